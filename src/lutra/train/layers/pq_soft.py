"""LUT-NN's gradient: a softmax over the distances to the centroids, with a learned temperature.

The forward pass stays hard. The backward pass differentiates sum_k attention_k * table_k with
attention = softmax(-||x - c_k|| / t) (un-squared distance, as in the authors' code). It recomputes
the distances block by block of images, so that memory is bounded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lutra.train.geometry import Geometry
from lutra.train.operators import pq as ops
from lutra.train.operators.portable import block_size, unfold

_NEAR = 1e-12  # squared distance below which a sub-vector is at its centroid


class SoftLookup(torch.autograd.Function):
    """Hard forward; gradients to x, centroids, tables and the inverse temperature are soft."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        centroids: Tensor,
        tables: Tensor,
        inverse_temperature: Tensor,
        call: tuple[Any, ...],
    ) -> Tensor:
        geometry, grid, encoder, int8_tables, scale, keep = call
        y, codes = ops.forward(x, geometry, grid, encoder, int8_tables, scale)
        keep.append(codes)
        ctx.geometry = geometry
        ctx.save_for_backward(x, centroids, tables, inverse_temperature)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, centroids, tables, inverse = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return *_soft_gradients(ctx.geometry, x, centroids, tables, inverse, gradient), None


def _soft_gradients(
    geometry: Geometry,
    x: Tensor,
    centroids: Tensor,
    tables: Tensor,
    inverse: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, centroids, tables and inverse temperature."""
    codebooks, k, dim = centroids.shape
    grad_centroids, grad_tables = torch.zeros_like(centroids), torch.zeros_like(tables)
    grad_inverse = torch.zeros_like(inverse)
    norms = centroids.square().sum(2)[:, :, None]
    pixels = gradient.shape[2] * gradient.shape[3]
    images = max(1, block_size(x) // max(1, codebooks * k * pixels))
    grad_x = []
    for part, grad in zip(torch.split(x, images), torch.split(gradient, images), strict=True):
        sub = unfold(part, geometry, dim, 0.0)  # (B, V, R)
        rows = grad.float().transpose(0, 1).reshape(1, grad.shape[1], -1)  # (1, M, R)
        rows = rows.expand(codebooks, -1, -1)
        squared = norms - 2.0 * torch.bmm(centroids, sub) + sub.square().sum(1, keepdim=True)
        distance = squared.clamp_min(_NEAR).sqrt()  # (B, K, R)
        attention = torch.softmax(distance * -inverse, 1)
        grad_tables += torch.bmm(attention, rows.transpose(1, 2))
        grad_attention = torch.bmm(tables, rows)
        mean = (attention * grad_attention).sum(1, keepdim=True)
        grad_logits = attention.mul_(grad_attention.sub_(mean))
        grad_inverse -= (grad_logits * distance).sum()
        pull = grad_logits.mul_(-inverse).div_(distance)
        pull.masked_fill_(squared < _NEAR, 0.0)  # the distance has no slope at a centroid
        grad_sub = sub * pull.sum(1, keepdim=True) - torch.bmm(centroids.transpose(1, 2), pull)
        grad_centroids += centroids * pull.sum(2, keepdim=True)
        grad_centroids -= torch.bmm(pull, sub.transpose(1, 2))
        grad_x.append(_fold(grad_sub, part, geometry))
    return torch.cat(grad_x), grad_centroids, grad_tables, grad_inverse


def _fold(sub: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """The adjoint of `unfold` for x (N, C, H, W)."""
    flat = sub.reshape(-1, sub.shape[2])[: geometry.depth]
    patches = flat.view(geometry.depth, x.shape[0], -1).transpose(0, 1)
    ph, pw = geometry.padding
    size = (x.shape[2] + 2 * ph, x.shape[3] + 2 * pw)
    image = F.fold(patches, size, geometry.kernel, geometry.dilation, 0, geometry.stride)
    return image[:, :, ph : size[0] - ph, pw : size[1] - pw]

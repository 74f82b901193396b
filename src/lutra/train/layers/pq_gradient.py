"""Gradients of sums of table rows, and of values that are rounded."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lutra.train.layers.base import clip_gradient
from lutra.train.operators import pq as ops


class _Round(torch.autograd.Function):
    """Replaces a value by its quantised form and passes the gradient straight through."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, quantized: Tensor) -> Tensor:
        return quantized

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(value: Tensor, quantized: Tensor) -> Tensor:
    """A value in its quantised form, whose gradient goes to the value as it is."""
    return cast(Tensor, _Round.apply(value, quantized))  # type: ignore[no-untyped-call]


class StraightThroughLookup(torch.autograd.Function):
    """Sum of table rows; the gradient of the tables is exact, that of x is a convolution's with
    `weight`: the dense layer's weights, as they are or projected."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tables: Tensor, weight: Tensor, call: tuple[Any, ...]
    ) -> Tensor:
        geometry, grid, encoder, int8_tables, scale, keep, dtype = call
        y, codes = ops.forward(x, geometry, grid, encoder, int8_tables, scale)
        keep.append(codes)
        ctx.geometry, ctx.grid, ctx.centroids, ctx.dtype = geometry, grid, tables.shape[1], dtype
        ctx.save_for_backward(x, weight, codes)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, codes = ctx.saved_tensors
        need_x, need_tables = ctx.needs_input_grad[:2]
        grad_x = grad_tables = None
        if need_tables:
            grad_tables = ops.table_gradient(codes, gradient, ctx.centroids)
        if need_x:
            geometry, grid, dtype = ctx.geometry, ctx.grid, ctx.dtype
            if geometry.is_linear(x):  # several times as fast as the convolution
                rows = gradient.flatten(1).to(dtype) @ weight.flatten(1).to(dtype)
                grad_x = rows.to(x.dtype).view(x.shape)
            else:
                grad_x = torch.ops.aten.convolution_backward(
                    gradient.to(dtype), x.to(dtype), weight.to(dtype), None,
                    geometry.stride, geometry.padding, geometry.dilation,
                    False, [0, 0], 1, [True, False, False],
                )[0].to(x.dtype)  # fmt: skip
            grad_x = clip_gradient(grad_x, x, grid)
        return grad_x, grad_tables, None, None


class TableSum(torch.autograd.Function):
    """The sums y of table rows that some codes chose, as a function of the tables."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tables: Tensor, codes: Tensor) -> Tensor:
        ctx.centroids = tables.shape[1]
        ctx.save_for_backward(codes)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (codes,) = ctx.saved_tensors
        return None, ops.table_gradient(codes, gradient, ctx.centroids), None

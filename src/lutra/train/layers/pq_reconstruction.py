"""How far lookup layers are from the dense products that they replace, as a loss.

eLUT-NN (PIM-DL, ASPLOS 2024) trains transformers with it: the gradient of the task passes through a
layer as if it were dense (`PQ(gradient="dense")`), and the codebooks learn from this loss alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.train.geometry import Geometry


def dense_product(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """What the dense layer makes of x (N, C, H, W), bias apart: (N, M, H', W')."""
    weight = weight.float()
    if geometry.is_linear(x):
        return F.linear(x.flatten(1), weight.flatten(1))[:, :, None, None]
    weight = weight.reshape(-1, geometry.channels, *geometry.kernel)
    return F.conv2d(x, weight, None, geometry.stride, geometry.padding, geometry.dilation)


def two_sided(lookup: Tensor, dense: Tensor) -> Tensor:
    """Mean squared difference; each side is drawn to the other as it stands."""
    return F.mse_loss(lookup.detach(), dense) + F.mse_loss(lookup, dense.detach())


def keep(layer: nn.Module, loss: Tensor) -> None:
    """Keeps the loss of a layer's forward pass until `reconstruction_loss` asks for it."""
    layer.__dict__["_reconstruction"] = loss


def forget(model: nn.Module) -> None:
    """Drops what is kept."""
    for layer in model.modules():
        layer.__dict__.pop("_reconstruction", None)


def reconstruction_loss(model: nn.Module) -> Tensor | None:
    """The sum over the layers whose recipe has `reconstruction`, of their last forward pass in
    training mode, each times its weight; None if there are none. `finetune` adds it; a training
    loop of your own must do so.
    """
    losses = [
        layer.__dict__.pop("_reconstruction")
        for layer in model.modules()
        if "_reconstruction" in layer.__dict__
    ]
    return torch.stack(losses).sum() if losses else None

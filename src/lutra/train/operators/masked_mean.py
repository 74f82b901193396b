"""The mean of the tokens that count, as one operator: what sentence encoders end with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lutra.errors import InputError

_LEAST = 1e-9  # so that a sample without any token gives 0


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens of each sample that a mask keeps.

    `export` writes it as one operator. It does the same with the usual
    `(x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1e-9)`.

    Args:
        x: (N, T, D) of a floating type.
        mask: (N, T) of integers or bool; each token is weighted with its number.

    Returns:
        (N, D); 0 for a sample whose mask is 0.

    Raises:
        InputError: Shapes that do not fit, or a mask of another type.
    """
    if x.ndim != 3 or mask.shape != x.shape[:2] or mask.is_floating_point():
        raise InputError(
            f"masked_mean: x has shape {tuple(x.shape)} and mask {tuple(mask.shape)} "
            f"{mask.dtype}; give x of shape (N, T, D) and a mask (N, T) of integers or bool."
        )
    result: Tensor = torch.ops.lutra.masked_mean(x, mask)
    return result


@torch.library.custom_op("lutra::masked_mean", mutates_args=())
def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(x.dtype).unsqueeze(-1)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=_LEAST)


@_masked_mean.register_fake
def _(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2]))


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (mask,) = ctx.saved_tensors
    weight = mask.to(grad.dtype).unsqueeze(-1)
    share = weight / weight.sum(1, keepdim=True).clamp(min=_LEAST)
    return grad.unsqueeze(1) * share, None


_masked_mean.register_autograd(_backward, setup_context=_remember)

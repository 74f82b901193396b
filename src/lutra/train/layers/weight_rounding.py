"""Weights rounded to few levels, so that the outputs of a layer change as little as they can.

The weights of an output are rounded one after the other. The error that one of them makes is made
good, as far as the inputs of the layer go together, by those that are not rounded yet (GPTQ,
arXiv 2210.17323). What it needs of the data is the matrix of products of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 0.01  # of the mean of the diagonal
_BLOCK = 128  # weights whose errors are carried over together


def rounding_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which weights are rounded (D), and how the error of each is made good: an upper
    triangle (D, D) in that order.

    Args:
        gram: products X'X (D, D) of the inputs, float64.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    damped = gram[order][:, order]
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean() + 1e-30)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return order, torch.linalg.cholesky(inverse, upper=True)


def round_weights(
    weight: Tensor,
    step: Tensor,
    low: int,
    high: int,
    order: Tensor,
    factor: Tensor,
    zero: Tensor | None = None,
) -> Tensor:
    """Codes low..high (M, D) for weights (M, D), each of which stands for (code - zero) * step.

    Args:
        weight: of a layer.
        step: of each output (M), or of each weight (M, D).
        low, high: the smallest and the largest code.
        order, factor: from `rounding_factor`.
        zero: the code that stands for zero, of each weight (M, D); None: 0.
    """
    rest = weight.double()[:, order]
    step = step[:, None] if step.dim() == 1 else step
    unit = step.double().expand_as(rest)[:, order]
    middle = torch.zeros_like(rest[:1]) if zero is None else zero.double()[:, order]
    found = torch.empty_like(rest)
    for start in range(0, rest.shape[1], _BLOCK):
        end = min(start + _BLOCK, rest.shape[1])
        errors = torch.empty_like(rest[:, start:end])
        for i in range(start, end):
            own, offset = unit[:, i : i + 1], middle[:, i : i + 1]
            code = (rest[:, i : i + 1] / own + offset).round().clamp_(low, high)
            error = (rest[:, i : i + 1] - (code - offset) * own) / factor[i, i]
            found[:, i : i + 1] = code
            rest[:, i + 1 : end] -= error * factor[i, i + 1 : end]
            errors[:, i - start : i - start + 1] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
    result = torch.empty_like(found)
    result[:, order] = found
    return result.float()

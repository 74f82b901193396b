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
    # A weight of all outputs is a row: columns of a wide matrix share few sets of the caches.
    rest = weight.double().t()[order]
    unit = step.double().t()[order] if step.dim() == 2 else step.double()[None].expand_as(rest)
    middle = torch.zeros_like(rest[:, :1]) if zero is None else zero.double().t()[order]
    found = torch.empty_like(rest)
    for start in range(0, len(rest), _BLOCK):
        end = min(start + _BLOCK, len(rest))
        errors = torch.empty_like(rest[start:end])
        for i in range(start, end):
            own, offset = unit[i], middle[i]
            code = (rest[i] / own + offset).round().clamp_(low, high)
            error = (rest[i] - (code - offset) * own) / factor[i, i]
            found[i] = code
            rest[i + 1 : end] -= factor[i, i + 1 : end, None] * error
            errors[i - start] = error
        rest[end:] -= factor[start:end, end:].t() @ errors
    result = torch.empty_like(found)
    result[order] = found
    return result.t().float().contiguous()

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


def round_weights(weight: Tensor, step: Tensor, half: int, order: Tensor, factor: Tensor) -> Tensor:
    """Multiples of a step, -half..half (M, D), for weights (M, D).

    Args:
        weight: of a layer.
        step: of each output (M).
        half: the largest multiple.
        order, factor: from `rounding_factor`.
    """
    rest = weight.double()[:, order]
    unit = step.double()[:, None]
    found = torch.empty_like(rest)
    for start in range(0, rest.shape[1], _BLOCK):
        end = min(start + _BLOCK, rest.shape[1])
        errors = torch.empty_like(rest[:, start:end])
        for i in range(start, end):
            found[:, i : i + 1] = (rest[:, i : i + 1] / unit).round().clamp_(-half, half)
            error = (rest[:, i : i + 1] - found[:, i : i + 1] * unit) / factor[i, i]
            rest[:, i + 1 : end] -= error * factor[i, i + 1 : end]
            errors[:, i - start : i - start + 1] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
    result = torch.empty_like(found)
    result[:, order] = found
    return result.float()

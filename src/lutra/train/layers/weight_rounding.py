"""Weights rounded to few levels, so that the outputs of a layer change as little as they can.

The weights of an output are rounded one after the other. The error that those before it have made
is made good, as far as the inputs of the layer go together, by the next one and all that are not
rounded yet (GPTQ, arXiv 2210.17323, in the form of LDLQ, arXiv 2307.13304: what is added to a
weight is a sum over the changes of those before it). What it needs of the data is the matrix of
products of inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lutra.train.layers.products import Products

_DAMPING = 0.01  # of the mean of the diagonal
_BLOCK = 128  # weights whose changes are carried over together
_STEPS = 16  # of them whose changes are carried over one by one


class Feedback(NamedTuple):
    """What is added to a weight for the changes of those that were rounded before it.

    `order` (D) of the rounding; in this order `take` (D, n) and `give` (D, n): with changes d
    (D, M), weight j gets `take[j] @ sum over i < j of give[i] d[i]`. `give` of None is the unit
    matrix.
    """

    order: Tensor
    take: Tensor
    give: Tensor | None

    @staticmethod
    def of(products: Products) -> Feedback:
        """That of a layer with these products of inputs."""
        diagonal = products.diagonal()
        order = diagonal.argsort(descending=True, stable=True)
        damping = float(_DAMPING * diagonal.mean() + 1e-30)
        if products.rows is not None:
            rows = products.rows.t()[order].contiguous()
            return Feedback(order, _take_of_rows(rows, damping), rows)
        assert products.matrix is not None
        matrix = products.matrix[order][:, order]
        matrix.diagonal().add_(damping)
        factor = _upper(matrix)
        return Feedback(order, (factor / factor.diagonal()).t().contiguous(), None)

    def carried(self, start: int, end: int, state: Tensor) -> Tensor:
        """What weights start..end get for those before them: (end - start, M)."""
        if self.give is None:
            return self.take[start:end, :start] @ state[:start]
        return self.take[start:end] @ state

    def between(self, start: int, end: int) -> Tensor:
        """What a change of weight i adds to weight j > i, of weights start..end, at [j, i]."""
        if self.give is None:
            return self.take[start:end, start:end]
        return self.take[start:end] @ self.give[start:end].t()

    def carry(self, start: int, changes: Tensor, state: Tensor) -> None:
        """Adds changes of weights from `start` on to what is carried."""
        if self.give is None:
            state[start : start + len(changes)] = changes
        else:
            state.addmm_(self.give[start : start + len(changes)].t(), changes)


def _upper(matrix: Tensor) -> Tensor:
    """An upper triangle R with R R' = matrix."""
    lower: Tensor = torch.linalg.cholesky(matrix.flip(0, 1))
    return lower.flip(0, 1)


def _take_of_rows(give: Tensor, damping: float) -> Tensor:
    """P_j x_j (D, n) of the inputs x_j = give[j], P_j the inverse of damping + sum over i >= j of
    x_i x_i', for a block of inputs at a time from the last to the first.

    With P of the inputs behind the block X, Y = P X' and R R' = 1 + X P X', R an upper triangle,
    the block has Z = Y R'^-1: columns P_j x_j times the diagonal of R; P loses Z Z' before it.
    """
    depth, count = give.shape
    take = torch.empty_like(give)
    behind = torch.eye(count, dtype=give.dtype, device=give.device) / damping
    for start in reversed(range(0, depth, _BLOCK)):
        block = give[start : start + _BLOCK]
        products = behind @ block.t()
        inner = block @ products
        inner.diagonal().add_(1.0)
        factor = _upper(inner)
        own = torch.linalg.solve_triangular(factor, products.t(), upper=True)
        take[start : start + _BLOCK] = own / factor.diagonal()[:, None]
        behind -= own.t() @ own
    return take


def round_weights(
    weight: Tensor,
    step: Tensor,
    low: int,
    high: int,
    feedback: Feedback,
    zero: Tensor | None = None,
) -> Tensor:
    """Codes low..high (M, D) for weights (M, D), each of which stands for (code - zero) * step.

    Args:
        weight: of a layer.
        step: of each output (M), or of each weight (M, D).
        low, high: the smallest and the largest code.
        feedback: of the inputs of the layer.
        zero: the code that stands for zero, of each weight (M, D); None: 0.
    """
    outputs, depth = weight.shape
    order, give = feedback.order, feedback.give
    carried = depth if give is None else give.shape[1]
    state = torch.zeros((carried, outputs), dtype=torch.float64, device=weight.device)
    found = torch.empty((depth, outputs), device=weight.device)
    unit = step.double() if step.dim() == 1 else step
    for start in range(0, depth, _BLOCK):
        end = min(start + _BLOCK, depth)
        which = order[start:end]
        rest = _columns(weight, which)
        units = [unit] * len(which) if unit.dim() == 1 else list(_columns(unit, which))
        middle = None if zero is None else _columns(zero, which)
        first = rest.clone()
        rest += feedback.carried(start, end, state)
        between = feedback.between(start, end)
        changes = torch.empty_like(rest)
        for at in range(0, end - start, _STEPS):
            part = slice(at, min(at + _STEPS, end - start))
            rest[part] += between[part, :at] @ changes[:at]
            for i in range(part.start, part.stop):
                if i > at:
                    rest[i] += between[i, at:i] @ changes[at:i]
                offset = 0.0 if middle is None else middle[i]
                code = (rest[i] / units[i] + offset).round_().clamp_(low, high)
                found[start + i] = code
                changes[i] = first[i] - (code - offset) * units[i]
        feedback.carry(start, changes, state)
    back = torch.empty_like(order)
    back[order] = torch.arange(depth, device=order.device)
    return found[back].t().contiguous()


def _columns(matrix: Tensor, which: Tensor) -> Tensor:
    """Some columns of a matrix as rows, float64. A weight of all outputs is a row: columns of a
    wide matrix share few sets of the caches."""
    return matrix.index_select(1, which).t().double().contiguous()

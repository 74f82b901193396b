"""Closed-form fits of the layers of product quantisation to a goal, on samples of the input.

Weights are fitted on the quantised input, free tables on the codes; both by ridge regression around
what the layer has. The ridge is chosen by samples that are held out, so a layer with many entries
and few samples stays near the products of centroids and weights. Where the goal is cut off, as by a
ReLU, the regression is repeated towards the targets that are then nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lutra.train import distributed
from lutra.train.layers.goal import Goal
from lutra.train.layers.products import Products, are_few
from lutra.train.layers.ridge import Ridge, RowRidge, held_out
from lutra.train.operators import pq as ops

_ROUNDS = 6  # of a goal that is cut off
_TABLE_ROWS = 2048  # that are solved for together
_BLOCK = 2048  # rows


class Fit(NamedTuple):
    """The change of coefficients, and of the bias; of weights also the products of the inputs,
    without their mean."""

    change: Tensor
    shift: Tensor
    products: Products | None = None


def fit_weight(x: Tensor, y: Tensor, goal: Goal) -> Fit:
    """Change of the weights (M, D), given the quantised input x (n, D) and outputs y (n, M)."""
    mean = distributed.mean_row(x)
    centered = x - mean
    solver = _OfRows(centered) if are_few(*x.shape) else _OfSums(centered)
    total: Tensor | None = None
    shift = torch.zeros(y.shape[1], device=x.device)
    for turn in range(_ROUNDS if goal.is_cut else 1):
        rest = goal.targets(y) - y
        middle = distributed.mean_row(rest)
        shift, y, rest = shift + middle, y + middle, rest - middle
        if turn == 0:
            solver.choose(rest, goal.weights(y.shape[1]))
        change = solver.change(rest)
        y = y + centered @ change
        total = change if total is None else total + change
    assert total is not None
    return Fit(total.t(), shift - mean @ total, solver.products)


class _OfSums:
    """Weights (D, M) of inputs (n, D) by the products of the inputs."""

    def __init__(self, x: Tensor) -> None:
        self._parts = [x[part] for part in held_out(len(x))]
        self._ridge = Ridge([part.t() @ part for part in self._parts])
        self._total: Tensor | None = None
        self.products = Products(matrix=self._ridge.gram)

    def _moments(self, rest: Tensor) -> list[Tensor]:
        split = [rest[part] for part in held_out(len(rest))]
        return [x.t() @ part for x, part in zip(self._parts, split, strict=True)]

    def choose(self, rest: Tensor, outputs: Tensor) -> None:
        """Takes the weight of the ridge; see `Ridge.choose`."""
        self._ridge.choose(self._moments(rest), outputs)

    def change(self, rest: Tensor) -> Tensor:
        """What is added to the weights for what is left of the outputs (n, M)."""
        change = self._ridge.solve(self._moments(rest), self._total)
        self._total = change if self._total is None else self._total + change
        return change


class _OfRows:
    """The same from few rows."""

    def __init__(self, x: Tensor) -> None:
        self.products = Products(rows=x.double())
        self._x = x
        self._ridge = RowRidge(x.double())
        self._total: Tensor | None = None

    def choose(self, rest: Tensor, outputs: Tensor) -> None:
        self._ridge.choose(rest, outputs)

    def change(self, rest: Tensor) -> Tensor:
        change = self._ridge.solve(rest, self._total)
        self._total = change if self._total is None else self._total + change
        return (change.float().t() @ self._x).t()  # (M, D) in memory, as weights are


def fit_tables(codes: Tensor, tables: Tensor, y: Tensor, goal: Goal) -> Fit:
    """Change of free tables (B, K, M), given the codes (B, n) and the outputs y (n, M)."""
    codebooks, k, outputs = tables.shape
    groups = torch.split(torch.arange(codebooks, device=codes.device), max(1, _TABLE_ROWS // k))
    ridges = [Ridge(_gram(codes[group], k)) for group in groups]
    total = torch.zeros_like(tables)
    shift = torch.zeros(outputs, device=y.device)
    for turn in range(_ROUNDS if goal.is_cut else 1 + (len(groups) > 1)):
        for group, ridge in zip(groups, ridges, strict=True):
            rest = goal.targets(y) - y
            middle = distributed.mean_row(rest)
            shift, y, rest = shift + middle, y + middle, rest - middle
            moments = [_moments(codes[group, part], rest[part], k) for part in held_out(len(y))]
            if turn == 0 and ridge is ridges[0]:
                ridge.choose(moments, goal.weights(outputs))
            elif turn == 0:  # codebooks of one layer are alike
                ridge.take(ridges[0].weight)
            change = ridge.solve(moments, total[group].flatten(0, 1)).view(len(group), k, outputs)
            total[group] += change
            y = y + sum_rows(codes[group], change)
    return Fit(total, shift)


def _gram(codes: Tensor, k: int) -> list[Tensor]:
    """How often two codes meet: (B K, B K) for each part of the rows."""
    return [ops.code_pairs(codes[:, part], k).float() for part in held_out(codes.shape[1])]


def _moments(codes: Tensor, values: Tensor, k: int) -> Tensor:
    """Sums (B K, M) of values (n, M) by code."""
    image = values.t()[None, :, None, :]  # (1, M, 1, n), channels last
    return ops.table_gradient(codes.contiguous(), image, k).flatten(0, 1)


def sum_rows(codes: Tensor, tables: Tensor) -> Tensor:
    """Sums (n, M) of the rows of tables (B, K, M) that codes (B, n) pick."""
    codebooks, k, outputs = tables.shape
    offset = torch.arange(0, codebooks * k, k, dtype=torch.int32, device=codes.device)
    rows = tables.reshape(codebooks * k, outputs)
    blocks = [
        F.embedding_bag(block.t().int() + offset, rows, mode="sum")
        for block in torch.split(codes, _BLOCK, 1)
    ]
    return torch.cat(blocks)

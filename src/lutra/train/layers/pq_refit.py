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
from lutra.train.layers.ridge import Ridge, held_out

_ROUNDS = 6  # of a goal that is cut off
_TABLE_ROWS = 2048  # that are solved for together
_BLOCK = 2048  # rows


class Fit(NamedTuple):
    """The change of coefficients, and of the bias; of weights also the products X'X (D, D) of the
    inputs without their mean, in float64."""

    change: Tensor
    shift: Tensor
    gram: Tensor | None = None


def fit_weight(x: Tensor, y: Tensor, goal: Goal) -> Fit:
    """Change of the weights (M, D), given the quantised input x (n, D) and outputs y (n, M)."""
    mean = distributed.mean_row(x)
    centered = x - mean
    parts = held_out(len(x))
    ridge = Ridge([centered[part].t() @ centered[part] for part in parts])
    total = torch.zeros((x.shape[1], y.shape[1]), device=x.device)
    shift = torch.zeros(y.shape[1], device=x.device)
    for turn in range(_ROUNDS if goal.is_cut else 1):
        rest = goal.targets(y) - y
        middle = distributed.mean_row(rest)
        shift, y, rest = shift + middle, y + middle, rest - middle
        moments = [centered[part].t() @ rest[part] for part in parts]
        if turn == 0:
            ridge.choose(moments, goal.weights(y.shape[1]))
        change = ridge.solve(moments, total)
        total, y = total + change, y + centered @ change
    return Fit(total.t(), shift - mean @ total, ridge.gram)


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
            if turn == 0:
                ridge.choose(moments, goal.weights(outputs))
            change = ridge.solve(moments, total[group].flatten(0, 1)).view(len(group), k, outputs)
            total[group] += change
            y = y + sum_rows(codes[group], change)
    return Fit(total, shift)


def _gram(codes: Tensor, k: int) -> list[Tensor]:
    """How often two codes meet: (B K, B K) for each part of the rows."""
    size = len(codes) * k
    offset = torch.arange(len(codes), device=codes.device)[:, None] * k
    grams = []
    for part in held_out(codes.shape[1]):
        gram = torch.zeros((size, size), device=codes.device)
        for block in torch.split(codes[:, part].long(), _BLOCK, 1):
            member = torch.zeros((block.shape[1], size), device=codes.device)
            member.scatter_(1, (block + offset).t(), 1.0)
            gram += member.t() @ member  # whole numbers: exact
        grams.append(gram)
    return grams


def _moments(codes: Tensor, values: Tensor, k: int) -> Tensor:
    """Sums (B K, M) of values (n, M) by code."""
    moments = [
        torch.zeros((k, values.shape[1]), device=values.device).index_add_(0, own.int(), values)
        for own in codes
    ]
    return torch.cat(moments)


def sum_rows(codes: Tensor, tables: Tensor) -> Tensor:
    """Sums (n, M) of the rows of tables (B, K, M) that codes (B, n) pick."""
    total = tables.new_zeros((codes.shape[1], tables.shape[2]))
    for codebook, table in zip(codes, tables, strict=True):
        total += F.embedding(codebook.int(), table)
    return total

"""The activation range of a layer by the error of its outputs, and weights that suit the rounding.

A range that cuts off more has a finer step. Which one is best depends on the weights and on what is
behind the layer, so every candidate is tried on samples of the input, each end of the range by
itself where there are values on both sides of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lutra.train import distributed
from lutra.train.layers.goal import Goal
from lutra.train.layers.pq_refit import fit_weight
from lutra.train.operators import portable

if TYPE_CHECKING:
    from lutra.train.layers.base import QuantizedLayer

#: Shares of the largest value, and quantiles, at which a range may end.
_SHARES = (0.85, 0.7, 0.55, 0.4, 0.3)
_QUANTILES = (0.9999, 0.999, 0.99)
_SEARCHED = 512  # rows that every candidate is tried on
_MOST = 1 << 20  # values that quantiles are taken of


def ends(values: Tensor) -> list[float]:
    """Ends of a range that are worth trying, for values from zero upwards; the largest first."""
    top = distributed.all_reduce(values.max().clamp_min(0.0).clone(), "max")
    found = [float(top)]
    found += [float(top) * share for share in _SHARES]
    flat = values.flatten()
    flat = flat[:: len(flat) // _MOST + 1].clamp_min(0.0)
    levels = torch.tensor(_QUANTILES, device=flat.device)
    ranked = flat.sort().values
    index = (levels * (len(ranked) - 1)).long()
    found += distributed.all_reduce(ranked[index], "max").tolist()
    return sorted({end for end in found if end > 0.0}, reverse=True)


def search(
    low: list[float], high: list[float], error: Callable[[float, float], float]
) -> tuple[float, float]:
    """The range (-low, high) with the least error: first both ends together, then each alone.

    Args:
        low, high: candidates of the ends, from `ends`; an empty list is zero.
        error: of a range.
    """
    if not high and not low:
        return 0.0, 1.0
    known: dict[tuple[float, float], float] = {}

    def best(pairs: Iterator[tuple[float, float]]) -> tuple[float, float]:
        tried = list(pairs)
        for pair in tried:
            if pair not in known:
                known[pair] = error(-pair[0], pair[1])
        return min(tried, key=lambda pair: known[pair])

    lows, highs = low or [0.0], high or [0.0]
    count = max(len(lows), len(highs))
    at = best((lows[i * len(lows) // count], highs[i * len(highs) // count]) for i in range(count))
    if low and high:
        at = best((end, at[1]) for end in lows)
        at = best((at[0], end) for end in highs)
    return -at[0], at[1]


@torch.no_grad()
def fit_range(layer: QuantizedLayer, rows: Tensor, goal: Goal, *, symmetric: bool) -> None:
    """Sets the activation range of a layer to the one with the least error of its outputs, the bias
    aside.

    Args:
        layer: its weights and tables stay.
        rows: samples (n, D) of its input.
        goal: what its outputs should be.
        symmetric: whether the grid has a range on both sides of zero, or on none.
    """
    part = slice(None, None, max(1, len(rows) // _SEARCHED))
    some, wanted = rows[part], goal.at(part)

    def error(low: float, high: float) -> float:
        layer.set_activation_range(low, high)
        y = layer.of_rows(some)
        return wanted.error(y + distributed.mean_row(wanted.targets(y) - y))

    low = distributed.all_reduce((-rows.min()).clone(), "max")
    if symmetric and float(low) > 0.0:
        reach = ends(rows.abs())
        found = min(reach, key=lambda end: error(-end, end))
        layer.set_activation_range(-found, found)
    else:
        layer.set_activation_range(*search(ends(-rows), ends(rows), error))


@torch.no_grad()
def fit_rounded(
    layer: QuantizedLayer, rows: Tensor, goal: Goal, scales: Callable[[], None] = lambda: None
) -> None:
    """Fits the weights of a layer on its rounded input, if that makes its outputs better.

    Args:
        layer: a layer of products of weights and rounded inputs, of one group.
        rows: samples (n, D) of its input.
        goal: what its outputs should be.
        scales: sets what depends on the weights.
    """
    grid, y = layer.grid(), layer.of_rows(rows)
    x = (portable.quantize(rows, grid) - grid.zero) * grid.scale
    before, bias, start = layer.weight, layer.bias, goal.error(y)
    fit = fit_weight(x, y, goal)
    weight = layer.kernel_weight.float().reshape(layer.outputs, -1) + fit.change
    fitted = layer.form.kernel(weight).view_as(before).to(before.dtype)
    layer.weight = nn.Parameter(fitted, requires_grad=before.requires_grad)
    layer.shift_bias(fit.shift)
    scales()
    if goal.error(layer.of_rows(rows)) >= start:
        layer.weight, layer.bias = before, bias
        scales()

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
from lutra.train.layers.products import Products
from lutra.train.operators import portable

if TYPE_CHECKING:
    from lutra.train.layers.base import QuantizedLayer

#: Shares of the largest value, and quantiles, at which a range may end.
_SHARES = (0.85, 0.7, 0.55, 0.4, 0.3)
_QUANTILES = (0.9999, 0.999, 0.99)
_SEARCHED = 512  # rows that every candidate is tried on
_JUDGED = 512  # outputs that every candidate is judged by, or up to twice as many
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


def _activation_range(rows: Tensor, bits: int) -> tuple[float, float]:
    """The clipping range with the least squared error on the grid, over a few candidates."""
    flat = rows.flatten()
    if len(flat) > 1 << 20:
        flat = flat[:: len(flat) // (1 << 20) + 1]
    low, high = float(rows.min()), float(rows.max())
    reach = max(high, -low)
    if reach == 0.0:
        return 0.0, 1.0
    levels = max(1, 2 ** (bits - 1) - 1 if low < 0 else 2**bits - 1)
    best, best_error = reach, float("inf")
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        step = reach * share / levels
        q = (flat / step).round().clamp(-levels - 1 if low < 0 else 0, levels) * step
        error = float((q - flat).square().mean())
        if error < best_error:
            best, best_error = reach * share, error
    return (-best, best) if low < 0 else (0.0, best)


@torch.no_grad()
def fit_grid(layer: QuantizedLayer, rows: Tensor) -> None:
    """Sets the activation grid of a layer, if it has one, from samples of its input."""
    if not layer.has_grid:
        return
    low, high = _activation_range(layer.smoothed(rows), layer.method.act_bits)
    # A process whose samples are all positive must take the others' signed grid.
    reach = distributed.all_reduce(torch.tensor([-low, high]), "max")
    layer.set_activation_range(-float(reach[0]), float(reach.max()))


@torch.no_grad()
def fit_range(layer: QuantizedLayer, rows: Tensor, goal: Goal) -> None:
    """Sets the activation range of a layer to the one with the least error of its outputs, the bias
    aside.

    Args:
        layer: its weights and tables stay.
        rows: samples (n, D) of its input.
        goal: what its outputs should be.
    """
    part = slice(None, None, max(1, len(rows) // _SEARCHED))
    some, wanted, judge = rows[part], goal.at(part), layer
    every = layer.outputs // _JUDGED
    if every > 1 and layer.geometry.groups == 1:
        outputs = slice(None, None, every)
        wanted, judge = wanted.of_outputs(outputs), layer.of_outputs(outputs)

    def error(low: float, high: float) -> float:
        judge.set_activation_range(low, high)
        y = judge.of_rows(some)
        return wanted.error(y + distributed.mean_row(wanted.targets(y) - y))

    seen = layer.smoothed(rows)
    layer.set_activation_range(*search(ends(-seen), ends(seen), error))


@torch.no_grad()
def fit_rounded(
    layer: QuantizedLayer,
    rows: Tensor,
    goal: Goal,
    settle: Callable[[Products], None] = lambda products: None,
) -> None:
    """Fits the weights of a layer on its rounded input, if that makes its outputs better.

    Args:
        layer: a layer of products of weights and rounded inputs, of one group.
        rows: samples (n, D) of its input.
        goal: what its outputs should be.
        settle: sets what depends on the weights, given the products of the inputs; it may
            change the weights within what the layer rounds to.
    """
    grid, y = layer.grid(), layer.of_rows(rows)
    x = (portable.quantize(layer.smoothed(rows), grid) - grid.zero) * grid.scale
    others = [t for t in (*layer.parameters(), *layer.buffers()) if t is not layer.weight]
    before = [(tensor, tensor.clone()) for tensor in others]
    weight, bias, start = layer.weight, layer.bias, goal.error(y)
    fit = fit_weight(x, y, goal)
    assert fit.products is not None
    change = fit.change if layer.smoothing is None else fit.change / layer.smoothing
    fitted = layer.kernel_weight.float().reshape(layer.outputs, -1) + change
    replace_weight(layer, fitted)
    layer.shift_bias(fit.shift)
    settle(fit.products)
    if goal.error(layer.of_rows(rows)) >= start:
        layer.weight, layer.bias = weight, bias
        for tensor, value in before:
            tensor.copy_(value)


def replace_weight(layer: QuantizedLayer, rows: Tensor) -> None:
    """Gives a layer new weights (M, D)."""
    old = layer.weight
    new = layer.form.kernel(rows).view_as(old).to(old.dtype)
    layer.weight = nn.Parameter(new, requires_grad=old.requires_grad)

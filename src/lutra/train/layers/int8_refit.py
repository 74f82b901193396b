"""The activation range of a layer by the error of its outputs, and weights that suit the rounding.

A range that cuts off more has a finer step. Which one is best depends on the weights and on what is
behind the layer, so every candidate is tried on samples of the input, each end of the range by
itself where there are values on both sides of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lutra.train import distributed

#: Shares of the largest value, and quantiles, at which a range may end.
_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_QUANTILES = (0.99999, 0.9999, 0.999, 0.99)
_SEARCHED = 1024  # rows that every candidate is tried on
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


def searched(rows: Tensor) -> slice:
    """The rows that candidates are tried on, evenly from all."""
    return slice(None, None, max(1, len(rows) // _SEARCHED))

"""Recipes worth trying: the least predicted loss within a limit of time or bytes.

One of its candidates for each layer is a mixed-integer program, which HiGHS solves (in SciPy).
Recipes that were tried are cut off, so that every proposal is new.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from lutra.errors import LutraError
from lutra.train.search.predict import Term

_SECONDS: Final = 10.0
_GAP: Final = 1e-4


def need_solver() -> None:
    """Finds out before the work whether SciPy is there.

    Raises:
        LutraError: it is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise LutraError(
            "optimize needs scipy, which is not installed; install it with "
            "pip install 'lutra[search]'"
        )


def propose(
    losses: Mapping[Term, float],
    costs: Mapping[Term, float],
    limit: float,
    tried: Iterable[Mapping[str, str]] = (),
) -> dict[str, str] | None:
    """The recipe with the least loss whose costs are within a limit.

    Args:
        losses: of every candidate of every layer.
        costs: of the same.
        limit: of the sum of the costs.
        tried: recipes that must not be proposed; those with a choice that is no candidate cannot
            be, and do not count.

    Returns:
        The key of each layer; None where no recipe is left.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # of the extra `search`
    from scipy.sparse import lil_array

    terms = list(losses)
    layers: dict[str, list[int]] = {}
    for place, (layer, _) in enumerate(terms):
        layers.setdefault(layer, []).append(place)
    if not layers:
        return None
    place_of = {term: i for i, term in enumerate(terms)}
    cuts = []
    for choice in tried:
        own = [place_of.get((layer, choice.get(layer, ""))) for layer in layers]
        known = [place for place in own if place is not None]
        if len(known) == len(layers):
            cuts.append(known)
    rows = lil_array((len(layers) + 1 + len(cuts), len(terms)))
    low = np.full(rows.shape[0], -np.inf)
    high = np.full(rows.shape[0], np.inf)
    for row, places in enumerate(layers.values()):
        rows[row, places] = 1.0
        low[row] = high[row] = 1.0
    scale = max(abs(cost) for cost in costs.values()) or 1.0
    rows[len(layers), :] = np.array([costs[term] for term in terms]) / scale
    high[len(layers)] = limit / scale
    for row, cut in enumerate(cuts, len(layers) + 1):
        rows[row, cut] = 1.0
        high[row] = len(layers) - 1.0
    goal = np.array([losses[term] for term in terms])
    weight = max(float(np.abs(goal).max()), 1e-30)
    result = milp(
        goal / weight,
        constraints=LinearConstraint(rows.tocsr(), low, high),
        bounds=Bounds(0.0, 1.0),
        integrality=np.ones(len(terms)),
        options={"time_limit": _SECONDS, "mip_rel_gap": _GAP},
    )
    if result.x is None:
        return None
    return {
        layer: terms[max(places, key=lambda i: result.x[i])][1] for layer, places in layers.items()
    }


def cheapest(costs: Mapping[Term, float]) -> float:
    """The least sum of costs that any recipe has."""
    least: dict[str, float] = {}
    for (layer, _), cost in costs.items():
        least[layer] = min(cost, least.get(layer, np.inf))
    return float(sum(least.values()))


def spread(count: int) -> float:
    """The numbers 1/2, 1/4, 3/4, 1/8, 5/8, ... in 0..1: each falls into a wide gap (van der
    Corput)."""
    value, share, number = 0.0, 0.5, count + 1
    while number:
        value += share * (number % 2)
        number //= 2
        share /= 2
    return value

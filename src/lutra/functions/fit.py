"""Fitting tables: `fit` for any function of one number."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np

from lutra.errors import InputError
from lutra.functions.histogram import Histogram
from lutra.functions.lines import balance, level, square
from lutra.functions.piecewise import Piecewise, check_entries, padded
from lutra.functions.scalar import Doubles, Line, Scalar, scalar

Method: TypeAlias = Literal["minimax", "dp", "uniform", "exponential"]
Loss: TypeAlias = Literal["max", "l2"]
End: TypeAlias = "Line | Literal['constant', 'linear'] | None"

_POINTS: Final = 12288
_CANDIDATES: Final = 384
#: What an error weighs where no input was seen, at least; where they are densest it is 1.
_RARE: Final = 0.25
#: The part of the mean squared error that counts evenly, whatever was seen.
_EVEN: Final = 0.5
#: The ranges of functions without asymptotes on both sides: those that NN-LUT trains on.
_RANGES: Final = {
    "exp": (-24.0, 0.0),
    "reciprocal": (1.0, 1024.0),
    "rsqrt": (0.1, 1024.0),
    "sqrt": (0.0, 1024.0),
}


def fit(
    fn: str | Callable[[Doubles], Any] | Scalar,
    low: float | None = None,
    high: float | None = None,
    entries: int = 16,
    method: Method = "minimax",
    *,
    histogram: Histogram | None = None,
    loss: Loss | None = None,
    relative: bool = False,
    continuous: bool = False,
    left: End = None,
    right: End = None,
) -> Piecewise:
    """Fits a table of straight lines to a function of one number.

    The two outer entries are the lines that the function tends to, exactly: GELU and SiLU are 0
    and x far from zero whatever range was fitted, so a table cannot blow up there. The others
    share the range between them.

    Args:
        fn: A name of `lutra.functions.KNOWN`, or a callable that maps a float64 array to one of
            the same shape. Asymptotes of a callable are found by trying (see `scalar`).
        low: Start of the range in which errors count fully. None: where the function leaves its
            left asymptote, or the smallest input of the histogram. Where there is an asymptote,
            errors between it and `low` count a quarter.
        high: End of that range, the same way.
        entries: 8, 16 or 32.
        method: "minimax": the smallest largest error, the optimum over all breakpoints. "dp":
            the smallest mean squared error, by dynamic programming over 384 candidates. "uniform"
            and "exponential": breakpoints at even distances, or at distances that double away from
            zero: NN-LUT's two baselines.
        histogram: Inputs that were seen. "dp" weighs squared errors with their density, two parts
            of three; "minimax" weighs errors with its fifth root, a quarter at least, which makes
            the mean squared error smaller too and the largest at most four times as large.
        loss: Of the lines of "uniform" and "exponential": "max" (default) or "l2".
        relative: Whether errors are divided by the function.
        continuous: Whether the table may not jump at breakpoints, as NN-LUT's network cannot.
            Without it the error is smaller, and jumps are at most twice the largest error.
        left: The line left of the range for a function without asymptote: (slope, intercept),
            "constant" (the value at `low`; the default) or "linear" (the tangent at `low`).
        right: The line right of the range, the same way.

    Returns:
        The table, rounded to float32.

    Raises:
        InputError: A setting that is not known, a range that is empty or not given for a callable
            without asymptotes, or a function that is not finite in its range.

    Source: NN-LUT, arXiv 2112.02191 (tables of 16 lines, the baselines); the bisection is the
        classic one for the best piecewise line with free breakpoints.
    """
    function = scalar(fn)
    check_entries(entries)
    if method not in get_args(Method):
        raise InputError(
            f"functions: method={method!r}; choose one of {list(get_args(Method))}, or "
            "lutra.train.fit_relu_net for a trained network"
        )
    if loss not in (None, *get_args(Loss)):
        raise InputError(f"functions: loss={loss!r}; choose 'max' or 'l2'")
    fixed = {"minimax": "max", "dp": "l2"}.get(method)
    if loss is not None and fixed not in (None, loss):
        raise InputError(
            f"functions: method={method!r} minimises {fixed!r}; leave out loss={loss!r}"
        )
    kind: str = fixed or loss or "max"
    bounds = _range(function, low, high, histogram)
    lines = _end(function, left, bounds[0], "left"), _end(function, right, bounds[1], "right")
    span = _span(function, lines, bounds)
    x = _points(function, span)
    f = function(x)
    if not np.isfinite(f).all():
        at = x[~np.isfinite(f)][0]
        raise InputError(
            f"functions: {function.name} is not finite at {at:.6g}, in the range "
            f"{span[0]:.6g}..{span[1]:.6g}; give low and high where it is"
        )
    weight, mass = _weights(x, bounds, histogram)
    t = 1.0 / weight
    if relative:
        t = t * np.maximum(np.abs(f), 1e-30)
    inner = entries - 2
    if method == "minimax":
        ends, _ = balance(x, f, t, *lines, inner)
    elif method == "dp":
        squares = mass / (np.maximum(np.abs(f), 1e-30) ** 2 if relative else 1.0)
        at_most = np.unique(np.linspace(0, len(x), _CANDIDATES + 1).astype(int))
        ends = square(x, f, squares, *lines, inner, at_most.tolist())
    else:
        ends = _fixed(x, bounds, inner, method)
    return _table(function.name, x, f, t, mass, lines, ends, entries, kind, continuous)


def _range(
    fn: Scalar, low: float | None, high: float | None, histogram: Histogram | None
) -> tuple[float, float]:
    if histogram is not None and not histogram.empty:
        low = histogram.low if low is None else low
        high = histogram.high if high is None else high
    reach, known = fn.reach, _RANGES.get(fn.name, (-math.inf, math.inf))
    if low is None:
        low = max(known[0], reach[0])
    if high is None:
        high = min(known[1], reach[1])
    low, high = max(low, fn.domain[0]), min(high, fn.domain[1])
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(
            f"functions: {fn.name} tends to no line on both sides; give the range low..high that "
            "the table is for"
        )
    if low == high:  # of a constant input
        low, high = low - 0.5, high + 0.5
        low = max(low, fn.domain[0])
    if not low < high:
        raise InputError(f"functions: the range {low}..{high} of {fn.name} is empty")
    return low, high


def _end(fn: Scalar, wanted: End, x: float, side: str) -> Line:
    """The line beyond one end of the range."""
    known: Line | None = getattr(fn, side)
    if isinstance(wanted, tuple):
        slope, intercept = wanted
        return float(slope), float(intercept)
    if wanted is None and known is not None:
        return known
    value = float(fn(np.float64(x)))
    if wanted in (None, "constant"):
        return 0.0, value
    if wanted != "linear":
        raise InputError(
            f"functions: {side}={wanted!r}; give (slope, intercept), 'constant' or 'linear'"
        )
    inside = x + 1e-6 * max(1.0, abs(x)) * (1 if side == "left" else -1)
    slope = (float(fn(np.float64(inside))) - value) / (inside - x)
    return slope, value - slope * x


def _span(fn: Scalar, lines: tuple[Line, Line], bounds: tuple[float, float]) -> tuple[float, float]:
    """What lies between the outer lines: the range, and the way to the asymptotes."""
    reach = fn.reach
    low = min(bounds[0], reach[0]) if fn.left == lines[0] else bounds[0]
    high = max(bounds[1], reach[1]) if fn.right == lines[1] else bounds[1]
    # Beyond the reach of an asymptote there is nothing to fit.
    if fn.left == lines[0] and math.isfinite(reach[0]):
        low = max(low, reach[0])
    if fn.right == lines[1] and math.isfinite(reach[1]):
        high = min(high, reach[1])
    return low, high


def _points(fn: Scalar, span: tuple[float, float]) -> Doubles:
    """Ascending float32 numbers, dense where the function bends."""
    low, high = span
    fine = np.linspace(low, high, 1 << 15)
    if low > 0:  # 1/x and its kin bend at the small end
        fine = np.unique(np.concatenate([fine, np.geomspace(low, high, 1 << 14)]))
    f = fn(fine)
    if not np.isfinite(f).all():
        return fine
    slope = np.diff(f) / np.diff(fine)
    bend = np.sqrt(np.abs(np.diff(slope)) * np.diff(fine)[1:])
    bend = np.concatenate([[0.0], bend / max(float(bend.sum()), 1e-300)])
    even = np.diff(fine) / (high - low)
    place = np.concatenate([[0.0], np.cumsum(0.5 * even + 0.5 * bend)])
    chosen = np.interp(np.linspace(0.0, place[-1], _POINTS), place, fine)
    return np.unique(chosen.astype(np.float32)).astype(np.float64)


def _weights(
    x: Doubles, bounds: tuple[float, float], histogram: Histogram | None
) -> tuple[Doubles, Doubles]:
    """What an error weighs at each point, and what its square weighs in a mean."""
    step = np.gradient(x)
    inside = (x >= bounds[0]) & (x <= bounds[1])
    weight = np.where(inside, 1.0, _RARE)
    even = step / step.sum()
    if histogram is None or histogram.empty:
        return weight, even * weight**2
    density = histogram.density(x)
    share = density / max(float(density.max()), 1e-300)
    mass = density * step
    return np.maximum(_RARE, share**0.2), mass / max(float(mass.sum()), 1e-300) + _EVEN * even


def _fixed(x: Doubles, bounds: tuple[float, float], inner: int, method: str) -> list[int]:
    """Ends of segments that do not look at the function."""
    low, high = max(bounds[0], float(x[0])), min(bounds[1], float(x[-1]))
    if method == "uniform":
        edges = np.linspace(low, high, inner + 1)
    elif low >= 0:
        ratio = high / low if low > 0 else 2.0**inner
        edges = high * ratio ** (np.arange(-inner, 1) / inner)
    else:
        half = inner // 2
        steps = 2.0 ** np.arange(-half + 1, 1)
        if high <= 0:
            edges = np.concatenate([low * 2.0 ** -np.arange(inner), [0.0]])
        else:
            edges = np.concatenate([low * steps[::-1], [0.0], high * steps])
    found = np.searchsorted(x, edges.astype(np.float32).astype(np.float64))
    found[-1] = max(int(found[-1]), int(np.searchsorted(x, high, side="right")))
    return [int(index) for index in found]


def _table(
    name: str,
    x: Doubles,
    f: Doubles,
    t: Doubles,
    mass: Doubles,
    lines: tuple[Line, Line],
    ends: list[int],
    entries: int,
    kind: str,
    continuous: bool,
) -> Piecewise:
    """Lines for segments between ends, rounded to float32 without moving off centre."""
    ends = sorted(set(ends))
    if continuous:
        return _joined(name, x, f, t, mass, lines, ends, entries, kind)
    slopes, intercepts = [lines[0][0]], [lines[0][1]]
    for start, end in pairwise(ends):
        part = slice(start, end)
        if kind == "max":
            slope, _, _ = level(x[part], f[part], t[part])
            slope = float(np.float32(slope))
            _, middle, _ = _centre(f[part] - slope * x[part], t[part])
        else:
            w = mass[part] / mass[part].sum()
            centre = float((w * x[part]).sum())
            off = x[part] - centre
            spread = float((w * off * off).sum())
            slope = float((w * off * f[part]).sum() / spread) if spread > 0 else 0.0
            slope = float(np.float32(slope))
            middle = float((w * (f[part] - slope * x[part])).sum())
        slopes.append(slope)
        intercepts.append(middle)
    slopes.append(lines[1][0])
    intercepts.append(lines[1][1])
    edges = []
    for i, end in enumerate(ends):
        before, after = float(x[max(end - 1, 0)]), float(x[min(end, len(x) - 1)])
        edge = (
            after if end < len(x) else float(np.nextafter(np.float32(before), np.float32(np.inf)))
        )
        bend = slopes[i + 1] - slopes[i]
        if bend:  # where the lines meet, if that is between the two points
            meet = float(np.float32((intercepts[i] - intercepts[i + 1]) / bend))
            edge = meet if before < meet <= after else edge
        edges.append(edge)
    return padded(edges, slopes, intercepts, name, entries)


def _centre(rest: Doubles, t: Doubles) -> tuple[float, float, float]:
    """The constant with the smallest largest |rest - constant| / t."""
    if np.ptp(t) == 0:
        high, low = float(rest.max()), float(rest.min())
        return 0.0, 0.5 * (high + low), 0.5 * (high - low)
    low, high = float(rest.min()), float(rest.max())
    for _ in range(60):  # the largest error of each sign moves against the other
        middle = 0.5 * (low + high)
        up, down = float(((rest - middle) / t).max()), float(((middle - rest) / t).max())
        low, high = (middle, high) if up > down else (low, middle)
    return 0.0, 0.5 * (low + high), max(up, down)


def _joined(
    name: str,
    x: Doubles,
    f: Doubles,
    t: Doubles,
    mass: Doubles,
    lines: tuple[Line, Line],
    ends: list[int],
    entries: int,
    kind: str,
) -> Piecewise:
    """The best table without jumps that has these breakpoints."""
    edges = x[np.minimum(ends, len(x) - 1)]
    edges = np.unique(edges)
    first, last = (
        line[0] * edge + line[1] for line, edge in zip(lines, edges[[0, -1]], strict=True)
    )
    part = (x >= edges[0]) & (x <= edges[-1])
    px, pf, pt, pm = x[part], f[part], t[part], mass[part]
    segment = (np.searchsorted(edges, px, side="right") - 1).clip(0, len(edges) - 2)
    share = (px - edges[segment]) / (edges[segment + 1] - edges[segment])
    hats = np.zeros((len(px), len(edges)))
    rows = np.arange(len(px))
    hats[rows, segment] += 1 - share
    hats[rows, segment + 1] += share
    rest = pf - hats[:, 0] * first - hats[:, -1] * last
    free = hats[:, 1:-1]
    weight = pm.copy() if kind == "l2" else np.full(len(px), 1.0 / len(px)) / pt**2
    values = np.zeros(free.shape[1])
    best = np.inf
    for _ in range(1 if kind == "l2" else 150):  # Lawson: squares weighted by the errors so far
        gram = free.T @ (free * weight[:, None]) + 1e-14 * np.eye(free.shape[1])
        trial = np.linalg.solve(gram, free.T @ (weight * rest))
        error = np.abs(rest - free @ trial) / pt
        if error.max() < best:
            best, values = float(error.max()), trial
        weight = weight * (error / max(float(error.max()), 1e-300) + 1e-3)
        weight /= weight.sum()
    heights = np.concatenate([[first], values, [last]])
    slopes = np.diff(heights) / np.diff(edges)
    intercepts = heights[:-1] - slopes * edges[:-1]
    slope = np.concatenate([[lines[0][0]], slopes, [lines[1][0]]])
    intercept = np.concatenate([[lines[0][1]], intercepts, [lines[1][1]]])
    return padded(edges, slope, intercept, name, entries)

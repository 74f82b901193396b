"""Lines through points: the best in the largest error, the best in squares, and how far they go."""

from __future__ import annotations

from typing import Final

import numpy as np

from lutra.functions.scalar import Doubles, Line

_EXCHANGES: Final = 64  # a handful suffices; the bound is for a table of NaN


def level(x: Doubles, f: Doubles, t: Doubles, enough: float = -1.0) -> tuple[float, float, float]:
    """The line with the smallest largest error |f - line| / t: an exchange of three points.

    Three points at which the error is the same with alternating signs are exchanged until none
    has a larger one (Remez's algorithm; de la Vallee-Poussin's bound makes both ends early).

    Args:
        x: Ascending.
        f: Values.
        t: Units of the error, positive.
        enough: An error to compare with: stop as soon as it is known whether the line is better.

    Returns:
        Slope, intercept, and the largest error; with `enough` only which side of it is sure.
    """
    last = len(x) - 1
    if last == 0:
        return 0.0, float(f[0]), 0.0
    slope = float((f[last] - f[0]) / (x[last] - x[0]))
    if last == 1:
        return slope, float(f[0] - slope * x[0]), 0.0
    off = np.abs(f - (f[0] + slope * (x - x[0]))) / t
    i, j, k = 0, min(max(int(off.argmax()), 1), last - 1), last
    largest = np.inf
    intercept = 0.0
    for _ in range(_EXCHANGES):
        # f - line = e * t, -e * t, e * t at the three points.
        x0, x1, x2 = x[i], x[j], x[k]
        share = (x1 - x0) / (x2 - x0)
        sag = f[i] + share * (f[k] - f[i]) - f[j]
        e = sag / (t[i] + share * (t[k] - t[i]) + t[j])
        slope = float((f[k] - e * t[k] - f[i] + e * t[i]) / (x2 - x0))
        intercept = float(f[i] - e * t[i] - slope * x0)
        bound = abs(float(e))
        if 0.0 <= enough < bound:
            return slope, intercept, bound
        error = (f - (slope * x + intercept)) / t
        p = int(np.abs(error).argmax())
        largest = float(abs(error[p]))
        if largest <= enough or largest <= bound * (1 + 1e-9) + 1e-15 or p in (i, j, k):
            break
        above = error[p] > 0
        if p < i:
            i, j, k = (p, j, k) if above == (e > 0) else (p, i, j)
        elif p < j:
            i, j, k = (p, j, k) if above == (e > 0) else (i, p, k)
        elif p < k:
            i, j, k = (i, p, k) if above == (e < 0) else (i, j, p)
        else:
            i, j, k = (i, j, p) if above == (e > 0) else (j, k, p)
    return slope, intercept, largest


def cover(
    x: Doubles, f: Doubles, t: Doubles, start: int, stop: int, error: float, guess: int
) -> int:
    """The largest end <= stop so that one line has points start..end - 1 within an error.

    Args:
        guess: Where the end may be; a good one saves time.
    """

    def within(end: int) -> bool:
        part = slice(start, end)
        return level(x[part], f[part], t[part], error)[2] <= error

    good, bad = min(start + 2, stop), stop + 1  # two points always fit
    step = 1
    probe = min(max(guess, good), stop)
    while good < bad - 1:
        if within(probe):
            good = probe
            probe = min(good + step, bad - 1) if bad == stop + 1 else (good + bad) // 2
            step *= 2
            if good == stop:
                break
        else:
            bad = probe
            probe = max(good + (bad - good) // 2, bad - step)
            step *= 2
    return good


def balance(
    x: Doubles, f: Doubles, t: Doubles, left: Line, right: Line, inner: int
) -> tuple[list[int], float]:
    """Ends of segments with the smallest largest error: the best piecewise line there is.

    Points before the first end lie on the left line, those from the last end on the right line,
    `inner` segments between them have a line of their own. How many are needed falls as the error
    that is allowed grows, so the smallest error is found by bisection; for a given error each
    segment goes as far as it can, which no other choice beats.

    Returns:
        inner + 1 indices into x, ascending, and the error in units of t.
    """
    count = len(x)
    off_left = np.abs(f - (left[0] * x + left[1])) / t
    off_right = np.abs(f - (right[0] * x + right[1])) / t

    def outer(error: float) -> tuple[int, int]:
        over = np.flatnonzero(off_left > error)
        first = int(over[0]) if len(over) else count
        over = np.flatnonzero(off_right > error)
        final = int(over[-1]) + 1 if len(over) else 0
        return first, max(final, first)

    guess = [0] * (inner + 1)

    def ends(error: float) -> list[int] | None:
        first, final = outer(error)
        found = [first]
        for segment in range(inner):
            if found[-1] < final:
                found.append(cover(x, f, t, found[-1], final, error, guess[segment + 1]))
            else:
                found.append(found[-1])
        if found[-1] < final:
            return None
        return found

    high = float(np.minimum(off_left, off_right).max())
    best = ends(high)
    low = 0.0
    trial = high / (4 * inner * inner + 4)
    while high - low > 1e-4 * high:
        found = ends(trial)
        if found is None:
            low = trial
        else:
            best, high, guess = found, trial, found
        trial = 0.5 * (low + high) if best is not None and low > 0 else 0.25 * high
        if high < 1e-14:
            break
    assert best is not None  # with the error `high` the outer lines alone cover all points
    return best, high


def square(
    x: Doubles, f: Doubles, weight: Doubles, left: Line, right: Line, inner: int, at: list[int]
) -> list[int]:
    """Ends of segments with the smallest sum of weighted squared errors, by dynamic programming.

    Args:
        at: Candidates: indices into x, ascending.

    Returns:
        inner + 1 of the candidates, ascending; as `balance`.
    """
    middle = x.mean()
    u = x - middle

    def running(values: Doubles) -> Doubles:
        return np.concatenate([[0.0], np.cumsum(weight * values)])[at]

    s0, s1, s2 = running(np.ones_like(u)), running(u), running(u * u)
    f1, fu, f2 = running(f), running(f * u), running(f * f)

    def between(s: Doubles) -> Doubles:
        return s[None, :] - s[:, None]  # [i, j]: of the points from candidate i to candidate j

    w, wu, wuu, wf, wfu, wff = (between(s) for s in (s0, s1, s2, f1, fu, f2))
    with np.errstate(all="ignore"):
        spread = wuu - wu * wu / w
        joint = wfu - wu * wf / w
        cost = wff - wf * wf / w - np.where(spread > 0, joint * joint / spread, 0.0)
    cost = np.where(np.isfinite(cost), cost.clip(0.0), 0.0)
    cost[np.tril_indices(len(at), -1)] = np.inf
    before = np.concatenate([[0.0], np.cumsum(weight * (f - left[0] * x - left[1]) ** 2)])[at]
    after = np.concatenate(
        [np.cumsum((weight * (f - right[0] * x - right[1]) ** 2)[::-1])[::-1], [0.0]]
    )[at]
    best, choices = before, []
    for _ in range(inner):
        total = best[:, None] + cost
        choice = total.argmin(0)
        best = total[choice, np.arange(len(at))]
        choices.append(choice)
    j = int((best + after).argmin())
    found = [at[j]]
    for choice in reversed(choices):
        j = int(choice[j])
        found.append(at[j])
    return found[::-1]

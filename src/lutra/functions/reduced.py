"""Tables of exp, 1/x and 1/sqrt(x) for all floats: range reduction by the bits of the float.

The exponent of a float is dealt with exactly, so a table covers one octave (two for the square
root) in steps of equal width, and its entry is read off the leading bits: no search, and the
relative error is the same for every size of x. NN-LUT scales by powers of two in the same spirit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np

from lutra.errors import InputError
from lutra.functions.lines import level
from lutra.functions.piecewise import Floats, check_entries
from lutra.reference.functions import exp_table, reciprocal_table, rsqrt_table

Kind: TypeAlias = Literal["exp", "reciprocal", "rsqrt"]

_LAWS: Final[dict[str, Callable[..., Any]]] = {
    "exp": exp_table,
    "reciprocal": reciprocal_table,
    "rsqrt": rsqrt_table,
}
_POINTS: Final = 513  # of a segment; its error is a parabola, which they find to 1e-5 of itself


@dataclass(frozen=True, eq=False)
class Reduced:
    """A table of lines y = slope[i] * m + intercept[i] for a reduced argument m.

    * "exp": x = ln(2) * (n + f), f in [0, 1): entry floor(f * E), times 2^n; 0 below -87, and
      beyond 88 what it is there.
    * "reciprocal": x = m * 2^n, m in [1, 2): entry of the leading bits of m, times 2^-n.
    * "rsqrt": x = m * 4^n, m in [1, 4): half of the entries for [1, 2) and half for [2, 4), times
      2^-n.

    Attributes:
        kind: Which of them.
        slope: float32 (E,).
        intercept: float32 (E,).

    Raises:
        InputError: Another kind, or arrays that are not E = 8, 16 or 32 finite numbers.
    """

    kind: Kind
    slope: Floats
    intercept: Floats

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"functions: a table of {self.kind!r}; choose of {get_args(Kind)}")
        for role in ("slope", "intercept"):
            array = np.array(getattr(self, role), np.float32)
            if array.ndim != 1 or not np.isfinite(array).all():
                raise InputError(
                    f"functions: the {role} of {self.kind} has shape {array.shape}; give one axis "
                    "of finite numbers"
                )
            array.setflags(write=False)
            object.__setattr__(self, role, array)
        if len(self.intercept) != check_entries(len(self.slope)):
            raise InputError(
                f"functions: {self.kind} has {len(self.slope)} slopes and {len(self.intercept)} "
                "intercepts; give as many of both"
            )

    @property
    def entries(self) -> int:
        """E."""
        return len(self.slope)

    @property
    def tensors(self) -> dict[str, Floats]:
        """The arrays by the roles that graph nodes have for them."""
        return {f"{self.kind}_slope": self.slope, f"{self.kind}_intercept": self.intercept}

    def __call__(self, x: Any) -> Floats:
        """The table's values, float32, of anything array-like; `lutra.reference.functions` says
        what becomes of zero, infinity, NaN and numbers that the function is not for."""
        with np.errstate(all="ignore"):
            made = _LAWS[self.kind](np.asarray(x, np.float32), self.slope, self.intercept)
        result: Floats = np.asarray(made, np.float32)
        return result


def _fit(kind: Kind, entries: int) -> Reduced:
    steps = np.arange(check_entries(entries) + 1)
    fn: Callable[[Any], Any] = np.exp2
    if kind == "exp":
        edges = steps / entries
    elif kind == "reciprocal":
        edges, fn = 1 + steps / entries, np.reciprocal
    else:
        half = 1 + 2 * steps[: entries // 2] / entries
        edges = np.concatenate([half, 2 * half, [4.0]])
        fn = _rsqrt
    slopes, intercepts = [], []
    for low, high in pairwise(edges):
        m = np.linspace(low, high, _POINTS)
        y = np.asarray(fn(m), np.float64)
        # The slope is rounded first, and the intercept made for the rounded one.
        slope = float(np.float32(level(m, y, y)[0]))
        shifted = (y - slope * m) / y  # the best constant of errors relative to y
        unit = 1 / y
        a, b = int(shifted.argmax()), int(shifted.argmin())
        for _ in range(4):
            c = (y[a] - slope * m[a]) * unit[a] + (y[b] - slope * m[b]) * unit[b]
            c /= unit[a] + unit[b]
            error = shifted - c * unit
            a, b = int(error.argmax()), int(error.argmin())
        slopes.append(slope)
        intercepts.append(c)
    return Reduced(kind, np.asarray(slopes, np.float32), np.asarray(intercepts, np.float32))


def _rsqrt(m: Any) -> Any:
    return m**-0.5


def fit_exp(entries: int = 16) -> Reduced:
    """exp by 2^f on [0, 1): relative error 4.7e-4, 1.2e-4, 2.9e-5 with 8, 16, 32 entries.

    Raises:
        InputError: Another number of entries.
    """
    return _fit("exp", entries)


def fit_reciprocal(entries: int = 16) -> Reduced:
    """1/x by 1/m on [1, 2): relative error 1.8e-3, 4.6e-4, 1.2e-4 with 8, 16, 32 entries.

    Raises:
        InputError: Another number of entries.
    """
    return _fit("reciprocal", entries)


def fit_rsqrt(entries: int = 16) -> Reduced:
    """1/sqrt(x) by 1/sqrt(m) on [1, 4): relative error 2.4e-3, 6.5e-4, 1.7e-4 with 8, 16, 32.

    Raises:
        InputError: Another number of entries.
    """
    return _fit("rsqrt", entries)

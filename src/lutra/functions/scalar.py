"""The scalar functions that tables stand for, in float64, and the lines that they tend to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lutra.errors import InputError

Doubles: TypeAlias = NDArray[np.float64]
#: Slope and intercept.
Line: TypeAlias = tuple[float, float]

#: How near a function must come to a line before that counts as its asymptote.
_NEAR: Final = 1e-6
_ZERO: Final[Line] = (0.0, 0.0)
_ONE: Final[Line] = (0.0, 1.0)
_SAME: Final[Line] = (1.0, 0.0)


@dataclass(frozen=True)
class Scalar:
    """A function of one number.

    Attributes:
        name: Its name.
        value: float64 array -> float64 array of the same shape.
        left: The line that it tends to at -inf; None if there is none.
        right: The same at +inf.
        domain: Where it is defined and finite.
    """

    name: str
    value: Callable[[Doubles], Doubles]
    left: Line | None = None
    right: Line | None = None
    domain: tuple[float, float] = (-math.inf, math.inf)

    def __call__(self, x: Any) -> Doubles:
        """The function of anything array-like, in float64."""
        with np.errstate(all="ignore"):
            result: Doubles = self.value(np.asarray(x, np.float64))
        return result

    @property
    def reach(self) -> tuple[float, float]:
        """Beyond which points the function is its asymptotes to 1e-6; infinite without one."""
        return -_reach(self, -1.0), _reach(self, 1.0)


def _reach(fn: Scalar, sign: float) -> float:
    line = fn.left if sign < 0 else fn.right
    if line is None:
        return math.inf
    x = sign * np.arange(1, 1 << 12) / 64.0  # to 64: where exp(-x) is far below any float32 error
    off = np.abs(fn(x) - (line[0] * x + line[1])) > _NEAR
    last = int(np.flatnonzero(off)[-1]) if off.any() else 0
    return float(abs(x[min(last + 1, len(x) - 1)]))


_erf = np.frompyfunc(math.erf, 1, 1)
_erfc = np.frompyfunc(math.erfc, 1, 1)


def _each(function: Any, x: Doubles) -> Doubles:
    return np.asarray(function(x), np.float64)


def _sigmoid(x: Doubles) -> Doubles:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def _times(x: Doubles, gate: Doubles) -> Doubles:
    return np.where(gate == 0.0, 0.0, x * gate)  # -inf * 0 is 0 here: the limit of gated functions


def _gelu(x: Doubles) -> Doubles:
    return _times(x, 0.5 * _each(_erfc, -x / math.sqrt(2.0)))


def _gelu_tanh(x: Doubles) -> Doubles:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
    return _times(x, _sigmoid(2.0 * inner))


def _softplus(x: Doubles) -> Doubles:
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


#: The functions that have names.
KNOWN: Final = {
    fn.name: fn
    for fn in (
        Scalar("gelu", _gelu, _ZERO, _SAME),
        Scalar("gelu_tanh", _gelu_tanh, _ZERO, _SAME),
        Scalar("quick_gelu", lambda x: _times(x, _sigmoid(1.702 * x)), _ZERO, _SAME),
        Scalar("silu", lambda x: _times(x, _sigmoid(x)), _ZERO, _SAME),
        Scalar("mish", lambda x: x * np.tanh(_softplus(x)), _ZERO, _SAME),
        Scalar("softplus", _softplus, _ZERO, _SAME),
        Scalar("elu", lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), (0.0, -1.0), _SAME),
        Scalar("sigmoid", _sigmoid, _ZERO, _ONE),
        Scalar("tanh", np.tanh, (0.0, -1.0), _ONE),
        Scalar("erf", lambda x: _each(_erf, x), (0.0, -1.0), _ONE),
        Scalar("exp", np.exp, _ZERO),
        Scalar(
            "reciprocal", lambda x: 1.0 / x, domain=(float(np.finfo(np.float32).tiny), math.inf)
        ),
        Scalar("log", np.log, domain=(float(np.finfo(np.float32).tiny), math.inf)),
        Scalar("sqrt", np.sqrt, domain=(0.0, math.inf)),
        Scalar("rsqrt", lambda x: x**-0.5, domain=(float(np.finfo(np.float32).tiny), math.inf)),
    )
}


def scalar(fn: str | Callable[[Doubles], Any] | Scalar) -> Scalar:
    """The function of a name, or of a callable.

    Args:
        fn: A name of `KNOWN`, or a callable that maps a float64 array to one of the same shape.
            Whether a callable tends to a line is found by trying: where it is a line to 1e-6 from
            64 to 2**20, that is its asymptote.

    Raises:
        InputError: No such name, or a callable that does not return an array of the same shape.
    """
    if isinstance(fn, Scalar):
        return fn
    if isinstance(fn, str):
        if fn not in KNOWN:
            raise InputError(
                f"functions: there is no function {fn!r}; choose one of {', '.join(KNOWN)}, or "
                "give a callable of an array"
            )
        return KNOWN[fn]
    name = getattr(fn, "__name__", "function")

    def value(x: Doubles) -> Doubles:
        result = np.asarray(fn(x), np.float64)
        if result.shape != x.shape:
            raise InputError(
                f"functions: {name} makes an array of shape {result.shape} of one of shape "
                f"{x.shape}; give a function that treats every element alike"
            )
        return result

    plain = Scalar(name, value)
    return Scalar(name, value, _tends(plain, -1.0), _tends(plain, 1.0))


def _tends(fn: Scalar, sign: float) -> Line | None:
    """The line that a function is far from zero, or None."""
    x = sign * 2.0 ** np.arange(6, 21)
    y = fn(x)
    if not np.isfinite(y).all():
        return None
    slope = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
    slope = round(slope, 9)
    intercept = round(float(y[0] - slope * x[0]), 9)
    near = np.abs(y - (slope * x + intercept)) <= _NEAR * np.maximum(1.0, np.abs(x))
    return (slope + 0.0, intercept + 0.0) if near.all() else None

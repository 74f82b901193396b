"""Functions of single values, exact and from tables: see ``lutra.ops.functions``.

Exact functions are computed in float64 and rounded once, so they are right to the last bit or
nearly so; tables give the bits that the engine gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from lutra.node import Array, Node
from lutra.ops.functions import function_name

__all__ = [
    "EXACT",
    "engine_sigmoid",
    "engine_tanh",
    "exp_of_score",
    "exp_table",
    "fma",
    "function",
    "pieces",
    "piecewise",
    "reciprocal_table",
]

_LOG2_E: Final = np.float32(1.4426950408889634)
#: Added to a float32 below 2^22, it rounds the float to an integer.
_MAGIC: Final = np.float32(1.5 * 2**23)
#: The logarithm of 2: 16 bits, and the rest.
_LN2_HIGH: Final = np.float32(0.693145752)
_LN2_LOW: Final = np.float32(1.42860677e-6)
#: The polynomial of exp near 0, the highest power first.
_EXP_TERMS: Final = tuple(
    np.float32(term)
    for term in (0.00138145395, 0.00836874545, 0.0416683890, 0.166665211, 0.499999940, 1, 1)
)
#: The polynomials of tanh, in x^2, the highest power first.
_TANH_OVER: Final = tuple(
    np.float32(term)
    for term in (
        1.82089222e-11, -1.27622168e-8, 9.26128996e-6, 2.92008836e-3, 1.29186019e-1, 0.99999994
    )
)  # fmt: skip
_TANH_UNDER: Final = tuple(
    np.float32(term) for term in (2.28007193e-4, 2.37604100e-2, 4.62518841e-1, 1)
)
#: Below this exp is 0, and beyond the other it stays what it is there.
EXP_LOW: Final = np.float32(-87.0)
EXP_HIGH: Final = np.float32(88.0)
#: The smallest float32 with 24 bits: the logarithm takes smaller ones for it.
_SMALLEST: Final = float(np.finfo(np.float32).tiny)


def _erf(x: Array) -> Array:
    return np.array([math.erf(value) for value in x.ravel()]).reshape(x.shape)


def _sigmoid(x: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-x))
    return result


def _gelu(x: Array) -> Array:
    return _limit(x, 0.5 * x * (1 + _erf(x * math.sqrt(0.5))))


def _gelu_tanh(x: Array) -> Array:
    inside = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return _limit(x, 0.5 * x * (1 + np.tanh(inside)))


def _silu(x: Array) -> Array:
    return _limit(x, x * _sigmoid(x))


def _log(x: Array) -> Array:
    result: Array = np.log(np.where((x > 0) & (x < _SMALLEST), _SMALLEST, x))
    return result


def _elu(x: Array) -> Array:
    return np.where(x < 0, np.expm1(np.minimum(x, 0)), x)


def _softplus(x: Array) -> Array:
    result: Array = np.logaddexp(0.0, x)
    return result


def _mish(x: Array) -> Array:
    return _limit(x, x * np.tanh(_softplus(x)))


def _limit(x: Array, y: Array) -> Array:
    """What tends to 0 on the left, there too where floats make NaN of infinity times 0."""
    return np.where(np.isneginf(x), 0.0, y)


#: The exact functions, float64 to float64, by the names of the engine.
EXACT: Final[dict[str, Callable[[Array], Array]]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "exp": np.exp,
    "erf": _erf,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "log": _log,
    "elu": _elu,
    "softplus": _softplus,
    "mish": _mish,
}


def function(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """One of the exact functions, element by element."""
    with np.errstate(all="ignore"):
        made = EXACT[function_name(node)](inputs[0].astype(np.float64))
        result: Array = made.astype(np.float32)
    return result


def piecewise(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """A table of lines between breakpoints."""
    (x,) = inputs
    index = np.searchsorted(tensors["breakpoint"], x, side="right")
    index[np.isnan(x)] = 0
    return pieces(index, x, tensors["slope"], tensors["intercept"])


def pieces(index: Array, x: Array, slope: Array, intercept: Array) -> Array:
    """``fma(slope[i], x, intercept[i])``, and the intercept where the slope is 0; NaN stays NaN.

    Args:
        index: Entries of the table, an integer for each value.
        x: float32.
        slope: float32 (E)
        intercept: float32 (E)
    """
    made = fma(slope[index], x, intercept[index])
    result: Array = np.where((slope[index] == 0) & ~np.isnan(x), intercept[index], made)
    return result


def fma(a: Array, b: Array | np.float32, c: Array | np.float32) -> Array:
    """``a * b + c`` of float32, rounded once, as the instruction does it."""
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b  # exact
        total = np.atleast_1d(product + c)
        # What the float64 sum lost (Knuth's TwoSum). Rounding to odd, the last bit says that
        # something was lost, makes the second rounding, to float32, that of the exact sum.
        part = total - product
        lost = (product - (total - part)) + (c - part)
        bits = total.view(np.int64)
        even = np.isfinite(lost) & (lost != 0) & (bits & 1 == 0)
        away = np.where((lost > 0) == (total > 0), 1, -1)
        odd = np.where(even, bits + away, bits).view(np.float64)
        result: Array = odd.astype(np.float32).reshape(np.shape(product))
    return result


def _power_of_e(x: Array) -> tuple[Array, Array]:
    """y and n with e^x = y 2^n, as the engine finds them: float32 and int32; n of NaN is 0."""
    n = fma(x, _LOG2_E, _MAGIC) - _MAGIC
    r = fma(-n, _LN2_LOW, fma(-n, _LN2_HIGH, x))
    y = np.full_like(r, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        y = fma(y, r, term)
    return y, np.where(np.isnan(n), np.float32(0), n).astype(np.int32)


def exp_of_score(x: Array) -> Array:
    """exp of float32 values that are at most 0, with the bits of the engine's exponential.

    Below -87 it is 0; NaN stays NaN. ``power_of_e`` in cpp/kernels/functions.h has the same steps.
    """
    with np.errstate(all="ignore"):
        y, exponent = _power_of_e(np.where(x < EXP_LOW, EXP_LOW, x))
        made = y * np.ldexp(np.float32(1), exponent)
    return np.where(x < EXP_LOW, np.float32(0), made)


def engine_sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x) of float32 values with the bits of the engine; NaN stays NaN.

    ``gated`` and ``exp_of`` in cpp/kernels/functions.h have the same steps.
    """
    with np.errstate(all="ignore"):
        t = np.float32(0) - x
        above = np.where(t < np.float32(-104), np.float32(-104), t)
        y, exponent = _power_of_e(np.where(above > np.float32(89), np.float32(89), above))
        e = np.ldexp(y.astype(np.float64), exponent).astype(np.float32)
        result: Array = np.float32(1) / (e + np.float32(1))
    return result


def engine_tanh(x: Array) -> Array:
    """The hyperbolic tangent of float32 values with the bits of the engine: ``Tanh`` there."""
    with np.errstate(all="ignore"):
        a = np.abs(x)
        a = np.where(a > np.float32(9), np.float32(9), a)
        u = a * a
        p = np.full_like(u, _TANH_OVER[0])
        for term in _TANH_OVER[1:]:
            p = fma(p, u, term)
        q = np.full_like(u, _TANH_UNDER[0])
        for term in _TANH_UNDER[1:]:
            q = fma(q, u, term)
        made = a * p / q
        result: Array = np.copysign(np.where(made > 1, np.float32(1), made), x)
    return result


def exp_table(x: Array, slope: Array, intercept: Array) -> Array:
    """exp of float32 values by a table of 2^f on [0, 1).

    Below -87, and for -infinity, it is 0; beyond 88 it is what it is at 88, so that nothing
    overflows; NaN stays NaN.
    """
    inside = np.where(np.isnan(x), np.float32(0), x).clip(EXP_LOW, EXP_HIGH)
    t = inside * _LOG2_E
    n = np.floor(t)
    f = t - n  # may round to the next entry, or to 1, which t itself does not
    index = np.floor(t * len(slope)).astype(np.int64) % len(slope)
    made = np.ldexp(pieces(index, f, slope, intercept), n.astype(np.int32))
    made = np.where(x < EXP_LOW, np.float32(0), made)
    return np.where(np.isnan(x), x, made)


def reciprocal_table(x: Array, slope: Array, intercept: Array) -> Array:
    """1/x of float32 values by a table of 1/m on [1, 2).

    Zero and what is denormal is taken as if its exponent were -127 and its significand had the
    leading 1, which gives a large finite number; from 2^127 on, and for infinity, it is 0; the sign
    is that of x; NaN stays NaN.
    """
    bits, exponent, mantissa, significand = _parts(x)
    made = pieces(_top_bits(mantissa, len(slope)), significand, slope, intercept)
    made = np.where(exponent < 127, np.ldexp(made, -exponent), np.float32(0))
    return np.where(np.isnan(x), x, np.where(bits < 0, -made, made))


def rsqrt_table(x: Array, slope: Array, intercept: Array) -> Array:
    """1/sqrt(x) of float32 values by a table of 1/sqrt(m) on [1, 4).

    Zero and what is denormal is taken as by ``reciprocal_table``; infinity is taken as the largest
    float32; NaN and what is below zero give NaN.
    """
    with np.errstate(invalid="ignore"):
        inside = np.where(x > 0, np.minimum(x, np.finfo(np.float32).max), np.float32(0))
    _, exponent, mantissa, significand = _parts(inside)
    odd, half = exponent & 1, len(slope) // 2
    m = np.ldexp(significand, odd)
    made = pieces(odd * half + _top_bits(mantissa, half), m, slope, intercept)
    made = np.ldexp(made, -(exponent >> 1))
    return np.where(x >= 0, made, np.float32(np.nan))


def _parts(x: Array) -> tuple[Array, Array, Array, Array]:
    """Bits and exponents, int32; mantissas, int32 of 23 bits; and significands in [1, 2)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.int32).reshape(np.shape(x))
    mantissa = bits & 0x7FFFFF
    significand = (mantissa | 0x3F800000).view(np.float32)
    return bits, (bits >> 23 & 0xFF) - 127, mantissa, significand


def _top_bits(mantissa: Array, entries: int) -> Array:
    result: Array = mantissa >> (23 - (entries.bit_length() - 1))
    return result

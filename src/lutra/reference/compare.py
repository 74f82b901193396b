"""How far two arrays are apart: one measure for all that compares outputs."""

from __future__ import annotations

import math

import numpy as np

from lutra.node import Array

__all__ = ["difference", "same_bits", "unequal"]


def difference(got: Array, want: Array) -> float:
    """The largest difference of two arrays as a share of the largest finite wanted value.

    NaN equals NaN, and an infinity equals an infinity of the same sign.

    Args:
        got: Numbers of any dtype and shape.
        want: What they should be.

    Returns:
        0 where all values are equal; inf where the shapes differ, where one array alone has NaN,
        or where an infinity is not the wanted one. The largest difference itself where no wanted
        value is finite and not 0.
    """
    if got.shape != want.shape:
        return math.inf
    wrong = unequal(got, want)
    if not wrong.any():
        return 0.0
    with np.errstate(invalid="ignore"):
        worst = float(np.abs(got[wrong].astype(np.float64) - want[wrong]).max())
    scale = float(np.abs(want[np.isfinite(want)]).max(initial=0)) or 1.0
    return math.inf if math.isnan(worst) else worst / scale


def unequal(got: Array, want: Array) -> Array:
    """Where two arrays of one shape differ, bool; NaN equals NaN."""
    result: Array = (got != want) & ~(np.isnan(got) & np.isnan(want))
    return result


def same_bits(a: Array, b: Array) -> bool:
    """Whether two float32 arrays are the same to the sign of zero and the bits of NaN."""
    if a.shape != b.shape:
        return False
    bits, others = (np.ascontiguousarray(x).view(np.uint32) for x in (a, b))
    return np.array_equal(bits, others)

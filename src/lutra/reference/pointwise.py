"""Operators that choose, compare and bend values one by one, with the bits of the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from lutra.node import Array, Node
from lutra.ops.spec import ints, number

_ONE: Final = np.float32(1)


def _hardswish(x: Array) -> Array:
    above = np.where(x + np.float32(3) > 0, x + np.float32(3), np.float32(0))
    result: Array = x * np.where(above < 6, above, np.float32(6)) / np.float32(6)
    return result


#: 2 pi, 2 / pi, and pi / 2 in two parts, the first of 33 bits.
_TURN: Final = float.fromhex("0x1.921fb54442d18p+2")
_PER_TURN: Final = float.fromhex("0x1.45f306dc9c883p-1")
_FIRST: Final = float.fromhex("0x1.921fb54400000p+0")
_REST: Final = float.fromhex("0x1.0b4611a626331p-34")


def _of_quarters(x: Array, ahead: float) -> Array:
    """The sine of x, or with ``ahead`` = 1 the cosine, in float64 and then rounded.

    Reduced to |r| <= pi / 4 as by Cody and Waite; then the series of Taylor.
    """
    v = x.astype(np.float64)
    v = np.where(np.abs(v) > 2**20, np.fmod(v, _TURN), v)
    k = np.rint(v * _PER_TURN)
    r = (v - k * _FIRST) - k * _REST
    turn = k + ahead
    quarter = turn - 4.0 * np.floor(turn / 4.0)
    s = r * r
    odd = np.full_like(s, 1 / math.factorial(13))
    for n in (11, 9, 7, 5, 3, 1):
        odd = odd * s + (-1) ** (n // 2) / math.factorial(n)
    even = np.full_like(s, -1 / math.factorial(14))
    for n in (12, 10, 8, 6, 4, 2, 0):
        even = even * s + (-1) ** (n // 2) / math.factorial(n)
    y = np.where((quarter == 0) | (quarter == 2), odd * r, even)
    made: Array = np.where(quarter >= 2, -y, y).astype(np.float32)
    return made


_CHOICES: Final[dict[str, Callable[[Array, Array], Array]]] = {
    # NaN where one is NaN; the second where they are equal, as 0 and -0 are
    "maximum": lambda a, b: np.where((a > b) | np.isnan(a), a, b),
    "minimum": lambda a, b: np.where((a < b) | np.isnan(a), a, b),
    "greater": lambda a, b: (a > b) * _ONE,
    "greater_equal": lambda a, b: (a >= b) * _ONE,
    "equal": lambda a, b: (a == b) * _ONE,
}
_BENDS: Final[dict[str, Callable[[Array], Array]]] = {
    "abs": np.abs,
    "sign": lambda x: (x > 0) * _ONE - (x < 0) * _ONE,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.rint,
    "hardswish": _hardswish,
    "sin": lambda x: _of_quarters(x, 0.0),
    "cos": lambda x: _of_quarters(x, 1.0),
}


def choice(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """A comparison (1 or 0), or the larger or smaller of two; sizes of 1 are repeated."""
    with np.errstate(all="ignore"):
        return _CHOICES[node.op](*inputs)


def bend(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """A function of each value; ``round`` takes halves to even numbers, ``sign`` NaN to 0."""
    with np.errstate(all="ignore"):
        return _BENDS[node.op](inputs[0])


def leaky_relu(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """x where it is above 0, else x * slope."""
    (x,) = inputs
    with np.errstate(all="ignore"):
        return np.where(x > 0, x, x * np.float32(number(node, "slope")))


def where(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """The second input where the first is not 0, else the third; sizes of 1 are repeated."""
    condition, a, b = inputs
    return np.where(condition != 0, a, b)


def constant(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """The same numbers for every sample."""
    shape = ints(node, "shape")
    return np.broadcast_to(tensors["value"].reshape(shape), (len(inputs[0]), *shape))

"""Operators that choose, compare and bend values one by one, with the bits of the engine."""

from __future__ import annotations

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

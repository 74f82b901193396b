"""Operators that move elements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.spec import integer, ints, number


def flatten(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Merges the axes from ``start_axis`` to the last."""
    (x,) = inputs
    kept = x.shape[: integer(node, "start_axis")]
    return x.reshape(*kept, math.prod(x.shape[len(kept) :]))


def reshape(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Gives each sample another shape."""
    (x,) = inputs
    return x.reshape(x.shape[0], *ints(node, "shape"))


def regroup(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Gives each sample another shape, of numbers and of sizes that it has."""
    (x,) = inputs
    sizes = [x.shape[-size] if size < 0 else size for size in ints(node, "sizes")]
    return x.reshape(x.shape[0], *sizes)


def pad(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Puts a value before and after every axis."""
    pads = ints(node, "pads")
    around = tuple(zip(pads[::2], pads[1::2], strict=True))
    return np.pad(inputs[0], around, constant_values=np.float32(number(node, "value")))


def slice_(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Every ``step``-th entry from ``start`` to ``stop`` of one axis."""
    (x,) = inputs
    before = (slice(None),) * integer(node, "axis")
    stop = min(integer(node, "stop"), x.shape[len(before)])  # TO_THE_END is beyond it
    picked = slice(integer(node, "start"), stop, integer(node, "step"))
    result: Array = x[(*before, picked)]
    return result


def transpose(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Puts the axes into another order."""
    return inputs[0].transpose(ints(node, "axes"))


def expand(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Repeats axes of size 1."""
    (x,) = inputs
    sizes = (want or size for want, size in zip(ints(node, "shape"), x.shape[1:], strict=True))
    return np.broadcast_to(x, (x.shape[0], *sizes))


def concat(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Joins arrays along one axis."""
    return np.concatenate(list(inputs), axis=integer(node, "axis"))

"""Entries chosen by value or by a computed index: see ``lutra.ops.select``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.errors import InputError
from lutra.node import Array, Node
from lutra.ops.spec import flag, integer


def topk(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """The largest or smallest entries of an axis, or their places."""
    (x,) = inputs
    axis, k = integer(node, "axis"), integer(node, "k")
    # argsort puts NaN last, which is right for the smallest.
    if flag(node, "largest"):
        order = np.argsort(-x, axis=axis, kind="stable")
        unknown = np.isnan(np.take_along_axis(x, order, axis))
        # NaN is the largest: to the front, in order
        order = np.take_along_axis(order, np.argsort(~unknown, axis=axis, kind="stable"), axis)
    else:
        order = np.argsort(x, axis=axis, kind="stable")
    order = order.take(np.arange(k), axis=axis)
    made = order if flag(node, "indices") else np.take_along_axis(x, order, axis)
    return made.astype(np.float32)


def take_along(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Entries at indices along an axis.

    Raises:
        InputError: If an index is not one of the axis.
    """
    x, index = inputs
    axis = integer(node, "axis")
    wrong = ~((index >= 0) & (index < x.shape[axis]))
    if wrong.any():
        raise InputError(
            f"run_reference: node {node.name!r} got the index {index[wrong][0]}; axis {axis} has "
            f"{x.shape[axis]} entries"
        )
    shape = tuple(index.shape[i] if i == axis else size for i, size in enumerate(x.shape))
    places = np.broadcast_to(index.astype(np.int64), shape)
    return np.take_along_axis(x, places, axis)


def from_end(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """An entry of an axis, counted from its end."""
    result: Array = inputs[0].take(-integer(node, "back"), axis=integer(node, "axis"))
    return result


def flip(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """An axis from its end to its beginning."""
    return np.flip(inputs[0], integer(node, "axis"))


def trim(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """An axis without entries at its beginning and its end."""
    (x,) = inputs
    axis, first, last = (integer(node, name) for name in ("axis", "first", "last"))
    kept = (slice(None),) * axis
    return x[(*kept, slice(first, x.shape[axis] - last, integer(node, "step")))]

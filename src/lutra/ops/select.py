"""Operators that choose entries by value or by a computed index.

    topk:            the ``k`` largest (or smallest) entries of an axis, the first first; with
                     ``indices`` their places. Of equal ones the first comes first, and NaN counts
                     as the largest.
    take_along:      y[.., i, ..] = x[.., index[.., i, ..], ..] along an axis
    from_end:        the entry of an axis that is ``back`` entries before its end, as the last of a
                     sequence is 1, without the axis
    flip:            an axis from its end to its beginning
    trim:            x[first : size - last : step] of an axis whose size is known at run time only

Values of a graph are float32, and so are indices: whole numbers, exact up to 2^24. Those of an
input of integers are cast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from lutra.formatting import shape_text
from lutra.node import Array, Node, Value
from lutra.ops.limits import MAX_INDEXED
from lutra.ops.spec import Attr, OpSpec, integer, need_axis, node_error


def _need_exact(node: Node, x: Value, axis: int) -> None:
    size = x.shape[axis]
    if size is not None and size > MAX_INDEXED:
        raise node_error(
            node,
            f"counts the {size} entries of axis {axis} of its input {x.name!r}",
            f"indices are exact up to {MAX_INDEXED}: use a shorter axis",
        )


def _infer_topk(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    axis, k = integer(node, "axis"), integer(node, "k")
    need_axis(node, x, "axis", axis)
    _need_exact(node, x, axis)
    size = x.shape[axis]
    if size is not None and k > size:
        raise node_error(
            node,
            f"takes {k} entries of axis {axis} of the input {x.name!r} of shape "
            f"{shape_text(x.shape)}",
            f"it has {size}: use a smaller k",
        )
    return x.with_shape(node.output, (*x.shape[:axis], k, *x.shape[axis + 1 :]))


def _infer_take(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    x, index = inputs
    axis = integer(node, "axis")
    need_axis(node, x, "axis", axis)
    _need_exact(node, x, axis)
    fits = len(x.shape) == len(index.shape) and x.shape[0] == index.shape[0]
    for i, (a, b) in enumerate(zip(x.shape, index.shape, strict=False)):
        fits = fits and (i in (0, axis) or b in (a, 1, None) or a is None)
    if not fits:
        raise node_error(
            node,
            f"reads {x.name!r} of shape {shape_text(x.shape)} at the indices {index.name!r} of "
            f"shape {shape_text(index.shape)}",
            f"all their sizes but those of axis {axis} must be equal, or 1 for the indices",
        )
    return x.with_shape(node.output, (*x.shape[:axis], index.shape[axis], *x.shape[axis + 1 :]))


def _infer_from_end(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    axis, back = integer(node, "axis"), integer(node, "back")
    need_axis(node, x, "axis", axis)
    size = x.shape[axis]
    if size is not None and back > size:
        raise node_error(
            node,
            f"has back={back} on axis {axis} of the input {x.name!r} of shape "
            f"{shape_text(x.shape)}",
            f"it must be in 1..{size}",
        )
    return x.with_shape(node.output, (*x.shape[:axis], *x.shape[axis + 1 :]))


def _infer_flip(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    need_axis(node, x, "axis", integer(node, "axis"))
    return x.with_shape(node.output, x.shape)


def _infer_trim(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    axis, first, last, step = (integer(node, name) for name in ("axis", "first", "last", "step"))
    need_axis(node, x, "axis", axis)
    size = x.shape[axis]
    if size is not None and first + last >= size:
        raise node_error(
            node,
            f"has first={first} and last={last} on axis {axis} of the input {x.name!r} of shape "
            f"{shape_text(x.shape)}",
            "an entry must be left",
        )
    left = None if size is None else -(-(size - first - last) // step)
    return x.with_shape(node.output, (*x.shape[:axis], left, *x.shape[axis + 1 :]))


SPECS: Final = (
    OpSpec(
        "topk",
        attrs={
            "k": Attr(int, low=1, high=MAX_INDEXED),
            "axis": Attr(int, low=1, high=7),
            "largest": Attr(bool, default=True),
            "indices": Attr(bool, default=False),
        },
        infer=_infer_topk,
        since=3,
    ),
    OpSpec(
        "take_along",
        attrs={"axis": Attr(int, low=1, high=7)},
        infer=_infer_take,
        min_inputs=2,
        max_inputs=2,
        since=3,
    ),
    OpSpec(
        "from_end",
        attrs={"axis": Attr(int, low=1, high=7), "back": Attr(int, low=1)},
        infer=_infer_from_end,
        since=3,
    ),
    OpSpec(
        "flip",
        attrs={"axis": Attr(int, low=1, high=7)},
        infer=_infer_flip,
        exact_floats=True,
        since=3,
    ),
    OpSpec(
        "trim",
        attrs={
            "axis": Attr(int, low=1, high=7),
            "first": Attr(int, default=0, low=0),
            "last": Attr(int, default=0, low=0),
            "step": Attr(int, default=1, low=1),
        },
        infer=_infer_trim,
        exact_floats=True,
        since=3,
    ),
)

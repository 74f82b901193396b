"""Operators that move elements and change none. The batch, axis 0, always stays as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from lutra.ops.registry import (
    MAX_EXTENT,
    Array,
    Attr,
    OpSpec,
    inner,
    integer,
    ints,
    need_axis,
    node_error,
)

if TYPE_CHECKING:
    from lutra.graph import Node, Value

_MAX_SIZE: Final = 2**31 - 1


def _infer_flatten(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    start = integer(node, "start_axis")
    need_axis(node, x, "start_axis", start)
    merged = math.prod(inner(x)[start - 1 :])
    return x.with_shape(node.output, (*x.shape[:start], merged))


def _infer_reshape(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    shape = ints(node, "shape")
    if math.prod(shape) != math.prod(inner(x)):
        raise node_error(
            node,
            f"has shape={shape} for the input {x.name!r} of shape {x.shape}",
            f"a sample has {math.prod(inner(x))} elements before and after",
        )
    return x.with_shape(node.output, (x.shape[0], *shape))


def _infer_pad(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    pads = ints(node, "pads")
    if len(pads) != 2 * len(x.shape) or any(pads[:2]):
        raise node_error(
            node,
            f"has pads={pads} for the input {x.name!r} of shape {x.shape}",
            f"give {2 * len(x.shape)} entries, before and after each axis, 0 for the batch",
        )
    sizes = [
        size + before + after
        for size, before, after in zip(inner(x), pads[2::2], pads[3::2], strict=True)
    ]
    return x.with_shape(node.output, (x.shape[0], *sizes))


def _infer_slice(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    axis, start, stop, step = (integer(node, name) for name in ("axis", "start", "stop", "step"))
    need_axis(node, x, "axis", axis)
    size = inner(x)[axis - 1]
    if not start < stop <= size:
        raise node_error(
            node,
            f"has start={start} and stop={stop} on axis {axis} of the input {x.name!r} of shape "
            f"{x.shape}",
            f"it must be start < stop <= {size}, so that something is left",
        )
    sizes = list(x.shape)
    sizes[axis] = -(-(stop - start) // step)
    return x.with_shape(node.output, tuple(sizes))


def _infer_concat(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    first = inputs[0]
    axis = integer(node, "axis")
    need_axis(node, first, "axis", axis)
    total = 0
    for value in inputs:
        sizes = list(value.shape)
        if len(sizes) == len(first.shape):
            total += inner(value)[axis - 1]
            sizes[axis] = first.shape[axis]
        if tuple(sizes) != first.shape:
            raise node_error(
                node,
                f"joins {first.name!r} of shape {first.shape} and {value.name!r} of shape "
                f"{value.shape} on axis {axis}",
                "all other axes must have the same size",
            )
    return first.with_shape(node.output, (*first.shape[:axis], total, *first.shape[axis + 1 :]))


SPECS: Final = (
    OpSpec(
        "flatten", attrs={"start_axis": Attr(int, default=1, low=1, high=7)}, infer=_infer_flatten
    ),
    OpSpec("reshape", attrs={"shape": Attr(tuple, low=1, high=_MAX_SIZE)}, infer=_infer_reshape),
    OpSpec(
        "pad",
        attrs={"pads": Attr(tuple, low=0, high=MAX_EXTENT), "value": Attr(float, default=0.0)},
        infer=_infer_pad,
    ),
    OpSpec(
        "slice",
        attrs={
            "axis": Attr(int, low=1, high=7),
            "start": Attr(int, low=0, high=_MAX_SIZE),
            "stop": Attr(int, low=1, high=_MAX_SIZE),
            "step": Attr(int, default=1, low=1, high=_MAX_SIZE),
        },
        infer=_infer_slice,
    ),
    OpSpec(
        "concat",
        attrs={"axis": Attr(int, low=1, high=7)},
        infer=_infer_concat,
        max_inputs=None,
    ),
)

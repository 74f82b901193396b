"""Operators that move elements and change none. The batch, axis 0, always stays as it is.

For axes whose size is known at run time only, a ``reshape`` may leave one size to what the others
do not take up, a ``regroup`` names the axes whose sizes it keeps (-a is the size of axis a of its
input), and a ``slice`` may go to the end of its axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from lutra.formatting import shape_text
from lutra.node import Array, Node, Value
from lutra.ops.limits import MAX_EXTENT
from lutra.ops.spec import Attr, OpSpec, integer, ints, need_axis, node_error

_MAX_SIZE: Final = 2**31 - 1
#: The size in a ``reshape`` that is what the others leave.
REST: Final = -1
#: The ``stop`` of a slice to the end of its axis, whatever its size.
TO_THE_END: Final = _MAX_SIZE


def _product(sizes: Sequence[int | None]) -> int | None:
    """The number of elements; None where a size is dynamic."""
    known = [size for size in sizes if size is not None]
    return math.prod(known) if len(known) == len(sizes) else None


def _infer_flatten(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    start = integer(node, "start_axis")
    need_axis(node, x, "start_axis", start)
    return x.with_shape(node.output, (*x.shape[:start], _product(x.shape[start:])))


def _check_reshape(node: Node, tensors: Mapping[str, Array]) -> None:
    shape = ints(node, "shape")
    if 0 in shape or shape.count(REST) > 1:
        raise node_error(
            node, f"has shape={shape}", f"give sizes of at least 1, and {REST} for one of them"
        )


def _infer_reshape(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    shape = ints(node, "shape")
    total, given = _product(x.shape[1:]), math.prod(size for size in shape if size != REST)
    if total is None and REST not in shape:
        raise node_error(
            node,
            f"has shape={shape} for the input {x.name!r}, whose shape {shape_text(x.shape)} is "
            "known at run time only",
            f"one size must be {REST}, for what is left",
        )
    if total is not None and (total % given if REST in shape else total != given):
        raise node_error(
            node,
            f"has shape={shape} for the input {x.name!r} of shape {x.shape}",
            f"a sample has {total} elements before and after",
        )
    rest = None if total is None else total // given
    sizes = (rest if size == REST else size for size in shape)
    return x.with_shape(node.output, (x.shape[0], *sizes))


def _check_regroup(node: Node, tensors: Mapping[str, Array]) -> None:
    sizes = ints(node, "sizes")
    if 0 in sizes:
        raise node_error(
            node, f"has sizes={sizes}", "give sizes of at least 1, and -a for the size of axis a"
        )


def _infer_regroup(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    sizes = ints(node, "sizes")
    for size in sizes:
        if size < 0:
            need_axis(node, x, "sizes", -size)
    made = tuple(x.shape[-size] if size < 0 else size for size in sizes)
    before, after = _product(x.shape[1:]), _product(made)
    if before is not None and after is not None and before != after:
        raise node_error(
            node,
            f"has sizes={sizes} for the input {x.name!r} of shape {x.shape}",
            f"a sample has {before} elements before and {after} after",
        )
    return x.with_shape(node.output, (x.shape[0], *made))


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
        None if size is None else size + before + after
        for size, before, after in zip(x.shape, pads[::2], pads[1::2], strict=True)
    ]
    return x.with_shape(node.output, tuple(sizes))


def _infer_slice(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    axis, start, stop, step = (integer(node, name) for name in ("axis", "start", "stop", "step"))
    need_axis(node, x, "axis", axis)
    size = x.shape[axis]
    end = size if stop == TO_THE_END else stop
    if end is not None and not start < end <= (stop if size is None else size):
        limit = "the size of the axis" if size is None else size
        raise node_error(
            node,
            f"has start={start} and stop={stop} on axis {axis} of the input {x.name!r} of shape "
            f"{x.shape}",
            f"it must be start < stop <= {limit}, so that something is left",
        )
    sizes = list(x.shape)
    sizes[axis] = None if end is None else -(-(end - start) // step)
    return x.with_shape(node.output, tuple(sizes))


def _infer_concat(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    first = inputs[0]
    axis = integer(node, "axis")
    need_axis(node, first, "axis", axis)
    parts: list[int | None] = []
    for value in inputs:
        sizes = list(value.shape)
        if len(sizes) == len(first.shape):
            parts.append(sizes[axis])
            sizes[axis] = first.shape[axis]
        if tuple(sizes) != first.shape:
            raise node_error(
                node,
                f"joins {first.name!r} of shape {first.shape} and {value.name!r} of shape "
                f"{value.shape} on axis {axis}",
                "all other axes must have the same size",
            )
    known = [size for size in parts if size is not None]
    total = sum(known) if len(known) == len(parts) else None
    return first.with_shape(node.output, (*first.shape[:axis], total, *first.shape[axis + 1 :]))


def _infer_transpose(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    axes = ints(node, "axes")
    if axes[:1] != (0,) or sorted(axes) != list(range(len(x.shape))):
        raise node_error(
            node,
            f"has axes={axes} for the input {x.name!r} of shape {x.shape}",
            f"name each of its {len(x.shape)} axes once, and 0, the batch, first",
        )
    return x.with_shape(node.output, tuple(x.shape[axis] for axis in axes))


def _infer_expand(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    shape = ints(node, "shape")
    known = x.shape[1:]
    fits = len(shape) == len(known) and all(
        want in (0, size) or size in (1, None) for want, size in zip(shape, known, strict=True)
    )
    if not fits:
        raise node_error(
            node,
            f"has shape={shape} for the input {x.name!r} of shape {shape_text(x.shape)}",
            f"give {len(known)} sizes, 0 for those that stay; only a size of 1 can change",
        )
    sizes = (size if want == 0 else want for want, size in zip(shape, known, strict=True))
    return x.with_shape(node.output, (x.shape[0], *sizes))


SPECS: Final = (
    OpSpec(
        "flatten", attrs={"start_axis": Attr(int, default=1, low=1, high=7)}, infer=_infer_flatten
    ),
    OpSpec(
        "reshape",
        attrs={"shape": Attr(tuple, low=REST, high=_MAX_SIZE)},
        check=_check_reshape,
        infer=_infer_reshape,
    ),
    OpSpec(
        "regroup",
        attrs={"sizes": Attr(tuple, low=-7, high=_MAX_SIZE)},
        check=_check_regroup,
        infer=_infer_regroup,
        exact_floats=True,
        since=3,
    ),
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
    OpSpec(
        "transpose",
        attrs={"axes": Attr(tuple, low=0, high=7)},
        infer=_infer_transpose,
        since=2,
    ),
    OpSpec(
        "expand",
        attrs={"shape": Attr(tuple, low=0, high=_MAX_SIZE)},
        infer=_infer_expand,
        since=2,
    ),
)

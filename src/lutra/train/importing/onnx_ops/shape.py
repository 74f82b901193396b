"""Operators on shapes, and those that only move values or make constants."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lutra.train.importing.builder import Builder, Numbers, Refusal, Value
from lutra.train.importing.onnx_ops.registry import (
    Op,
    axis_of,
    entries,
    ints,
    number,
    onnx_op,
)


@onnx_op("Constant")
def _constant(b: Builder, op: Op) -> Any:
    for name in ("value_int", "value_ints", "value_float", "value_floats"):
        if name in op.attrs:
            dtype = torch.int64 if "int" in name else torch.float32
            return torch.tensor(op.attrs[name], dtype=dtype)
    value = op.get("value")
    if not isinstance(value, Tensor):
        raise Refusal("it holds no dense tensor of numbers")
    return value


@onnx_op("Shape")
def _shape(b: Builder, op: Op, x: Value) -> Any:
    start, end = op.get("start", 0), op.get("end")
    items = b.shape(x)[start:end]
    return Numbers(tuple(items), torch.int64)


@onnx_op("Size")
def _size(b: Builder, op: Op, x: Value) -> Any:
    total: Any = 1
    for size in b.shape(x):
        if isinstance(total, int) and isinstance(size, int):
            total *= size
        else:
            total = b.call(operator.mul, total, size)
    return Numbers((total,), torch.int64, scalar=True)


@onnx_op("Reshape")
def _reshape(b: Builder, op: Op, x: Value, shape: Value) -> Any:
    target = entries(shape, "shape")
    if not op.get("allowzero", 0):
        target = [b.size(x, i) if size == 0 else size for i, size in _numbered(b, x, target)]
    if isinstance(x, Numbers) and target in ([], [1], [-1], [len(x.items)]):
        return Numbers(x.items, x.dtype, scalar=not target)
    target = _with_batch(b, op, x, target)
    return b.call(torch.reshape, x, _one_unknown(b, x, target))


def _numbered(b: Builder, x: Value, target: list[Any]) -> list[tuple[int, Any]]:
    for i, size in enumerate(target):
        if size == 0 and isinstance(size, int) and i >= b.ndim(x):
            raise Refusal(f"its shape {target} has a 0 at axis {i} of a tensor without that axis")
    return list(enumerate(target))


def _one_unknown(b: Builder, x: Value, target: list[Any]) -> list[Any]:
    """The shape with -1 for its one size that is computed, which is easier to trace."""
    if isinstance(x, fx.Node) and -1 not in target and 0 not in target:
        unknown = [i for i, size in enumerate(target) if isinstance(size, fx.Node)]
        if len(unknown) == 1:
            return [-1 if i == unknown[0] else size for i, size in enumerate(target)]
    return target


def _with_batch(b: Builder, op: Op, x: Value, target: list[Any]) -> list[Any]:
    """The shape with the batch for a 1, in a file that was made for one sample only."""
    batch = op.context.one_sample
    if batch is None or not isinstance(x, fx.Node) or 1 not in target:
        return target
    here = [axis for axis, size in enumerate(b.example_shape(x)) if _is(size, batch)]
    total = math.prod(b.example_shape(x))
    if not here or any(
        isinstance(size, fx.Node) and _is(size.meta["val"], batch) for size in target
    ):
        return target
    rest = [size.meta["val"] if isinstance(size, fx.Node) else size for size in target]
    known = math.prod(size for size in rest if not (isinstance(size, int) and size == -1))
    if -1 not in target and _is(total, known):
        return target
    before = b.example_shape(x)[: here[0]]
    ones = [i for i, size in enumerate(target) if isinstance(size, int) and size == 1]
    # the 1 that has as many elements in front of it as the batch has now
    for i in ones:
        front = rest[:i]
        if not any(isinstance(s, int) and s == -1 for s in front) and _is(
            math.prod(front), math.prod(before)
        ):
            return [*target[:i], b.size(x, here[0]), *target[i + 1 :]]
    return target


def _is(size: Any, batch: Any) -> bool:
    """Whether two sizes are the same number for every size of the inputs."""
    one = size.node.expr if isinstance(size, torch.SymInt) else size
    other = batch.node.expr if isinstance(batch, torch.SymInt) else batch
    return bool(one == other)


@onnx_op("Flatten")
def _flatten(b: Builder, op: Op, x: Value) -> Any:
    ndim = b.ndim(x)
    axis = int(op.get("axis", 1))
    axis = axis + ndim if axis < 0 else axis
    if not 0 <= axis <= ndim:
        raise Refusal(f"it names axis {axis} of a tensor with {ndim} axes")
    if axis == 1:
        return b.call(torch.flatten, x, 1) if ndim > 1 else b.call(torch.unsqueeze, x, 1)
    if axis == 0:
        return b.call(torch.reshape, x, [1, -1])
    if axis == ndim:
        return b.call(torch.reshape, x, [-1, 1])
    front = b.call(torch.flatten, x, 0, axis - 1)
    return b.call(torch.flatten, front, 1)


@onnx_op("Squeeze")
def _squeeze(b: Builder, op: Op, x: Value, axes: Value | None = None) -> Any:
    chosen = op.axes(axes)
    if isinstance(x, Numbers):
        if not x.scalar and len(x.items) == 1:
            return Numbers(x.items, x.dtype, scalar=True)
        return x
    sizes = b.sizes(x)
    if chosen is None:
        chosen = [axis for axis, size in enumerate(sizes) if size == 1]
    chosen = sorted({axis_of(axis, len(sizes)) for axis in chosen}, reverse=True)
    for axis in chosen:
        if sizes[axis] != 1:
            if sizes[axis] is None and op.context.is_batch_axis(b, x, axis):
                continue  # the one sample of the file
            raise Refusal(f"axis {axis} of its input has {sizes[axis] or 'any number of'} entries")
        x = b.call(torch.squeeze, x, axis)
    return x


@onnx_op("Unsqueeze")
def _unsqueeze(b: Builder, op: Op, x: Value, axes: Value | None = None) -> Any:
    chosen = op.axes(axes)
    if chosen is None:
        raise Refusal("it has no axes")
    if isinstance(x, Numbers) and x.scalar and len(chosen) == 1:
        return Numbers(x.items, x.dtype)
    ndim = b.ndim(x) + len(chosen)
    for axis in sorted(axis_of(axis, ndim) for axis in chosen):
        x = b.call(torch.unsqueeze, x, axis)
    return x


@onnx_op("Transpose")
def _transpose(b: Builder, op: Op, x: Value) -> Any:
    ndim = b.ndim(x)
    order = [int(i) for i in op.get("perm", range(ndim)[::-1])]
    if sorted(order) != list(range(ndim)):
        raise Refusal(f"its perm {order} does not fit a tensor with {ndim} axes")
    return x if order == list(range(ndim)) else b.call(torch.permute, x, order)


@onnx_op("Concat")
def _concat(b: Builder, op: Op, *values: Value) -> Any:
    axis = int(op.get("axis", 0))
    sizes = any(isinstance(value, Numbers) for value in values)
    if sizes and all(not isinstance(v, fx.Node) and v.ndim == 1 for v in values):
        items = [item for value in values for item in entries(value, "input")]
        return Numbers(tuple(items), values[0].dtype)  # type: ignore[union-attr]
    if len(values) == 1:
        return values[0]
    values = _repeated(b, op, values, axis)
    return b.call(torch.cat, list(values), axis)


def _repeated(b: Builder, op: Op, values: tuple[Value, ...], axis: int) -> Any:
    """Constants of one sample as those of the whole batch, where others are of the batch."""
    batch = op.context.one_sample
    owner = next(
        (
            (value, i)
            for value in values
            if isinstance(value, fx.Node)
            for i, size in enumerate(b.example_shape(value))
            if i != axis % b.ndim(value) and batch is not None and _is(size, batch)
        ),
        None,
    )
    if owner is None:
        return values
    value, at = owner
    count = b.size(value, at)
    made = []
    for each in values:
        if b.sizes(each)[at] == 1:
            each = b.call(
                torch.Tensor.expand, each, [count if i == at else -1 for i in range(b.ndim(each))]
            )
        made.append(each)
    return tuple(made)


@onnx_op("Split")
def _split(b: Builder, op: Op, x: Value, split: Value | None = None) -> Any:
    axis = axis_of(int(op.get("axis", 0)), b.ndim(x))
    parts = op.get("split") if split is None else ints(split, "split")
    size = b.sizes(x)[axis]
    if parts is None:
        count = int(op.get("num_outputs", len(op.outputs)))
        if size is None:
            raise Refusal(f"it splits axis {axis}, whose size is known at run time only")
        each = -(-size // max(count, 1))
        parts = [min(each, size - each * i) for i in range(count)]
    parts = [int(part) for part in parts]
    if any(part < 0 for part in parts):
        raise Refusal(f"its parts {parts} do not fit the size {size} of axis {axis}")
    if isinstance(x, Numbers):
        firsts = [sum(parts[:i]) for i in range(len(parts))]
        return tuple(
            Numbers(x.items[first : first + part], x.dtype)
            for first, part in zip(firsts, parts, strict=True)
        )
    made = b.call(torch.split, x, parts, axis)
    return tuple(made)


@onnx_op("Slice")
def _slice(b: Builder, op: Op, x: Value, *given: Value | None) -> Any:
    if op.opset < 10:
        starts, ends = list(op.get("starts", ())), list(op.get("ends", ()))
        axes, steps = op.axes(None), None
    else:
        some = [*given, None, None, None, None]
        starts, ends = (entries(v, w) for v, w in zip(some[:2], ("starts", "ends"), strict=True))  # type: ignore[arg-type]
        axes = None if some[2] is None else ints(some[2], "axes")
        steps = None if some[3] is None else ints(some[3], "steps")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise Refusal("its starts, ends, axes and steps have different lengths")
    if isinstance(x, Numbers) and not x.scalar:
        first, last = (None if isinstance(v, fx.Node) else v for v in (starts[0], ends[0]))
        if first is not None and last is not None:
            return Numbers(x.items[_python_slice(len(x.items), first, last, steps[0])], x.dtype)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = _sliced(b, x, start, end, axis_of(axis, b.ndim(x)), step)
    return x


def _python_slice(size: int, start: int, end: int, step: int) -> slice:
    if step == 0:
        raise Refusal("its step is 0")
    if step > 0:
        return slice(start, end, step)
    return slice(start, None if end < -size else end, step)


#: Exporters write such an end for "all the rest".
_END = 10**8


def _sliced(b: Builder, x: Value, start: Any, end: Any, axis: int, step: int) -> Any:
    if step == 0:
        raise Refusal("its step is 0")
    size = b.sizes(x)[axis]
    front = (slice(None),) * axis
    if step < 0:
        if isinstance(start, fx.Node) or isinstance(end, fx.Node):
            raise Refusal("it goes backwards from a size that is known at run time only")
        if size is None:
            if (start < -1 or start < 2**30) and start != -1:
                raise Refusal(
                    "it goes backwards along an axis whose size is known at run time only"
                )
            turned = b.call(torch.flip, x, [axis])
            if end > -(2**30):
                raise Refusal(
                    "it goes backwards along an axis whose size is known at run time only"
                )
            return b.call(operator.getitem, turned, (*front, slice(0, None, -step)))
        picked = list(range(size))[_python_slice(size, start, end, step)]
        turned = b.call(torch.flip, x, [axis])
        if not picked:
            return b.call(operator.getitem, turned, (*front, slice(0, 0)))
        first, last = size - 1 - picked[0], size - 1 - picked[-1]
        return b.call(operator.getitem, turned, (*front, slice(first, last + 1, -step)))
    if isinstance(end, int) and end >= _END:
        end = None
    if isinstance(start, int) and isinstance(end, (int, type(None))) and size is not None:
        start, end, step = slice(start, end, step).indices(size)
        if (start, end, step) == (0, size, 1):
            return x
        end = max(start, end)
    if start == 0 and end is None and step == 1:
        return x
    return b.call(operator.getitem, x, (*front, slice(start, end, step)))


@onnx_op("Expand")
def _expand(b: Builder, op: Op, x: Value, shape: Value) -> Any:
    target = entries(shape, "shape")
    own = list(b.shape(x))
    while len(own) < len(target):
        own.insert(0, 1)
    target = [1] * (len(own) - len(target)) + target
    sizes = [
        one if isinstance(want, int) and want == 1 else want
        for one, want in zip(own, target, strict=True)
    ]
    if sizes == list(b.shape(x)):
        return x
    return b.call(torch.Tensor.expand, x, sizes)


@onnx_op("Tile")
def _tile(b: Builder, op: Op, x: Value, repeats: Value) -> Any:
    return b.call(torch.tile, x, tuple(entries(repeats, "repeats")))


@onnx_op("ConstantOfShape")
def _constant_of_shape(b: Builder, op: Op, shape: Value) -> Any:
    filled = op.get("value", torch.zeros(1))
    sizes = entries(shape, "shape")
    if any(isinstance(size, int) and size < 0 for size in sizes):
        raise Refusal(f"it makes a tensor of shape {sizes}")
    if (
        len(sizes) == 1
        and isinstance(sizes[0], int)
        and sizes[0] <= 8
        and filled.dtype == torch.int64
    ):
        return torch.full((sizes[0],), filled.item(), dtype=filled.dtype)
    return b.call(torch.full, tuple(sizes), filled.item(), dtype=filled.dtype)


@onnx_op("Range")
def _range(b: Builder, op: Op, start: Value, limit: Value, delta: Value) -> Any:
    numbers = [number(x, name) for x, name in
               zip((start, limit, delta), ("start", "limit", "delta"), strict=True)]  # fmt: skip
    if numbers[2] == 0:
        raise Refusal("its delta is 0")
    return b.call(torch.arange, *numbers, dtype=b.dtype(start))


@onnx_op("EyeLike")
def _eye_like(b: Builder, op: Op, x: Value) -> Any:
    from lutra.train.importing.onnx_ops.registry import dtype_of

    dtype = dtype_of(op.get("dtype")) if op.get("dtype") else b.dtype(x)
    rows, columns = b.shape(x)
    made = b.call(torch.ones, (rows, columns))
    shift = int(op.get("k", 0))
    band = b.call(torch.triu, b.call(torch.tril, made, shift), shift)
    return b.call(torch.Tensor.to, band, dtype)


@onnx_op("Trilu")
def _trilu(b: Builder, op: Op, x: Value, k: Value | None = None) -> Any:
    function = torch.triu if op.get("upper", 1) else torch.tril
    return b.call(function, x, int(number(k, "k", 0)))


_MODES = {"reflect": "reflect", "edge": "replicate", "wrap": "circular", "constant": "constant"}


@onnx_op("Pad")
def _pad(b: Builder, op: Op, x: Value, pads: Value | None = None, value: Value | None = None,
         axes: Value | None = None) -> Any:  # fmt: skip
    ndim = b.ndim(x)
    widths = [int(p) for p in op.get("pads", ())] if pads is None else entries(pads, "pads")
    fill = op.get("value", 0.0) if pads is None else number(value, "constant_value", 0)
    chosen = range(ndim) if axes is None else [axis_of(a, ndim) for a in ints(axes, "axes")]
    if len(widths) != 2 * len(chosen):
        raise Refusal(f"it has {len(widths)} pads for {len(chosen)} axes")
    sides: list[tuple[Any, Any]] = [(0, 0)] * ndim
    for i, axis in enumerate(chosen):
        sides[axis] = (widths[i], widths[i + len(chosen)])
    return padded(b, x, sides, str(op.get("mode", "constant")), fill)


def padded(
    b: Builder, x: Value, sides: list[tuple[Any, Any]], mode: str = "constant", fill: float = 0.0
) -> Any:
    """The value with so many entries more in front of and behind each axis."""
    if all(side == (0, 0) for side in sides):
        return x
    if mode == "constant":
        first = next(i for i, side in enumerate(sides) if side != (0, 0))
        flat = [width for side in reversed(sides[first:]) for width in side]
        if b.dtype(x) == torch.bool:
            whole = b.call(F.pad, b.call(torch.Tensor.to, x, torch.uint8), flat, value=int(fill))
            return b.call(torch.Tensor.to, whole, torch.bool)
        if not b.dtype(x).is_floating_point:
            fill = int(fill)
        return b.call_like(_sketch, F.pad, x, flat, "constant", fill)
    return _mirrored(b, x, sides, mode)


def _sketch(x: Tensor, pad: Any, *_: Any, **__: Any) -> Tensor:
    """A tensor of the size with the pads."""
    if any(isinstance(w, int) and -w > s for w, s in zip(pad[::2], reversed(x.shape), strict=False)
           if isinstance(s, int)):  # fmt: skip
        raise Refusal(f"its pads {list(pad)} take more than there is")
    shape = list(x.shape)
    for i in range(len(pad) // 2):
        shape[-1 - i] = shape[-1 - i] + pad[2 * i] + pad[2 * i + 1]
    return x.new_empty(shape)


def _mirrored(b: Builder, x: Value, sides: list[tuple[Any, Any]], mode: str) -> Any:
    """Padding with values of the tensor itself: of the last axes, as torch has it."""
    if mode not in _MODES:
        raise Refusal(f"its mode is {mode!r}, not one of {', '.join(_MODES)}")
    ndim = len(sides)
    sizes = b.sizes(x)
    for axis, (front, back) in enumerate(sides):
        if any(isinstance(w, int) and w < 0 for w in (front, back)):
            x = _sliced(b, x, max(0, -front), None if back >= 0 else back, axis, 1)
    sides = [tuple(max(0, w) if isinstance(w, int) else w for w in side) for side in sides]  # type: ignore[misc]
    axes = [axis for axis, side in enumerate(sides) if side != (0, 0)]
    if not axes:
        return x
    spatial = ndim - min(axes)
    if ndim > 2 and spatial <= min(3, ndim - 2) and spatial == len(range(min(axes), ndim)):
        flat = [width for side in reversed(sides[min(axes) :]) for width in side]
        if spatial == ndim - 2 or ndim <= 5:
            lead = ndim - spatial
            if lead == 2 or lead == 1:
                return b.call_like(_sketch, F.pad, x, flat, mode=_MODES[mode])
    for axis in axes:  # entry by entry, in an order of its own
        size = sizes[axis]
        if size is None or any(not isinstance(w, int) for w in sides[axis]):
            raise Refusal(f"it mirrors axis {axis}, whose size is known at run time only")
        order = [_source(i, size, mode) for i in range(-sides[axis][0], size + sides[axis][1])]
        x = b.call(torch.index_select, x, axis, torch.tensor(order))
    return x


def _source(index: int, size: int, mode: str) -> int:
    if mode == "edge":
        return min(max(index, 0), size - 1)
    if mode == "wrap":
        return index % size
    if size == 1:
        return 0
    index %= 2 * (size - 1)
    return index if index < size else 2 * (size - 1) - index


@onnx_op("SpaceToDepth")
def _space_to_depth(b: Builder, op: Op, x: Value) -> Any:
    size = int(op.get("blocksize", 1))
    channels = b.sizes(x)[1]
    made = b.call(F.pixel_unshuffle, x, size)  # (C, b, b): ONNX has (b, b, C), or the same
    if op.get("mode", "DCR") == "CRD":
        return made
    if channels is None:
        raise Refusal("its channels are known at run time only")
    order = torch.arange(channels * size * size).reshape(channels, -1).t().reshape(-1)
    return b.call(torch.index_select, made, 1, order)


@onnx_op("DepthToSpace")
def _depth_to_space(b: Builder, op: Op, x: Value) -> Any:
    size = int(op.get("blocksize", 1))
    if op.get("mode", "DCR") == "DCR":
        channels = b.sizes(x)[1]
        if channels is None or size < 1 or channels % (size * size):
            raise Refusal(f"its {channels} channels are no multiple of {size} x {size}")
        order = torch.arange(channels).reshape(size * size, -1).t().reshape(-1)
        x = b.call(torch.index_select, x, 1, order)
    return b.call(F.pixel_shuffle, x, size)

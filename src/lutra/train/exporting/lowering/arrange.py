"""Joining, stacking, repeating, turning over and padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lutra.ops.elementwise import NO_LIMIT
from lutra.ops.shape import TO_THE_END
from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import (
    Number,
    activation,
    need_constant,
    need_rank,
    text,
)
from lutra.train.exporting.lowering.core import (
    Deferred,
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    is_dynamic,
    lowers,
)
from lutra.train.exporting.lowering.deferred import computed
from lutra.train.exporting.lowering.operands import constant, is_activation, operand
from lutra.train.exporting.lowering.rows import of_constant
from lutra.train.exporting.lowering.select import of_each_sample
from lutra.train.exporting.lowering.values import REPEATED, Atom

_OPEN_END = 2**31  # torch writes the open end of a slice as the largest int64
_POOLS = (
    "aten.max_pool1d.default",
    "aten.max_pool2d.default",
    "aten.max_pool2d_with_indices.default",
)


# ---- joining ------------------------------------------------------------------------------------


def _join(ctx: Lowering, parts: Sequence[Any], axis: int) -> Ref:
    """Join activations and constants along an axis."""
    given = [operand(ctx, part) for part in parts]
    refs = [ctx.realise(x) if is_activation(x) else x for x in given]
    like = next((x for x in refs if isinstance(x, Ref)), None)
    if like is None:
        raise UnsupportedUse("it joins what is the same for every input; make that a buffer")
    made = [
        x if isinstance(x, Ref) else constant(ctx, _one_sample(x), like, like.rank) for x in refs
    ]
    if axis == 0:
        raise UnsupportedUse("it joins along the batch (axis 0); join along another axis")
    parts_of_axis = [ref.shape[axis] for ref in made]
    size = parts_of_axis[0]
    for part in parts_of_axis[1:]:
        size = size + part
    shape = (*like.shape[:axis], size, *like.shape[axis + 1 :])
    return ctx.emit("concat", made, shape, attrs={"axis": axis})


def _one_sample(values: Tensor) -> Tensor:
    if values.ndim and values.shape[0] > 1 and bool((values == values[:1]).all()):
        return values[:1]
    return values


@lowers(
    "aten.cat.default",
    "aten.concat.default",
    "aten.concatenate.default",
    takes=("tensors",),
    axes=("dim",),
)
def _cat(ctx: Lowering, tensors: list[Any], dim: int) -> Ref:
    rank = len(ctx.result_sizes)
    # torch leaves out what is empty, of whatever shape
    parts = [x for x in tensors if not (isinstance(x, Tensor) and x.numel() == 0)]
    return _join(ctx, parts, dim % rank)


@lowers("aten.stack.default", takes=("tensors",))
def _stack(ctx: Lowering, tensors: list[Any], dim: int) -> Ref | View:
    rank = len(ctx.result_sizes)
    axis = dim % rank
    place = max(axis, 1)  # behind the batch; a view shows it in front of it
    parts: list[Any] = []
    for tensor in tensors:
        x = operand(ctx, tensor)
        if is_activation(x):
            ref = ctx.realise(x)
            x = views.emit_reshape(ctx, ref, (*ref.shape[:place], 1, *ref.shape[place:]), "row")
        else:
            x = _one_sample(x).unsqueeze(place)
        parts.append(x)
    joined = _join(ctx, parts, place)
    if axis > 0:
        return joined
    return views.permuted(ctx, joined, (1, 0, *range(2, rank)))


# ---- repeating ----------------------------------------------------------------------------------


@lowers("aten.repeat.default", "aten.tile.default", takes=("self",))
def _repeat(ctx: Lowering, self: Any) -> Ref | View:
    x = activation(ctx, self)
    old, new = views.sizes_of(ctx, x), ctx.result_sizes
    view = views.view_of(ctx, x)
    if len(new) > len(old):
        view = View(view.base, (*((),) * (len(new) - len(old)), *view.axes), ctx.node)
        old = (1,) * (len(new) - len(old)) + tuple(old)
    axes = []
    for axis, before, after in zip(view.axes, old, new, strict=True):
        times = _times(after, before)
        axes.append(axis if times == 1 else (Atom(REPEATED, 1, times), *axis))
    return views.simplest(ctx, View(view.base, tuple(axes), ctx.node))


def _times(after: Any, before: Any) -> Any:
    if after == before:
        return 1
    if isinstance(before, int) and before == 1:
        return after
    if isinstance(before, int) and isinstance(after, int):
        return after // before
    ratio = after / before
    if not getattr(ratio, "is_Integer", False):
        raise UnsupportedUse("it repeats as often as is known at run time only; use constants")
    return int(ratio)


@lowers("aten.repeat_interleave.self_int", takes=("self",))
def _repeat_interleave(ctx: Lowering, self: Any, repeats: int, dim: int | None) -> Ref | View:
    x = activation(ctx, self)
    if dim is None:
        raise UnsupportedUse("it repeats the elements of the whole batch; name an axis, not 0")
    axis = dim % x.rank
    view = views.view_of(ctx, x)
    if views.sizes_of(ctx, x)[axis] == ctx.batch:
        raise UnsupportedUse(f"it repeats samples of the batch (axis {axis}); name another axis")
    inside = (*view.axes[axis], Atom(REPEATED, 1, repeats)) if repeats > 1 else view.axes[axis]
    axes = (*view.axes[:axis], inside, *view.axes[axis + 1 :])
    return views.simplest(ctx, View(view.base, axes, ctx.node))


# ---- turning over, and picking by constants -----------------------------------------------------


def pick(ctx: Lowering, x: Ref, axis: int, index: Tensor) -> Ref:
    """Emit a gather of an axis by a constant row of indices."""
    if axis == 0:
        raise UnsupportedUse("it picks samples of the batch; index other axes only")
    shape = (*x.shape[:axis], index.numel(), *x.shape[axis + 1 :])
    return ctx.emit(
        "gather", x, shape, attrs={"axis": axis}, tensors={"index": index.int().contiguous()}
    )


def cut(ctx: Lowering, x: Ref, axis: int, start: int, stop: int) -> Ref:
    """Emit a slice of an axis."""
    shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])
    attrs = {"axis": axis, "start": start, "stop": stop, "step": 1}
    return ctx.emit("slice", x, shape, attrs=attrs, suffix="slice")


def _fixed(x: Ref, axis: int, what: str) -> int:
    size = x.shape[axis]
    if size is None:
        raise UnsupportedUse(f"{what} the batch (axis 0); use other axes")
    if not isinstance(size, int):
        raise UnsupportedUse(
            f"{what} axis {axis} of {text(x)}, whose size is known at run time only; take that "
            "axis out of dynamic_axes"
        )
    return size


def turned_over(ctx: Lowering, x: Ref, axis: int) -> Ref:
    """Emit an axis from its end to its beginning."""
    return ctx.emit("flip", x, x.shape, attrs={"axis": axis}, suffix="flip")


def cut_from_end(ctx: Lowering, x: Ref, axis: int, first: int, last: int) -> Ref:
    """Emit x[-first : -last] along an axis; last = 0 is the end."""
    part = cut(ctx, turned_over(ctx, x, axis), axis, last, first)
    return turned_over(ctx, part, axis)


def _join_along(ctx: Lowering, parts: Sequence[Ref], axis: int) -> Ref:
    """Join what may be of sizes known at run time only."""
    size: Any = parts[0].shape[axis]
    for part in parts[1:]:
        size = size + part.shape[axis]
    shape = (*parts[0].shape[:axis], size, *parts[0].shape[axis + 1 :])
    return ctx.emit("concat", parts, shape, attrs={"axis": axis})


@lowers("aten.flip.default", takes=("self",), axes=("dims",))
def _flip(ctx: Lowering, self: Any, dims: list[int]) -> Ref:
    x = ctx.realise(activation(ctx, self))
    for dim in dims:
        axis = dim % x.rank
        if axis == 0:
            raise UnsupportedUse("it turns over the batch (axis 0); use other axes")
        x = turned_over(ctx, x, axis)
    return x


@lowers("aten.roll.default", takes=("self",), axes=("dims",))
def _roll(ctx: Lowering, self: Any, shifts: Any, dims: Any) -> Ref:
    x = ctx.realise(activation(ctx, self))
    if not dims:
        raise UnsupportedUse("it rolls the whole batch as one row; name the axes in dims")
    for shift, dim in zip(shifts, dims, strict=True):
        axis = dim % x.rank
        size = x.shape[axis]
        if size is None:
            raise UnsupportedUse("it rolls the batch (axis 0); use other axes")
        if is_dynamic(size):
            x = _rolled(ctx, x, axis, shift)
            continue
        first = -shift % size
        if first:
            left, right = cut(ctx, x, axis, 0, first), cut(ctx, x, axis, first, size)
            x = ctx.emit("concat", (right, left), x.shape, attrs={"axis": axis})
    return x


def _rolled(ctx: Lowering, x: Ref, axis: int, shift: int) -> Ref:
    """A roll of an axis whose size is known at run time only, and not below the shift."""
    if shift == 0:
        return x
    if shift > 0:
        attrs = {"axis": axis, "first": 0, "last": shift, "step": 1}
        shape = (*x.shape[:axis], x.shape[axis] - shift, *x.shape[axis + 1 :])
        rest = ctx.emit("trim", x, shape, attrs=attrs, suffix="trim")
        return _join_along(ctx, (cut_from_end(ctx, x, axis, shift, 0), rest), axis)
    shape = (*x.shape[:axis], x.shape[axis] + shift, *x.shape[axis + 1 :])
    attrs = {"axis": axis, "start": -shift, "stop": TO_THE_END, "step": 1}
    rest = ctx.emit("slice", x, shape, attrs=attrs, suffix="slice")
    return _join_along(ctx, (rest, cut(ctx, x, axis, 0, -shift)), axis)


@lowers("aten.index_select.default", takes=("self", "index"), axes=("dim",))
def _index_select(ctx: Lowering, self: Any, dim: int, index: Any) -> Ref | View:
    of_table = of_constant(ctx, self, [index], dim % len(ctx.result_sizes))
    if of_table is not None:
        return of_table  # type: ignore[no-any-return]
    x = ctx.realise(activation(ctx, self))
    axis = dim % x.rank
    index = operand(ctx, index)
    index = need_constant(index, "the index")
    size = x.shape[axis]
    if axis == 0:
        raise UnsupportedUse("it picks samples of the batch; index other axes only")
    if not isinstance(size, int) and int(index.min()) < 0:
        raise UnsupportedUse("it counts from an end that is known at run time only")
    index = torch.where(index < 0, index + size, index) if isinstance(size, int) else index
    return pick(ctx, x, axis, index)


@lowers("aten.index.Tensor", takes=("self", "indices"))
def _index(ctx: Lowering, self: Any, indices: list[Any]) -> Ref | View:
    of_table = of_constant(ctx, self, indices)
    if of_table is not None:
        return of_table  # type: ignore[no-any-return]
    by_sample = of_each_sample(ctx, self, indices)
    if by_sample is not None:
        return by_sample
    indices = [computed(ctx, x) if isinstance(x, Deferred) else x for x in indices]
    given = [axis for axis, index in enumerate(indices) if index is not None]
    rows = [need_constant(indices[axis], "the index") for axis in given]
    if any(row.dtype == torch.bool for row in rows):
        raise UnsupportedUse("it picks by a mask of bools; write the indices as a list of integers")
    if given != list(range(given[0], given[-1] + 1)):
        raise UnsupportedUse("it picks along axes that are not neighbours; pick in two steps")
    x = activation(ctx, self)
    order = views.batch_first(ctx, x)
    if order[0] in given:
        raise UnsupportedUse(f"it picks samples of the batch (axis {order[0]}); index other axes")
    ref = ctx.realise(views.permuted(ctx, x, order))
    first = order.index(given[0])
    sizes = [ref.shape[first + i] for i in range(len(given))]
    shape = np.broadcast_shapes(*(tuple(row.shape) for row in rows))
    rows = [row.expand(shape) for row in rows]
    if len(given) > 1:
        fixed = [_fixed(ref, first + i, "it picks along") for i in range(len(given))]
        flat = torch.zeros_like(rows[0])
        for row, size in zip(rows, fixed, strict=True):
            flat = flat * size + torch.where(row < 0, row + size, row)
        merged = (*ref.shape[:first], math.prod(fixed), *ref.shape[first + len(given) :])
        ref = views.emit_reshape(ctx, ref, merged, "flat")
    else:
        (flat,), (size,) = rows, sizes
        if not isinstance(size, int) and int(flat.min()) < 0:
            raise UnsupportedUse("it counts from an end that is known at run time only")
        flat = torch.where(flat < 0, flat + size, flat) if isinstance(size, int) else flat
    picked = pick(ctx, ref, first, flat.reshape(-1))
    if flat.ndim == 1 and len(given) == 1:
        return views.put_back(ctx, picked, order)
    if order[0] != 0:
        raise UnsupportedUse("it picks by several numbers, with the batch not in axis 0")
    return views.emit_reshape(ctx, picked, ctx.result_shape, "picked")


@lowers("aten.diagonal.default", takes=("self",))
def _diagonal(ctx: Lowering, self: Any, offset: int, dim1: int, dim2: int) -> Ref:
    x = activation(ctx, self)
    axes = (dim1 % x.rank, dim2 % x.rank)
    order = [*(axis for axis in range(x.rank) if axis not in axes), *axes]
    ref = ctx.realise(views.permuted(ctx, x, order))
    rows, columns = (_fixed(ref, axis, "it takes a diagonal of") for axis in (-2, -1))
    index = torch.arange(rows * columns).reshape(rows, columns).diagonal(offset)
    flat = views.emit_reshape(ctx, ref, (*ref.shape[:-2], rows * columns), "flat")
    return pick(ctx, flat, flat.rank - 1, index)


# ---- writing into a part ------------------------------------------------------------------------


@lowers("aten.fill.Tensor", takes=("self",))
def _fill(ctx: Lowering, self: Any, value: Any) -> Ref | View:
    number = float(need_constant(value, "what it fills in"))
    attrs = {"low": number, "high": number}  # of NaN too
    x = activation(ctx, self)
    return views.on_each(ctx, (x,), lambda ref: ctx.emit("clamp", ref, ref.shape, attrs=attrs))


@lowers("aten.copy.default", takes=("self", "src"))
def _copy(ctx: Lowering, self: Any, src: Any) -> Ref | View:
    part = operand(ctx, src)
    if not is_activation(part):
        ref = ctx.realise(activation(ctx, self))
        return _spread(ctx, part, ref, ref.shape)
    return views.expanded(ctx, part, ctx.result_sizes)


@lowers("aten.slice_scatter.default", takes=("self", "src"), axes=("dim",))
def _slice_scatter(
    ctx: Lowering, self: Any, src: Any, dim: int, start: int | None, end: int | None, step: int
) -> Ref | View:
    ref, axis = _target(ctx, self, src), dim % len(ctx.node.meta["val"].shape)
    size = ref.shape[axis]
    if not isinstance(size, int):
        if (start or 0) == 0 and (end is None or end >= _OPEN_END) and step == 1:
            return _in_place_of(ctx, ref, operand(ctx, src))
        _fixed(ref, axis, "it writes into a part of")
    first, stop, step = slice(start, end, step).indices(size)
    if (first, stop, step) == (0, size, 1):
        return _in_place_of(ctx, ref, operand(ctx, src))
    if step != 1:
        raise UnsupportedUse(f"it writes into every {step}th entry; write with torch.where")
    return _written(ctx, ref, axis, first, stop, operand(ctx, src))


@lowers("aten.select_scatter.default", takes=("self", "src"))
def _select_scatter(ctx: Lowering, self: Any, src: Any, dim: int, index: int) -> Ref:
    ref = _target(ctx, self, src)
    axis = dim % ref.rank
    first = index % _fixed(ref, axis, "it writes into an entry of")
    part = operand(ctx, src)
    if is_activation(part):
        row = ctx.realise(part)
        part = views.emit_reshape(ctx, row, (*ref.shape[:axis], 1, *ref.shape[axis + 1 :]), "row")
    else:
        part = part.unsqueeze(axis)
    return _written(ctx, ref, axis, first, first + 1, part)


def _target(ctx: Lowering, x: Any, part: Any) -> Ref:
    """What is written into, in the shape of the result: constants too, such as zeros."""
    given = operand(ctx, x)
    if is_activation(given):
        return ctx.realise(given)
    part = operand(ctx, part)
    if not is_activation(part):
        raise UnsupportedUse("it works on what is the same for every input; make that a buffer")
    return _spread(ctx, given, ctx.realise(part), ctx.result_shape)


def _in_place_of(ctx: Lowering, x: Ref, part: Any) -> Ref:
    return ctx.realise(part) if is_activation(part) else _spread(ctx, part, x, x.shape)


def _written(ctx: Lowering, x: Ref, axis: int, first: int, stop: int, part: Any) -> Ref:
    """An activation with a part of an axis from somewhere else."""
    size = x.shape[axis]
    shape = (*x.shape[:axis], stop - first, *x.shape[axis + 1 :])
    middle = ctx.realise(part) if is_activation(part) else _spread(ctx, part, x, shape)
    parts = [
        middle if (start, end) == (first, stop) else cut(ctx, x, axis, start, end)
        for start, end in ((0, first), (first, stop), (stop, size))
        if end > start
    ]
    return ctx.emit("concat", parts, x.shape, attrs={"axis": axis}) if len(parts) > 1 else middle


def _spread(ctx: Lowering, values: Tensor, like: Ref, shape: tuple[Any, ...]) -> Ref:
    """A constant in a shape that it is repeated to."""
    made = constant(ctx, _one_sample(values), like, len(shape))
    if made.shape == shape:
        return made
    sizes = [0 if a == b else b for a, b in zip(made.shape, shape, strict=True)][1:]
    return ctx.emit("expand", made, shape, attrs={"shape": sizes})


@lowers("aten.unfold.default", takes=("self",))
def _unfold(ctx: Lowering, self: Any, dimension: int, size: int, step: int) -> Ref | View:
    x = ctx.realise(activation(ctx, self))
    axis = dimension % x.rank
    length = _fixed(x, axis, "it cuts windows of")
    starts = torch.arange(0, length - size + 1, step)
    index = (starts[:, None] + torch.arange(size)).reshape(-1)
    picked = pick(ctx, x, axis, index)
    sizes = views.sizes_of(ctx, picked)
    cut = views.reshaped(ctx, picked, (*sizes[:axis], len(starts), size, *sizes[axis + 1 :]))
    assert cut is not None
    order = [*range(axis + 1), *range(axis + 2, x.rank + 1), axis + 1]
    return views.permuted(ctx, cut, order)


@lowers("aten.tril.default", "aten.triu.default", takes=("self",))
def _triangle(ctx: Lowering, self: Any, diagonal: int) -> Ref:
    x = ctx.realise(activation(ctx, self))
    rows, columns = (_fixed(x, axis, "it cuts a triangle of") for axis in (x.rank - 2, x.rank - 1))
    cut = torch.tril if ".tril." in str(ctx.node.target) else torch.triu
    keep = constant(ctx, cut(torch.ones(rows, columns), diagonal), x, x.rank)
    zero = constant(ctx, 0.0, x, x.rank)
    return ctx.emit("where", (keep, x, zero), x.shape)


@lowers("aten.glu.default", takes=("self",), axes=("dim",))
def _glu(ctx: Lowering, self: Any, dim: int) -> Ref | View:
    x = ctx.realise(activation(ctx, self))
    axis = dim % x.rank
    half = _fixed(x, axis, "it halves") // 2
    value, gate = cut(ctx, x, axis, 0, half), cut(ctx, x, axis, half, 2 * half)
    return ctx.emit("mul", (value, ctx.emit("sigmoid", gate, gate.shape)), gate.shape)


# ---- channels and pixels ------------------------------------------------------------------------


def _regrouped(
    ctx: Lowering, x: Ref | View, cut: Sequence[Any], order: Sequence[int]
) -> Ref | View:
    """A view that is cut into axes, which change places, and made the result."""
    apart = views.reshaped(ctx, x, tuple(cut))
    turned = None if apart is None else views.permuted(ctx, apart, order)
    made = None if turned is None else views.reshaped(ctx, turned, ctx.result_sizes)
    if made is None:
        raise UnsupportedUse("it cuts up axes whose sizes are known at run time only")
    return made


@lowers("aten.channel_shuffle.default", "aten.native_channel_shuffle.default", takes=("self",))
def _channel_shuffle(ctx: Lowering, self: Any, groups: int) -> Ref:
    x = ctx.realise(activation(ctx, self))
    channels = torch.arange(_fixed(x, 1, "it shuffles"))
    return pick(ctx, x, 1, channels.reshape(groups, -1).t().reshape(-1))


@lowers("aten.pixel_unshuffle.default", takes=("self",))
def _pixel_unshuffle(ctx: Lowering, self: Any, downscale_factor: int) -> Ref | View:
    x = activation(ctx, self)
    need_rank(ctx.realise(x), 4)
    n, c, h, w = views.sizes_of(ctx, x)
    factor = downscale_factor
    rows, columns = (size // factor if isinstance(size, int) else size / factor for size in (h, w))
    cut = (n, c, rows, factor, columns, factor)
    return _regrouped(ctx, x, cut, (0, 1, 3, 5, 2, 4))


# ---- padding ------------------------------------------------------------------------------------


@lowers("aten.pad.default", takes=("self",))
def _pad(ctx: Lowering, self: Any, pad: list[int], mode: str, value: Number | None) -> Ref | View:
    if mode == "constant":
        return _constant_pad(ctx, self, pad, value or 0)
    return _mirrored(ctx, self, pad, mode)


@lowers(
    "aten.reflection_pad1d.default",
    "aten.reflection_pad2d.default",
    takes=("self",),
)
def _reflection_pad(ctx: Lowering, self: Any, padding: list[int]) -> Ref | View:
    return _mirrored(ctx, self, padding, "reflect")


@lowers(
    "aten.replication_pad1d.default",
    "aten.replication_pad2d.default",
    takes=("self",),
)
def _replication_pad(ctx: Lowering, self: Any, padding: list[int]) -> Ref | View:
    return _mirrored(ctx, self, padding, "replicate")


def _mirrored(ctx: Lowering, x: Any, pad: list[int], mode: str) -> Ref | View:
    """Padding with what is in the activation, one axis after the other."""
    view = activation(ctx, x)
    order = views.batch_first(ctx, view)
    ref = ctx.realise(views.permuted(ctx, view, order))
    for position in range(len(pad) // 2):
        before, after = pad[2 * position : 2 * position + 2]
        axis = order.index(ref.rank - 1 - position)
        if not (before or after):
            continue
        size = ref.shape[axis]
        if is_dynamic(size):
            ref = _mirrored_ends(ctx, ref, axis, before, after, mode)
            continue
        index = torch.arange(-before, size + after)
        if mode == "circular":
            index = index % size
        elif mode == "replicate":
            index = index.clamp(0, size - 1)
        else:
            index = (size - 1) - ((size - 1) - index.abs()).abs()
        ref = pick(ctx, ref, axis, index)
    return views.put_back(ctx, ref, order)


def _mirrored_ends(ctx: Lowering, x: Ref, axis: int, before: int, after: int, mode: str) -> Ref:
    """Padding of an axis whose size is known at run time only: its ends, put before and behind."""

    def end(turned: Ref, count: int) -> Ref:
        """What stands before the first entry, from the beginning on."""
        if mode == "reflect":
            return turned_over(ctx, cut(ctx, turned, axis, 1, count + 1), axis)
        row = cut(ctx, turned, axis, 0, 1)
        shape = (*row.shape[:axis], count, *row.shape[axis + 1 :])
        sizes = [count if i == axis else 0 for i in range(1, x.rank)]
        return ctx.emit("expand", row, shape, attrs={"shape": sizes}) if count > 1 else row

    parts = [x]
    if mode == "circular":
        parts = [cut_from_end(ctx, x, axis, before, 0), x] if before else parts
        parts = [*parts, cut(ctx, x, axis, 0, after)] if after else parts
        return _join_along(ctx, parts, axis)
    if before:
        parts.insert(0, end(x, before))
    if after:
        parts.append(turned_over(ctx, end(turned_over(ctx, x, axis), after), axis))
    return _join_along(ctx, parts, axis)


@lowers("aten.constant_pad_nd.default", takes=("self",))
def _constant_pad(ctx: Lowering, self: Any, pad: list[int], value: Number) -> Ref | View:
    view = activation(ctx, self)
    if not any(pad):
        return view
    order = views.batch_first(ctx, view)
    x = ctx.realise(views.permuted(ctx, view, order))
    x = _cropped(ctx, x, pad, order)
    pad = [max(amount, 0) for amount in pad]
    if not any(pad):
        return views.put_back(ctx, x, order)
    # torch names the last axis first; lutra goes from axis 0 on.
    ends = [(0, 0)] * x.rank
    for position in range(len(pad) // 2):
        ends[order.index(x.rank - 1 - position)] = (pad[2 * position], pad[2 * position + 1])
    if any(ends[0]):
        raise UnsupportedUse("it pads the batch (axis 0); pad other axes only")
    pads = tuple(amount for pair in ends for amount in pair)
    shape = tuple(
        size if size is None else size + before + after
        for size, (before, after) in zip(x.shape, ends, strict=True)
    )
    attrs = {"pads": pads, "value": _finite(ctx, float(value))}
    return views.put_back(ctx, ctx.emit("pad", x, shape, attrs=attrs), order)


def _cropped(ctx: Lowering, x: Ref, pad: Sequence[int], order: Sequence[int]) -> Ref:
    """An activation without what negative pads cut off."""
    for position in range(len(pad) // 2):
        axis = order.index(x.rank - 1 - position)
        first, last = (max(-amount, 0) for amount in pad[2 * position : 2 * position + 2])
        if not (first or last):
            continue
        if axis == 0:
            raise UnsupportedUse("it cuts the batch (axis 0); slice other axes only")
        size = x.shape[axis]
        if isinstance(size, int):
            x = cut(ctx, x, axis, first, size - last)
            continue
        attrs = {"axis": axis, "first": first, "last": last, "step": 1}
        shape = (*x.shape[:axis], size - first - last, *x.shape[axis + 1 :])
        x = ctx.emit("trim", x, shape, attrs=attrs, suffix="trim")
    return x


def _finite(ctx: Lowering, value: float) -> float:
    """The number to pad with; minus infinity in front of a maximum is the smallest number."""
    if math.isfinite(value):
        return value
    if value == -math.inf and all(str(user.target) in _POOLS for user in ctx.node.users):
        return -NO_LIMIT
    raise UnsupportedUse(
        f"it pads with {value}; pad with a finite number, or with -inf in front of max pooling only"
    )

"""Joining, stacking, repeating, turning over and padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lutra.ops.shape import TO_THE_END
from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import (
    activation,
    need_constant,
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

OPEN_END = 2**31  # torch writes the open end of a slice as the largest int64


# ---- joining ------------------------------------------------------------------------------------


def _join(ctx: Lowering, parts: Sequence[Any], axis: int) -> Ref:
    """Join activations and constants along an axis."""
    given = [operand(ctx, part) for part in parts]
    refs = [ctx.realise(x) if is_activation(x) else x for x in given]
    like = next((x for x in refs if isinstance(x, Ref)), None)
    if like is None:
        raise UnsupportedUse("it joins what is the same for every input; make that a buffer")
    made = [
        x if isinstance(x, Ref) else constant(ctx, one_sample(x), like, like.rank) for x in refs
    ]
    if axis == 0:
        raise UnsupportedUse("it joins along the batch (axis 0); join along another axis")
    parts_of_axis = [ref.shape[axis] for ref in made]
    size = parts_of_axis[0]
    for part in parts_of_axis[1:]:
        size = size + part
    shape = (*like.shape[:axis], size, *like.shape[axis + 1 :])
    return ctx.emit("concat", made, shape, attrs={"axis": axis})


def one_sample(values: Tensor) -> Tensor:
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
            x = one_sample(x).unsqueeze(place)
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


def fixed(x: Ref, axis: int, what: str) -> int:
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


def join_along(ctx: Lowering, parts: Sequence[Ref], axis: int) -> Ref:
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
        return join_along(ctx, (cut_from_end(ctx, x, axis, shift, 0), rest), axis)
    shape = (*x.shape[:axis], x.shape[axis] + shift, *x.shape[axis + 1 :])
    attrs = {"axis": axis, "start": -shift, "stop": TO_THE_END, "step": 1}
    rest = ctx.emit("slice", x, shape, attrs=attrs, suffix="slice")
    return join_along(ctx, (rest, cut(ctx, x, axis, 0, -shift)), axis)


@lowers("aten.index_select.default", takes=("self", "index"))
def _index_select(ctx: Lowering, self: Any, dim: int, index: Any) -> Ref | View:
    of_table = of_constant(ctx, self, [index], dim % len(ctx.result_sizes))
    if of_table is not None:
        return of_table  # type: ignore[no-any-return]
    x = activation(ctx, self)
    order = views.batch_first(ctx, x)
    ref = ctx.realise(views.permuted(ctx, x, order))
    axis = order.index(dim % x.rank)
    index = need_constant(operand(ctx, index), "the index")
    size = ref.shape[axis]
    if axis == 0:
        raise UnsupportedUse("it picks samples of the batch; index other axes only")
    if not isinstance(size, int) and int(index.min()) < 0:
        raise UnsupportedUse("it counts from an end that is known at run time only")
    index = torch.where(index < 0, index + size, index) if isinstance(size, int) else index
    return views.put_back(ctx, pick(ctx, ref, axis, index), order)


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
        sides = [fixed(ref, first + i, "it picks along") for i in range(len(given))]
        flat = torch.zeros_like(rows[0])
        for row, size in zip(rows, sides, strict=True):
            flat = flat * size + torch.where(row < 0, row + size, row)
        merged = (*ref.shape[:first], math.prod(sides), *ref.shape[first + len(given) :])
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
    return diagonal(ctx, activation(ctx, self), offset, dim1, dim2)


def diagonal(ctx: Lowering, x: Ref | View, offset: int, dim1: int, dim2: int) -> Ref:
    """Emit the diagonal of two axes of an activation, as the last axis.

    Args:
        ctx: The walk.
        x: The activation.
        offset: Which diagonal: above 0 those above the main one.
        dim1: The rows.
        dim2: The columns.
    """
    axes = (dim1 % x.rank, dim2 % x.rank)
    order = [*(axis for axis in range(x.rank) if axis not in axes), *axes]
    ref = ctx.realise(views.permuted(ctx, x, order))
    rows, columns = (fixed(ref, axis, "it takes a diagonal of") for axis in (-2, -1))
    index = torch.arange(rows * columns).reshape(rows, columns).diagonal(offset)
    flat = views.emit_reshape(ctx, ref, (*ref.shape[:-2], rows * columns), "flat")
    return pick(ctx, flat, flat.rank - 1, index)


@lowers("aten.glu.default", takes=("self",), axes=("dim",))
def _glu(ctx: Lowering, self: Any, dim: int) -> Ref | View:
    x = ctx.realise(activation(ctx, self))
    axis = dim % x.rank
    half = fixed(x, axis, "it halves") // 2
    value, gate = cut(ctx, x, axis, 0, half), cut(ctx, x, axis, half, 2 * half)
    return ctx.emit("mul", (value, ctx.emit("sigmoid", gate, gate.shape)), gate.shape)


def spread(ctx: Lowering, values: Tensor, like: Ref, shape: tuple[Any, ...]) -> Ref:
    """A constant in a shape that it is repeated to."""
    made = constant(ctx, one_sample(values), like, len(shape))
    if made.shape == shape:
        return made
    sizes = [0 if a == b else b for a, b in zip(made.shape, shape, strict=True)][1:]
    return ctx.emit("expand", made, shape, attrs={"shape": sizes})


# ---- channels and pixels ------------------------------------------------------------------------


def regrouped(ctx: Lowering, x: Ref | View, cut: Sequence[Any], order: Sequence[int]) -> Ref | View:
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
    channels = torch.arange(fixed(x, 1, "it shuffles"))
    return pick(ctx, x, 1, channels.reshape(groups, -1).t().reshape(-1))

"""Reshapes, transposes and slices."""

from __future__ import annotations

from typing import Any

from lutra.ops.shape import TO_THE_END
from lutra.train.exporting.lowering import arrange, views
from lutra.train.exporting.lowering.arguments import activation, text
from lutra.train.exporting.lowering.core import (
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    is_dynamic,
    lowers,
)
from lutra.train.exporting.lowering.values import Atom

_OPEN_END = 2**31  # torch writes the open end of a slice as the largest int64


@lowers(
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.unsqueeze.default",
    takes=("self",),
)
def _reshape(ctx: Lowering, self: Any) -> Ref | View:
    # The shape that torch worked out says it all, whatever mixture of -1 and x.size(0) asked for
    # it.
    x = activation(ctx, self)
    view = views.reshaped(ctx, x, ctx.result_sizes)
    return views.emit_reshape(ctx, ctx.realise(x), ctx.result_shape) if view is None else view


@lowers("aten.transpose.int", "aten.swapaxes.default", takes=("self",))
def _transpose(ctx: Lowering, self: Any, dim0: int, dim1: int) -> Ref | View:
    x = activation(ctx, self)
    order = list(range(x.rank))
    order[dim0 % x.rank], order[dim1 % x.rank] = dim1 % x.rank, dim0 % x.rank
    return views.permuted(ctx, x, order)


@lowers("aten.swapdims.default", takes=("self",))
def _swapdims(ctx: Lowering, self: Any, dim0: int, dim1: int) -> Ref | View:
    return _transpose(ctx, self, dim0, dim1)


@lowers("aten.permute.default", takes=("self",))
def _permute(ctx: Lowering, self: Any, dims: list[int]) -> Ref | View:
    x = activation(ctx, self)
    return views.permuted(ctx, x, [dim % x.rank for dim in dims])


@lowers("aten.movedim.int", takes=("self",))
def _movedim(ctx: Lowering, self: Any, source: int, destination: int) -> Ref | View:
    x = activation(ctx, self)
    order = [axis for axis in range(x.rank) if axis != source % x.rank]
    order.insert(destination % x.rank, source % x.rank)
    return views.permuted(ctx, x, order)


@lowers(
    "aten.t.default",
    "aten.mT.default",
    "aten.adjoint.default",
    "aten.numpy_T.default",
    takes=("self",),
)
def _swap_last(ctx: Lowering, self: Any) -> Ref | View:
    return _transpose(ctx, self, -2, -1)


@lowers("aten.expand.default", "aten.expand_as.default", takes=("self",))
def _expand(ctx: Lowering, self: Any) -> Ref | View:
    return views.expanded(ctx, activation(ctx, self), ctx.result_sizes)


@lowers("aten.slice.Tensor", takes=("self",), takes_sizes=True)
def _slice(ctx: Lowering, self: Any, dim: int, start: Any, end: Any, step: int) -> Ref | View:
    x = activation(ctx, self)
    axis = dim % x.rank
    size = views.sizes_of(ctx, x)[axis]
    start, end = _place(start, size), _place(end, size)
    whole = (start or 0) == 0 and step == 1 and (end is None or end >= _OPEN_END)
    if not isinstance(size, int) and whole:
        return x
    if isinstance(x, View) and isinstance(size, int) and step == 1:
        first, stop, _ = slice(start, end).indices(size)
        cut = _cut_base(ctx, x, axis, first, stop)
        if cut is not None:
            return cut
    if not views.is_sample(ctx, x):
        if not isinstance(size, int):
            raise UnsupportedUse(f"it cuts the batch (axis {axis}); slice other axes only")
        order = views.batch_first(ctx, x)
        ref = ctx.realise(views.permuted(ctx, x, order))
        first, stop, step = slice(start, end, step).indices(size)
        cut = _cut(ctx, ref, order.index(axis), first, max(first, stop), step)
        return views.put_back(ctx, cut, order)
    x = ctx.realise(x)
    size = x.shape[axis]
    if size is None:
        raise UnsupportedUse("it cuts the batch (axis 0); slice other axes only")
    if is_dynamic(size):
        return _dynamic_slice(ctx, x, axis, start or 0, end, step)
    first, stop, step = slice(start, end, step).indices(size)
    return _cut(ctx, x, axis, first, max(first, stop), step)


def _place(place: Any, size: Any) -> int | None:
    """Where a slice begins or ends; from the end, as -1, where it is computed from the size."""
    if place is None or isinstance(place, int):
        return place
    before = size - place.node.expr  # of the whole axis, or of some entries less
    if getattr(before, "is_Integer", False) and before >= 0:
        return _OPEN_END if before == 0 else -int(before)
    raise UnsupportedUse(
        "it cuts at a place that is computed from sizes known at run time only; count from the "
        "beginning or the end of the axis itself, or take that axis out of dynamic_axes"
    )


def _dynamic_slice(ctx: Lowering, x: Ref, axis: int, start: int, end: int | None, step: int) -> Ref:
    """A slice of an axis whose size is known at run time only."""
    to_the_end = end is None or end >= _OPEN_END
    stop = TO_THE_END if end is None or to_the_end else end
    size = ctx.result_shape[axis]
    if start < 0 and (to_the_end or stop < 0):
        last = 0 if to_the_end else -stop
        if -start <= last or size != -(-(-start - last) // step):
            raise UnsupportedUse(
                f"it cuts axis {axis} of {text(x)}, whose size is known at run time only, from "
                f"{start} to {stop}, and torch does not know that there are as many entries; give "
                "a longer example"
            )
        part = arrange.cut_from_end(ctx, x, axis, -start, last)
        return _cut(ctx, part, axis, 0, -start - last, step)
    if start >= 0 and stop < 0:
        attrs = {"axis": axis, "first": start, "last": -stop, "step": step}
        return ctx.emit("trim", x, attrs=attrs)
    known = isinstance(size, int)  # not so where torch would cut less
    if start < 0 or known == to_the_end:
        raise UnsupportedUse(
            f"it cuts axis {axis} of {text(x)}, whose size is known at run time only, from {start} "
            f"to {stop}; count both from the beginning or both from the end"
        )
    attrs = {"axis": axis, "start": start, "stop": stop, "step": step}
    return ctx.emit("slice", x, attrs=attrs)


@lowers("aten.select.int", takes=("self",))
def _select(ctx: Lowering, self: Any, dim: int, index: int) -> Ref | View:
    x = activation(ctx, self)
    axis = dim % x.rank
    if isinstance(x, View):
        size = views.sizes_of(ctx, x)[axis]
        if isinstance(size, int):
            row = _cut_base(ctx, x, axis, index % size, index % size + 1)
            if row is not None:
                view = views.view_of(ctx, row)
                axes = (*view.axes[:axis], *view.axes[axis + 1 :])
                return views.simplest(ctx, View(view.base, axes, ctx.node))
            if not views.is_sample(ctx, x):
                row = views.view_of(ctx, _slice(ctx, x, axis, index % size, index % size + 1, 1))
                axes = (*row.axes[:axis], *row.axes[axis + 1 :])
                return views.simplest(ctx, View(row.base, axes, ctx.node))
        x = ctx.realise(x)
    size = x.shape[axis]
    if size is None:
        raise UnsupportedUse("it picks one sample of the batch; index other axes only")
    if is_dynamic(size):
        if index < 0:
            shape = (*x.shape[:axis], *x.shape[axis + 1 :])
            return ctx.emit("from_end", x, shape, attrs={"axis": axis, "back": -index})
    else:
        index %= size
    row = _cut(ctx, x, axis, index, index + 1, 1, suffix="slice")
    return views.emit_reshape(ctx, row, ctx.result_shape)


@lowers("aten.unbind.int", takes=("self",))
def _unbind(ctx: Lowering, self: Any, dim: int) -> tuple[Ref | View, ...]:
    x = activation(ctx, self)
    size = views.sizes_of(ctx, x)[dim % x.rank]
    if not isinstance(size, int):
        raise UnsupportedUse("it takes apart an axis whose size is known at run time only")
    return tuple(_select(ctx, x, dim, index) for index in range(size))


@lowers("aten.chunk.default", axes=("dim",))
def _chunk(ctx: Lowering, self: Ref, chunks: int, dim: int) -> tuple[Ref, ...]:
    size = self.shape[dim % self.rank]
    if not isinstance(size, int):
        raise UnsupportedUse("it splits the batch, or an axis known at run time only; split others")
    return _split(ctx, self, -(-size // chunks), dim)


@lowers("aten.split.Tensor", "aten.unsafe_split.Tensor", axes=("dim",))
def _split(ctx: Lowering, self: Ref, split_size: int, dim: int) -> tuple[Ref, ...]:
    size = self.shape[dim % self.rank]
    if size is None:
        raise UnsupportedUse("it splits the batch (axis 0); split other axes only")
    if is_dynamic(size):
        raise UnsupportedUse(
            f"it splits an axis of {text(self)} whose size is known at run time only; split others"
        )
    sizes = [min(split_size, size - start) for start in range(0, size, split_size)]
    return _split_sizes(ctx, self, sizes, dim)


@lowers("aten.split_with_sizes.default", axes=("dim",))
def _split_sizes(ctx: Lowering, self: Ref, split_sizes: list[int], dim: int) -> tuple[Ref, ...]:
    axis = dim % self.rank
    if axis == 0:
        raise UnsupportedUse("it splits the batch (axis 0); split other axes only")
    starts = [sum(split_sizes[:i]) for i in range(len(split_sizes))]
    pieces = zip(starts, split_sizes, strict=True)
    return tuple(_cut(ctx, self, axis, start, start + size, 1) for start, size in pieces)


def _cut_base(ctx: Lowering, x: View, axis: int, start: int, stop: int) -> Ref | View | None:
    """A slice of a view that is a slice of its base too; None where it is not."""
    if len(x.axes[axis]) != 1 or stop <= start:
        return None
    (atom,) = x.axes[axis]
    size = x.base.shape[atom.axis] if atom.axis > 0 else None
    if not isinstance(size, int) or atom.inner * atom.size != size:
        return None
    first, last = start * atom.inner, stop * atom.inner
    shape = (*x.base.shape[: atom.axis], last - first, *x.base.shape[atom.axis + 1 :])
    with ctx.making(shape):
        base = _cut(ctx, x.base, atom.axis, first, last, 1, suffix="slice")
    made = (Atom(atom.axis, atom.inner, stop - start),) if stop - start > 1 else ()
    return views.simplest(ctx, View(base, (*x.axes[:axis], made, *x.axes[axis + 1 :]), ctx.node))


def _cut(
    ctx: Lowering, x: Ref, axis: int, start: int, stop: int, step: int, suffix: str = ""
) -> Ref:
    if (start, stop, step) == (0, x.shape[axis], 1):
        return x
    size = len(range(start, stop, step))
    if size == 0:
        raise UnsupportedUse(f"it takes nothing from axis {axis} of {text(x)}; keep one entry")
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    attrs = {"axis": axis, "start": start, "stop": stop, "step": step}
    return ctx.emit("slice", x, shape, attrs=attrs, suffix=suffix)

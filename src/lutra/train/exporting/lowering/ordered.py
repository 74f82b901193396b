"""Entries in order, the one at some place among them, and the largest so far."""

from __future__ import annotations

import math
from typing import Any

from lutra.ops.elementwise import NO_LIMIT
from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import activation
from lutra.train.exporting.lowering.arrange import cut
from lutra.train.exporting.lowering.core import Lowering, Ref, UnsupportedUse, View, lowers
from lutra.train.exporting.lowering.functions import line
from lutra.train.exporting.lowering.operands import constant, together
from lutra.train.exporting.lowering.reduce import reduced

_SELF = ("self",)


def _fixed(x: Ref, axis: int) -> int:
    size = x.shape[axis]
    if axis == 0:
        raise UnsupportedUse("it compares the samples of the batch (axis 0); name another axis")
    if not isinstance(size, int):
        raise UnsupportedUse(
            f"it orders axis {axis}, whose size is known at run time only; take that axis out of "
            "dynamic_axes"
        )
    return size


def _first(ctx: Lowering, x: Ref, axis: int, count: int, largest: bool, places: bool) -> Ref:
    """The first entries of an axis in order, or where they were."""
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    attrs = {"k": count, "axis": axis, "largest": largest, "indices": places}
    return ctx.emit("topk", x, shape, attrs=attrs, suffix="places" if places else "sorted")


@lowers("aten.sort.default", "aten.sort.stable", takes=_SELF, axes=("dim",))
def _sort(ctx: Lowering, self: Any, dim: int, descending: bool) -> tuple[Ref, Ref]:
    x = ctx.realise(activation(ctx, self))
    axis = dim % x.rank
    size = _fixed(x, axis)
    return (
        _first(ctx, x, axis, size, descending, places=False),
        _first(ctx, x, axis, size, descending, places=True),
    )


@lowers("aten.argsort.default", "aten.argsort.stable", takes=_SELF, axes=("dim",))
def _argsort(ctx: Lowering, self: Any, dim: int, descending: bool) -> Ref:
    return _sort(ctx, self, dim, descending)[1]


@lowers("aten.msort.default")
def _msort(ctx: Lowering, self: Ref) -> Ref:
    raise UnsupportedUse("it sorts the samples of the batch (axis 0); name another axis")


def _at(ctx: Lowering, x: Ref, axis: int, place: int, keepdim: bool, indices: bool = False) -> Ref:
    """The entry of an axis that has `place` smaller ones."""
    made = _first(ctx, x, axis, place + 1, False, indices)
    made = cut(ctx, made, axis, place, place + 1)
    shape = (*x.shape[:axis], *((1,) if keepdim else ()), *x.shape[axis + 1 :])
    return made if made.shape == shape else views.emit_reshape(ctx, made, shape, "one")


def _placed(
    ctx: Lowering, x: Any, dim: int, keepdim: bool, place: int | None
) -> tuple[Ref | View, Ref | View]:
    def make(ref: Ref, axes: tuple[int, ...], keep: bool, indices: bool) -> Ref:
        (axis,) = axes
        chosen = (_fixed(ref, axis) - 1) // 2 if place is None else place
        return _at(ctx, ref, axis, chosen, keep, indices)

    what = "it compares"
    return (
        reduced(ctx, x, dim, keepdim, what, lambda r, a, k: make(r, a, k, False)),
        reduced(ctx, x, dim, keepdim, what, lambda r, a, k: make(r, a, k, True)),
    )


@lowers("aten.median.dim", takes=_SELF)
def _median(ctx: Lowering, self: Any, dim: int, keepdim: bool) -> tuple[Ref | View, Ref | View]:
    return _placed(ctx, self, dim, keepdim, None)


@lowers("aten.kthvalue.default", takes=_SELF)
def _kthvalue(
    ctx: Lowering, self: Any, k: int, dim: int, keepdim: bool
) -> tuple[Ref | View, Ref | View]:
    return _placed(ctx, self, dim, keepdim, k - 1)


@lowers("aten.quantile.scalar", takes=_SELF)
def _quantile(
    ctx: Lowering, self: Any, q: float, dim: int | None, keepdim: bool, interpolation: str
) -> Ref | View:
    if dim is None:
        raise UnsupportedUse("it makes one number of the whole batch; name an axis, other than 0")

    def make(ref: Ref, axes: tuple[int, ...], keep: bool) -> Ref:
        (axis,) = axes
        place = q * (_fixed(ref, axis) - 1)
        low, high = math.floor(place), math.ceil(place)
        share = {"lower": 0.0, "higher": 1.0, "midpoint": 0.5, "nearest": float(round(place) > low)}
        weight = share.get(interpolation, place - low) if low != high else 0.0
        first = _at(ctx, ref, axis, low, keep)
        if weight == 0.0:
            return first
        second = _at(ctx, ref, axis, high, keep)
        apart = ctx.emit("sub", (second, first), first.shape)
        return ctx.emit("add", (first, line(ctx, apart, weight, 0.0)), first.shape)

    return reduced(ctx, self, dim, keepdim, "it compares", make)


# ---- up to each entry ---------------------------------------------------------------------------


def _so_far(ctx: Lowering, x: Ref, axis: int, op: str, neutral: float) -> Ref:
    """What an operator makes of the entries up to each: of 2, of 4, and so on."""
    size, step = _fixed(x, axis), 1
    while step < size:
        pads = [0, 0] * x.rank
        pads[2 * axis] = step
        attrs = {"pads": tuple(pads), "value": neutral}
        kept = cut(ctx, x, axis, 0, size - step)
        moved = ctx.emit("pad", kept, x.shape, attrs=attrs, suffix="moved")
        x = ctx.emit(op, (x, moved), x.shape)
        step *= 2
    return x


@lowers("aten.cumprod.default", takes=_SELF, axes=("dim",))
def _cumprod(ctx: Lowering, self: Any, dim: int) -> Ref:
    x = ctx.realise(activation(ctx, self))
    return _so_far(ctx, x, dim % x.rank, "mul", 1.0)


@lowers("aten.cummax.default", takes=_SELF, axes=("dim",))
def _cummax(ctx: Lowering, self: Any, dim: int) -> tuple[Ref, None]:
    x = ctx.realise(activation(ctx, self))
    return _so_far(ctx, x, dim % x.rank, "maximum", -NO_LIMIT), None


@lowers("aten.cummin.default", takes=_SELF, axes=("dim",))
def _cummin(ctx: Lowering, self: Any, dim: int) -> tuple[Ref, None]:
    x = ctx.realise(activation(ctx, self))
    return _so_far(ctx, x, dim % x.rank, "minimum", NO_LIMIT), None


# ---- between borders ----------------------------------------------------------------------------


@lowers("aten.bucketize.Tensor", takes=_SELF)
def _bucketize(ctx: Lowering, self: Any, boundaries: Any, right: bool) -> Ref:
    x = ctx.realise(activation(ctx, self))
    borders = boundaries.float().reshape((1,) * x.rank + (-1,))
    apart = views.emit_reshape(ctx, x, (*x.shape, 1), "apart")
    limits = constant(ctx, borders, x, x.rank + 1)
    op = "greater_equal" if right else "greater"
    passed = together(ctx, op, (apart, limits))
    assert isinstance(passed, Ref)
    mean = ctx.emit("mean", passed, x.shape, attrs={"axes": (x.rank,), "keepdims": False})
    count = line(ctx, mean, float(borders.numel()), 0.0)
    return ctx.emit("round", count, x.shape)


@lowers("aten.searchsorted.Tensor", takes=("self",))
def _searchsorted(
    ctx: Lowering, sorted_sequence: Any, self: Any, right: bool, side: str | None
) -> Ref:
    if getattr(sorted_sequence, "ndim", 0) != 1:
        raise UnsupportedUse("its sorted sequence must be a constant of one axis")
    return _bucketize(ctx, self, sorted_sequence, right or side == "right")

"""Means, sums, maxima and the like over axes, and sums up to each entry of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import Number, activation, text
from lutra.train.exporting.lowering.arrange import cut
from lutra.train.exporting.lowering.core import (
    Lowering,
    Ref,
    Sizes,
    UnsupportedUse,
    View,
    is_dynamic,
    lowers,
)
from lutra.train.exporting.lowering.functions import line

_SELF = ("self",)
_MOST_FACTORS = 64
_INSTEAD = "use a mean, or lutra.train.masked_mean for the tokens that a mask keeps"


def _axes(x: Ref | View, dim: Any) -> tuple[int, ...]:
    given = [dim] if isinstance(dim, int) else list(dim or range(x.rank))
    return tuple(sorted(axis % x.rank for axis in given))


def reduced(
    ctx: Lowering,
    x: Any,
    dim: Any,
    keepdim: bool,
    what: str,
    make: Callable[[Ref, tuple[int, ...], bool], Ref],
) -> Ref | View:
    """Apply an operator that leaves one value of some axes.

    Args:
        ctx: The walk.
        x: Its operand.
        dim: Its axes; None for all.
        keepdim: Whether they stay, with size 1.
        what: What it does, for errors.
        make: Called with an activation, axes and `keepdim`.

    Raises:
        UnsupportedUse: The batch is among the axes.
    """
    x = activation(ctx, x)
    axes = _axes(x, dim)
    sizes = views.sizes_of(ctx, x)
    batch = next((axis for axis, size in enumerate(sizes) if size == ctx.batch), 0)
    if batch in axes:
        raise UnsupportedUse(f"{what} over the batch (axis {batch}); name the other axes")
    if batch == 0:
        return make(ctx.realise(x), axes, keepdim)
    # samples lie in another axis: bring it to the front, and back
    order = [batch, *(axis for axis in range(x.rank) if axis != batch)]
    moved = ctx.realise(views.permuted(ctx, x, order))
    made = make(moved, tuple(sorted(order.index(axis) for axis in axes)), True)
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(sizes))
    back: Ref | View = views.permuted(ctx, made, [order.index(axis) for axis in range(x.rank)])
    if keepdim:
        return back
    kept = tuple(size for axis, size in enumerate(shape) if axis not in axes)
    result = views.reshaped(ctx, back, kept)
    assert result is not None  # sizes of 1 are left out
    return result


def shape_without(x: Ref, axes: Sequence[int], keepdim: bool) -> Sizes:
    """The shape of what is left of an activation."""
    if keepdim:
        return tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    return tuple(size for axis, size in enumerate(x.shape) if axis not in axes)


def emit_reduced(ctx: Lowering, op: str, x: Ref, axes: tuple[int, ...], keepdim: bool) -> Ref:
    attrs = {"axes": axes, "keepdims": keepdim}
    return ctx.emit(op, x, shape_without(x, axes, keepdim), attrs=attrs)


def count(x: Ref, axes: Sequence[int], what: str, instead: str) -> int:
    """The number of elements that become one."""
    sizes = [x.shape[axis] for axis in axes]
    if not all(isinstance(size, int) for size in sizes):
        raise UnsupportedUse(
            f"{what} over axes {list(axes)} of {text(x)}, whose sizes are known at run time only; "
            f"{instead}"
        )
    return math.prod(sizes)


def emit_sum(ctx: Lowering, x: Ref, axes: tuple[int, ...], keepdim: bool) -> Ref:
    fixed = [axis for axis in axes if isinstance(x.shape[axis], int)]
    if len(fixed) == len(axes):
        number = count(x, axes, "it adds up", _INSTEAD)
        return line(ctx, emit_reduced(ctx, "mean", x, axes, keepdim), number, 0.0)
    made = line(ctx, emit_reduced(ctx, "mean", x, axes, True), count(x, fixed, "", ""), 0.0)
    for axis in axes:
        if axis not in fixed:
            made = ctx.emit("mul", (made, _length(ctx, x, axis)), made.shape)
    return made if keepdim else views.emit_reshape(ctx, made, shape_without(x, axes, False))


def _length(ctx: Lowering, x: Ref, axis: int) -> Ref:
    """(N, 1, ...) of the size of an axis that is known at run time only: a sum of as many ones."""
    row = (None, x.shape[axis])
    others = tuple(i for i in range(1, x.rank) if i != axis)
    if others:
        attrs: dict[str, Any] = {"axes": others, "keepdims": False}
        x = ctx.emit("mean", x, row, attrs=attrs, suffix="row")
    ones = ctx.emit("clamp", x, row, attrs={"low": 1.0, "high": 1.0}, suffix="ones")  # of NaN too
    sums = ctx.emit("cumsum", ones, row, attrs={"axis": 1}, suffix="sums")
    last = ctx.emit("from_end", sums, (None,), attrs={"axis": 1, "back": 1}, suffix="last")
    return views.emit_reshape(ctx, last, (None, *(1,) * len(others), 1), "length")


@lowers("aten.mean.dim", takes=_SELF)
def _mean(ctx: Lowering, self: Any, dim: Any, keepdim: bool) -> Ref | View:
    return reduced(
        ctx, self, dim, keepdim, "it averages", lambda x, a, k: emit_reduced(ctx, "mean", x, a, k)
    )


@lowers("aten.sum.dim_IntList", takes=_SELF)
def _sum(ctx: Lowering, self: Any, dim: Any, keepdim: bool) -> Ref | View:
    return reduced(ctx, self, dim, keepdim, "it adds up", lambda x, a, k: emit_sum(ctx, x, a, k))


@lowers("aten.mean.default", "aten.sum.default", "aten.max.default", "aten.min.default")
def _whole(ctx: Lowering, self: Ref) -> Ref:
    raise UnsupportedUse("it makes one number of the whole batch; name the axes, without axis 0")


def _largest(ctx: Lowering, x: Any, dim: Any, keepdim: bool) -> Ref | View:
    what = "it takes the maximum"
    return reduced(ctx, x, dim, keepdim, what, lambda x, a, k: emit_reduced(ctx, "max", x, a, k))


def _smallest(ctx: Lowering, x: Any, dim: Any, keepdim: bool) -> Ref | View:
    def make(x: Ref, axes: tuple[int, ...], keep: bool) -> Ref:
        return line(ctx, emit_reduced(ctx, "max", line(ctx, x, -1.0, 0.0), axes, keep), -1.0, 0.0)

    return reduced(ctx, x, dim, keepdim, "it takes the minimum", make)


@lowers("aten.amax.default", takes=_SELF)
def _amax(ctx: Lowering, self: Any, dim: Any, keepdim: bool) -> Ref | View:
    return _largest(ctx, self, dim, keepdim)


@lowers("aten.amin.default", takes=_SELF)
def _amin(ctx: Lowering, self: Any, dim: Any, keepdim: bool) -> Ref | View:
    return _smallest(ctx, self, dim, keepdim)


@lowers("aten.max.dim", takes=_SELF)
def _max(ctx: Lowering, self: Any, dim: int, keepdim: bool) -> tuple[Ref | View, Ref | View]:
    return _largest(ctx, self, dim, keepdim), place_of(ctx, self, dim, keepdim, True)


@lowers("aten.min.dim", takes=_SELF)
def _min(ctx: Lowering, self: Any, dim: int, keepdim: bool) -> tuple[Ref | View, Ref | View]:
    return _smallest(ctx, self, dim, keepdim), place_of(ctx, self, dim, keepdim, False)


def place_of(ctx: Lowering, x: Any, dim: int, keepdim: bool, largest: bool) -> Ref | View:
    """The first place of the largest or smallest entry of an axis."""

    def make(x: Ref, axes: tuple[int, ...], keep: bool) -> Ref:
        (axis,) = axes
        shape = shape_without(x, axes, True)
        attrs = {"k": 1, "axis": axis, "largest": largest, "indices": True}
        places = ctx.emit("topk", x, shape, attrs=attrs, suffix="places")
        return places if keep else views.emit_reshape(ctx, places, shape_without(x, axes, False))

    return reduced(ctx, x, dim, keepdim, "it compares numbers", make)


@lowers("aten.argmax.default", takes=_SELF)
def _argmax(ctx: Lowering, self: Any, dim: int | None, keepdim: bool) -> Ref | View:
    return _place(ctx, self, dim, keepdim, True)


@lowers("aten.argmin.default", takes=_SELF)
def _argmin(ctx: Lowering, self: Any, dim: int | None, keepdim: bool) -> Ref | View:
    return _place(ctx, self, dim, keepdim, False)


def _place(ctx: Lowering, x: Any, dim: int | None, keepdim: bool, largest: bool) -> Ref | View:
    if dim is None:
        raise UnsupportedUse(
            "it finds one place in the whole batch; name an axis, for example with "
            "x.flatten(1).argmax(1)"
        )
    return place_of(ctx, x, dim, keepdim, largest)


@lowers("aten.any.dim", "aten.any.dims", takes=_SELF)
def _any(ctx: Lowering, self: Any, dim: Any, keepdim: bool) -> Ref | View:
    return _largest(ctx, self, dim, keepdim)


@lowers("aten.all.dim", "aten.all.dims", takes=_SELF)
def _all(ctx: Lowering, self: Any, dim: Any, keepdim: bool) -> Ref | View:
    return _smallest(ctx, self, dim, keepdim)


# ---- spread -------------------------------------------------------------------------------------


def _emit_variance(
    ctx: Lowering, x: Ref, axes: tuple[int, ...], keepdim: bool, correction: float
) -> Ref:
    mean = emit_reduced(ctx, "mean", x, axes, True)
    away = ctx.emit("sub", (x, mean), x.shape)
    square = ctx.emit("mul", (away, away), x.shape)
    spread = emit_reduced(ctx, "mean", square, axes, keepdim)
    if correction == 0:
        return spread
    if any(is_dynamic(x.shape[axis]) for axis in axes):
        return _corrected(ctx, x, square, axes, keepdim, correction)
    number = count(x, axes, "it corrects a variance", "use correction=0, or unbiased=False")
    if number <= correction:
        raise UnsupportedUse(
            f"it takes the variance of {number} numbers with a correction of {correction}, which "
            "divides by nothing; use correction=0"
        )
    return line(ctx, spread, number / (number - correction), 0.0)


def _corrected(
    ctx: Lowering, x: Ref, square: Ref, axes: tuple[int, ...], keepdim: bool, correction: float
) -> Ref:
    """A sum of squares over as many numbers as are known at run time only, but for some."""
    free = [axis for axis in axes if is_dynamic(x.shape[axis])]
    number = _length(ctx, x, free[0])
    for axis in free[1:]:
        number = ctx.emit("mul", (number, _length(ctx, x, axis)), number.shape)
    fixed = count(x, [axis for axis in axes if axis not in free], "", "")
    total = emit_sum(ctx, square, axes, True)
    made = ctx.emit("div", (total, line(ctx, number, fixed, -correction)), total.shape)
    return made if keepdim else views.emit_reshape(ctx, made, shape_without(x, axes, False))


def _variance(
    ctx: Lowering, x: Any, dim: Any, correction: float, keepdim: bool, root: bool
) -> Ref | View:
    def make(x: Ref, axes: tuple[int, ...], keep: bool) -> Ref:
        made = _emit_variance(ctx, x, axes, keep, correction)
        return ctx.emit("sqrt", made, made.shape) if root else made

    return reduced(ctx, x, dim, keepdim, "it takes the variance", make)


@lowers("aten.var.correction", takes=_SELF)
def _var(ctx: Lowering, self: Any, dim: Any, correction: Any, keepdim: bool) -> Ref | View:
    return _variance(ctx, self, dim, 1 if correction is None else correction, keepdim, False)


@lowers("aten.var.dim", takes=_SELF)
def _var_dim(ctx: Lowering, self: Any, dim: Any, unbiased: bool, keepdim: bool) -> Ref | View:
    return _variance(ctx, self, dim, int(unbiased), keepdim, False)


@lowers("aten.std.correction", takes=_SELF)
def _std(ctx: Lowering, self: Any, dim: Any, correction: Any, keepdim: bool) -> Ref | View:
    return _variance(ctx, self, dim, 1 if correction is None else correction, keepdim, True)


@lowers("aten.std.dim", takes=_SELF)
def _std_dim(ctx: Lowering, self: Any, dim: Any, unbiased: bool, keepdim: bool) -> Ref | View:
    return _variance(ctx, self, dim, int(unbiased), keepdim, True)


@lowers("aten.var_mean.correction", takes=_SELF)
def _var_mean(
    ctx: Lowering, self: Any, dim: Any, correction: Any, keepdim: bool
) -> tuple[Ref | View, Ref | View]:
    return _var(ctx, self, dim, correction, keepdim), _mean(ctx, self, dim, keepdim)


@lowers("aten.std_mean.correction", takes=_SELF)
def _std_mean(
    ctx: Lowering, self: Any, dim: Any, correction: Any, keepdim: bool
) -> tuple[Ref | View, Ref | View]:
    return _std(ctx, self, dim, correction, keepdim), _mean(ctx, self, dim, keepdim)


# ---- logarithms of sums -------------------------------------------------------------------------


def _powers(ctx: Lowering, x: Ref, axes: tuple[int, ...], keepdim: bool) -> tuple[Ref, Ref, Ref]:
    """The largest value, what each is below it, and the sum of the powers of that."""
    top = emit_reduced(ctx, "max", x, axes, True)
    below = ctx.emit("sub", (x, top), x.shape)
    total = emit_sum(ctx, ctx.emit("exp", below, x.shape), axes, keepdim)
    return top, below, total


@lowers("aten.log_softmax.int", "aten._log_softmax.default", takes=_SELF)
def _log_softmax(ctx: Lowering, self: Any, dim: int) -> Ref | View:
    x = activation(ctx, self)
    axis = dim % x.rank

    def make(ref: Ref) -> Ref:
        _, below, total = _powers(ctx, ref, (axis,), True)
        return ctx.emit("sub", (below, ctx.emit("log", total, total.shape)), ref.shape)

    if axis == x.rank - 1:
        return views.on_last(ctx, x, make)
    if views.sizes_of(ctx, x)[axis] == ctx.batch:
        raise UnsupportedUse(f"it works over the batch (axis {axis}); use another axis")
    return make(ctx.realise(x))


@lowers("aten.logsumexp.default", takes=_SELF)
def _logsumexp(ctx: Lowering, self: Any, dim: Any, keepdim: bool) -> Ref | View:
    def make(x: Ref, axes: tuple[int, ...], keep: bool) -> Ref:
        top, _, total = _powers(ctx, x, axes, keep)
        top = top if keep else emit_reduced(ctx, "max", x, axes, False)
        return ctx.emit("add", (ctx.emit("log", total, total.shape), top), total.shape)

    return reduced(ctx, self, dim, keepdim, "it adds up", make)


# ---- norms --------------------------------------------------------------------------------------


@lowers("aten.linalg_vector_norm.default", takes=_SELF)
def _vector_norm(ctx: Lowering, self: Any, ord: Number, dim: Any, keepdim: bool) -> Ref | View:
    def make(x: Ref, axes: tuple[int, ...], keep: bool) -> Ref:
        if ord == 2:
            return emit_reduced(ctx, "l2_norm", x, axes, keep)
        sizes = ctx.emit("abs", x, x.shape)
        if ord == math.inf:
            return emit_reduced(ctx, "max", sizes, axes, keep)
        return emit_sum(ctx, sizes, axes, keep)

    if ord not in (1, 2, math.inf):
        raise UnsupportedUse(f"it is the {ord}-norm; use 1, 2 or infinity")
    return reduced(ctx, self, dim, keepdim, f"it is the {ord}-norm", make)


@lowers("aten.norm.ScalarOpt_dim", takes=_SELF)
def _norm(ctx: Lowering, self: Any, p: Any, dim: Any, keepdim: bool) -> Ref | View:
    return _vector_norm(ctx, self, 2 if p is None else p, dim, keepdim)


# ---- products -----------------------------------------------------------------------------------


@lowers("aten.prod.dim_int", takes=_SELF)
def _prod(ctx: Lowering, self: Any, dim: int, keepdim: bool) -> Ref | View:
    def make(x: Ref, axes: tuple[int, ...], keep: bool) -> Ref:
        (axis,) = axes
        size = count(x, axes, "it multiplies", "multiply in a fixed axis")
        if size > _MOST_FACTORS:
            raise UnsupportedUse(
                f"it multiplies {size} numbers with each other; {_MOST_FACTORS} are the most"
            )
        made, *others = (cut(ctx, x, axis, i, i + 1) for i in range(size))
        for other in others:
            made = ctx.emit("mul", (made, other), made.shape)
        return made if keep else views.emit_reshape(ctx, made, shape_without(x, axes, False))

    return reduced(ctx, self, dim, keepdim, "it multiplies", make)


# ---- cumulative sums ----------------------------------------------------------------------------


@lowers("aten.cumsum.default", takes=_SELF, axes=("dim",))
def _cumsum(ctx: Lowering, self: Any, dim: int) -> Ref:
    x = ctx.realise(activation(ctx, self))
    axis = dim % x.rank
    if axis == 0:
        raise UnsupportedUse("it adds up over the batch (axis 0); use another axis")
    return ctx.emit("cumsum", x, x.shape, attrs={"axis": axis})

"""Writing into a part of an activation, windows along an axis, and triangles of matrices."""

from __future__ import annotations

from typing import Any

import torch

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import activation, need_constant, need_rank
from lutra.train.exporting.lowering.arrange import (
    OPEN_END,
    cut,
    fixed,
    join_along,
    pick,
    regrouped,
    spread,
)
from lutra.train.exporting.lowering.core import (
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    is_dynamic,
    lowers,
)
from lutra.train.exporting.lowering.operands import constant, is_activation, operand


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
        return spread(ctx, part, ref, ref.shape)
    return views.expanded(ctx, part, ctx.result_sizes)


@lowers("aten.slice_scatter.default", takes=("self", "src"), axes=("dim",))
def _slice_scatter(
    ctx: Lowering, self: Any, src: Any, dim: int, start: int | None, end: int | None, step: int
) -> Ref | View:
    ref, axis = _target(ctx, self, src), dim % len(ctx.node.meta["val"].shape)
    size = ref.shape[axis]
    if not isinstance(size, int):
        if (start or 0) == 0 and (end is None or end >= OPEN_END) and step == 1:
            return _in_place_of(ctx, ref, operand(ctx, src))
        fixed(ref, axis, "it writes into a part of")
    first, stop, step = slice(start, end, step).indices(size)
    if (first, stop, step) == (0, size, 1):
        return _in_place_of(ctx, ref, operand(ctx, src))
    if step != 1:
        count = len(range(first, stop, step))
        part = _spread_to(ctx, ref, operand(ctx, src), axis, count)
        order = torch.arange(size)
        order[first:stop:step] = torch.arange(count) + size
        return pick(ctx, join_along(ctx, (ref, part), axis), axis, order)
    return _written(ctx, ref, axis, first, stop, operand(ctx, src))


@lowers("aten.select_scatter.default", takes=("self", "src"))
def _select_scatter(ctx: Lowering, self: Any, src: Any, dim: int, index: int) -> Ref:
    ref = _target(ctx, self, src)
    axis = dim % ref.rank
    first = index % fixed(ref, axis, "it writes into an entry of")
    part = operand(ctx, src)
    if is_activation(part):
        row = ctx.realise(part)
        part = views.emit_reshape(ctx, row, (*ref.shape[:axis], 1, *ref.shape[axis + 1 :]), "row")
    else:
        part = part.unsqueeze(axis)
    return _written(ctx, ref, axis, first, first + 1, part)


@lowers("aten.diagonal_scatter.default", takes=("self", "src"))
def _diagonal_scatter(
    ctx: Lowering, self: Any, src: Any, offset: int, dim1: int, dim2: int
) -> Ref | View:
    rank = len(ctx.result_sizes)
    axes = (dim1 % rank, dim2 % rank)
    order = [*(axis for axis in range(rank) if axis not in axes), *axes]
    given = operand(ctx, self)
    turned = ctx.realise(views.permuted(ctx, _target(ctx, given, src), order))
    rows, columns = (fixed(turned, axis, "it writes a diagonal of") for axis in (-2, -1))
    flat = views.emit_reshape(ctx, turned, (*turned.shape[:-2], rows * columns), "flat")
    places = torch.arange(rows * columns).reshape(rows, columns).diagonal(offset)
    part = _spread_to(ctx, flat, operand(ctx, src), flat.rank - 1, len(places))
    chosen = torch.arange(rows * columns)
    chosen[places] = torch.arange(len(places)) + rows * columns
    made = pick(ctx, join_along(ctx, (flat, part), flat.rank - 1), flat.rank - 1, chosen)
    apart = views.emit_reshape(ctx, made, turned.shape, "square")
    return views.put_back(ctx, apart, order)


def _spread_to(ctx: Lowering, x: Ref, part: Any, axis: int, count: int) -> Ref:
    """What is written along an axis, in as many entries as are written to."""
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    return ctx.realise(part) if is_activation(part) else spread(ctx, part, x, shape)


def _target(ctx: Lowering, x: Any, part: Any) -> Ref:
    """What is written into, in the shape of the result: constants too, such as zeros."""
    given = operand(ctx, x)
    if is_activation(given):
        return ctx.realise(given)
    part = operand(ctx, part)
    if not is_activation(part):
        raise UnsupportedUse("it works on what is the same for every input; make that a buffer")
    return spread(ctx, given, ctx.realise(part), ctx.result_shape)


def _in_place_of(ctx: Lowering, x: Ref, part: Any) -> Ref:
    return ctx.realise(part) if is_activation(part) else spread(ctx, part, x, x.shape)


def _written(ctx: Lowering, x: Ref, axis: int, first: int, stop: int, part: Any) -> Ref:
    """An activation with a part of an axis from somewhere else."""
    size = x.shape[axis]
    shape = (*x.shape[:axis], stop - first, *x.shape[axis + 1 :])
    middle = ctx.realise(part) if is_activation(part) else spread(ctx, part, x, shape)
    parts = [
        middle if (start, end) == (first, stop) else cut(ctx, x, axis, start, end)
        for start, end in ((0, first), (first, stop), (stop, size))
        if end > start
    ]
    return ctx.emit("concat", parts, x.shape, attrs={"axis": axis}) if len(parts) > 1 else middle


@lowers("aten.unfold.default", takes=("self",), takes_sizes=True)
def _unfold(ctx: Lowering, self: Any, dimension: int, size: int, step: int) -> Ref | View:
    if not isinstance(size, int) or not isinstance(step, int):
        raise UnsupportedUse("the size of its windows is known at run time only; use constants")
    x = ctx.realise(activation(ctx, self))
    axis = dimension % x.rank
    if is_dynamic(x.shape[axis]):
        return _windows(ctx, x, axis, size, step)
    length = fixed(x, axis, "it cuts windows of")
    starts = torch.arange(0, length - size + 1, step)
    index = (starts[:, None] + torch.arange(size)).reshape(-1)
    picked = pick(ctx, x, axis, index)
    sizes = views.sizes_of(ctx, picked)
    cut = views.reshaped(ctx, picked, (*sizes[:axis], len(starts), size, *sizes[axis + 1 :]))
    assert cut is not None
    order = [*range(axis + 1), *range(axis + 2, x.rank + 1), axis + 1]
    return views.permuted(ctx, cut, order)


def _windows(ctx: Lowering, x: Ref, axis: int, size: int, step: int) -> Ref | View:
    """Windows of an axis whose size is known at run time only: the first entry of each, the second
    and so on, side by side."""
    count = ctx.result_sizes[axis]
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    parts = []
    for place in range(size):
        attrs = {"axis": axis, "first": place, "last": size - 1 - place, "step": step}
        part = ctx.emit("trim", x, shape, attrs=attrs, suffix="windows")
        apart = (*shape[: axis + 1], 1, *shape[axis + 1 :])
        parts.append(views.emit_reshape(ctx, part, apart, "entry"))
    made = join_along(ctx, parts, axis + 1) if size > 1 else parts[0]
    order = [*range(axis + 1), *range(axis + 2, x.rank + 1), axis + 1]
    return views.permuted(ctx, made, order)


@lowers("aten.tril.default", "aten.triu.default", takes=("self",))
def _triangle(ctx: Lowering, self: Any, diagonal: int) -> Ref:
    x = ctx.realise(activation(ctx, self))
    rows, columns = (fixed(x, axis, "it cuts a triangle of") for axis in (x.rank - 2, x.rank - 1))
    cut = torch.tril if ".tril." in str(ctx.node.target) else torch.triu
    keep = constant(ctx, cut(torch.ones(rows, columns), diagonal), x, x.rank)
    zero = constant(ctx, 0.0, x, x.rank)
    return ctx.emit("where", (keep, x, zero), x.shape)


@lowers("aten.pixel_unshuffle.default", takes=("self",))
def _pixel_unshuffle(ctx: Lowering, self: Any, downscale_factor: int) -> Ref | View:
    x = activation(ctx, self)
    ref = ctx.realise(x)
    need_rank(ref, 4)
    factor = downscale_factor
    n, c, h, w = views.sizes_of(ctx, x)
    if is_dynamic(h) or is_dynamic(w):
        return _unshuffled(ctx, ref, factor)
    cut = (n, c, h // factor, factor, w // factor, factor)
    return regrouped(ctx, x, cut, (0, 1, 3, 5, 2, 4))


def _unshuffled(ctx: Lowering, x: Ref, factor: int) -> Ref:
    """Pixels of an image whose size is known at run time only: those of each place in a square of
    them are an image of their own."""
    n, _, height, width = ctx.result_shape
    small = fixed(x, 1, "it arranges")
    parts = []
    for down in range(factor):
        attrs = {"axis": 2, "first": down, "last": factor - 1 - down, "step": factor}
        rows = ctx.emit("trim", x, (n, small, height, x.shape[3]), attrs=attrs, suffix="rows")
        for along in range(factor):
            attrs = {"axis": 3, "first": along, "last": factor - 1 - along, "step": factor}
            shape = (n, small, height, width)
            parts.append(ctx.emit("trim", rows, shape, attrs=attrs, suffix="pixels"))
    joined = join_along(ctx, parts, 1)
    order = torch.arange(small * factor**2).reshape(factor * factor, small).t().reshape(-1)
    return pick(ctx, joined, 1, order)

"""Values written to places: by a mask, by constant indices, or by computed ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import activation
from lutra.train.exporting.lowering.arrange import pick, spread
from lutra.train.exporting.lowering.core import Deferred, Lowering, Ref, UnsupportedUse, lowers
from lutra.train.exporting.lowering.deferred import computed
from lutra.train.exporting.lowering.operands import constant, is_activation, operand

#: Computed places of one axis that are written one after the other.
_MOST_PLACES = 64


def _value(ctx: Lowering, x: Any) -> Any:
    return computed(ctx, x) if isinstance(x, Deferred) else operand(ctx, x)


def _as_ref(ctx: Lowering, x: Any, like: Ref) -> Ref:
    """An activation or constant that broadcasts to the rank of another."""
    if is_activation(x):
        ref = ctx.realise(x)
        if ref.rank < like.rank:  # samples stay in front
            raise UnsupportedUse(
                f"it writes values of {ref.rank} axes into {like.rank}; give them the same axes"
            )
        return ref
    tensor = torch.as_tensor(x)
    return constant(ctx, tensor, like, like.rank)


# ---- index_put ----------------------------------------------------------------------------------


@lowers("aten.index_put.default", takes=("self", "indices", "values"))
def _index_put(ctx: Lowering, self: Any, indices: list[Any], values: Any, accumulate: bool) -> Ref:
    given = [(axis, x) for axis, x in enumerate(indices) if x is not None]
    node: Any = ctx.node.args[1]
    is_mask = (
        len(given) == 1
        and isinstance(node[given[0][0]], fx.Node)
        and (node[given[0][0]].meta["val"].dtype == torch.bool)
    )
    if is_mask and given[0][0] == 0:
        return _under_mask(ctx, self, given[0][1], values, accumulate)
    if len(given) != 1 or is_mask:
        raise UnsupportedUse("it writes to places along several axes; write with torch.where")
    ((axis, index),) = given
    index = _value(ctx, index)
    if not isinstance(index, Tensor) or index.ndim != 1:
        raise UnsupportedUse(
            "it writes to places that are computed from activations; use scatter along an axis"
        )
    part = _value(ctx, values)
    if axis == 0:
        raise UnsupportedUse("it writes into samples of the batch (axis 0); name another axis")
    target = _value(ctx, self)
    x = ctx.realise(target if is_activation(target) else activation(ctx, self))
    return _at_constant(ctx, x, axis, index, part, accumulate)


def _under_mask(ctx: Lowering, x: Any, mask: Any, values: Any, accumulate: bool) -> Ref:
    part = _value(ctx, values)
    single = not is_activation(part) and torch.as_tensor(part).numel() == 1
    if accumulate or not single:
        raise UnsupportedUse(
            "it writes several values under a mask; write x = torch.where(mask, values, x)"
        )
    ref = ctx.realise(activation(ctx, x))
    keep = ctx.realise(activation(ctx, mask))
    if keep.rank < ref.rank:
        keep = views.emit_reshape(ctx, keep, (*keep.shape, *(1,) * (ref.rank - keep.rank)), "mask")
    number = constant(ctx, torch.as_tensor(part).reshape(()), ref, ref.rank)
    return ctx.emit("where", (keep, number, ref), ref.shape)


def _at_constant(
    ctx: Lowering, x: Ref, axis: int, index: Tensor, part: Any, accumulate: bool
) -> Ref:
    """Entries of an axis from somewhere else, at places that are known."""
    size = x.shape[axis]
    if not isinstance(size, int):
        raise UnsupportedUse(
            f"it writes to places of axis {axis}, whose size is known at run time only; take it "
            "out of dynamic_axes"
        )
    index = torch.where(index < 0, index + size, index).long()
    shape = (*x.shape[:axis], len(index), *x.shape[axis + 1 :])
    rows = _as_ref(ctx, part, x)
    if rows.shape != shape:
        attrs = {"shape": [0 if a == b else b for a, b in zip(rows.shape, shape, strict=True)][1:]}
        rows = ctx.emit("expand", rows, shape, attrs=attrs, suffix="rows")
    if accumulate:
        added = x
        for place, row in enumerate(index.tolist()):
            one = pick(ctx, rows, axis, torch.tensor([place]))
            at = torch.zeros(size)
            at[row] = 1.0
            turned = at.reshape([1, *(size if i == axis else 1 for i in range(1, x.rank))])
            spread = ctx.emit("mul", (constant(ctx, turned, x, x.rank), one), x.shape)
            added = ctx.emit("add", (added, spread), x.shape)
        return added
    order = torch.arange(size)
    order[index] = torch.arange(len(index)) + size
    both = (*x.shape[:axis], size + len(index), *x.shape[axis + 1 :])
    joined = ctx.emit("concat", (x, rows), both, attrs={"axis": axis}, suffix="both")
    return pick(ctx, joined, axis, order)


@lowers("aten.index_copy.default", takes=("self", "source"), axes=("dim",))
def _index_copy(ctx: Lowering, self: Any, dim: int, index: Any, source: Any) -> Ref:
    return _indexed(ctx, self, dim, index, source, accumulate=False)


@lowers("aten.index_fill.int_Scalar", takes=("self",), axes=("dim",))
def _index_fill(ctx: Lowering, self: Any, dim: int, index: Any, value: Any) -> Ref:
    return _indexed(ctx, self, dim, index, torch.tensor(float(value)), accumulate=False)


@lowers("aten.index_add.default", takes=("self", "source"), axes=("dim",))
def _index_add(ctx: Lowering, self: Any, dim: int, index: Any, source: Any, alpha: float) -> Ref:
    if alpha != 1:
        raise UnsupportedUse("it scales what it adds; multiply before")
    return _indexed(ctx, self, dim, index, source, accumulate=True)


def _indexed(ctx: Lowering, x: Any, dim: int, index: Any, source: Any, *, accumulate: bool) -> Ref:
    part, target = _value(ctx, source), _value(ctx, x)
    if not isinstance(index, Tensor):
        raise UnsupportedUse("its index is computed from activations; use scatter along an axis")
    if is_activation(target):
        ref = ctx.realise(target)
    else:  # such as zeros
        like = ctx.realise(activation(ctx, part))
        ref = spread(ctx, target, like, ctx.result_shape)
    if dim % ref.rank == 0:
        raise UnsupportedUse("it writes into samples of the batch (axis 0); name another axis")
    return _at_constant(ctx, ref, dim % ref.rank, index, part, accumulate)


# ---- scatter ------------------------------------------------------------------------------------


@lowers("aten.scatter.value", takes=("self", "index"), axes=("dim",))
def _scatter_value(ctx: Lowering, self: Any, dim: int, index: Any, value: Any) -> Ref:
    return _scattered(ctx, self, dim, index, float(value), "")


@lowers("aten.scatter.src", takes=("self", "index", "src"), axes=("dim",))
def _scatter(ctx: Lowering, self: Any, dim: int, index: Any, src: Any) -> Ref:
    return _scattered(ctx, self, dim, index, src, "")


@lowers("aten.scatter_add.default", takes=("self", "index", "src"), axes=("dim",))
def _scatter_add(ctx: Lowering, self: Any, dim: int, index: Any, src: Any) -> Ref:
    return _scattered(ctx, self, dim, index, src, "sum")


@lowers("aten.scatter_reduce.two", takes=("self", "index", "src"), axes=("dim",))
def _scatter_reduce(
    ctx: Lowering, self: Any, dim: int, index: Any, src: Any, reduce: str, include_self: bool
) -> Ref:
    return _scattered(ctx, self, dim, index, src, reduce, include_self)


#: How a value joins what is at its place; what is neither added nor multiplied does so unless it
#: is the first.
_JOINS = {"sum": "add", "mean": "add", "prod": "mul", "amax": "maximum", "amin": "minimum"}


def _scattered(
    ctx: Lowering, x: Any, dim: int, index: Any, src: Any, reduce: str, whole: bool = True
) -> Ref:
    """Values put to places of an axis, one entry of the indices after the other.

    Args:
        ctx: The walk.
        x: What they are put into.
        dim: The axis.
        index: The places.
        src: The values.
        reduce: How they join what is there; nothing: they take its place.
        whole: Whether what was there before counts.
    """
    given = [_value(ctx, each) for each in (x, index, src)]
    like = next((each for each in given if is_activation(each)), None)
    if like is None:
        raise UnsupportedUse("it works on what is the same for every input; make that a buffer")
    shape = ctx.result_shape
    rank = len(shape)
    refs = []
    for each in given:
        if is_activation(each):
            refs.append(ctx.realise(each))
            continue
        tensor = torch.as_tensor(each)
        if tensor.ndim == rank and bool((tensor == tensor[:1]).all()):
            tensor = tensor[:1]
        refs.append(constant(ctx, tensor, ctx.realise(like), rank))
    target, places, values = refs
    axis = dim % rank
    size, count = shape[axis], places.shape[axis]
    if axis == 0 or not isinstance(size, int) or not isinstance(count, int):
        raise UnsupportedUse("it writes along the batch, or an axis of a size known at run time")
    if count > _MOST_PLACES:
        raise UnsupportedUse(
            f"it writes to {count} computed places of an axis, and {_MOST_PLACES} are the most; "
            "use torch.where with a mask"
        )
    others = [i for i in range(1, rank) if i != axis]
    for i in others:
        if places.shape[i] not in (1, shape[i]):
            raise UnsupportedUse(
                "its indices are shorter than what it writes into along another axis; cut that "
                "before"
            )
    numbers = torch.arange(size).reshape([size if i == axis else 1 for i in range(rank)])
    every = constant(ctx, numbers, ctx.realise(like), rank)

    def entry(ref: Ref, place: int) -> Ref:
        return ref if ref.shape[axis] == 1 else pick(ctx, ref, axis, torch.tensor([place]))

    one = constant(ctx, 1.0, target, rank)
    number: Ref | None = None  # of values that were put to each place
    for place in range(count):
        at = entry(places, place)
        met = tuple(size if i == axis else at.shape[i] for i in range(rank))
        here = ctx.emit("equal", (every, at), met, suffix="here")
        value = entry(values, place)
        if not reduce:
            target = ctx.emit("where", (here, value, target), shape)
            continue
        joined = ctx.emit(_JOINS[reduce], (target, value), shape)
        if not whole:  # the first one takes the place
            first = here if number is None else ctx.emit("greater", (one, number), number.shape)
            joined = ctx.emit("where", (first, value, joined), shape)
        target = ctx.emit("where", (here, joined, target), shape)
        if not whole or reduce == "mean":
            number = here if number is None else _counted(ctx, number, here)
    if reduce == "mean":
        assert number is not None
        number = _counted(ctx, number, one) if whole else number
        target = ctx.emit("div", (target, _at_least(ctx, number, one)), shape)
    return target


def _counted(ctx: Lowering, number: Ref, more: Ref) -> Ref:
    return ctx.emit("add", (number, more), number.shape)


def _at_least(ctx: Lowering, number: Ref, one: Ref) -> Ref:
    return ctx.emit("maximum", (number, one), number.shape)

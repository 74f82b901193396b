"""Operators on several operands, element by element: activations, views of them and constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import text
from lutra.train.exporting.lowering.core import (
    Deferred,
    Lowering,
    Ref,
    Sizes,
    UnsupportedUse,
    View,
    is_dynamic,
)
from lutra.train.exporting.lowering.deferred import computed, in_parts, same_numbers
from lutra.train.exporting.lowering.emitter import expressions

_WORDS = {"add": "adds", "sub": "subtracts", "mul": "multiplies", "div": "divides"}


def operand(ctx: Lowering, x: Any) -> Any:
    """An argument as an activation, a view or a constant."""
    if not isinstance(x, Deferred):
        return x
    filled: Ref | View | None = _filled(ctx, x)
    filled = _parts(ctx, x) if filled is None else filled
    return computed(ctx, x) if filled is None else filled


def _parts(ctx: Lowering, x: Deferred) -> Ref | View | None:
    """What is the same for every sample, with parts of samples in one axis with the batch."""
    sizes = expressions(x.node.meta["val"].shape)
    found = [i for i, size in enumerate(sizes) if is_dynamic(size) and size != ctx.batch]
    if x.inputs or len(found) != 1 or not isinstance(like := first_activation(ctx), Ref):
        return None
    (axis,) = found
    count = sizes[axis] / ctx.batch
    if not getattr(count, "is_Integer", False):
        return None
    one, two = in_parts(ctx, x, axis, int(count))
    if not (same_numbers(two, two[:1].expand_as(two)) and same_numbers(one, two[:1])):
        return None
    made = constant(ctx, one, like, one.ndim)
    order = [*range(1, axis + 1), 0, *range(axis + 1, made.rank)]
    return views.reshaped(ctx, views.permuted(ctx, made, order), sizes)


def first_activation(ctx: Lowering) -> Ref | None:
    """Some activation so far, which has the batch; None before there is one."""
    return ctx.find(lambda ref: not ctx.is_integers(ref))


def _filled(ctx: Lowering, x: Deferred) -> Ref | None:
    """One number in a shape that is known at run time only, where an activation has that shape."""
    value = x.node.meta["val"]
    sizes = tuple(size if isinstance(size, int) else size.node.expr for size in value.shape)
    if x.inputs or not any(is_dynamic(size) and size != ctx.batch for size in sizes):
        return None
    values = ctx.sources.evaluate(x.node, ctx.sources.sizes(), {}).float()
    number = float(values.reshape(-1)[0]) if values.numel() else 0.0
    if not bool((values == number).all()):
        return None
    shape = (None, *sizes[1:])
    if sizes[0] != ctx.batch:
        return None
    like = ctx.find(lambda ref: ref.shape == shape and not ctx.is_integers(ref))
    if like is None:
        return None
    finite = number if math.isfinite(number) else 0.0
    attrs = {"low": finite, "high": finite}  # of NaN too
    made = ctx.emit("clamp", like, shape, attrs=attrs, suffix="filled")
    return made if finite == number else infinity(ctx, made, number)


def is_activation(x: Any) -> bool:
    return isinstance(x, (Ref, View))


def base_of(x: Ref | View) -> Ref:
    """The graph value of an activation or a view."""
    return x.base if isinstance(x, View) else x


def constant(ctx: Lowering, values: Any, like: Ref, rank: int) -> Ref:
    """Emit an activation that holds constants, the same for every sample.

    Args:
        ctx: The walk.
        values: A number, or a tensor that broadcasts to `rank` axes.
        like: An activation, which has the batch.
        rank: Axes of the result; those that the values lack are of size 1.

    Raises:
        UnsupportedUse: The values differ from sample to sample, or are no numbers.
    """
    tensor = torch.as_tensor(values).detach().float()
    if tensor.ndim > rank or (tensor.ndim == rank and tensor.shape[0] != 1):
        raise UnsupportedUse(
            f"a constant of shape {tuple(tensor.shape)} meets the batch (axis 0); give it a size "
            "of 1 there"
        )
    if not bool(tensor.isfinite().all()):
        return _with_infinity(ctx, tensor, like, rank)
    sizes = (1,) * (rank - 1 - tensor.ndim) + tuple(tensor.shape)
    sizes = sizes[-(rank - 1) :] if rank > 1 else ()
    return ctx.emit(
        "constant",
        like,
        (like.shape[0], *sizes),
        attrs={"shape": sizes},
        tensors={"value": tensor.reshape(-1).contiguous()},
        suffix="constant",
    )


def infinity(ctx: Lowering, zero: Ref, number: float) -> Ref:
    """Infinity of the sign of a number, or NaN, in the shape of zeros: no file holds them."""
    if math.isnan(number):
        endless = infinity(ctx, zero, math.inf)
        return ctx.emit("sub", (endless, endless), zero.shape, suffix="nan")
    return ctx.emit("log" if number < 0 else "reciprocal", zero, zero.shape, suffix="infinity")


def _with_infinity(ctx: Lowering, values: Tensor, like: Ref, rank: int) -> Ref:
    """A constant of which some numbers are infinity or NaN."""
    made = constant(ctx, torch.where(values.isfinite(), values, 0.0), like, rank)
    for number in (-math.inf, math.inf, math.nan):
        place = values.isnan() if math.isnan(number) else values == number
        if bool(place.all()):
            return infinity(ctx, made, number)
        if bool(place.any()):
            endless = infinity(ctx, constant(ctx, 0.0, like, rank), number)
            where = (constant(ctx, place, like, rank), endless, made)
            made = ctx.emit("where", where, made.shape)
    return made


def together(ctx: Lowering, op: str, operands: Sequence[Any]) -> Ref | View:
    """Emit an operator on operands that broadcasting puts together.

    Args:
        ctx: The walk.
        op: Its name.
        operands: Activations, views, numbers and constants; one is an activation at least.
    """
    small = [views.unrepeated(ctx, x) if is_activation(x) else x for x in operands]
    given = [x for x in small if is_activation(x)]
    if all(views.is_sample(ctx, x) for x in given):
        rank = max(x.rank for x in given)
        refs = [ctx.realise(x) if is_activation(x) else x for x in small]
        like = next(x for x in refs if isinstance(x, Ref))
        made = [x if isinstance(x, Ref) else constant(ctx, x, like, rank) for x in refs]
        shape = _common(ctx, op, made)
        wanted = ctx.result_shape if _repeats(shape, ctx.result_shape) else shape
        result = ctx.emit(op, made, shape)
        if wanted != shape:  # all repeat values along one axis
            return views.expanded(ctx, result, ctx.result_sizes)
        return result
    several = [x for x in operands if is_activation(x)]
    if any(isinstance(x, Tensor) and x.numel() > 1 for x in operands):
        return _turned(ctx, op, small)

    def make(*bases: Ref) -> Ref:
        rest = iter(bases)
        refs = [
            next(rest)
            if is_activation(x)
            else constant(ctx, torch.as_tensor(x).reshape(()), bases[0], bases[0].rank)
            for x in operands
        ]
        return ctx.emit(op, refs, bases[0].shape)

    return views.on_each(ctx, several, make)


def _turned(ctx: Lowering, op: str, operands: Sequence[Any]) -> Ref | View:
    """Operands with constants among them, with the batch put in front."""
    first = next(x for x in operands if is_activation(x) and not views.is_sample(ctx, x))
    order = views.batch_first(ctx, first)
    rank = len(order)
    refs: list[Any] = []
    for x in operands:
        if is_activation(x):
            if x.rank != rank:
                raise UnsupportedUse("its operands have different numbers of axes; unsqueeze them")
            refs.append(ctx.realise(views.permuted(ctx, x, order)))
        else:
            values = torch.as_tensor(x)
            spread = values.reshape((1,) * (rank - values.ndim) + tuple(values.shape))
            refs.append(spread.permute(order))
    like = next(x for x in refs if isinstance(x, Ref))
    made = [x if isinstance(x, Ref) else constant(ctx, x, like, rank) for x in refs]
    return views.put_back(ctx, ctx.emit(op, made, _common(ctx, op, made)), order)


def _repeats(small: Sizes, large: Sizes) -> bool:
    return len(small) == len(large) and any(
        s == 1 != size for s, size in zip(small, large, strict=True)
    )


def _common(ctx: Lowering, op: str, refs: Sequence[Ref]) -> Sizes:
    shape = refs[0].shape
    for ref in refs[1:]:
        fits = len(shape) == ref.rank and all(
            x == y or 1 in (x, y) or not (isinstance(x, int) and isinstance(y, int))
            for x, y in zip(shape, ref.shape, strict=True)
        )
        if not fits:
            word = _WORDS.get(op, "puts together")
            raise UnsupportedUse(
                f"it {word} shapes {text(refs[0])} and {text(ref)}; operands "
                "must have equal shapes, or sizes of 1"
            )
        shape = tuple(y if x == 1 else x for x, y in zip(shape, ref.shape, strict=True))
    return shape

"""Rows of constants at places that are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.core import Lowering, Ref, UnsupportedUse, View
from lutra.train.exporting.lowering.operands import is_activation, operand, together
from lutra.train.exporting.lowering.values import Atom


def embedded(ctx: Lowering, ids: Ref | View, tensors: dict[str, Tensor]) -> Ref | View:
    """Rows of a table, whatever the order of what counts them.

    Args:
        ctx: The walk.
        ids: Whole numbers.
        tensors: The table (S, D), as an embedding has it.
    """
    width = tensors["weight"].shape[1]
    if views.is_sample(ctx, ids):
        ref = ctx.realise(ids)
        return ctx.emit("embedding", ref, (*ref.shape, width), tensors=tensors)
    view = views.view_of(ctx, ids)
    base = view.base  # which has every number, in another order
    made = ctx.emit("embedding", base, (*base.shape, width), tensors=tensors)
    last = () if width == 1 else (Atom(base.rank, 1, width),)
    return views.simplest(ctx, View(made, (*view.axes, last), ctx.node))


def of_constant(ctx: Lowering, x: Any, indices: Sequence[Any], axis: int = 0) -> Any:
    """Parts of a constant at computed places, as in `table[ids]`; None for any other index.

    Args:
        ctx: The walk.
        x: What is picked from.
        indices: One for each axis from `axis` on; None for one that stays whole.
        axis: The first axis.
    """
    given = operand(ctx, x)
    if is_activation(given) or not indices or any(index is None for index in indices):
        return None
    places = [operand(ctx, index) for index in indices]
    if not any(is_activation(place) for place in places):
        return None
    if any(isinstance(place, Tensor) and place.dtype == torch.bool for place in places):
        raise UnsupportedUse("it picks by a mask of bools; write the indices as a list of integers")
    count = len(places)
    sizes = given.shape[axis : axis + count]
    others = [*given.shape[:axis], *given.shape[axis + count :]]
    front = given.movedim(tuple(range(axis, axis + count)), tuple(range(count)))
    table = front.reshape(sizes.numel(), -1).float().contiguous()
    ids = places[0] if count == 1 else _flat(ctx, places, sizes)
    rows = embedded(ctx, ids, {"weight": table})
    where = views.sizes_of(ctx, ids)
    made = views.reshaped(ctx, rows, (*where, *others))
    assert made is not None  # the features of a value
    order = [*range(len(where), len(where) + axis), *range(len(where))]
    return views.permuted(ctx, made, [*order, *range(len(order), made.rank)])


def _flat(ctx: Lowering, places: Sequence[Any], sizes: Sequence[int]) -> Ref | View:
    """The place in a table whose axes were made one; below 0 where one of them is outside."""
    total: Any = None
    inside: Any = None
    for place, size in zip(places, sizes, strict=True):
        from_end = together(ctx, "add", (place, float(size))) if is_activation(place) else None
        at: Any
        if from_end is None:
            at = (place % size).float()
        else:
            below = together(ctx, "greater", (0.0, place))
            at = together(ctx, "where", (below, from_end, place))
            known = together(
                ctx,
                "mul",
                (
                    together(ctx, "greater_equal", (at, 0.0)),
                    together(ctx, "greater", (float(size), at)),
                ),
            )
            inside = known if inside is None else together(ctx, "mul", (inside, known))
        scaled = None if total is None else _scaled(ctx, total, float(size))
        total = at if scaled is None else _sum(ctx, scaled, at)
    return together(ctx, "where", (inside, total, -1.0))


def _scaled(ctx: Lowering, x: Any, factor: float) -> Any:
    return together(ctx, "mul", (x, factor)) if is_activation(x) else x * factor


def _sum(ctx: Lowering, x: Any, y: Any) -> Any:
    return together(ctx, "add", (x, y)) if is_activation(x) or is_activation(y) else x + y

"""The largest entries, and entries at indices that are computed or given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import activation, text
from lutra.train.exporting.lowering.core import (
    Deferred,
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    lowers,
)
from lutra.train.exporting.lowering.operands import constant, is_activation, operand


@lowers("aten.topk.default", takes=("self",))
def _topk(ctx: Lowering, self: Any, k: int, dim: int, largest: bool) -> tuple[Any, Any]:
    x = activation(ctx, self)
    last = dim % x.rank == x.rank - 1
    if not views.is_sample(ctx, x) and not last:
        raise UnsupportedUse("it works along another axis than the last, with the batch elsewhere")

    def chosen(ref: Ref, indices: bool) -> Ref:
        axis = ref.rank - 1 if last else dim % ref.rank
        if axis == 0:
            raise UnsupportedUse("it compares the samples of the batch (axis 0); name another axis")
        attrs = {"k": k, "axis": axis, "largest": largest, "indices": indices}
        shape = (*ref.shape[:axis], k, *ref.shape[axis + 1 :])
        return ctx.emit("topk", ref, shape, attrs=attrs, suffix="places" if indices else "topk")

    return (
        views.on_last(ctx, x, lambda ref: chosen(ref, False)),
        views.on_last(ctx, x, lambda ref: chosen(ref, True)),
    )


@lowers("aten.gather.default", takes=("self", "index"))
def _gather(ctx: Lowering, self: Any, dim: int, index: Any) -> Ref:
    given = operand(ctx, self)
    if isinstance(given, Tensor):
        return _of_constant(ctx, given, dim % given.ndim, index)
    self = ctx.realise(given)
    axis = dim % self.rank
    if axis == 0:
        raise UnsupportedUse("it picks samples of the batch (axis 0); name another axis")
    places = operand(ctx, index)
    if isinstance(places, Tensor):  # the same for every sample
        places = constant(ctx, places, self, self.rank)
    small = views.unrepeated(ctx, places) if isinstance(places, View) else places
    by = ctx.realise(small if views.is_sample(ctx, small) else places)
    for i, (size, given) in enumerate(zip(self.shape, by.shape, strict=True)):
        known = isinstance(size, int) and isinstance(given, int)
        if i != axis and known and given not in (1, size):
            raise UnsupportedUse(
                f"it picks from {text(self)} by indices of shape {text(by)}; all sizes but those "
                f"of axis {axis} must be equal"
            )
    shape = (*self.shape[:axis], by.shape[axis], *self.shape[axis + 1 :])
    return ctx.emit("take_along", (self, by), shape, attrs={"axis": axis})


def of_each_sample(ctx: Lowering, x: Any, indices: Sequence[Any]) -> Ref | View | None:
    """An entry of each sample, as in `x[torch.arange(N), places]`; None for any other index.

    Args:
        ctx: The walk.
        x: An activation (N, T, ...).
        indices: One for each axis that is picked from: the number of the sample, (N,) or (N, 1),
            and places (N,) or (N, K).
    """
    if len(indices) != 2 or not isinstance(indices[0], Deferred) or not is_activation(x):
        return None
    if indices[0].inputs or not _numbers_samples(ctx, indices[0]):
        return None
    if not views.is_sample(ctx, x):
        raise UnsupportedUse("it picks from each sample, with the batch not in axis 0")
    ref, given = ctx.realise(x), operand(ctx, indices[1])
    if not is_activation(given):
        return None
    places = ctx.realise(given)
    size, count = ref.shape[1], 1 if places.rank == 1 else places.shape[1]
    if places.rank > 2:
        raise UnsupportedUse("it picks from each sample by indices of more than two axes")
    if isinstance(size, int):  # they may count from the end
        line = {"scale": 1.0, "bias": float(size)}
        end = ctx.emit("affine_scalar", places, places.shape, attrs=line)
        zero = constant(ctx, 0.0, places, places.rank)
        below = ctx.emit("greater", (zero, places), places.shape)
        places = ctx.emit("where", (below, end, places), places.shape)
    shape = (None, count, *(1 for _ in ref.shape[2:]))
    by = views.emit_reshape(ctx, places, shape, "places")
    made = ctx.emit("take_along", (ref, by), (None, count, *ref.shape[2:]), attrs={"axis": 1})
    return views.reshaped(ctx, made, ctx.result_sizes)


def _numbers_samples(ctx: Lowering, x: Deferred) -> bool:
    """Whether what is deferred counts the samples of the batch."""
    value = x.node.meta["val"]
    if value.ndim not in (1, 2) or any(size != 1 for size in value.shape[1:]):
        return False
    for batch in (1, 2, 5):
        numbers = ctx.sources.evaluate(x.node, ctx.sources.sizes(first=batch), {})
        if not torch.equal(numbers.reshape(-1), torch.arange(batch)):
            return False
    return True


def _of_constant(ctx: Lowering, values: Tensor, axis: int, index: Any) -> Ref:
    """Entries of a constant at places that are computed."""
    places = ctx.realise(activation(ctx, index))
    if values.numel() and bool((values == values.reshape(-1)[0]).all()):  # such as types of tokens
        number = float(values.reshape(-1)[0])
        return ctx.emit("clamp", places, places.shape, attrs={"low": number, "high": number})
    row = values.movedim(axis, -1).reshape(-1, values.shape[axis])
    if axis == 0 or not bool((row == row[:1]).all()):
        raise UnsupportedUse(
            "it picks from a constant that differs from row to row; look rows up by nn.Embedding"
        )
    table = row[0].float().reshape(-1, 1).contiguous()
    made = ctx.emit("embedding", places, (*places.shape, 1), tensors={"weight": table})
    return views.emit_reshape(ctx, made, places.shape)

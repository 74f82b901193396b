"""The largest entries, and entries at indices that are computed or given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import activation, text
from lutra.train.exporting.lowering.core import (
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    lowers,
)
from lutra.train.exporting.lowering.operands import constant, operand


@lowers("aten.topk.default")
def _topk(ctx: Lowering, self: Ref, k: int, dim: int, largest: bool) -> tuple[Ref, Ref]:
    axis = dim % self.rank
    if axis == 0:
        raise UnsupportedUse("it compares the samples of the batch (axis 0); name another axis")
    attrs = {"k": k, "axis": axis, "largest": largest}
    values, places = (
        ctx.emit("topk", self, attrs={**attrs, "indices": indices}, suffix=suffix)
        for indices, suffix in ((False, "topk"), (True, "places"))
    )
    return values, places


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

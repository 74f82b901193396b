"""The largest entries, and entries at indices that are computed or given."""

from __future__ import annotations

from typing import Any

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import activation, text
from lutra.train.exporting.lowering.core import (
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    lowers,
)


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


@lowers("aten.gather.default", takes=("index",))
def _gather(ctx: Lowering, self: Ref, dim: int, index: Any) -> Ref:
    axis = dim % self.rank
    if axis == 0:
        raise UnsupportedUse("it picks samples of the batch (axis 0); name another axis")
    places = activation(ctx, index)
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

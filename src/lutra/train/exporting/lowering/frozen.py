"""Layers of all families: `lutra::frozen` becomes the operator that it names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import activation, need_rank
from lutra.train.exporting.lowering.core import Lowering, Ref, View, lowers
from lutra.train.operators.frozen import FrozenNode


@lowers("lutra.frozen.default", takes=("x",))
def _frozen(ctx: Lowering, x: Any, tensors: list[Tensor], node: str) -> Ref | View:
    parsed = FrozenNode.from_json(node)
    roles = dict(zip(parsed.roles, tensors, strict=True))
    given = activation(ctx, x)
    if not parsed.is_linear:
        ref = ctx.realise(given)
        need_rank(ref, 4)
        return ctx.emit(parsed.op, ref, attrs=parsed.attrs, tensors=roles)

    def rows(ref: Ref) -> Ref:
        shape = parsed.output_shape(ref.shape, tensors)
        return ctx.emit(parsed.op, ref, shape, attrs=parsed.attrs, tensors=roles)

    return views.on_last(ctx, given, rows)

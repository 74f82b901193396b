"""Recurrent layers with matrices in int8: `lutra::int8_recurrent` becomes the operator that it
names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lutra.train.exporting.lowering.arguments import activation
from lutra.train.exporting.lowering.core import Lowering, Ref, lowers
from lutra.train.exporting.lowering.recurrent import end_of, is_zero
from lutra.train.operators import int8_recurrent as operators  # noqa: F401  (its operator)
from lutra.train.operators.frozen import FrozenNode


@lowers("lutra.int8_recurrent.default", takes=("x", "states"))
def _int8_recurrent(
    ctx: Lowering, x: Any, states: Sequence[Any], tensors: list[Tensor], node: str
) -> tuple[Ref, Ref]:
    parsed = FrozenNode.from_json(node)
    roles = dict(zip(parsed.roles, tensors, strict=True))
    sequence = ctx.realise(activation(ctx, x))
    given: list[Ref] = []
    if not all(is_zero(ctx, state) for state in states):
        given = [ctx.realise(activation(ctx, state)) for state in states]
    width = roles["weight_hh"].shape[1] * (2 if parsed.attrs.get("cells") else 1)
    shape = (*sequence.shape[:2], width)
    made = ctx.emit(parsed.op, (sequence, *given), shape, attrs=parsed.attrs, tensors=roles)
    return made, end_of(ctx, made, bool(parsed.attrs["reverse"]))

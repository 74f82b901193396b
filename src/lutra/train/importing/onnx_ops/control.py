"""Branches: one that constants and sizes decide about is imported, the other one is not."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from lutra.train.importing.builder import Builder, Numbers, Refusal, Value
from lutra.train.importing.onnx_ops.registry import Op, onnx_op


@onnx_op("If")
def _if(b: Builder, op: Op, condition: Value) -> Any:
    if isinstance(condition, Numbers):
        chosen = condition.items[0] if len(condition.items) == 1 else None
        if isinstance(chosen, fx.Node) or chosen is None:
            raise Refusal(
                "a size that is known at run time only decides which branch runs; fix the size "
                "with shapes="
            )
    elif isinstance(condition, Tensor) and condition.numel() == 1:
        chosen = bool(condition.item())
    else:
        raise Refusal(
            "values of the inputs decide which branch runs; make them constants with constants="
        )
    branch = op.get("then_branch" if chosen else "else_branch")
    if branch is None:
        raise Refusal("it lacks a branch")
    return op.context.branch(branch)

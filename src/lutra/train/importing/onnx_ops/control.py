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
                "a size that is known at run time only decides which branch runs; fix the size: "
                "shapes= of load_onnx, or --shape NAME=N,... on the command line"
            )
    elif isinstance(condition, Tensor) and condition.numel() == 1:
        chosen = bool(condition.item())
    else:
        names = ", ".join(f"'{name}'" for name in _inputs_of(condition)) or "of the file"
        raise Refusal(
            f"the values of inputs ({names}) decide which branch runs; make them constants: "
            "constants={name: value} of load_onnx, or --constant NAME=VALUE on the command line"
        )
    branch = op.get("then_branch" if chosen else "else_branch")
    if branch is None:
        raise Refusal("it lacks a branch")
    return op.context.branch(branch)


def _inputs_of(value: Value) -> list[str]:
    """Names of the inputs that a value is computed from."""
    waiting = [value] if isinstance(value, fx.Node) else []
    found: dict[fx.Node, None] = {}
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting += node.all_input_nodes
    return sorted(node.name for node in found if node.op == "placeholder")

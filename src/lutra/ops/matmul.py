"""Products of two values, matrix by matrix: (..., M, K) times (..., K, P).

All axes before the last two count the matrices; a size of 1 is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from lutra.formatting import shape_text
from lutra.node import Array, Node, Shape, Value
from lutra.ops.elementwise import broadcast, check_dynamic
from lutra.ops.spec import Attr, Cost, OpSpec, flag, inner, need_rank, node_error


def _matrices(node: Node, inputs: Sequence[Value]) -> tuple[Shape, Shape]:
    """The shapes of both operands, transposed where the node says so."""
    shapes = []
    for value, name in zip(inputs, ("transpose_a", "transpose_b"), strict=True):
        need_rank(node, value, 3)
        *batch, rows, columns = value.shape
        shapes.append((*batch, columns, rows) if flag(node, name) else value.shape)
    return shapes[0], shapes[1]


def _mismatch(node: Node, inputs: Sequence[Value], fix: str) -> Exception:
    a, b = inputs
    flags = ", ".join(f"{name}={node.attrs[name]}" for name in ("transpose_a", "transpose_b"))
    return node_error(
        node,
        f"multiplies {a.name!r} of shape {shape_text(a.shape)} and {b.name!r} of shape "
        f"{shape_text(b.shape)} with {flags}",
        fix,
    )


def _infer(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    a, b = _matrices(node, inputs)
    if len(a) != len(b):
        raise _mismatch(node, inputs, "both must have the same number of axes")
    if None not in (a[-1], b[-2]) and a[-1] != b[-2]:
        raise _mismatch(
            node, inputs, f"the rows of the first have {a[-1]} values, the columns of the second "
            f"{b[-2]}: they must have the same number"
        )  # fmt: skip
    batch = broadcast(a[:-2], b[:-2])
    if batch is None:
        raise _mismatch(node, inputs, "the axes before the last two must be the same, or 1")
    return inputs[0].with_shape(node.output, (*batch, a[-2], b[-1]))


def _check_sizes(node: Node, inputs: Sequence[Value], sized: Sequence[Value]) -> None:
    check_dynamic(node, inputs, sized, last=-2)


def _cost(node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]) -> Cost:
    depth = inner(inputs[0])[-2 if flag(node, "transpose_a") else -1]
    macs = math.prod(inner(output)) * depth
    return Cost(macs=macs, dense_macs=macs)


SPECS: Final = (
    OpSpec(
        "matmul",
        attrs={
            "transpose_a": Attr(bool, default=False),
            "transpose_b": Attr(bool, default=False),
        },
        infer=_infer,
        cost=_cost,
        min_inputs=2,
        max_inputs=2,
        check_sizes=_check_sizes,
        since=2,
    ),
)

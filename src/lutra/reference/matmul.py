"""Products of two values, matrix by matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lutra.node import Array, Node
from lutra.ops.spec import flag


def matmul(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(..., M, K) times (..., K, P)."""
    a, b = inputs
    a = a.swapaxes(-1, -2) if flag(node, "transpose_a") else a
    b = b.swapaxes(-1, -2) if flag(node, "transpose_b") else b
    result: Array = a @ b
    return result

"""Operators that give images another size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lutra.graph import Node
from lutra.ops.registry import Array, integer


def pixel_shuffle(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, C r r, H, W) to (N, C, H r, W r).

    y[n, c, h r + i, w r + j] = x[n, (c r + i) r + j, h, w]
    """
    (x,) = inputs
    r = integer(node, "factor")
    n, channels, height, width = x.shape
    parts = x.reshape(n, channels // r**2, r, r, height, width).transpose(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, channels // r**2, height * r, width * r)

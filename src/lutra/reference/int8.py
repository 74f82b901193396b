"""Dense operators in int8, in exact integers: see ``lutra.ops.int8`` for the equations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.spec import integer, number, pair
from lutra.reference.pq import quantise
from lutra.reference.windows import patches, windows

__all__ = ["int8_conv2d", "int8_linear"]


def _steps(node: Node, x: Array) -> Array:
    """Activations as steps of the grid away from zero: ``x_q - act_zero``, float64.

    Products of float64 are exact here (a sum is an integer below 2**31), and much faster than
    NumPy's integer ones.
    """
    zero = integer(node, "act_zero")
    x_q = quantise(x, number(node, "act_scale"), zero, integer(node, "act_bits"))
    return x_q.astype(np.float64) - zero


def int8_linear(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(..., D) to (..., M)."""
    (x,) = inputs
    sums = _steps(node, x) @ tensors["weight"].T.astype(np.float64)
    result: Array = sums.astype(np.float32) * tensors["scale"] + tensors["bias"]
    return result


def int8_conv2d(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, C, H, W) to (N, M, Ho, Wo), in groups of channels."""
    (x,) = inputs
    weight = tensors["weight"]
    groups = integer(node, "groups")
    rows, columns = pair(node, "padding")
    padded = np.pad(_steps(node, x), ((0, 0), (0, 0), (rows, rows), (columns, columns)))
    kernel = (weight.shape[2], weight.shape[3])
    view = windows(padded, kernel, pair(node, "stride"), pair(node, "dilation"))
    outputs, (height, width) = weight.shape[0], view.shape[2:4]
    # (G, D / G, M / G): one small matrix for each group
    matrices = weight.reshape(groups, outputs // groups, -1).transpose(0, 2, 1).astype(np.float64)
    sums = np.empty((x.shape[0], outputs, height, width), np.float32)
    for image, band, block in patches(view):
        grouped = block.reshape(block.shape[0], groups, -1).transpose(1, 0, 2)  # (G, R, D / G)
        made = (grouped @ matrices).transpose(0, 2, 1)  # (G, M / G, R)
        sums[image, :, band] = made.reshape(outputs, -1, width)
    return sums * tensors["scale"][:, None, None] + tensors["bias"][:, None, None]

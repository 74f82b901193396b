"""Lookups in a table of two axes, in exact integers: see ``lutra.ops.lookup`` for the equations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.limits import INT8_MAX
from lutra.ops.lookup import unpack_weights
from lutra.ops.rows import row_length
from lutra.ops.spec import integer, number, pair
from lutra.reference.pq import quantise
from lutra.reference.windows import patches, windows

__all__ = ["lookup_conv2d", "lookup_linear", "responses"]

_MAX_ROWS = 2**14  # bounds the memory of one step


def responses(rows: Array, weight: Array, table: Array) -> Array:
    """Adds the table entries that activations and weights pick.

    Args:
        rows: Activation indices, uint8 (R, D)
        weight: Weight indices, uint8 (M, D)
        table: int8 (N_f, N_w)

    Returns:
        Exact sums, float32 or float64 (R, M)
    """
    # Reads for the weights that have one index, added up by a product with ones and zeros: NumPy
    # multiplies floats much faster than integers. All sums, in whatever order, are integers that
    # the type holds exactly: float32 up to 2**24, float64 all that fit into int32.
    kind = np.float32 if rows.shape[1] * INT8_MAX <= 2**24 else np.float64
    sums = np.zeros((rows.shape[0], weight.shape[0]), kind)
    for column, entries in enumerate(table.T.astype(kind)):
        sums += entries[rows] @ (weight == column).astype(kind).T
    return sums


def _rows(node: Node, rows: Array, tensors: Mapping[str, Array]) -> Array:
    """From activation indices, uint8 (R, D), to outputs, float32 (R, M)."""
    weight = unpack_weights(tensors["weight"], integer(node, "weight_bits"), row_length(node))
    result = np.empty((rows.shape[0], weight.shape[0]), np.float32)
    for first in range(0, rows.shape[0], _MAX_ROWS):
        part = slice(first, first + _MAX_ROWS)
        sums = responses(rows[part], weight, tensors["table"])
        result[part] = sums.astype(np.float32) * tensors["scale"] + tensors["bias"]
    return result


def _quantise(node: Node, x: Array) -> Array:
    return quantise(
        x, number(node, "act_scale"), integer(node, "act_zero"), integer(node, "act_bits")
    )


def lookup_linear(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(..., D) to (..., M)."""
    (x,) = inputs
    rows = _quantise(node, x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _rows(node, rows, tensors).reshape(*x.shape[:-1], tensors["weight"].shape[0])


def lookup_conv2d(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, C, H, W) to (N, M, Ho, Wo)."""
    (x,) = inputs
    rows, columns = pair(node, "padding")
    x_q = np.pad(
        _quantise(node, x),
        ((0, 0), (0, 0), (rows, rows), (columns, columns)),
        constant_values=integer(node, "act_zero"),
    )
    view = windows(x_q, pair(node, "kernel"), pair(node, "stride"), pair(node, "dilation"))
    outputs, (height, width) = tensors["weight"].shape[0], view.shape[2:4]
    result = np.empty((x.shape[0], outputs, height, width), np.float32)
    for image, band, block in patches(view):
        made = _rows(node, block, tensors)
        result[image, :, band] = made.T.reshape(outputs, -1, width)
    return result

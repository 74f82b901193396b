"""Product quantisation in exact integers: see ``lutra.ops.pq`` for the equations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.pq import cut_rows
from lutra.ops.spec import integer, number, pair
from lutra.reference.windows import patches, windows

__all__ = ["encode", "encode_tree", "lookup", "pq_conv2d", "pq_linear", "quantise", "row_codes"]

_MAX_ROWS = 2**14  # bounds the memory of one step
_MAX_DIFFERENCES = 2**22  # that exist at a time


def quantise(x: Array, act_scale: float, act_zero: int, act_bits: int) -> Array:
    """Rounds activations to the grid of the codebooks.

    Args:
        x: float32, any shape.
        act_scale: Width of one step.
        act_zero: The integer that stands for 0.0.
        act_bits: Width of the integers.

    Returns:
        uint8 in 0..2**act_bits - 1, same shape. NaN gives 0.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.rint(x / np.float32(act_scale)) + np.float32(act_zero)
    steps = np.where(np.isnan(steps), np.float32(0), steps)
    result: Array = np.clip(steps, 0, 2**act_bits - 1).astype(np.uint8)
    return result


def encode(rows: Array, centroids: Array, distance: str = "l2") -> Array:
    """Finds the nearest centroid of every sub-vector.

    Args:
        rows: uint8 (R, D)
        centroids: uint8 (B, K, V)
        distance: "l2", "l1" (sum of absolute differences) or "chebyshev" (the largest of them).

    Returns:
        Codes, int64 (R, B), the lowest on ties.
    """
    if distance != "l2":
        return _encode_apart(rows, centroids, distance)
    codebooks, _, width = centroids.shape
    padded = np.zeros((rows.shape[0], codebooks * width), np.float32)
    padded[:, : rows.shape[1]] = rows
    # float32 products are exact here, and much faster than NumPy's integer ones: a score is a sum
    # of at most 64 products of at most 127 * 127, far below 2**24.
    subvectors = padded.reshape(-1, codebooks, width).transpose(1, 0, 2)  # (B, R, V)
    products = subvectors @ centroids.astype(np.float32).transpose(0, 2, 1)  # (B, R, K)
    half_norms = np.square(centroids.astype(np.int32)).sum(axis=2) >> 1  # (B, K)
    scores = products.astype(np.int32) - half_norms[:, None, :]
    codes: Array = scores.argmax(axis=2).T
    return codes


def _encode_apart(rows: Array, centroids: Array, distance: str) -> Array:
    """``encode`` by absolute differences."""
    codebooks, count, width = centroids.shape
    padded = np.zeros((rows.shape[0], codebooks * width), np.int16)
    padded[:, : rows.shape[1]] = rows
    subvectors = padded.reshape(-1, codebooks, 1, width)
    codes = np.empty((rows.shape[0], codebooks), np.int64)
    step = max(1, _MAX_DIFFERENCES // (count * width))
    for b in range(codebooks):
        for first in range(0, rows.shape[0], step):
            part = slice(first, first + step)
            apart = np.abs(subvectors[part, b] - centroids[b].astype(np.int16))  # (R, K, V)
            far = apart.sum(axis=2, dtype=np.int32) if distance == "l1" else apart.max(axis=2)
            codes[part, b] = far.argmin(axis=1)
    return codes


def encode_tree(rows: Array, splits: Array, thresholds: Array) -> Array:
    """Finds the leaf of every codebook's decision tree.

    Args:
        rows: uint8 (R, D)
        splits: int32 (B, L), the entry of the row that each level looks at.
        thresholds: uint8 (B, K - 1), node 0 the root, the children of i are 2 i + 1 and 2 i + 2.

    Returns:
        Codes, int64 (R, B)
    """
    codebooks, levels = splits.shape
    node = np.zeros((rows.shape[0], codebooks), np.int64)
    for level in range(levels):
        right = rows[:, splits[:, level]] >= thresholds[np.arange(codebooks), node]
        node = 2 * node + 1 + right
    codes: Array = node - thresholds.shape[1]
    return codes


def lookup(codes: Array, tables: Array) -> Array:
    """Adds the table rows that the codes pick.

    Args:
        codes: (R, B)
        tables: int8 (B, K, M)

    Returns:
        int32 (R, M)
    """
    sums = np.zeros((codes.shape[0], tables.shape[2]), np.int32)
    for codebook, table in enumerate(tables):
        sums += table[codes[:, codebook]]
    return sums


def row_codes(node: Node, rows: Array, tensors: Mapping[str, Array]) -> Array:
    """Codes (R, B) of quantised rows, uint8 (R, D)."""
    parts = cut_rows(node, rows)  # (R, T, D / T)
    each = parts.reshape(-1, parts.shape[2])
    if "splits" in tensors:
        codes = encode_tree(each, tensors["splits"], tensors["thresholds"])
    else:
        codes = encode(each, tensors["centroids"], str(node.attrs.get("distance", "l2")))
    return codes.reshape(*parts.shape[:2], -1).swapaxes(1, 2).reshape(len(rows), -1)


def _rows(node: Node, rows: Array, tensors: Mapping[str, Array]) -> Array:
    """From quantised rows, uint8 (R, D), to outputs, float32 (R, M)."""
    result = np.empty((rows.shape[0], tensors["tables"].shape[2]), np.float32)
    for first in range(0, rows.shape[0], _MAX_ROWS):
        part = slice(first, first + _MAX_ROWS)
        sums = lookup(row_codes(node, rows[part], tensors), tensors["tables"])
        result[part] = sums.astype(np.float32) * tensors["scale"] + tensors["bias"]
    return result


def _quantise(node: Node, x: Array) -> Array:
    return quantise(
        x, number(node, "act_scale"), integer(node, "act_zero"), integer(node, "act_bits")
    )


def pq_linear(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(..., D) to (..., M)."""
    (x,) = inputs
    rows = _quantise(node, x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _rows(node, rows, tensors).reshape(*x.shape[:-1], tensors["tables"].shape[2])


def pq_conv2d(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, C, H, W) to (N, M, Ho, Wo)."""
    (x,) = inputs
    rows, columns = pair(node, "padding")
    x_q = np.pad(
        _quantise(node, x),
        ((0, 0), (0, 0), (rows, rows), (columns, columns)),
        constant_values=integer(node, "act_zero"),
    )
    view = windows(x_q, pair(node, "kernel"), pair(node, "stride"), pair(node, "dilation"))
    outputs, (height, width) = tensors["tables"].shape[2], view.shape[2:4]
    result = np.empty((x.shape[0], outputs, height, width), np.float32)
    for image, band, block in patches(view):
        made = _rows(node, block, tensors)
        result[image, :, band] = made.T.reshape(outputs, -1, width)
    return result

"""Matrices of low-bit weights times vectors of activations in int8: what the kernels compute.

A weight of code ``u`` (see ``lutra.ops.lowbit_storage``) has an integer level

    ternary:  u - 1                        1 to 4 bits:  2 u - (2**bits - 1)

The second is the symmetric form of a code, in which every bit counts +1 or -1 (LUT Tensor Core,
arXiv 2408.06003, section 3). A weight is the number ``scale * (level - zero)``; a scale ``s`` and
a zero point ``z`` of codes, ``s * (u - z)``, become ``s / 2`` and ``2 z - (2**bits - 1)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.lowbit import load_rows
from lutra.ops.spec import integer

__all__ = ["lowbit_levels", "lowbit_linear", "lowbit_matmul", "lowbit_sums", "quantise_rows"]

#: Rows whose largest magnitude is below this are zeros.
_TINY = np.float32(2.0**-120)


def lowbit_levels(codes: Array, levels: int) -> Array:
    """The level of each code, int32.

    Args:
        codes: uint8 (M, K).
        levels: How many values a code has: 2, 3, 4, 8 or 16.
    """
    wide = codes.astype(np.int32)
    return wide - 1 if levels == 3 else 2 * wide - (levels - 1)


def quantise_rows(x: Array) -> tuple[Array, Array]:
    """Activations in int8, each row by its largest magnitude.

    Args:
        x: float32 (n, K).

    Returns:
        int8 (n, K) in -127..127, and float32 (n): what a step of each row stands for. A row that
        holds NaN or an infinity becomes zeros, whose step is NaN.
    """
    finite = np.asarray(np.isfinite(x).all(axis=1))
    x = np.where(finite[:, None], x, np.float32(0))
    most = np.abs(x).max(axis=1)
    tiny = most < _TINY
    inverse = np.float32(127) / np.where(tiny, np.float32(1), most)
    q = np.rint(x * np.where(tiny, np.float32(0), inverse)[:, None]).astype(np.int8)
    step = np.where(tiny, np.float32(0), most / np.float32(127))
    return q, np.where(finite, step, np.float32(np.nan))


def lowbit_sums(levels: Array, x: Array, group: int) -> Array:
    """Sums of levels times activations, over each group of inputs.

    Args:
        levels: int32 (M, K).
        x: int8 (n, K).
        group: Neighbouring inputs of a group; divides K.

    Returns:
        int32 (n, K / group, M).
    """
    n, depth = x.shape
    # (groups, n, group) @ (groups, group, M); every product and sum is an integer below 2**53
    a = x.reshape(n, depth // group, group).transpose(1, 0, 2).astype(np.float64)
    w = levels.reshape(-1, depth // group, group).transpose(1, 2, 0).astype(np.float64)
    return (a @ w).transpose(1, 0, 2).astype(np.int32)


def lowbit_matmul(levels: Array, scale: Array, zero: Array | None, x: Array, group: int) -> Array:
    """The product of activations with a matrix of low-bit weights, transposed.

    Groups are added in order in float32; multiplications and additions are rounded one by one.

    Args:
        levels: int32 (M, K).
        scale: float32 (K / group, M).
        zero: int32 (K / group, M), or None for zeros.
        x: float32 (n, K); a row that holds NaN or an infinity gives NaN.
        group: Neighbouring inputs of a group; divides K.

    Returns:
        float32 (n, M).
    """
    q, row_scale = quantise_rows(x)
    sums = lowbit_sums(levels, q, group)
    if zero is not None:
        x_sums = q.reshape(len(q), -1, group).sum(axis=2, dtype=np.int32)
        sums = sums - zero * x_sums[:, :, None]
    y: Array = sums[:, 0].astype(np.float32) * scale[0]
    for g in range(1, len(scale)):
        y = y + sums[:, g].astype(np.float32) * scale[g]
    return y * row_scale[:, None]


def lowbit_linear(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(..., K) to (..., M): see ``lutra.ops.lowbit`` for the equations."""
    (x,) = inputs
    depth, count = integer(node, "in_features"), integer(node, "levels")
    levels = lowbit_levels(load_rows(tensors["weight"], count, depth), count)
    zero = tensors.get("zero")
    y = lowbit_matmul(
        levels,
        tensors["scale"].T,
        None if zero is None else zero.astype(np.int32).T,
        x.reshape(-1, depth),
        integer(node, "group"),
    )
    bias = tensors["bias"]
    made: Array = (y + bias).reshape(*x.shape[:-1], len(bias))
    return made

"""Operators that give images another size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.image import upsampled_size
from lutra.ops.spec import flag, integer, ints, number, text


def pixel_shuffle(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, C r r, H, W) to (N, C, H r, W r).

    y[n, c, h r + i, w r + j] = x[n, (c r + i) r + j, h, w]
    """
    (x,) = inputs
    r = integer(node, "factor")
    n, channels, height, width = x.shape
    parts = x.reshape(n, channels // r**2, r, r, height, width).transpose(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, channels // r**2, height * r, width * r)


def upsample(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, C, H, W) to (N, C, H', W'), see ``lutra.ops.image`` for the equations."""
    x, *like = inputs
    scales = (number(node, "scale_h"), number(node, "scale_w"))
    if like:
        sizes = like[0].shape[2:]
    else:
        sizes = ints(node, "size") or tuple(map(upsampled_size, x.shape[2:], scales))
    rows, columns = (
        _positions(node, n, m, scale)
        for n, m, scale in zip(x.shape[2:], sizes, scales, strict=True)
    )
    if text(node, "mode") != "bilinear":
        nearest: Array = x[:, :, rows[0]][..., columns[0]]
        return nearest
    (top, bottom, upper, lower), (left, right, first, second) = rows, columns
    upper, lower = upper[:, None], lower[:, None]

    def along(lines: Array) -> Array:
        made: Array = lines[..., left] * first + lines[..., right] * second
        return made

    result: Array = along(x[:, :, top]) * upper + along(x[:, :, bottom]) * lower
    return result


def _positions(node: Node, n: int, m: int, scale: float) -> tuple[Array, Array, Array, Array]:
    """The two entries that each of ``m`` results is made of, int64 (m,), and their weights."""
    j = np.arange(m, dtype=np.float32)
    aligned, mode = flag(node, "align_corners"), text(node, "mode")
    half = np.float32(0.5)
    if aligned:
        step = np.float32(n - 1) / np.float32(m - 1) if m > 1 else np.float32(0)
    else:
        step = np.float32(1 / scale) if scale else np.float32(n) / np.float32(m)
    s = j * step
    if mode == "nearest-exact":
        s = (j + half) * step
    elif n == m:
        s = j
    elif mode == "nearest" and m == 2 * n:
        s = j * half
    elif mode == "bilinear" and not aligned:
        s = np.maximum((j + half) * step - half, np.float32(0))
    i = np.minimum(np.floor(s).astype(np.int64), n - 1)
    weight = np.minimum(s - i.astype(np.float32), np.float32(1))
    return i, np.minimum(i + 1, n - 1), np.float32(1) - weight, weight

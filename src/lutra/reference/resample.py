"""Images read between their pixels: see ``lutra.ops.resample`` for the equations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.image import upsampled_size
from lutra.ops.spec import flag, ints, number, text

_ONE, _TWO, _HALF = np.float32(1), np.float32(2), np.float32(0.5)
_A = np.float32(-0.75)


def upsample_bicubic(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, C, H, W) to (N, C, H', W')."""
    x, *like = inputs
    scales = (number(node, "scale_h"), number(node, "scale_w"))
    if like:
        sizes = like[0].shape[2:]
    else:
        sizes = ints(node, "size") or tuple(map(upsampled_size, x.shape[2:], scales))
    aligned = flag(node, "align_corners")
    (rows, upper), (columns, left) = (
        _places(n, m, scale, aligned)
        for n, m, scale in zip(x.shape[2:], sizes, scales, strict=True)
    )
    across = _sum([x[:, :, :, at] * w for at, w in zip(columns, left, strict=True)])
    return _sum([across[:, :, at] * w[:, None] for at, w in zip(rows, upper, strict=True)])


def _sum(terms: Sequence[Array]) -> Array:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _places(n: int, m: int, scale: float, aligned: bool) -> tuple[Array, Array]:
    """The four entries that each of ``m`` results is made of, int64 (4, m), and their weights."""
    j = np.arange(m, dtype=np.float32)
    if aligned:
        step = np.float32(n - 1) / np.float32(m - 1) if m > 1 else np.float32(0)
        s = j * step
    else:
        step = np.float32(1 / scale) if scale else np.float32(n) / np.float32(m)
        s = (j + _HALF) * step - _HALF
    low = np.floor(s)
    t = s - low
    first = low.astype(np.int64) - 1
    weights = [_outer(t + _ONE), _inner(t), _inner(_ONE - t), _outer(_TWO - t)]
    return np.clip(np.stack([first + i for i in range(4)]), 0, n - 1), np.stack(weights)


def _inner(t: Array) -> Array:
    result: Array = ((_A + _TWO) * t - (_A + np.float32(3))) * t * t + _ONE
    return result


def _outer(t: Array) -> Array:
    five, eight, four = (np.float32(k) * _A for k in (5, 8, 4))
    result: Array = ((_A * t - five) * t + eight) * t - four
    return result


def grid_sample(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, C, H, W) and (N, H', W', 2) to (N, C, H', W')."""
    x, grid = inputs
    height, width = x.shape[2:]
    sx, sy = (
        _coordinates(node, grid[..., axis], size) for axis, size in enumerate((width, height))
    )
    if text(node, "mode") == "nearest":
        return _read(x, np.rint(sy), np.rint(sx), np.ones_like(sx))
    left, top = np.floor(sx), np.floor(sy)
    right, bottom = left + _ONE, top + _ONE
    return _sum(
        [
            _read(x, top, left, (right - sx) * (bottom - sy)),
            _read(x, top, right, (sx - left) * (bottom - sy)),
            _read(x, bottom, left, (right - sx) * (sy - top)),
            _read(x, bottom, right, (sx - left) * (sy - top)),
        ]
    )


def _coordinates(node: Node, g: Array, count: int) -> Array:
    """From points of the grid to pixels; two pixels outside of the image is far enough."""
    size, aligned = np.float32(count), flag(node, "align_corners")
    padding = text(node, "padding")
    with np.errstate(all="ignore"):
        wide = (g + _ONE) * size
        s = (g + _ONE) / _TWO * (size - _ONE) if aligned else (wide - _ONE) / _TWO
        if padding == "reflection":
            s = _reflected(
                s, np.float32(0 if aligned else -0.5), size - (_ONE if aligned else _HALF)
            )
        low, high = (-_TWO, size + _ONE) if padding == "zeros" else (np.float32(0), size - _ONE)
        s = np.where(s > low, s, low)  # also for NaN
        return np.where(s < high, s, high)


def _reflected(s: Array, low: np.float32, high: np.float32) -> Array:
    span = high - low
    if not span > 0:
        return np.full_like(s, low)
    distance = np.abs(s - low)
    rest, times = np.fmod(distance, span), np.floor(distance / span)
    made = np.where(np.fmod(times, _TWO) == 0, low + rest, high - rest)
    return np.where(np.isfinite(s), made, low)


def _read(x: Array, rows: Array, columns: Array, weight: Array) -> Array:
    """The pixels (N, C, H', W') at rows and columns (N, H', W'), weighed; 0 outside."""
    height, width = x.shape[2:]
    i, j = rows.astype(np.int64), columns.astype(np.int64)
    inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
    sample = np.arange(x.shape[0])[:, None, None]
    picked = x[sample, :, np.clip(i, 0, height - 1), np.clip(j, 0, width - 1)]
    made = np.where(inside[..., None], picked * weight[..., None], np.float32(0))
    return made.transpose(0, 3, 1, 2)

"""Pooling, mean and maximum, one window at a time where windows differ in size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.pool import pooled_size
from lutra.ops.spec import flag, integer, ints, pair
from lutra.reference.windows import windows


def max_pool2d(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """The largest value of each window; padding counts as minus infinity."""
    (x,) = inputs
    dilation = pair(node, "dilation")
    around = []
    counts = _counts(node, x, dilation)
    for axis in range(2):
        span = dilation[axis] * (pair(node, "kernel")[axis] - 1) + 1
        before = pair(node, "padding")[axis]
        end = (counts[axis] - 1) * pair(node, "stride")[axis] + span  # the last one may hang over
        around.append((before, max(0, end - before - x.shape[axis + 2])))
    padded = np.pad(x, ((0, 0), (0, 0), *around), constant_values=-np.inf)
    view = windows(padded, pair(node, "kernel"), pair(node, "stride"), dilation)
    result: Array = view[:, :, : counts[0], : counts[1]].max(axis=(4, 5))
    return result


def avg_pool2d(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """The sum of each window over its size.

    With ``count_include_pad`` the size counts padding, but never what hangs over the padding.
    """
    (x,) = inputs
    counts = _counts(node, x, (1, 1))
    result = np.empty((*x.shape[:2], *counts), np.float32)
    spans = [
        list(
            _spans(
                x.shape[axis + 2],
                counts[axis],
                pair(node, "kernel")[axis],
                pair(node, "stride")[axis],
                pair(node, "padding")[axis],
            )
        )
        for axis in range(2)
    ]
    for i, (rows, height) in enumerate(spans[0]):
        for j, (columns, width) in enumerate(spans[1]):
            window = x[:, :, rows, columns]
            if not flag(node, "count_include_pad"):
                height, width = window.shape[2:]
            result[:, :, i, j] = window.sum(axis=(2, 3)) / np.float32(height * width)
    return result


def adaptive_avg_pool2d(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """The mean of each of ``output_size`` windows that cover the input."""
    (x,) = inputs
    result = np.empty((*x.shape[:2], *pair(node, "output_size")), np.float32)
    for i, j, window in _adaptive_windows(node, x):
        result[:, :, i, j] = window.mean(axis=(2, 3))
    return result


def adaptive_max_pool2d(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """The largest value of each of ``output_size`` windows that cover the input."""
    (x,) = inputs
    result = np.empty((*x.shape[:2], *pair(node, "output_size")), np.float32)
    for i, j, window in _adaptive_windows(node, x):
        result[:, :, i, j] = window.max(axis=(2, 3))
    return result


def mean(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """The mean over some axes."""
    result: Array = inputs[0].mean(axis=ints(node, "axes"), keepdims=flag(node, "keepdims"))
    return result


def max_(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """The largest value over some axes; NaN is passed over, and minus infinity where all are."""
    (x,) = inputs
    known = np.where(np.isnan(x), np.float32(-np.inf), x)
    result: Array = known.max(axis=ints(node, "axes"), keepdims=flag(node, "keepdims"))
    return result


def cumsum(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """The sums of everything up to each entry of an axis, in float32 one after the other."""
    with np.errstate(all="ignore"):
        result: Array = np.add.accumulate(inputs[0], axis=integer(node, "axis"), dtype=np.float32)
    return result


def _counts(node: Node, x: Array, dilation: tuple[int, int]) -> tuple[int, int]:
    """Number of windows along rows and columns."""
    first, second = (
        pooled_size(
            x.shape[axis + 2],
            pair(node, "kernel")[axis],
            pair(node, "stride")[axis],
            pair(node, "padding")[axis],
            dilation[axis],
            flag(node, "ceil_mode"),
        )
        for axis in range(2)
    )
    return first, second


def _spans(
    size: int, count: int, kernel: int, stride: int, padding: int
) -> Iterator[tuple[slice, int]]:
    """What each window covers of the axis, and its size with padding."""
    for index in range(count):
        start = index * stride - padding
        stop = min(start + kernel, size + padding)
        yield slice(max(start, 0), max(0, min(stop, size))), stop - start


def _adaptive_windows(node: Node, x: Array) -> Iterator[tuple[int, int, Array]]:
    """Window ``i`` of ``n`` covers floor(i * size / n) to ceil((i + 1) * size / n)."""
    rows, columns = pair(node, "output_size")
    height, width = x.shape[2:]
    for i in range(rows):
        for j in range(columns):
            yield (
                i,
                j,
                x[
                    :,
                    :,
                    i * height // rows : -(-(i + 1) * height // rows),
                    j * width // columns : -(-(j + 1) * width // columns),
                ],
            )

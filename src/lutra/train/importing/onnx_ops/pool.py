"""Pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from lutra.train.importing.builder import Builder, Refusal, Value
from lutra.train.importing.onnx_ops.conv import each, window_pads
from lutra.train.importing.onnx_ops.registry import Op, onnx_op
from lutra.train.importing.onnx_ops.shape import padded

_MAX = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _window(b: Builder, op: Op, x: Value) -> tuple[list[int], list[int], list[int], Any]:
    rank = b.ndim(x) - 2
    if rank not in (1, 2, 3):
        raise Refusal(f"it pools {rank} axes; 1 to 3 exist")
    kernel, strides = each(op, "kernel_shape", rank), each(op, "strides", rank)
    dilations = each(op, "dilations", rank)
    if not op.get("kernel_shape"):
        raise Refusal("it has no kernel_shape")
    return kernel, strides, dilations, window_pads(b, op, x, kernel, strides, dilations)


def _fits(kernel: list[int], dilations: list[int], sides: Any) -> bool:
    """Whether the pooling of torch can pad so: the same on both sides, half the kernel at most."""
    return all(
        isinstance(front, int) and front == back and front <= size * step // 2
        for size, step, (front, back) in zip(kernel, dilations, sides, strict=True)
    )


@onnx_op("MaxPool")
def _max_pool(b: Builder, op: Op, x: Value) -> Any:
    if op.wants(1):
        raise Refusal("the places of the largest values are used; do without them")
    kernel, strides, dilations, sides = _window(b, op, x)
    padding = [front for front, _ in sides]
    ceil = bool(op.get("ceil_mode", 0))
    dtype = b.dtype(x)
    if not dtype.is_floating_point:
        x = b.call(torch.Tensor.to, x, torch.float32)
    if not _fits(kernel, [1] * len(kernel), sides):
        ended = _with_ceil(b, x, sides, kernel, strides, dilations, ceil)
        x = padded(b, x, [(0, 0), (0, 0), *ended], fill=-math.inf)
        padding, ceil = [0] * len(kernel), False
    y = b.call(_MAX[len(kernel) - 1], x, kernel, strides, padding, dilations, ceil)
    return y if dtype.is_floating_point else b.call(torch.Tensor.to, y, dtype)


def _with_ceil(b: Builder, x: Value, sides: Any, kernel: list[int], strides: list[int],
               dilations: list[int], ceil: bool) -> Any:  # fmt: skip
    """The pads with those of a last window that begins inside and ends outside."""
    if not ceil:
        return sides
    made = []
    for i, (front, back) in enumerate(sides):
        size = b.sizes(x)[2 + i]
        if size is None or not isinstance(front, int):
            raise Refusal("it rounds up a size that is known at run time only")
        reach = (kernel[i] - 1) * dilations[i] + 1
        count = -(-(size + front + back - reach) // strides[i]) + 1
        if (count - 1) * strides[i] >= size + front:
            count -= 1
        made.append((front, max(back, (count - 1) * strides[i] + reach - size - front)))
    return made


@onnx_op("AveragePool")
def _average_pool(b: Builder, op: Op, x: Value) -> Any:
    kernel, strides, dilations, sides = _window(b, op, x)
    rank = len(kernel)
    ceil, whole = bool(op.get("ceil_mode", 0)), bool(op.get("count_include_pad", 0))
    function = _AVERAGE[rank - 1]
    if all(d == 1 for d in dilations) and _fits(kernel, dilations, sides):
        return b.call(function, x, kernel, strides, [f for f, _ in sides], ceil, whole)
    ended = _with_ceil(b, x, sides, kernel, strides, dilations, ceil)
    total = _means(b, padded(b, x, [(0, 0), (0, 0), *ended]), kernel, strides, dilations)
    if all(side == (0, 0) for side in ended):
        return total
    sizes = b.sizes(x)[2:]
    if any(size is None for size in sizes):
        raise Refusal("it averages at a border whose place is known at run time only")
    counted: Value = torch.ones(1, 1, *sizes)  # type: ignore[arg-type]
    if whole:  # the pads count, and what the last window has beyond them does not
        counted = padded(b, counted, [(0, 0), (0, 0), *sides], fill=1.0)
        ended = [(0, e[1] - s[1]) for e, s in zip(ended, sides, strict=True)]
    counted = padded(b, counted, [(0, 0), (0, 0), *ended])
    share = _means(b, counted, kernel, strides, dilations)
    return b.call(torch.div, total, share)


def _means(b: Builder, x: Value, kernel: list[int], strides: list[int],
           dilations: list[int]) -> Any:  # fmt: skip
    rank = len(kernel)
    if all(d == 1 for d in dilations):
        return b.call(_AVERAGE[rank - 1], x, kernel, strides)
    channels = b.sizes(x)[1]
    if channels is None:
        raise Refusal("its channels are known at run time only")
    weight = torch.full((channels, 1, *kernel), 1 / math.prod(kernel))
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return b.call(function, x, weight, None, strides, [0] * rank, dilations, channels)


@onnx_op("LpPool")
def _lp_pool(b: Builder, op: Op, x: Value) -> Any:
    kernel, strides, dilations, sides = _window(b, op, x)
    order = float(op.get("p", 2))
    powers = b.call(torch.pow, b.call(torch.abs, x), order)
    ended = _with_ceil(b, x, sides, kernel, strides, dilations, bool(op.get("ceil_mode", 0)))
    powers = padded(b, powers, [(0, 0), (0, 0), *ended])
    means = _means(b, powers, kernel, strides, dilations)
    return b.call(torch.pow, b.call(torch.mul, means, float(math.prod(kernel))), 1 / order)


def _spatial(b: Builder, x: Value) -> list[int]:
    if b.ndim(x) < 3:
        raise Refusal(f"it pools images, and its input has {b.ndim(x)} axes")
    return list(range(2, b.ndim(x)))


@onnx_op("GlobalAveragePool")
def _global_average(b: Builder, op: Op, x: Value) -> Any:
    return b.call(torch.mean, x, _spatial(b, x), keepdim=True)


@onnx_op("GlobalMaxPool")
def _global_max(b: Builder, op: Op, x: Value) -> Any:
    return b.call(torch.amax, x, _spatial(b, x), keepdim=True)


@onnx_op("GlobalLpPool")
def _global_lp(b: Builder, op: Op, x: Value) -> Any:
    order = float(op.get("p", 2))
    powers = b.call(torch.pow, b.call(torch.abs, x), order)
    return b.call(torch.pow, b.call(torch.sum, powers, _spatial(b, x), keepdim=True), 1 / order)

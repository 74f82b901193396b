"""Quantised models, read as float: weights are dequantised, activations only clipped.

A tensor of integers that an operator makes is imported as the float values that it stands for,
inside the range of its integers: that range is what rounds towards in the file, and it often holds
a ReLU. The ranges are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lutra.train.importing.builder import Builder, Refusal, Value
from lutra.train.importing.onnx_ops.conv import conv
from lutra.train.importing.onnx_ops.dense import matmul
from lutra.train.importing.onnx_ops.registry import Op, axis_of, is_constant, onnx_op

_LIMITS = {
    torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int32: (-(2**31), 2**31 - 1),
    torch.int64: (-(2**31), 2**31 - 1),
}  # fmt: skip


_STEP = 2.0**-10


def _along(b: Builder, x: Value, value: Tensor, axis: int) -> Tensor:
    """A scale for each entry of an axis, shaped so that it multiplies."""
    if value.numel() == 1:
        return value.reshape(())
    if value.ndim != 1:
        raise Refusal("it has a scale for each block; only one for a tensor or an axis is read")
    shape = [1] * b.ndim(x)
    shape[axis_of(axis, b.ndim(x))] = -1
    return value.reshape(shape)


def dequantized(b: Builder, x: Value, scale: Value, zero: Value | None, axis: int) -> Any:
    """The floats that integers stand for."""
    if not isinstance(scale, Tensor) or not (zero is None or isinstance(zero, Tensor)):
        raise Refusal("its scale is computed while the model runs; it must be a constant")
    if isinstance(x, Tensor):
        made = x.float()
        if zero is not None:
            made = made - _along(b, x, zero.float(), axis)
        return made * _along(b, x, scale.float(), axis)
    if b.dtype(x).is_floating_point:
        return x  # they are what the file rounds to integers
    made_ = b.call(torch.Tensor.to, x, torch.float32)
    if zero is not None and bool((zero != 0).any()):
        made_ = b.call(torch.sub, made_, _along(b, x, zero.float(), axis))
    return b.call(torch.mul, made_, _along(b, x, scale.float(), axis))


def quantized(b: Builder, op: Op, x: Value, scale: Value, zero: Value | None) -> Any:
    """Activations inside the range of their integers."""
    if not isinstance(scale, Tensor) or not (zero is None or isinstance(zero, Tensor)):
        raise Refusal("its scale is computed while the model runs; it must be a constant")
    dtype = torch.uint8 if zero is None else zero.dtype
    lowest, highest = _LIMITS.get(dtype, (0, 255))
    shift = torch.zeros(()) if zero is None else zero.float()
    low, high = (lowest - shift) * scale.float(), (highest - shift) * scale.float()
    if low.numel() == 1:
        span = (float(low), float(high))
        op.context.note_range(op, span)
        return b.call(torch.clamp, x, *span)
    axis = int(op.get("axis", 1))
    sides = {"min": _along(b, x, low, axis), "max": _along(b, x, high, axis)}
    return b.call(torch.clamp, x, **sides)


@onnx_op("QuantizeLinear")
def _quantize(b: Builder, op: Op, x: Value, scale: Value, zero: Value | None = None) -> Any:
    if isinstance(x, Tensor) and is_constant(scale):  # a weight that the file quantises itself
        assert isinstance(scale, Tensor)
        axis = int(op.get("axis", 1))
        shift = torch.zeros(1, dtype=torch.uint8) if zero is None else b.tensor(zero)
        if not isinstance(shift, Tensor):
            raise Refusal("its zero point is computed while the model runs")
        lowest, highest = _LIMITS.get(shift.dtype, (0, 255))
        steps = torch.round(x / _along(b, x, scale, axis)) + _along(b, x, shift.float(), axis)
        return steps.clamp(lowest, highest).to(shift.dtype)
    op.context.is_quantized = True
    return quantized(b, op, x, scale, zero)


@onnx_op("DequantizeLinear")
def _dequantize(b: Builder, op: Op, x: Value, scale: Value, zero: Value | None = None) -> Any:
    if isinstance(x, Tensor):
        op.context.is_quantized = True
    made = dequantized(b, x, scale, zero, int(op.get("axis", 1)))
    if isinstance(x, Tensor) and isinstance(made, Tensor):
        b.name_constant(made, b.name_of_constant(x) or "weight")
    return made


@onnx_op("QLinearConv")
def _q_conv(b: Builder, op: Op, x: Value, x_scale: Value, x_zero: Value, w: Value, w_scale: Value,
            w_zero: Value, y_scale: Value, y_zero: Value,
            bias: Value | None = None) -> Any:  # fmt: skip
    op.context.is_quantized = True
    weight = dequantized(b, w, w_scale, w_zero, 0)
    if bias is not None:
        if not is_constant(bias, x_scale, w_scale):
            raise Refusal("its scales are computed while the model runs; they must be constants")
        bias = b.call(
            torch.mul, b.call(torch.Tensor.float, bias), b.call(torch.mul, x_scale, w_scale)
        )
    given = dequantized(b, x, x_scale, x_zero, 1)
    return quantized(b, op, conv(b, op, given, weight, bias), y_scale, y_zero)


@onnx_op("QLinearMatMul")
def _q_matmul(b: Builder, op: Op, x: Value, x_scale: Value, x_zero: Value, w: Value,
              w_scale: Value, w_zero: Value, y_scale: Value, y_zero: Value) -> Any:  # fmt: skip
    op.context.is_quantized = True
    weight = dequantized(b, w, w_scale, w_zero, -1)
    given = dequantized(b, x, x_scale, x_zero, -2)
    return quantized(b, op, matmul(b, op, given, weight), y_scale, y_zero)


@onnx_op("DynamicQuantizeLinear")
def _dynamic(b: Builder, op: Op, x: Value) -> Any:
    op.context.is_quantized = True
    # A fine grid: what the file rounds to it, such as biases, loses nothing.
    return b.call(torch.mul, x, 1 / _STEP), torch.tensor(_STEP), torch.zeros((), dtype=torch.uint8)


def _shifted(b: Builder, x: Value, zero: Value | None, axis: int) -> Any:
    """Integers from their zero point, as floats."""
    return dequantized(b, x, torch.ones(1), zero, axis)


@onnx_op("ConvInteger")
def _conv_integer(b: Builder, op: Op, x: Value, w: Value, x_zero: Value | None = None,
                  w_zero: Value | None = None) -> Any:  # fmt: skip
    op.context.is_quantized = True
    return conv(b, op, _shifted(b, x, x_zero, 1), _shifted(b, w, w_zero, 0))


@onnx_op("MatMulInteger")
def _matmul_integer(b: Builder, op: Op, x: Value, w: Value, x_zero: Value | None = None,
                    w_zero: Value | None = None) -> Any:  # fmt: skip
    op.context.is_quantized = True
    if isinstance(x_zero, fx.Node) or isinstance(w_zero, fx.Node):
        raise Refusal("its zero points are computed while the model runs; they must be constants")
    return matmul(b, op, _shifted(b, x, x_zero, -2), _shifted(b, w, w_zero, -1))

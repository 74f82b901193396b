"""Functions of one number, each element alike."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from lutra.ops.elementwise import NO_LIMIT
from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import Number, need_constant
from lutra.train.exporting.lowering.core import Lowering, Ref, UnsupportedUse, View, lowers
from lutra.train.exporting.lowering.operands import (
    constant,
    is_activation,
    operand,
    together,
)


def line(ctx: Lowering, x: Ref, scale: float, bias: float) -> Ref:
    """Emit x * scale + bias; nothing where that is x."""
    if (scale, bias) == (1.0, 0.0):
        return x
    attrs = {"scale": float(scale), "bias": float(bias)}
    return ctx.emit("affine_scalar", x, x.shape, attrs=attrs)


def truncated(ctx: Lowering, x: Ref) -> Ref:
    """Emit x without what is behind the point."""
    whole = ctx.emit("floor", ctx.emit("abs", x, x.shape), x.shape)
    return ctx.emit("mul", (whole, ctx.emit("sign", x, x.shape)), x.shape)


def _below(ctx: Lowering, x: Ref) -> Ref:
    """Emit min(x, 0)."""
    return ctx.emit("clamp", x, x.shape, attrs={"low": -NO_LIMIT, "high": 0.0})


@lowers("aten.gelu.default", works="each")
def _gelu(ctx: Lowering, self: Ref, approximate: str) -> Ref:
    return ctx.emit("gelu", self, attrs={"approximate": approximate})


@lowers("aten.silu.default", works="each")
def _silu(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("silu", self)


@lowers("aten.tanh.default", works="each")
def _tanh(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("tanh", self)


@lowers("aten.sigmoid.default", "aten.special_expit.default", works="each")
def _sigmoid(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("sigmoid", self)


@lowers("aten.exp.default", works="each")
def _exp(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("exp", self)


@lowers("aten.exp2.default", "aten.special_exp2.default", works="each")
def _exp2(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("exp", line(ctx, self, math.log(2), 0.0))


@lowers("aten.expm1.default", "aten.special_expm1.default", works="each")
def _expm1(ctx: Lowering, self: Ref) -> Ref:
    # elu has the bits of small numbers below 0, where the other would lose them
    above = ctx.emit("exp", ctx.emit("relu", self), self.shape)
    return ctx.emit("add", (line(ctx, above, 1.0, -1.0), ctx.emit("elu", _below(ctx, self))))


@lowers("aten.erf.default", "aten.special_erf.default", works="each")
def _erf(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("erf", self)


@lowers("aten.erfc.default", "aten.special_erfc.default", works="each")
def _erfc(ctx: Lowering, self: Ref) -> Ref:
    return line(ctx, ctx.emit("erf", self), -1.0, 1.0)


@lowers("aten.sqrt.default", works="each")
def _sqrt(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("sqrt", self)


@lowers("aten.rsqrt.default", works="each")
def _rsqrt(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("rsqrt", self)


@lowers("aten.reciprocal.default", works="each")
def _reciprocal(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("reciprocal", self)


# ---- logarithms ---------------------------------------------------------------------------------


@lowers("aten.log.default", works="each")
def _log(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("log", self)


@lowers("aten.log2.default", works="each")
def _log2(ctx: Lowering, self: Ref) -> Ref:
    return line(ctx, ctx.emit("log", self), 1 / math.log(2), 0.0)


@lowers("aten.log10.default", works="each")
def _log10(ctx: Lowering, self: Ref) -> Ref:
    return line(ctx, ctx.emit("log", self), 1 / math.log(10), 0.0)


@lowers("aten.log1p.default", "aten.special_log1p.default", works="each")
def _log1p(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("log", line(ctx, self, 1.0, 1.0))


@lowers("aten.softplus.default", works="each")
def _softplus(ctx: Lowering, self: Ref, beta: Number) -> Ref:
    # torch's threshold only saves it from infinity, which the operator does not run into
    return line(ctx, ctx.emit("softplus", line(ctx, self, beta, 0.0)), 1 / beta, 0.0)


@lowers("aten.log_sigmoid.default", works="each")
def _log_sigmoid(ctx: Lowering, self: Ref) -> Ref:
    return line(ctx, ctx.emit("softplus", line(ctx, self, -1.0, 0.0)), -1.0, 0.0)


@lowers("aten.log_sigmoid_forward.default")
def _log_sigmoid_forward(ctx: Lowering, self: Ref) -> tuple[Ref, None]:
    return _log_sigmoid(ctx, self), None


# ---- activations --------------------------------------------------------------------------------


@lowers("aten.mish.default", works="each")
def _mish(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("mish", self)


@lowers("aten.hardswish.default", works="each")
def _hardswish(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("hardswish", self)


@lowers("aten.hardsigmoid.default", works="each")
def _hardsigmoid(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("clamp", line(ctx, self, 1 / 6, 0.5), attrs={"low": 0.0, "high": 1.0})


@lowers("aten.leaky_relu.default", works="each")
def _leaky_relu(ctx: Lowering, self: Ref, negative_slope: Number) -> Ref:
    return ctx.emit("leaky_relu", self, attrs={"slope": float(negative_slope)})


@lowers("aten.rrelu.default", works="each")
def _rrelu(ctx: Lowering, self: Ref, lower: Number, upper: Number, training: bool) -> Ref:
    if training:
        raise UnsupportedUse("its slopes are random in eval mode too; leave training=False")
    return _leaky_relu(ctx, self, (lower + upper) / 2)


@lowers("aten.prelu.default", "aten._prelu_kernel.default")
def _prelu(ctx: Lowering, self: Ref, weight: Tensor) -> Ref:
    slopes = need_constant(weight, "the weight").reshape(-1).float()
    if slopes.numel() == 1:
        return _leaky_relu(ctx, self, float(slopes))
    tensors = {"scale": slopes, "bias": torch.zeros_like(slopes)}
    if bool((slopes <= 1).all()):
        return ctx.emit("maximum", (self, ctx.emit("affine", self, tensors=tensors)))
    scaled = ctx.emit("affine", _below(ctx, self), tensors=tensors)
    return ctx.emit("add", (ctx.emit("relu", self), scaled))


@lowers("aten.elu.default", works="each")
def _elu(ctx: Lowering, self: Ref, alpha: Number, scale: Number, input_scale: Number) -> Ref:
    if alpha == 1 and input_scale == 1:
        return line(ctx, ctx.emit("elu", self), scale, 0.0)
    above = line(ctx, ctx.emit("relu", self), scale, 0.0)
    below = _below(ctx, self)
    below = ctx.emit("elu", line(ctx, below, input_scale, 0.0))
    return ctx.emit("add", (above, line(ctx, below, alpha * scale, 0.0)))


@lowers("aten.selu.default", works="each")
def _selu(ctx: Lowering, self: Ref) -> Ref:
    return _elu(ctx, self, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1)


@lowers("aten.celu.default", works="each")
def _celu(ctx: Lowering, self: Ref, alpha: Number) -> Ref:
    return line(ctx, ctx.emit("elu", line(ctx, self, 1 / alpha, 0.0)), alpha, 0.0)


@lowers("aten.threshold.default", works="each")
def _threshold(ctx: Lowering, self: Ref, threshold: Number, value: Number) -> Ref:
    if (threshold, value) == (0, 0):
        return ctx.emit("relu", self)
    numbers = [constant(ctx, number, self, self.rank) for number in (threshold, value)]
    above = ctx.emit("greater", (self, numbers[0]))
    return ctx.emit("where", (above, self, numbers[1]))


@lowers("aten.softshrink.default", works="each")
def _softshrink(ctx: Lowering, self: Ref, lambd: Number) -> Ref:
    inside = ctx.emit("clamp", self, attrs={"low": -float(lambd), "high": float(lambd)})
    return ctx.emit("sub", (self, inside))


@lowers("aten.hardshrink.default", works="each")
def _hardshrink(ctx: Lowering, self: Ref, lambd: Number) -> Ref:
    limit, zero = (constant(ctx, number, self, self.rank) for number in (lambd, 0.0))
    outside = ctx.emit("greater", (ctx.emit("abs", self), limit))
    return ctx.emit("where", (outside, self, zero))


# ---- signs and whole numbers --------------------------------------------------------------------


@lowers("aten.abs.default", works="each")
def _abs(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("abs", self)


@lowers("aten.sign.default", "aten.sgn.default", works="each")
def _sign(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("sign", self)


@lowers("aten.sin.default", works="each")
def _sin(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("sin", self)


@lowers("aten.cos.default", works="each")
def _cos(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("cos", self)


@lowers("aten.tan.default", works="each")
def _tan(ctx: Lowering, self: Ref) -> Ref:
    parts = [ctx.emit(op, self, self.shape) for op in ("sin", "cos")]
    return ctx.emit("div", parts, self.shape)


@lowers("aten.floor.default", works="each")
def _floor(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("floor", self)


@lowers("aten.ceil.default", works="each")
def _ceil(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("ceil", self)


@lowers("aten.round.default", works="each")
def _round(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("round", self)


@lowers("aten.trunc.default", "aten.fix.default", works="each")
def _trunc(ctx: Lowering, self: Ref) -> Ref:
    return truncated(ctx, self)


@lowers("aten.frac.default", works="each")
def _frac(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("sub", (self, truncated(ctx, self)))


@lowers("aten.sinh.default", works="each")
def _sinh(ctx: Lowering, self: Ref) -> Ref:
    return _halves(ctx, self, "sub")


@lowers("aten.cosh.default", works="each")
def _cosh(ctx: Lowering, self: Ref) -> Ref:
    return _halves(ctx, self, "add")


def _halves(ctx: Lowering, x: Ref, op: str) -> Ref:
    """(e^x + e^-x) / 2, or the difference."""
    up = ctx.emit("exp", x, x.shape)
    down = ctx.emit("exp", line(ctx, x, -1.0, 0.0), x.shape)
    return line(ctx, ctx.emit(op, (up, down), x.shape), 0.5, 0.0)


# ---- inverse functions of angles ----------------------------------------------------------------

#: atan(x) / x for 0 <= x <= 1 in powers of x^2, from the highest on: least squares at Chebyshev
#: points, within 1e-8.
_ATAN: Final = (
    -0.00151763479608,
    0.00961237575485,
    -0.0285939623206,
    0.0551585329277,
    -0.0822367415057,
    0.108826350499,
    -0.142485186644,
    0.199966401149,
    -0.333331956878,
    0.999999984339,
)


def _atan_of_size(ctx: Lowering, size: Ref) -> Ref:
    """Emit atan of what is not below 0: pi / 2 - atan(1 / x) above 1."""
    one = constant(ctx, 1.0, size, size.rank)
    large = ctx.emit("greater", (size, one), size.shape)
    below = ctx.emit("where", (large, ctx.emit("reciprocal", size, size.shape), size), size.shape)
    square = ctx.emit("mul", (below, below), size.shape)
    total = line(ctx, square, _ATAN[0], _ATAN[1])
    for factor in _ATAN[2:]:
        total = line(ctx, ctx.emit("mul", (total, square), size.shape), 1.0, factor)
    angle = ctx.emit("mul", (total, below), size.shape)
    return ctx.emit("where", (large, line(ctx, angle, -1.0, math.pi / 2), angle), size.shape)


def _signed(ctx: Lowering, x: Ref, size: Ref) -> Ref:
    """Emit a size with the sign of x."""
    return ctx.emit("mul", (size, ctx.emit("sign", x, x.shape)), x.shape)


@lowers("aten.atan.default", works="each")
def _atan(ctx: Lowering, self: Ref) -> Ref:
    return _signed(ctx, self, _atan_of_size(ctx, ctx.emit("abs", self, self.shape)))


@lowers("aten.atan2.default", takes=("self", "other"))
def _atan2(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    # y / x in the right half, and turned by pi with the sign of y in the left one
    y, x = operand(ctx, self), operand(ctx, other)
    angle = views.on_each(ctx, (together(ctx, "div", (y, x)),), lambda ref: _atan(ctx, ref))
    left, below = (together(ctx, "greater", (0.0, each)) for each in (x, y))
    half = together(ctx, "where", (below, -math.pi, math.pi))
    made = together(ctx, "where", (left, together(ctx, "add", (angle, half)), angle))
    none = together(ctx, "equal", (together(ctx, "maximum", (_size(ctx, x), _size(ctx, y))), 0.0))
    return together(ctx, "where", (none, 0.0, made))


def _size(ctx: Lowering, x: Any) -> Any:
    if not is_activation(x):
        return torch.as_tensor(x).abs()
    return views.on_each(ctx, (x,), lambda ref: ctx.emit("abs", ref, ref.shape))


def _asin_of(ctx: Lowering, x: Ref) -> Ref:
    """Emit asin(x) = atan(x / sqrt((1 - x) (1 + x)))."""
    both = (line(ctx, x, -1.0, 1.0), line(ctx, x, 1.0, 1.0))
    other = ctx.emit("sqrt", ctx.emit("mul", both, x.shape), x.shape)
    return _atan(ctx, ctx.emit("div", (x, other), x.shape))


@lowers("aten.asin.default", works="each")
def _asin(ctx: Lowering, self: Ref) -> Ref:
    return _asin_of(ctx, self)


@lowers("aten.acos.default", works="each")
def _acos(ctx: Lowering, self: Ref) -> Ref:
    return line(ctx, _asin_of(ctx, self), -1.0, math.pi / 2)


@lowers("aten.asinh.default", works="each")
def _asinh(ctx: Lowering, self: Ref) -> Ref:
    size = ctx.emit("abs", self, self.shape)
    square = line(ctx, ctx.emit("mul", (size, size), size.shape), 1.0, 1.0)
    root = ctx.emit("sqrt", square, size.shape)
    whole = ctx.emit("add", (size, root), size.shape)
    return _signed(ctx, self, ctx.emit("log", whole, size.shape))


@lowers("aten.acosh.default", works="each")
def _acosh(ctx: Lowering, self: Ref) -> Ref:
    square = line(ctx, ctx.emit("mul", (self, self), self.shape), 1.0, -1.0)
    whole = ctx.emit("add", (self, ctx.emit("sqrt", square, self.shape)), self.shape)
    return ctx.emit("log", whole, self.shape)


@lowers("aten.atanh.default", works="each")
def _atanh(ctx: Lowering, self: Ref) -> Ref:
    up, down = line(ctx, self, 1.0, 1.0), line(ctx, self, -1.0, 1.0)
    made = ctx.emit("log", ctx.emit("div", (up, down), self.shape), self.shape)
    return line(ctx, made, 0.5, 0.0)


@lowers("aten.round.decimals", works="each")
def _round_decimals(ctx: Lowering, self: Ref, decimals: int) -> Ref:
    made = ctx.emit("round", line(ctx, self, 10.0**decimals, 0.0), self.shape)
    return line(ctx, made, 10.0**-decimals, 0.0)

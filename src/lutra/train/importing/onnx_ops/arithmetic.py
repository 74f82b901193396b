"""Operators on every element: functions of one number, arithmetic, comparisons, casts."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lutra.train.importing.builder import Builder, Numbers, Refusal, Value
from lutra.train.importing.onnx_ops.registry import Op, dtype_of, number, onnx_op

_UNARY: Final[dict[str, Callable[..., Any]]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
_BINARY: Final[dict[str, Callable[..., Any]]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
#: The same on Python numbers and sizes.
_ON_NUMBERS: Final[dict[str, Callable[..., Any]]] = {
    "Add": operator.add,
    "Ceil": math.ceil,
    "Equal": operator.eq,
    "Floor": math.floor,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "Mul": operator.mul,
    "Neg": operator.neg,
    "Not": torch.sym_not,
    "Sub": operator.sub,
}
_COMPARE: Final = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not")


def _numbers(b: Builder, op: Op, *values: Value) -> Numbers | None:
    """The result where the arguments are sizes, or constants beside sizes; None otherwise."""
    if not any(isinstance(value, Numbers) for value in values):
        return None
    if any(isinstance(value, fx.Node) or value.ndim > 1 for value in values):
        return None
    scalar = all(b.ndim(value) == 0 for value in values)
    parts = _alike(values)
    dtype = next(value.dtype for value in values if not isinstance(value, fx.Node))
    function = _ON_NUMBERS.get(op.type)
    if op.type == "Div":
        function = operator.truediv if dtype.is_floating_point else operator.floordiv
    if op.type == "Mod":
        function = operator.mod
    if function is None:
        return None
    items = tuple(_fold(b, function, items) for items in zip(*parts, strict=True))
    if op.type in ("Ceil", "Floor"):
        items = tuple(float(x) if isinstance(x, int) else b.call(torch.sym_float, x) for x in items)
    return Numbers(items, torch.bool if op.type in _COMPARE else dtype, scalar)


def _fold(b: Builder, function: Callable[..., Any], items: tuple[Any, ...]) -> Any:
    if len(items) == 1:
        return _number(b, function, *items) if function not in (torch.sym_max,) else items[0]
    result = items[0]
    for item in items[1:]:
        result = _number(b, function, result, item)
    return result


def _number(b: Builder, function: Callable[..., Any], *args: Any) -> Any:
    if any(isinstance(x, fx.Node) for x in args):
        return b.call(function, *args)
    try:
        return function(*args)
    except ZeroDivisionError as error:
        raise Refusal("it divides a size by 0") from error


@onnx_op(*_UNARY)
def _unary(b: Builder, op: Op, x: Value) -> Any:
    counted = _numbers(b, op, x)
    if counted is not None:
        return counted
    return b.call(_UNARY[op.type], x)


@onnx_op(*_BINARY)
def _binary(b: Builder, op: Op, x: Value, y: Value) -> Any:
    counted = _numbers(b, op, x, y)
    if counted is not None:
        return counted
    return b.call(_BINARY[op.type], *plain_numbers(b, x, y))


def plain_numbers(b: Builder, x: Value, y: Value) -> tuple[Any, Any]:
    """The second value as a number where it is a constant of one entry that stretches."""
    one = isinstance(y, Tensor) and y.numel() == 1 and y.ndim <= b.ndim(x)
    if one and isinstance(x, fx.Node) and y.dtype == b.dtype(x) != torch.bool:  # type: ignore[union-attr]
        return x, y.item()  # type: ignore[union-attr]
    return x, y


@onnx_op("Identity", "Dropout")
def _identity(b: Builder, op: Op, x: Value, *rest: Value | None) -> Any:
    training = rest[1] if len(rest) > 1 else None
    if training is not None and not (isinstance(training, Tensor) and not bool(training.any())):
        raise Refusal("it drops values at random; export the model in eval mode")
    if op.wants(1):
        return x, b.call(torch.ones_like, x, dtype=torch.bool)
    return x


@onnx_op("Div")
def _div(b: Builder, op: Op, x: Value, y: Value) -> Any:
    counted = _numbers(b, op, x, y)
    if counted is not None:
        return counted
    if b.dtype(x).is_floating_point:
        return b.call(torch.div, *plain_numbers(b, x, y))
    return b.call(torch.div, x, y, rounding_mode="trunc")


@onnx_op("Mod")
def _mod(b: Builder, op: Op, x: Value, y: Value) -> Any:
    counted = None if op.get("fmod", 0) else _numbers(b, op, x, y)
    if counted is not None:
        return counted
    return b.call(torch.fmod if op.get("fmod", 0) else torch.remainder, x, y)


@onnx_op("Pow")
def _pow(b: Builder, op: Op, x: Value, y: Value) -> Any:
    if isinstance(y, Tensor) and y.numel() == 1 and y.ndim <= b.ndim(x):
        exponent = y.item()
        whole = float(exponent).is_integer()
        return b.call(torch.pow, x, int(exponent) if whole else exponent)
    dtype = b.dtype(x)
    made = b.call(torch.pow, x, y)
    return made if b.dtype(made) == dtype else b.call(torch.Tensor.to, made, dtype)


@onnx_op("BitShift")
def _shift(b: Builder, op: Op, x: Value, y: Value) -> Any:
    left = op.get("direction") == "LEFT"
    function = torch.bitwise_left_shift if left else torch.bitwise_right_shift
    return b.call(function, x, y)


@onnx_op("Max", "Min")
def _extreme(b: Builder, op: Op, *values: Value) -> Any:
    counted = _numbers(b, op, *values) if len(values) > 1 else None
    if counted is not None:
        return counted
    function = torch.maximum if op.type == "Max" else torch.minimum
    result = values[0]
    for value in values[1:]:
        x, y = plain_numbers(
            b, *((result, value) if isinstance(value, Tensor) else (value, result))
        )
        if not isinstance(y, (int, float)):
            result = b.call(function, x, y)
        elif y != (-math.inf if op.type == "Max" else math.inf):
            result = b.call(torch.clamp, x, **{"min" if op.type == "Max" else "max": y})
        else:
            result = x
    return result


@onnx_op("Sum", "Mean")
def _sum(b: Builder, op: Op, *values: Value) -> Any:
    total = _reduced(b, torch.add, values)
    if op.type == "Sum" or len(values) == 1:
        return total
    return b.call(torch.div, total, float(len(values)))


def _reduced(b: Builder, function: Callable[..., Any], values: tuple[Value, ...]) -> Any:
    if not values:
        raise Refusal("it has no inputs")
    result = values[0]
    for value in values[1:]:
        result = b.call(function, result, value)
    return result


@onnx_op("Where")
def _where(b: Builder, op: Op, condition: Value, x: Value, y: Value) -> Any:
    given = (condition, x, y)
    sizes = any(isinstance(value, Numbers) for value in given)
    if sizes and not any(isinstance(value, fx.Node) or value.ndim > 1 for value in given):
        return _where_numbers(b, given)
    return b.call(torch.where, condition, x, y)


def _alike(values: Sequence[Value]) -> list[list[Any]]:
    """The entries of sizes and constants, those of one entry as often as the longest has."""
    parts = [
        list(value.items) if isinstance(value, Numbers) else value.reshape(-1).tolist()
        for value in values
        if not isinstance(value, fx.Node)
    ]
    length = max(map(len, parts))
    parts = [part * length if len(part) == 1 else part for part in parts]
    if any(len(part) != length for part in parts):
        raise Refusal(f"it gets arrays of {sorted(map(len, parts))} entries")
    return parts


def _where_numbers(b: Builder, given: tuple[Value, ...]) -> Numbers:
    parts = _alike(given)
    items = [
        b.call(torch.sym_ite, c, x, y) if isinstance(c, fx.Node) else (x if c else y)
        for c, x, y in zip(*parts, strict=True)
    ]
    return Numbers(tuple(items), b.dtype(given[1]), all(b.ndim(v) == 0 for v in given))


@onnx_op("Cast", "CastLike")
def _cast(b: Builder, op: Op, x: Value, like: Value | None = None) -> Any:
    dtype = dtype_of(int(op.get("to", 0))) if like is None else b.dtype(like)
    if isinstance(x, Numbers):
        return Numbers(tuple(_cast_number(b, item, dtype) for item in x.items), dtype, x.scalar)
    if b.dtype(x) == dtype:
        return x
    return b.call(torch.Tensor.to, x, dtype)


def _cast_number(b: Builder, x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, fx.Node):
        known = x.meta["val"]
        if dtype == torch.bool:
            return x if isinstance(known, torch.SymBool) else b.call(operator.ne, x, 0)
        if isinstance(known, torch.SymBool):
            x = b.call(torch.sym_ite, x, 1, 0)
        if dtype.is_floating_point:
            return b.call(torch.sym_float, x)
        return b.call(torch.sym_int, x) if isinstance(known, torch.SymFloat) else x
    if dtype == torch.bool:
        return bool(x)
    return float(x) if dtype.is_floating_point else int(x)


@onnx_op("Clip")
def _clip(b: Builder, op: Op, x: Value, low: Value | None = None, high: Value | None = None) -> Any:
    limits: list[Any] = [op.get("min"), op.get("max")] if op.opset < 11 else [low, high]
    if all(limit is None for limit in limits):
        return x
    limits = [
        limit.item() if isinstance(limit, Tensor) and limit.numel() == 1 else limit
        for limit in limits
    ]
    if any(isinstance(limit, (fx.Node, Tensor, Numbers)) for limit in limits):
        given = {"min": limits[0], "max": limits[1]}
        for name, limit in given.items():
            if isinstance(limit, (int, float)):
                given[name] = torch.tensor(limit, dtype=b.dtype(x))
        return b.call(torch.clamp, x, **given)
    if limits[0] is not None and limits[1] is not None and limits[0] > limits[1]:
        limits[0] = limits[1]
    if b.dtype(x).is_floating_point and limits == [0, 6]:
        return b.call(F.relu6, x)
    given = dict(zip(("min", "max"), limits, strict=True))
    return b.call(torch.clamp, x, **{k: v for k, v in given.items() if v is not None})


@onnx_op("LeakyRelu")
def _leaky_relu(b: Builder, op: Op, x: Value) -> Any:
    return b.call(F.leaky_relu, x, float(op.get("alpha", 0.01)))


@onnx_op("Elu")
def _elu(b: Builder, op: Op, x: Value) -> Any:
    return b.call(F.elu, x, float(op.get("alpha", 1.0)))


@onnx_op("Celu")
def _celu(b: Builder, op: Op, x: Value) -> Any:
    return b.call(F.celu, x, float(op.get("alpha", 1.0)))


@onnx_op("Selu")
def _selu(b: Builder, op: Op, x: Value) -> Any:
    alpha, gamma = float(op.get("alpha", 1.67326319217681884765625)), op.get("gamma")
    gamma = float(1.05070102214813232421875 if gamma is None else gamma)
    if math.isclose(alpha, 1.6732632, rel_tol=1e-6) and math.isclose(gamma, 1.050701, rel_tol=1e-6):
        return b.call(F.selu, x)
    return b.call(torch.mul, b.call(F.elu, x, alpha), gamma)


@onnx_op("ThresholdedRelu")
def _thresholded(b: Builder, op: Op, x: Value) -> Any:
    return b.call(F.threshold, x, float(op.get("alpha", 1.0)), 0.0)


@onnx_op("Shrink")
def _shrink(b: Builder, op: Op, x: Value) -> Any:
    bias, lambd = float(op.get("bias", 0.0)), float(op.get("lambd", 0.5))
    if bias == lambd and b.dtype(x).is_floating_point:
        return b.call(F.softshrink, x, lambd)
    if bias == 0 and b.dtype(x).is_floating_point:
        return b.call(F.hardshrink, x, lambd)
    above = b.call(torch.where, b.call(torch.gt, x, lambd), b.call(torch.sub, x, bias), 0.0)
    below = b.call(torch.where, b.call(torch.lt, x, -lambd), b.call(torch.add, x, bias), 0.0)
    made = b.call(torch.add, above, below)
    return made if b.dtype(made) == b.dtype(x) else b.call(torch.Tensor.to, made, b.dtype(x))


@onnx_op("HardSigmoid")
def _hard_sigmoid(b: Builder, op: Op, x: Value) -> Any:
    alpha, beta = float(op.get("alpha", 0.2)), float(op.get("beta", 0.5))
    if math.isclose(alpha, 1 / 6, rel_tol=1e-4) and beta == 0.5:
        return b.call(F.hardsigmoid, x)
    line = b.call(torch.add, b.call(torch.mul, x, alpha), beta)
    return b.call(torch.clamp, line, 0.0, 1.0)


@onnx_op("PRelu")
def _prelu(b: Builder, op: Op, x: Value, slope: Value) -> Any:
    channels = b.sizes(x)[1] if b.ndim(x) > 1 else None
    if isinstance(slope, Tensor) and (
        slope.numel() == 1
        or (slope.ndim == b.ndim(x) - 1 and slope.numel() == slope.shape[0] == channels)
    ):
        module = torch.nn.PReLU(slope.numel())
        module.weight.data = slope.reshape(-1).float().clone()
        return b.module(op.path, module, x)
    return b.call(torch.where, b.call(torch.lt, x, 0), b.call(torch.mul, x, slope), x)


@onnx_op("Gelu")
def _gelu(b: Builder, op: Op, x: Value) -> Any:
    return b.call(F.gelu, x, approximate=str(op.get("approximate", "none")))


@onnx_op("Swish")
def _swish(b: Builder, op: Op, x: Value) -> Any:
    alpha = float(op.get("alpha", 1.0))
    if alpha == 1:
        return b.call(F.silu, x)
    return b.call(torch.mul, x, b.call(torch.sigmoid, b.call(torch.mul, x, alpha)))


@onnx_op("IsInf")
def _is_inf(b: Builder, op: Op, x: Value) -> Any:
    positive, negative = op.get("detect_positive", 1), op.get("detect_negative", 1)
    if positive and negative:
        return b.call(torch.isinf, x)
    if not positive and not negative:
        return b.call(torch.zeros_like, x, dtype=torch.bool)
    return b.call(torch.eq, x, math.inf if positive else -math.inf)


@onnx_op("LogSoftmax", "Softmax", "Hardmax")
def _softmax(b: Builder, op: Op, x: Value) -> Any:
    ndim = b.ndim(x)
    axis = int(op.get("axis", -1 if op.opset >= 13 else 1))
    if op.opset < 13 and axis % max(ndim, 1) != ndim - 1:  # over all axes behind it at once
        flat = b.call(torch.flatten, x, axis % ndim)
        shape = list(b.shape(x))
        return b.call(torch.reshape, _along(b, op.type, flat, -1), shape)
    return _along(b, op.type, x, axis)


def _along(b: Builder, kind: str, x: Value, axis: int) -> Any:
    if kind != "Hardmax":
        function = torch.softmax if kind == "Softmax" else torch.log_softmax
        return b.call(function, x, axis)
    best = b.call(torch.argmax, x, axis)
    size = b.sizes(x)[axis]
    if size is None:
        raise Refusal("its axis has a size that is known at run time only")
    hot = b.call(torch.Tensor.to, b.call(F.one_hot, best, size), b.dtype(x))
    return b.call(torch.movedim, hot, -1, axis)


@onnx_op("Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
def _random(b: Builder, op: Op, *_: Value | None) -> Any:
    raise Refusal("it gives other numbers in every run; remove what is random")


def one_number(x: Value | None, what: str, default: float) -> float:
    """A float that an input holds."""
    return float(number(x, what, default))

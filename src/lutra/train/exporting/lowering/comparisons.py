"""Comparisons, choices by a mask, and the larger or smaller of two values.

What holds or not is 1 or 0 in the graph, and so is an activation of bools during the walk.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lutra.ops.elementwise import NO_LIMIT
from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import Number
from lutra.train.exporting.lowering.arithmetic import add, affine, mul
from lutra.train.exporting.lowering.core import (
    Deferred,
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    lowers,
)
from lutra.train.exporting.lowering.deferred import computed
from lutra.train.exporting.lowering.operands import is_activation, operand, together

_BOTH = ("self", "other")
_TURNED = {"scale": -1.0, "bias": 0.0}
_SOFTMAX = (
    "aten.softmax.int",
    "aten._softmax.default",
    "aten.amax.default",
    "aten.max.dim",
    "lutra.table_softmax.default",
)


def _compared(ctx: Lowering, op: str, a: Any, b: Any) -> Ref | View:
    return together(ctx, op, (operand(ctx, a), operand(ctx, b)))


def negated(ctx: Lowering, mask: Any) -> Any:
    """A mask that holds where another does not."""
    return affine(ctx, mask, -1.0, 1.0) if is_activation(mask) else 1.0 - mask.float()


@lowers("aten.gt.Tensor", "aten.gt.Scalar", takes=_BOTH)
def _greater(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return _compared(ctx, "greater", self, other)


@lowers("aten.lt.Tensor", "aten.lt.Scalar", takes=_BOTH)
def _less(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return _compared(ctx, "greater", other, self)


@lowers("aten.ge.Tensor", "aten.ge.Scalar", takes=_BOTH)
def _greater_equal(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return _compared(ctx, "greater_equal", self, other)


@lowers("aten.le.Tensor", "aten.le.Scalar", takes=_BOTH)
def _less_equal(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return _compared(ctx, "greater_equal", other, self)


@lowers("aten.eq.Tensor", "aten.eq.Scalar", takes=_BOTH)
def _equal(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return _compared(ctx, "equal", self, other)


@lowers("aten.ne.Tensor", "aten.ne.Scalar", takes=_BOTH)
def _not_equal(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return affine(ctx, _compared(ctx, "equal", self, other), -1.0, 1.0)


@lowers("aten.isnan.default", takes=("self",))
def _isnan(ctx: Lowering, self: Any) -> Ref | View:
    return _not_equal(ctx, self, self)


@lowers("aten.isinf.default", takes=("self",))
def _isinf(ctx: Lowering, self: Any) -> Ref | View:
    x = operand(ctx, self)
    size = views.on_each(ctx, (x,), lambda ref: ctx.emit("abs", ref, ref.shape))
    return together(ctx, "equal", (size, math.inf))


@lowers("aten.isfinite.default", takes=("self",))
def _isfinite(ctx: Lowering, self: Any) -> Ref | View:
    x = operand(ctx, self)
    zero = together(ctx, "sub", (x, x))  # NaN where it is not finite
    return together(ctx, "equal", (zero, 0.0))


@lowers("aten.copysign.Tensor", takes=_BOTH)
def _copysign(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    x, sign = operand(ctx, self), operand(ctx, other)
    if not is_activation(x):
        x = together(ctx, "add", (together(ctx, "mul", (sign, 0.0)), x))
    if not is_activation(sign):
        sign = torch.as_tensor(sign, dtype=torch.float32)
        sign = torch.copysign(torch.ones_like(sign), sign)
    size = views.on_each(ctx, (x,), lambda ref: ctx.emit("abs", ref, ref.shape))
    below = together(ctx, "greater", (0.0, sign)) if is_activation(sign) else (sign < 0).float()
    if is_activation(sign):  # of zeros too: 1 / -0 is below 0
        turned = views.on_each(ctx, (sign,), lambda ref: ctx.emit("reciprocal", ref, ref.shape))
        below = together(ctx, "maximum", (below, together(ctx, "greater", (0.0, turned))))
    return together(ctx, "where", (below, affine(ctx, size, -1.0, 0.0), size))


@lowers("aten.logical_not.default", "aten.bitwise_not.default", takes=("self",))
def _not(ctx: Lowering, self: Any) -> Ref | View:
    if ctx.node.meta["val"].dtype != torch.bool:
        raise UnsupportedUse("it computes with the bits of integers")
    return together(ctx, "equal", (operand(ctx, self), 0.0))


@lowers("aten.logaddexp.default", takes=_BOTH)
def _logaddexp(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    # max(a, b) + log(1 + e^-|a - b|)
    a, b = operand(ctx, self), operand(ctx, other)
    apart = together(ctx, "sub", (a, b))

    def extra(x: Ref) -> Ref:
        down = ctx.emit("affine_scalar", ctx.emit("abs", x, x.shape), x.shape, attrs=_TURNED)
        return ctx.emit("softplus", down, x.shape)

    more = views.on_each(ctx, (apart,), extra)
    return together(ctx, "add", (together(ctx, "maximum", (a, b)), more))


@lowers("aten.logical_and.default", "aten.bitwise_and.Tensor", "aten.__and__.Tensor", takes=_BOTH)
def _and(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return together(ctx, "mul", (_holds(ctx, 0, self), _holds(ctx, 1, other)))


@lowers("aten.logical_or.default", "aten.bitwise_or.Tensor", "aten.__or__.Tensor", takes=_BOTH)
def _or(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return together(ctx, "maximum", (_holds(ctx, 0, self), _holds(ctx, 1, other)))


@lowers("aten.logical_xor.default", "aten.bitwise_xor.Tensor", "aten.__xor__.Tensor", takes=_BOTH)
def _xor(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    equal = together(ctx, "equal", (_holds(ctx, 0, self), _holds(ctx, 1, other)))
    return affine(ctx, equal, -1.0, 1.0)


def _holds(ctx: Lowering, index: int, x: Any) -> Any:
    """An argument that is a mask, or what is not 0 in it as one."""
    if ctx.node.meta["val"].dtype != torch.bool:
        raise UnsupportedUse("it computes with the bits of integers")
    made = operand(ctx, x)
    if not is_activation(made):
        return torch.as_tensor(made) != 0
    argument: Any = ctx.node.args[index]
    if argument.meta["val"].dtype == torch.bool:
        return made
    return negated(ctx, together(ctx, "equal", (made, 0.0)))


# ---- the larger and the smaller -----------------------------------------------------------------


@lowers("aten.maximum.default", "aten.max.other", takes=_BOTH)
def _maximum(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return _compared(ctx, "maximum", self, other)


@lowers("aten.minimum.default", "aten.min.other", takes=_BOTH)
def _minimum(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return _compared(ctx, "minimum", self, other)


@lowers("aten.clamp_min.Tensor", takes=("self", "min"))
def _clamp_min(ctx: Lowering, self: Any, min: Any) -> Ref | View:
    return _maximum(ctx, self, min)


@lowers("aten.clamp_max.Tensor", takes=("self", "max"))
def _clamp_max(ctx: Lowering, self: Any, max: Any) -> Ref | View:
    return _minimum(ctx, self, max)


@lowers("aten.clamp.Tensor", takes=("self", "min", "max"))
def _clamp(ctx: Lowering, self: Any, min: Any, max: Any) -> Ref | View:
    x = self if min is None else _maximum(ctx, self, min)
    return x if max is None else _minimum(ctx, x, max)


# ---- choices ------------------------------------------------------------------------------------


@lowers(
    "aten.where.self",
    "aten.where.ScalarOther",
    "aten.where.ScalarSelf",
    "aten.where.Scalar",
    takes=("condition", *_BOTH),
)
def _where(ctx: Lowering, condition: Any, self: Any, other: Any) -> Ref | View:
    given = [operand(ctx, x) for x in (condition, self, other)]
    numbers = [isinstance(x, (int, float)) or getattr(x, "ndim", 1) == 0 for x in given]
    made = [
        _filled(ctx, float(x)) if is_number else x
        for x, is_number in zip(given, numbers, strict=True)
    ]
    return together(ctx, "where", made)


def _filled(ctx: Lowering, number: float) -> float:
    """The number to fill in; minus infinity in front of a softmax is the smallest number."""
    if number == -math.inf and all(str(user.target) in _SOFTMAX for user in ctx.node.users):
        return -NO_LIMIT
    return number


@lowers("aten.masked_fill.Scalar", "aten.masked_fill.Tensor", takes=("self", "mask"))
def _masked_fill(ctx: Lowering, self: Any, mask: Any, value: Any) -> Ref | View:
    number = _filled(ctx, float(value))
    x = operand(ctx, self)
    if not isinstance(mask, Deferred) or not is_activation(x) or not math.isfinite(number):
        return together(ctx, "where", (operand(ctx, mask), number, x))
    drop = computed(ctx, mask)
    if isinstance(drop, torch.Tensor):  # the same for every input
        return together(ctx, "where", (drop, number, x))
    kept = mul(ctx, x, negated(ctx, drop))
    return kept if number == 0 else add(ctx, kept, mul(ctx, drop, number), 1)


@lowers("aten.nan_to_num.default", works="each")
def _nan_to_num(
    ctx: Lowering, self: Ref, nan: Number | None, posinf: Number | None, neginf: Number | None
) -> Ref:
    largest = torch.finfo(torch.float32).max
    one = together(ctx, "equal", (self, self))
    known = together(ctx, "where", (one, self, float(nan or 0.0)))
    for limit, given in ((-math.inf, neginf), (math.inf, posinf)):
        if given is None or abs(float(given)) == largest:
            op, number = ("maximum", -largest) if limit < 0 else ("minimum", largest)
            known = together(ctx, op, (known, number))
        else:
            at = together(ctx, "equal", (known, limit))
            known = together(ctx, "where", (at, float(given), known))
    assert isinstance(known, Ref)
    return known

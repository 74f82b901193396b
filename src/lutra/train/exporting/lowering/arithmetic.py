"""Sums, products and quotients of activations, of constants and of what comes from integers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import Number, activation, text
from lutra.train.exporting.lowering.core import (
    Deferred,
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    lowers,
)
from lutra.train.exporting.lowering.deferred import table
from lutra.train.exporting.lowering.operands import operand, together

_BOTH = ("self", "other")


@lowers("aten.add.Tensor", "aten.add.Scalar", takes=_BOTH)
def add(ctx: Lowering, self: Any, other: Any, alpha: Number) -> Ref | View:
    if ctx.node.meta["val"].dtype == torch.bool:
        raise UnsupportedUse("it adds masks; join them with | or torch.logical_or")
    for x, what, factor in ((self, other, alpha), (other, self, 1)):
        placed = _positions(ctx, x, what, factor) if alpha == 1 or x is self else None
        if placed is not None:
            return placed
    a, b = operand(ctx, self), operand(ctx, other)
    if _is_endless(a) or _is_endless(b):
        b = b * alpha if isinstance(b, Tensor) else affine(ctx, b, alpha, 0.0)
        return together(ctx, "add", (a, b))
    if isinstance(b, (Ref, View)) and not isinstance(a, (Ref, View)):
        return affine(ctx, b, alpha, a)
    x = activation(ctx, a)
    if not isinstance(b, (Ref, View)):
        return affine(ctx, x, 1.0, torch.as_tensor(b) * alpha)
    if alpha in (1, -1):
        return together(ctx, "add" if alpha == 1 else "sub", (x, b))
    return together(ctx, "add", (x, affine(ctx, b, alpha, 0.0)))


def _is_endless(x: Any) -> bool:
    """Whether a constant holds infinity or NaN, which no file does."""
    return isinstance(x, Tensor) and not bool(x.isfinite().all())


@lowers("aten.sub.Tensor", "aten.sub.Scalar", takes=_BOTH)
def sub(ctx: Lowering, self: Any, other: Any, alpha: Number) -> Ref | View:
    return add(ctx, self, other, -alpha)


@lowers("aten.rsub.Scalar", "aten.rsub.Tensor", takes=_BOTH)
def _rsub(ctx: Lowering, self: Any, other: Any, alpha: Number) -> Ref | View:
    return add(ctx, other, self, -alpha)


@lowers("aten.neg.default", takes=("self",))
def _neg(ctx: Lowering, self: Any) -> Ref | View:
    return affine(ctx, activation(ctx, self), -1.0, 0.0)


@lowers("aten.mul.Tensor", "aten.mul.Scalar", takes=_BOTH)
def mul(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    a, b = operand(ctx, self), operand(ctx, other)
    if not isinstance(a, (Ref, View)):
        a, b = b, a
    x = activation(ctx, a)
    return together(ctx, "mul", (x, b)) if isinstance(b, (Ref, View)) else affine(ctx, x, b, 0.0)


@lowers("aten.div.Tensor", "aten.div.Scalar", takes=_BOTH)
def div(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    a, b = operand(ctx, self), operand(ctx, other)
    if not isinstance(b, (Ref, View)):
        return affine(ctx, activation(ctx, a), 1.0 / torch.as_tensor(b, dtype=torch.float64), 0.0)
    if isinstance(a, (Ref, View)):
        return together(ctx, "div", (a, b))
    inverse = views.on_each(ctx, (b,), lambda ref: ctx.emit("reciprocal", ref, ref.shape))
    return inverse if a is not None and _is_one(a) else affine(ctx, inverse, a, 0.0)


# ---- whole quotients ----------------------------------------------------------------------------


@lowers("aten.div.Tensor_mode", "aten.div.Scalar_mode", takes=_BOTH)
def _div_mode(ctx: Lowering, self: Any, other: Any, rounding_mode: str | None) -> Ref | View:
    if rounding_mode is None:
        return div(ctx, self, other)
    return _quotient(ctx, operand(ctx, self), operand(ctx, other), rounding_mode == "trunc")


@lowers("aten.floor_divide.default", "aten.floor_divide.Scalar", takes=_BOTH)
def _floor_divide(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return _quotient(ctx, operand(ctx, self), operand(ctx, other), False)


@lowers("aten.remainder.Scalar", "aten.remainder.Tensor", takes=_BOTH)
def _remainder(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return _rest(ctx, operand(ctx, self), operand(ctx, other), False)


@lowers("aten.fmod.Scalar", "aten.fmod.Tensor", takes=_BOTH)
def _fmod(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return _rest(ctx, operand(ctx, self), operand(ctx, other), True)


def _quotient(ctx: Lowering, a: Any, b: Any, towards_zero: bool) -> Ref | View:
    """a / b as a whole number; a quotient, so that multiples of b are exact."""
    exact = together(ctx, "div", (a, b))

    def whole(x: Ref) -> Ref:
        if not towards_zero:
            return ctx.emit("floor", x, x.shape)
        size = ctx.emit("floor", ctx.emit("abs", x, x.shape), x.shape)
        return ctx.emit("mul", (size, ctx.emit("sign", x, x.shape)), x.shape)

    return views.on_each(ctx, (exact,), whole)


def _rest(ctx: Lowering, a: Any, b: Any, towards_zero: bool) -> Ref | View:
    """What is left of a: a - b * (a / b as a whole number)."""
    whole = _quotient(ctx, a, b, towards_zero)
    return together(ctx, "sub", (a, together(ctx, "mul", (whole, b))))


def _is_one(x: Any) -> bool:
    return not isinstance(x, Tensor) or (x.numel() == 1 and float(x) == 1.0)


def _positions(ctx: Lowering, x: Any, what: Any, factor: Number) -> Ref | View | None:
    """Add what differs from position to position: (T, D) or (1, T, D) to (N, T, D)."""
    if not isinstance(x, (Ref, View)) or isinstance(what, (Ref, View)) or x.rank != 3:
        return None
    if views.sizes_of(ctx, x)[1] != ctx.result_sizes[1]:
        return None  # one row becomes many
    rows: Tensor | None = None
    if isinstance(what, Deferred):
        rows = table(ctx, what, -2)
    elif isinstance(what, Tensor) and what.ndim >= 2 and what.numel() == what[..., :, :].numel():
        fits = what.ndim == 2 or (what.ndim == 3 and what.shape[0] == 1)
        if what.shape[-1] == 1 and isinstance(views.sizes_of(ctx, x)[1], int):
            return None  # a bias of channels
        rows = what.reshape(what.shape[-2:]) if fits and what.shape[-2] > 1 else None
    if (
        rows is None
        or _is_endless(rows)
        or (rows.shape[-1] != 1 and views.sizes_of(ctx, x)[2] == 1)
    ):
        return None
    x = ctx.realise(x)
    width = x.shape[-1]
    if not isinstance(width, int):
        raise UnsupportedUse(f"it adds positions to {text(x)}, whose last axis has no fixed size")
    rows = rows.float().expand(-1, width) * float(factor)
    before = ctx.maker(x)
    if before is not None and before.op == "position_embedding":
        weight = torch.from_numpy(ctx.tensor(before.tensors["weight"]))
        length = min(len(weight), len(rows))
        rows = weight[:length] + rows[:length]
        x = ctx.reference(before.inputs[0])
    return ctx.emit("position_embedding", x, x.shape, tensors={"weight": rows.contiguous()})


def affine(ctx: Lowering, x: Ref | View, scale: Any, bias: Any) -> Ref | View:
    """Emit y = x * scale + bias for constants."""
    scale, bias = torch.as_tensor(scale), torch.as_tensor(bias)
    if scale.numel() == 1 and bias.numel() == 1 and max(scale.ndim, bias.ndim) <= x.rank:
        return views.on_each(ctx, (x,), lambda ref: _number(ctx, ref, float(scale), float(bias)))
    varying = max((scale, bias), key=lambda constant: constant.numel())
    count = varying.numel()
    by_last = _varies(varying, x) == {x.rank - 1} and views.sizes_of(ctx, x)[-1] == count
    if by_last and (x.rank > 2 or not views.is_sample(ctx, x)):
        return views.on_last(ctx, x, lambda ref: _along_last(ctx, ref, scale, bias))
    if not views.is_sample(ctx, x) and len(ctx.result_sizes) == x.rank:
        return _batch_first(ctx, x, scale, bias)
    ref = ctx.realise(x)
    channels = ref.shape[1] if ref.rank > 1 else None
    if _varies(varying, x) <= {1} and isinstance(channels, int) and count in (1, channels):
        return _channels(ctx, ref, scale, bias)
    sizes = ref.shape[1:]
    small = all(_fits(constant, sizes) for constant in (scale, bias))
    wide = {
        axis for axis, size in enumerate(ctx.result_shape) if axis and not isinstance(size, int)
    }
    if wide & (_varies(scale, ref) | _varies(bias, ref)):
        raise UnsupportedUse(
            f"a constant of shape {tuple(varying.shape)} meets an activation of shape {text(ref)}; "
            "constants may differ along axes of fixed size only"
        )
    if wide or not small:
        return _spread(ctx, ref, scale, bias)
    flat = views.emit_reshape(ctx, ref, (None, math.prod(sizes)), "flat")
    made = _channels(
        ctx,
        flat,
        *(
            c.reshape(c.shape[-len(sizes) :]).expand(sizes).reshape(1, -1)
            if c.ndim > len(sizes)
            else c.expand(sizes).reshape(1, -1)
            for c in (scale, bias)
        ),
    )
    return views.emit_reshape(ctx, made, ref.shape, "shaped")


def _batch_first(ctx: Lowering, x: Ref | View, scale: Tensor, bias: Tensor) -> Ref | View:
    """x * scale + bias with the batch brought to the front, and back."""
    order = views.batch_first(ctx, x)
    scale, bias = (
        each.reshape((1,) * (x.rank - each.ndim) + tuple(each.shape)).permute(order)
        for each in (scale, bias)
    )
    front = ctx.realise(views.permuted(ctx, x, order))
    with ctx.making(ctx.shape_of_sizes(tuple(ctx.result_sizes[i] for i in order))):
        made = affine(ctx, front, scale, bias)
    return views.put_back(ctx, made, order)


def _spread(ctx: Lowering, x: Ref, scale: Tensor, bias: Tensor) -> Ref | View:
    """x * scale + bias where the constants repeat what x holds."""
    made: Ref | View = x
    if scale.numel() > 1 or float(scale) != 1.0:
        made = together(ctx, "mul", (made, scale))
    return together(ctx, "add", (made, bias)) if bool((bias != 0).any()) else made


def _number(ctx: Lowering, x: Ref, scale: float, bias: float) -> Ref:
    if x.rank in (2, 4) and isinstance(x.shape[1], int):
        return _channels(ctx, x, torch.tensor(scale), torch.tensor(bias))
    return ctx.emit("affine_scalar", x, x.shape, attrs={"scale": scale, "bias": bias})


def _channels(ctx: Lowering, x: Ref, scale: Tensor, bias: Tensor) -> Ref:
    tensors = {
        name: constant.reshape(-1).float().expand(x.shape[1]).contiguous()
        for name, constant in (("scale", scale), ("bias", bias))
    }
    return ctx.emit("affine", x, x.shape, tensors=tensors)


def _along_last(ctx: Lowering, x: Ref, scale: Tensor, bias: Tensor) -> Ref:
    """Through axis 1, which is the one that `affine` works along."""
    last = x.rank - 1
    there = (0, last, *range(1, last))
    back = (0, *range(2, last + 1), 1)
    shape = tuple(x.shape[axis] for axis in there)
    moved = ctx.emit("transpose", x, shape, attrs={"axes": there}, suffix="transpose")
    made = _channels(ctx, moved, scale, bias)
    return ctx.emit("transpose", made, x.shape, attrs={"axes": back}, suffix="back")


def _varies(constant: Tensor, x: Ref | View) -> set[int]:
    """The axes of an activation along which a constant varies, as broadcasting lines them up."""
    shift = x.rank - constant.ndim
    return {axis + shift for axis, size in enumerate(constant.shape) if size != 1}


def _fits(constant: Tensor, sizes: tuple[Any, ...]) -> bool:
    shape = constant.shape[1:] if constant.ndim == len(sizes) + 1 else constant.shape
    extra = constant.ndim == len(sizes) + 1 and constant.shape[0] != 1
    return (
        not extra
        and len(shape) <= len(sizes)
        and all(s in (1, size) for s, size in zip(shape[::-1], sizes[::-1], strict=False))
    )

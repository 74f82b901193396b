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
from lutra.train.exporting.lowering.deferred import computed, table

_WORDS = {"add": "adds", "sub": "subtracts", "mul": "multiplies", "div": "divides"}
_BOTH = ("self", "other")


@lowers("aten.add.Tensor", "aten.add.Scalar", takes=_BOTH)
def _add(ctx: Lowering, self: Any, other: Any, alpha: Number) -> Ref | View:
    for x, what, factor in ((self, other, alpha), (other, self, 1)):
        placed = _positions(ctx, x, what, factor) if alpha == 1 or x is self else None
        if placed is not None:
            return placed
    a, b = _operand(ctx, self), _operand(ctx, other)
    if isinstance(b, (Ref, View)) and not isinstance(a, (Ref, View)):
        return _affine(ctx, b, alpha, a)
    x = activation(ctx, a)
    if not isinstance(b, (Ref, View)):
        return _affine(ctx, x, 1.0, torch.as_tensor(b) * alpha)
    if alpha in (1, -1):
        return _pair(ctx, "add" if alpha == 1 else "sub", x, b)
    return _pair(ctx, "add", x, _affine(ctx, b, alpha, 0.0))


@lowers("aten.sub.Tensor", "aten.sub.Scalar", takes=_BOTH)
def _sub(ctx: Lowering, self: Any, other: Any, alpha: Number) -> Ref | View:
    return _add(ctx, self, other, -alpha)


@lowers("aten.rsub.Scalar", "aten.rsub.Tensor", takes=_BOTH)
def _rsub(ctx: Lowering, self: Any, other: Any, alpha: Number) -> Ref | View:
    return _add(ctx, other, self, -alpha)


@lowers("aten.neg.default", takes=("self",))
def _neg(ctx: Lowering, self: Any) -> Ref | View:
    return _affine(ctx, activation(ctx, self), -1.0, 0.0)


@lowers("aten.mul.Tensor", "aten.mul.Scalar", takes=_BOTH)
def _mul(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    a, b = _operand(ctx, self), _operand(ctx, other)
    if not isinstance(a, (Ref, View)):
        a, b = b, a
    x = activation(ctx, a)
    return _pair(ctx, "mul", x, b) if isinstance(b, (Ref, View)) else _affine(ctx, x, b, 0.0)


@lowers("aten.div.Tensor", "aten.div.Scalar", takes=_BOTH)
def _div(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    a, b = _operand(ctx, self), _operand(ctx, other)
    if not isinstance(b, (Ref, View)):
        return _affine(ctx, activation(ctx, a), 1.0 / torch.as_tensor(b, dtype=torch.float64), 0.0)
    if isinstance(a, (Ref, View)):
        return _pair(ctx, "div", a, b)
    inverse = views.on_each(ctx, (b,), lambda ref: ctx.emit("reciprocal", ref, ref.shape))
    return inverse if a is not None and _is_one(a) else _affine(ctx, inverse, a, 0.0)


@lowers("aten.square.default", takes=("self",))
def _square(ctx: Lowering, self: Any) -> Ref | View:
    return _pow(ctx, self, 2)


@lowers("aten.pow.Tensor_Scalar", takes=("self",))
def _pow(ctx: Lowering, self: Any, exponent: Number) -> Ref | View:
    x = activation(ctx, self)
    roots = {0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
    if float(exponent) in roots:
        name = roots[float(exponent)]
        return views.on_each(ctx, (x,), lambda ref: ctx.emit(name, ref, ref.shape))
    if float(exponent) not in (1.0, 2.0, 3.0, 4.0):
        raise UnsupportedUse(f"it raises to the power of {exponent}; use 2, 3, 4, 0.5, -0.5 or -1")
    powers = {1: x}
    for _ in range(int(exponent) - 1):
        powers[len(powers) + 1] = _pair(ctx, "mul", powers[len(powers)], x)
    return powers[int(exponent)]


@lowers("aten.masked_fill.Scalar", takes=("self", "mask"))
def _masked_fill(ctx: Lowering, self: Any, mask: Any, value: Number) -> Ref | View:
    if not isinstance(mask, Deferred) or not math.isfinite(value):
        raise UnsupportedUse(
            "it fills in where activations say so, or infinity; fill in finite numbers where a "
            "mask of integers says so"
        )
    x, drop = activation(ctx, self), computed(ctx, mask)
    keep = _affine(ctx, drop, -1.0, 1.0) if isinstance(drop, (Ref, View)) else 1.0 - drop.float()
    kept = _mul(ctx, x, keep)
    return kept if value == 0 else _add(ctx, kept, _mul(ctx, drop, float(value)), 1)


def _operand(ctx: Lowering, x: Any) -> Any:
    return computed(ctx, x) if isinstance(x, Deferred) else x


def _is_one(x: Any) -> bool:
    return not isinstance(x, Tensor) or (x.numel() == 1 and float(x) == 1.0)


def _positions(ctx: Lowering, x: Any, what: Any, factor: Number) -> Ref | View | None:
    """Add what differs from position to position: (T, D) or (1, T, D) to (N, T, D)."""
    if not isinstance(x, (Ref, View)) or isinstance(what, (Ref, View)) or x.rank != 3:
        return None
    rows: Tensor | None = None
    if isinstance(what, Deferred):
        rows = table(ctx, what, -2)
    elif isinstance(what, Tensor) and what.ndim >= 2 and what.numel() == what[..., :, :].numel():
        fits = what.ndim == 2 or (what.ndim == 3 and what.shape[0] == 1)
        rows = what.reshape(what.shape[-2:]) if fits and what.shape[-2] > 1 else None
    if rows is None:
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


def _pair(ctx: Lowering, op: str, a: Ref | View, b: Ref | View) -> Ref | View:
    """An operator on two activations, of which one may have sizes of 1 where the other has not."""
    small = [views.unrepeated(ctx, x) for x in (a, b)]
    if all(views.is_sample(ctx, x) for x in small):
        first, second = (ctx.realise(x) for x in small)
        shape = _common(ctx, op, first, second)
        wanted = ctx.result_shape if _broadcast(shape, ctx.result_shape) else shape
        result = ctx.emit(op, (first, second), shape)
        if wanted != shape:  # both repeat values along one axis
            return views.expanded(ctx, result, ctx.result_sizes)
        return result
    return views.on_each(ctx, (a, b), lambda *refs: ctx.emit(op, refs, refs[0].shape))


def _broadcast(small: tuple[Any, ...], large: tuple[Any, ...]) -> bool:
    return len(small) == len(large) and any(
        s == 1 != size for s, size in zip(small, large, strict=True)
    )


def _common(ctx: Lowering, op: str, a: Ref, b: Ref) -> tuple[Any, ...]:
    fits = a.rank == b.rank and all(
        x == y or 1 in (x, y) or not (isinstance(x, int) and isinstance(y, int))
        for x, y in zip(a.shape, b.shape, strict=True)
    )
    if not fits:
        raise UnsupportedUse(
            f"it {_WORDS[op]} shapes {text(a)} and {text(b)}; operands must have equal shapes, or "
            "sizes of 1"
        )
    return tuple(y if x == 1 else x for x, y in zip(a.shape, b.shape, strict=True))


def _affine(ctx: Lowering, x: Ref | View, scale: Any, bias: Any) -> Ref | View:
    """Emit y = x * scale + bias for constants."""
    scale, bias = torch.as_tensor(scale), torch.as_tensor(bias)
    if scale.numel() == 1 and bias.numel() == 1 and max(scale.ndim, bias.ndim) <= x.rank:
        return views.on_each(ctx, (x,), lambda ref: _number(ctx, ref, float(scale), float(bias)))
    varying = max((scale, bias), key=lambda constant: constant.numel())
    if _varies(varying, x) == {x.rank - 1} and x.rank > 2:
        return views.on_last(ctx, x, lambda ref: _along_last(ctx, ref, scale, bias))
    ref = ctx.realise(x)
    if _varies(varying, x) <= {1} and ref.rank > 1 and isinstance(ref.shape[1], int):
        return _channels(ctx, ref, scale, bias)
    sizes = ref.shape[1:]
    small = all(_fits(constant, sizes) for constant in (scale, bias))
    if not small or not all(isinstance(size, int) for size in sizes):
        raise UnsupportedUse(
            f"a constant of shape {tuple(varying.shape)} meets an activation of shape {text(ref)}; "
            "constants may differ along axes of fixed size only"
        )
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

"""Activations, arithmetic, unfolded batch norm, softmax, and operators that change nothing."""

from __future__ import annotations

import builtins
import math
from typing import Any

import torch
from torch import Tensor

from lutra.ops.elementwise import NO_LIMIT
from lutra.train.lowering.arguments import Number, same_sizes, text
from lutra.train.lowering.core import Lowering, Ref, UnsupportedUse, lowers


@lowers(
    "aten.dropout.default",
    "aten.feature_dropout.default",
    "aten.alpha_dropout.default",
)
def _dropout(ctx: Lowering, input: Ref, train: bool) -> Ref:
    if train:
        raise UnsupportedUse("this dropout is on in eval mode too; use nn.Dropout")
    return input


@lowers("aten._to_copy.default", "aten.to.dtype", "aten.clone.default", "aten.contiguous.default")
@lowers("aten.detach.default", "aten.alias.default", "aten.lift_fresh_copy.default")
def _same(ctx: Lowering, self: Ref) -> Ref:
    return self


@lowers("aten.expand.default")
def _expand(ctx: Lowering, self: Ref) -> Ref:
    if ctx.result_shape != self.shape:
        raise UnsupportedUse("it repeats values; operands must have equal shapes")
    return self


@lowers("aten.relu.default")
def _relu(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("relu", self)


@lowers("aten.relu6.default")
def _relu6(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("relu6", self)


@lowers("aten.hardtanh.default")
def _hardtanh(ctx: Lowering, self: Ref, min_val: Number, max_val: Number) -> Ref:
    return _clamp(ctx, self, min_val, max_val)


@lowers("aten.clamp_min.default")
def _clamp_min(ctx: Lowering, self: Ref, min: Number) -> Ref:
    return _clamp(ctx, self, min, None)


@lowers("aten.clamp_max.default")
def _clamp_max(ctx: Lowering, self: Ref, max: Number) -> Ref:
    return _clamp(ctx, self, None, max)


@lowers("aten.clamp.default", "aten.clip.default")
def _clamp(ctx: Lowering, self: Ref, min: Number | None, max: Number | None) -> Ref:
    if min == 0 and max is None:
        return ctx.emit("relu", self)
    if min == 0 and max == 6:
        return ctx.emit("relu6", self)
    low, high = (
        (-math.inf if min is None else float(min)),
        (math.inf if max is None else float(max)),
    )
    if math.isnan(low) or math.isnan(high):
        raise UnsupportedUse(f"it limits values to {min}..{max}; use numbers, or leave one out")
    high = builtins.max(-NO_LIMIT, builtins.min(high, NO_LIMIT))
    # torch takes the upper limit where the lower one is above it
    low = builtins.max(-NO_LIMIT, builtins.min(low, high))
    return ctx.emit("clamp", self, attrs={"low": low, "high": high})


@lowers("aten.add.Tensor", "aten.add.Scalar")
def _add(ctx: Lowering, self: Any, other: Any, alpha: Number) -> Ref:
    if not isinstance(other, Ref):
        return _affine(ctx, self, 1.0, torch.as_tensor(other) * alpha)
    if not isinstance(self, Ref):
        return _affine(ctx, other, alpha, self)
    if not same_sizes(self, other):
        raise UnsupportedUse(
            f"it adds shapes {text(self)} and {text(other)}; operands must have equal shapes"
        )
    return ctx.emit("add", (self, other if alpha == 1 else _affine(ctx, other, alpha, 0.0)))


@lowers("aten.sub.Tensor", "aten.sub.Scalar")
def _sub(ctx: Lowering, self: Any, other: Any, alpha: Number) -> Ref:
    return _add(ctx, self, other, -alpha)


@lowers("aten.rsub.Scalar", "aten.rsub.Tensor")
def _rsub(ctx: Lowering, self: Any, other: Any, alpha: Number) -> Ref:
    return _add(ctx, other, self, -alpha)


@lowers("aten.neg.default")
def _neg(ctx: Lowering, self: Ref) -> Ref:
    return _affine(ctx, self, -1.0, 0.0)


@lowers("aten.mul.Tensor", "aten.mul.Scalar")
def _mul(ctx: Lowering, self: Any, other: Any) -> Ref:
    if isinstance(self, Ref) and isinstance(other, Ref):
        if not same_sizes(self, other):
            raise UnsupportedUse(
                f"it multiplies shapes {text(self)} and {text(other)}; operands must have equal "
                "shapes"
            )
        return ctx.emit("mul", (self, other))
    return _affine(ctx, self, other, 0.0) if isinstance(self, Ref) else _mul(ctx, other, self)


@lowers("aten.div.Tensor", "aten.div.Scalar")
def _div(ctx: Lowering, self: Any, other: Any) -> Ref:
    if isinstance(other, Ref):
        raise UnsupportedUse("lutra cannot divide by an activation; divide by constants only")
    return _affine(ctx, self, 1.0 / torch.as_tensor(other, dtype=torch.float64), 0.0)


@lowers("aten.batch_norm.default")
def _batch_norm(
    ctx: Lowering,
    input: Ref,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> Ref:
    if training or running_mean is None or running_var is None:
        raise UnsupportedUse(
            "this batch norm uses the statistics of the batch; give it track_running_stats=True"
        )
    variance = running_var.double() + eps
    scale = (1.0 if weight is None else weight.double()) / variance.sqrt()
    shift = (0.0 if bias is None else bias.double()) - running_mean.double() * scale
    tensors = {"scale": scale.float(), "bias": shift.float()}
    return ctx.emit("affine", input, input.shape, tensors=tensors)


@lowers("aten._native_batch_norm_legit_no_training.default")
def _native_batch_norm(
    ctx: Lowering,
    input: Ref,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Ref, None, None]:
    result = _batch_norm(ctx, input, weight, bias, running_mean, running_var, False, eps)
    return result, None, None


@lowers("aten.softmax.int", "aten._softmax.default")
def _softmax(ctx: Lowering, self: Ref, dim: int) -> Ref:
    axis = dim % self.rank
    if axis == 0:
        raise UnsupportedUse("it works over the batch (axis 0); use another axis")
    return ctx.emit("softmax", self, attrs={"axis": axis})


def _affine(ctx: Lowering, x: Ref, scale: Any, bias: Any) -> Ref:
    """Emit y = x * scale + bias, for constants that are single numbers or vary over axis 1."""
    tensors = {
        "scale": _per_channel(x, torch.as_tensor(scale)),
        "bias": _per_channel(x, torch.as_tensor(bias)),
    }
    return ctx.emit("affine", x, x.shape, tensors=tensors)


def _per_channel(x: Ref, constant: Tensor) -> Tensor:
    channels = x.shape[1] if x.rank > 1 else None
    # Axis 1 seen from behind, as broadcasting lines shapes up.
    axis = constant.ndim - x.rank + 1
    elsewhere = [size for i, size in enumerate(constant.shape) if i != axis]
    fits = constant.ndim <= x.rank and math.prod(elsewhere) == 1
    if not isinstance(channels, int) or not fits or constant.numel() not in (1, channels):
        raise UnsupportedUse(
            f"a constant of shape {tuple(constant.shape)} meets an activation of shape {text(x)}; "
            "constants may differ from channel to channel (axis 1) only"
        )
    return constant.reshape(-1).float().expand(channels).contiguous()

"""Clamps, unfolded batch norm, softmax, and operators that change nothing."""

from __future__ import annotations

import builtins
import math
from typing import Any

import torch
from torch import Tensor, fx

from lutra.ops.elementwise import NO_LIMIT
from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import Number, activation
from lutra.train.exporting.lowering.arithmetic import affine
from lutra.train.exporting.lowering.core import (
    Deferred,
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    lowers,
)
from lutra.train.exporting.lowering.functions import truncated
from lutra.train.exporting.lowering.operands import together


@lowers(
    "aten.dropout.default",
    "aten.feature_dropout.default",
    "aten.alpha_dropout.default",
    takes=("input",),
)
def _dropout(ctx: Lowering, input: Any, train: bool) -> Ref | View:
    if train:
        raise UnsupportedUse("this dropout is on in eval mode too; use nn.Dropout")
    return activation(ctx, input)


@lowers(
    "aten._to_copy.default",
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten.type_as.default",
    "aten.clone.default",
    "aten.contiguous.default",
    "aten.detach.default",
    "aten.alias.default",
    "aten.lift_fresh_copy.default",
    takes=("self",),
)
def _same(ctx: Lowering, self: Any) -> Ref | View:
    x = activation(ctx, self)
    source = ctx.node.args[0]
    was = source.meta["val"].dtype if isinstance(source, fx.Node) else None
    made = ctx.node.meta["val"].dtype
    if made == was or isinstance(self, Deferred) or was is None:
        return x
    if made == torch.bool:
        return affine(ctx, together(ctx, "equal", (x, 0.0)), -1.0, 1.0)
    if was.is_floating_point and not made.is_floating_point:
        return views.on_each(ctx, (x,), lambda ref: truncated(ctx, ref))
    return x


@lowers("aten.relu.default", works="each")
def _relu(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("relu", self)


@lowers("aten.relu6.default", works="each")
def _relu6(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("relu6", self)


@lowers("aten.hardtanh.default", works="each")
def _hardtanh(ctx: Lowering, self: Ref, min_val: Number, max_val: Number) -> Ref:
    return _clamp(ctx, self, min_val, max_val)


@lowers("aten.clamp_min.default", works="each")
def _clamp_min(ctx: Lowering, self: Ref, min: Number) -> Ref:
    return _clamp(ctx, self, min, None)


@lowers("aten.clamp_max.default", works="each")
def _clamp_max(ctx: Lowering, self: Ref, max: Number) -> Ref:
    return _clamp(ctx, self, None, max)


@lowers("aten.clamp.default", "aten.clip.default", works="each")
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


@lowers("aten.batch_norm.default", takes=("input",))
def _batch_norm(
    ctx: Lowering,
    input: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> Ref | View:
    if training or running_mean is None or running_var is None:
        raise UnsupportedUse(
            "this batch norm uses the statistics of the batch; give it track_running_stats=True"
        )
    variance = running_var.double() + eps
    scale = (1.0 if weight is None else weight.double()) / variance.sqrt()
    shift = (0.0 if bias is None else bias.double()) - running_mean.double() * scale
    tensors = {"scale": scale.float(), "bias": shift.float()}
    x = activation(ctx, input)
    if x.rank == 2 and not views.is_sample(ctx, x):  # rows that are parts of samples
        return views.on_last(ctx, x, lambda ref: ctx.realise(affine(ctx, ref, *tensors.values())))
    ref = ctx.realise(x)
    return ctx.emit("affine", ref, ref.shape, tensors=tensors)


@lowers("aten._native_batch_norm_legit_no_training.default", takes=("input",))
def _native_batch_norm(
    ctx: Lowering,
    input: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Ref | View, None, None]:
    result = _batch_norm(ctx, input, weight, bias, running_mean, running_var, False, eps)
    return result, None, None


@lowers("aten.softmax.int", "aten._softmax.default", takes=("self",))
def _softmax(ctx: Lowering, self: Any, dim: int) -> Ref | View:
    x = activation(ctx, self)
    axis = dim % x.rank
    if axis == x.rank - 1:
        return views.on_last(
            ctx, x, lambda ref: ctx.emit("softmax", ref, ref.shape, attrs={"axis": ref.rank - 1})
        )
    order = views.batch_first(ctx, x)
    if order[0] == axis:
        raise UnsupportedUse(f"it works over the batch (axis {axis}); use another axis")
    ref = ctx.realise(views.permuted(ctx, x, order))
    made = ctx.emit("softmax", ref, ref.shape, attrs={"axis": order.index(axis)})
    return views.put_back(ctx, made, order)


@lowers("aten.softmin.int", takes=("self",))
def _softmin(ctx: Lowering, self: Any, dim: int) -> Ref | View:
    return _softmax(ctx, affine(ctx, activation(ctx, self), -1.0, 0.0), dim)

"""Norms over the last axis."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import activation, need_constant
from lutra.train.exporting.lowering.core import Lowering, Ref, UnsupportedUse, View, lowers


@lowers("aten.layer_norm.default", takes=("input",))
def _any_layer_norm(
    ctx: Lowering,
    input: Any,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Ref | View:
    x = activation(ctx, input)
    if len(normalized_shape) == 1:
        return views.on_last(
            ctx, x, lambda ref: _layer_norm(ctx, ref, normalized_shape, weight, bias, eps)
        )
    ref = ctx.realise(x)
    size = math.prod(normalized_shape)
    shape = (*ref.shape[: ref.rank - len(normalized_shape)], size)
    flat = views.emit_reshape(ctx, ref, shape, "flat")
    rows = [
        None if t is None else need_constant(t, "its weight").reshape(-1) for t in (weight, bias)
    ]
    made = _layer_norm(ctx, flat, [size], rows[0], rows[1], eps)
    return views.emit_reshape(ctx, made, ref.shape, "shaped")


def _layer_norm(
    ctx: Lowering,
    input: Ref,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Ref:
    size = _last(input, normalized_shape)
    tensors = {
        "weight": torch.ones(size) if weight is None else need_constant(weight, "the weight"),
        "bias": torch.zeros(size) if bias is None else need_constant(bias, "the bias"),
    }
    return ctx.emit("layer_norm", input, input.shape, attrs={"eps": float(eps)}, tensors=tensors)


@lowers("aten.native_layer_norm.default")
def _native_layer_norm(
    ctx: Lowering,
    input: Ref,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Ref, None, None]:
    made = _any_layer_norm(ctx, input, normalized_shape, weight, bias, eps)
    return ctx.realise(made), None, None


@lowers("aten.rms_norm.default", works="last")
def _rms_norm(
    ctx: Lowering, input: Ref, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> Ref:
    size = _last(input, normalized_shape)
    scale = torch.ones(size) if weight is None else need_constant(weight, "the weight")
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    return ctx.emit("rms_norm", input, input.shape, attrs={"eps": eps}, tensors={"weight": scale})


def _last(x: Ref, normalized_shape: list[int]) -> int:
    (*others, size) = normalized_shape
    if others:
        raise UnsupportedUse(
            f"it works over the last {len(others) + 1} axes; lutra's norms work over the last one"
        )
    return int(size)

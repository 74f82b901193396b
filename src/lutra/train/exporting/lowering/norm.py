"""Norms over the last axis, and lengths of vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lutra.train.exporting.lowering.arguments import Number, need_constant
from lutra.train.exporting.lowering.core import Lowering, Ref, UnsupportedUse, lowers


@lowers("aten.layer_norm.default", works="last")
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
    return _layer_norm(ctx, input, normalized_shape, weight, bias, eps), None, None


@lowers("aten.rms_norm.default", works="last")
def _rms_norm(
    ctx: Lowering, input: Ref, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> Ref:
    size = _last(input, normalized_shape)
    scale = torch.ones(size) if weight is None else need_constant(weight, "the weight")
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    return ctx.emit("rms_norm", input, input.shape, attrs={"eps": eps}, tensors={"weight": scale})


@lowers("aten.linalg_vector_norm.default")
def _vector_norm(
    ctx: Lowering, self: Ref, ord: Number, dim: list[int] | None, keepdim: bool
) -> Ref:
    axes = tuple(sorted(axis % self.rank for axis in dim or range(self.rank)))
    if ord != 2 or axes[0] == 0:
        raise UnsupportedUse(
            f"it is the {ord}-norm over the axes {list(axes)}; use 2, and not the batch (axis 0)"
        )
    return ctx.emit("l2_norm", self, attrs={"axes": axes, "keepdims": keepdim})


@lowers("aten.norm.ScalarOpt_dim")
def _norm(ctx: Lowering, self: Ref, p: Any, dim: list[int], keepdim: bool) -> Ref:
    return _vector_norm(ctx, self, 2 if p is None else p, dim, keepdim)


def _last(x: Ref, normalized_shape: list[int]) -> int:
    (*others, size) = normalized_shape
    if others:
        raise UnsupportedUse(
            f"it works over the last {len(others) + 1} axes; lutra's norms work over the last one"
        )
    return int(size)

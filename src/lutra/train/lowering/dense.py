"""Convolutions and matrix products with constant weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lutra.train.lowering.arguments import (
    PRODUCT,
    Number,
    need_activation,
    need_constant,
    need_rank,
    pair,
    single,
)
from lutra.train.lowering.core import Lowering, Ref, UnsupportedUse, lowers
from lutra.train.lowering.points import as_image


@lowers("aten.conv2d.default")
def _conv2d(
    ctx: Lowering,
    input: Ref,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Ref:
    need_activation(input)
    need_rank(input, 4)
    weight = need_constant(weight, "the kernel")
    return ctx.emit(
        "conv2d",
        input,
        attrs={
            "stride": pair(stride),
            "padding": pair(padding),
            "dilation": pair(dilation),
            "groups": groups,
        },
        tensors={"weight": weight, "bias": _bias(bias, weight.shape[0])},
    )


@lowers("aten.conv2d.padding")
def _conv2d_padding(
    ctx: Lowering,
    input: Ref,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: str,
    dilation: Any,
    groups: int,
) -> Ref:
    need_activation(input)
    need_rank(input, 4)
    weight = need_constant(weight, "the kernel")
    totals = [0, 0]
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(pair(dilation), weight.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        # An even kernel: torch puts the odd row and column behind.
        (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
        shape = (*input.shape[:2], input.shape[2] + totals[0], input.shape[3] + totals[1])
        pads = (0, 0, 0, 0, top, bottom, left, right)
        input = ctx.emit("pad", input, shape, attrs={"pads": pads, "value": 0.0}, suffix="pad")
        totals = [0, 0]
    half = [total // 2 for total in totals]
    return _conv2d(ctx, input, weight, bias, stride, half, dilation, groups)


@lowers("aten.conv1d.default")
def _conv1d(
    ctx: Lowering,
    input: Ref,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Ref:
    need_activation(input)
    need_rank(input, 3)
    weight = need_constant(weight, "the kernel")
    size, step, pad, spread = weight.shape[2], single(stride), single(padding), single(dilation)
    return as_image(
        ctx,
        input,
        "conv2d",
        attrs={
            "stride": (1, step),
            "padding": (0, pad),
            "dilation": (1, spread),
            "groups": groups,
        },
        tensors={
            "weight": weight.reshape(*weight.shape[:2], 1, size),
            "bias": _bias(bias, weight.shape[0]),
        },
    )


@lowers("aten.conv1d.padding")
def _conv1d_padding(
    ctx: Lowering,
    input: Ref,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: str,
    dilation: Any,
    groups: int,
) -> Ref:
    need_activation(input)
    need_rank(input, 3)
    total = single(dilation) * (weight.shape[2] - 1) if padding == "same" else 0
    if total % 2:  # an even kernel: torch puts the odd entry behind
        shape = (*input.shape[:2], input.shape[2] + total)
        pads = (0, 0, 0, 0, total // 2, total - total // 2)
        input = ctx.emit("pad", input, shape, attrs={"pads": pads, "value": 0.0}, suffix="pad")
        total = 0
    return _conv1d(ctx, input, weight, bias, stride, total // 2, dilation, groups)


@lowers("aten.convolution.default")
def _convolution(
    ctx: Lowering,
    input: Ref,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    groups: int,
) -> Ref:
    if transposed:
        raise UnsupportedUse("lutra has no transposed convolution; keep this part in torch")
    if isinstance(weight, Tensor) and weight.ndim == 3:
        return _conv1d(ctx, input, weight, bias, stride, padding, dilation, groups)
    return _conv2d(ctx, input, weight, bias, stride, padding, dilation, groups)


@lowers("aten.linear.default")
def _linear(ctx: Lowering, input: Ref, weight: Tensor, bias: Tensor | None) -> Ref:
    need_activation(input)
    weight = need_constant(weight, "the weight")
    if bias is not None:
        need_constant(bias, "the bias")
    tensors = {"weight": weight, "bias": _bias(bias, weight.shape[0])}
    return ctx.emit("linear", input, tensors=tensors)


@lowers("aten.addmm.default")
def _addmm(
    ctx: Lowering, self: Tensor, mat1: Ref, mat2: Tensor, beta: Number, alpha: Number
) -> Ref:
    bias, weight = need_constant(self, "the bias"), need_constant(mat2, "the weight")
    need_activation(mat1)
    weight = weight.t() if alpha == 1 else weight.t() * alpha
    bias = (bias if beta == 1 else bias * beta).reshape(-1)
    return _linear(ctx, mat1, weight, bias.expand(weight.shape[0]))


@lowers("aten.mm.default")
def _mm(ctx: Lowering, self: Ref, mat2: Tensor) -> Ref:
    return _matmul(ctx, self, mat2)


@lowers("aten.matmul.default")
def _matmul(ctx: Lowering, self: Ref, other: Tensor) -> Ref:
    if not isinstance(self, Ref) or not isinstance(other, Tensor):
        raise UnsupportedUse(PRODUCT)
    if other.ndim != 2:
        raise UnsupportedUse(f"the second factor has shape {tuple(other.shape)}; make it 2-D")
    return _linear(ctx, self, other.t(), None)


def _bias(bias: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size) if bias is None else bias

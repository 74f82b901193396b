"""Norms over groups of channels, and over single ones."""

from __future__ import annotations

import torch
from torch import Tensor

from lutra.train.exporting.lowering.arguments import need_constant, text
from lutra.train.exporting.lowering.core import Lowering, Ref, UnsupportedUse, lowers
from lutra.train.exporting.lowering.points import as_image


@lowers("aten.group_norm.default")
def _group_norm(
    ctx: Lowering,
    input: Ref,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Ref:
    channels = _channels(input)
    attrs = {"groups": num_groups, "eps": float(eps)}
    tensors = {
        "weight": torch.ones(channels) if weight is None else need_constant(weight, "the weight"),
        "bias": torch.zeros(channels) if bias is None else need_constant(bias, "the bias"),
    }
    if input.rank == 3:
        return as_image(ctx, input, "group_norm", attrs=attrs, tensors=tensors)
    return ctx.emit("group_norm", input, attrs=attrs, tensors=tensors)


@lowers("aten.native_group_norm.default")
def _native_group_norm(
    ctx: Lowering, input: Ref, weight: Tensor | None, bias: Tensor | None, group: int, eps: float
) -> tuple[Ref, None, None]:
    return _group_norm(ctx, input, group, weight, bias, eps), None, None


@lowers("aten.instance_norm.default")
def _instance_norm(
    ctx: Lowering,
    input: Ref,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    eps: float,
) -> Ref:
    channels = _channels(input)
    if use_input_stats or running_mean is None or running_var is None:
        return _group_norm(ctx, input, channels, weight, bias, eps)
    gain = (running_var.double() + eps).rsqrt()
    if weight is not None:
        gain = gain * need_constant(weight, "the weight").double()
    shift = -running_mean.double() * gain
    if bias is not None:
        shift = shift + need_constant(bias, "the bias").double()
    tensors = {"scale": gain.float(), "bias": shift.float()}
    return ctx.emit("affine", input, input.shape, tensors=tensors)


def _channels(x: Ref) -> int:
    channels = x.shape[1]
    if not isinstance(channels, int):
        raise UnsupportedUse(f"its input has the shape {text(x)}; axis 1 must have a fixed size")
    return channels

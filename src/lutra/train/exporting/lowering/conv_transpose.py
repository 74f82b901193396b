"""Transposed convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lutra.train.exporting.lowering.arguments import (
    need_activation,
    need_constant,
    need_rank,
    pair,
    single,
)
from lutra.train.exporting.lowering.core import Lowering, Ref, lowers
from lutra.train.exporting.lowering.points import as_image


@lowers("aten.conv_transpose2d.input")
def conv_transpose2d(
    ctx: Lowering,
    input: Ref,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Ref:
    """Emit a transposed convolution of images."""
    need_activation(input)
    need_rank(input, 4)
    attrs = {
        "stride": pair(stride),
        "padding": pair(padding),
        "output_padding": pair(output_padding),
        "dilation": pair(dilation),
        "groups": groups,
    }
    tensors = _tensors(need_constant(weight, "the kernel"), bias, groups)
    return ctx.emit("conv_transpose2d", input, attrs=attrs, tensors=tensors)


@lowers("aten.conv_transpose1d.default")
def conv_transpose1d(
    ctx: Lowering,
    input: Ref,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Ref:
    """Emit a transposed convolution of rows of points."""
    need_activation(input)
    need_rank(input, 3)
    attrs = {
        "stride": (1, single(stride)),
        "padding": (0, single(padding)),
        "output_padding": (0, single(output_padding)),
        "dilation": (1, single(dilation)),
        "groups": groups,
    }
    image = need_constant(weight, "the kernel").unsqueeze(2)
    return as_image(
        ctx, input, "conv_transpose2d", attrs=attrs, tensors=_tensors(image, bias, groups)
    )


def _tensors(weight: Tensor, bias: Tensor | None, groups: int) -> dict[str, Tensor]:
    """The tensors of the operator: its kernel has the outputs in front, PyTorch's the channels."""
    channels, outputs, *kernel = weight.shape
    apart = weight.reshape(groups, channels // groups, outputs, *kernel).transpose(1, 2)
    turned = apart.reshape(groups * outputs, channels // groups, *kernel)
    zeros = torch.zeros(groups * outputs)
    return {
        "weight": turned.contiguous(),
        "bias": zeros if bias is None else need_constant(bias, "the bias"),
    }

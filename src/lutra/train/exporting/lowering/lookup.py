"""Lookup layers of a table of two axes: the custom operators of `lutra.train.operators.lookup`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lutra.train.exporting.lowering.arguments import need_rank
from lutra.train.exporting.lowering.core import Lowering, Ref, lowers


def _attrs(act_scale: float, act_zero: int, act_bits: int, weight_bits: int) -> dict[str, Any]:
    return {
        "act_scale": float(act_scale),
        "act_zero": act_zero,
        "act_bits": act_bits,
        "weight_bits": weight_bits,
    }


@lowers("lutra.lookup_conv2d.default")
def _lookup_conv2d(
    ctx: Lowering,
    x: Ref,
    weight: Tensor,
    table: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    weight_bits: int,
    channels: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Ref:
    need_rank(x, 4)
    return ctx.emit(
        "lookup_conv2d",
        x,
        attrs={
            "in_channels": channels,
            "kernel": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            **_attrs(act_scale, act_zero, act_bits, weight_bits),
        },
        tensors={"weight": weight, "table": table, "scale": scale, "bias": bias},
    )


@lowers("lutra.lookup_linear.default", works="last")
def _lookup_linear(
    ctx: Lowering,
    x: Ref,
    weight: Tensor,
    table: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    weight_bits: int,
) -> Ref:
    return ctx.emit(
        "lookup_linear",
        x,
        attrs={
            "in_features": x.shape[-1],
            **_attrs(act_scale, act_zero, act_bits, weight_bits),
        },
        tensors={"weight": weight, "table": table, "scale": scale, "bias": bias},
    )

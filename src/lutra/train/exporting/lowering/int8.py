"""Dense layers in int8: the custom operators of `lutra.train.layers.int8`."""

from __future__ import annotations

from torch import Tensor

from lutra.train.exporting.lowering.arguments import need_rank
from lutra.train.exporting.lowering.core import Lowering, Ref, lowers


@lowers("lutra.int8_conv2d.default")
def _int8_conv2d(
    ctx: Lowering,
    x: Ref,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Ref:
    need_rank(x, 4)
    return ctx.emit(
        "int8_conv2d",
        x,
        attrs={
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "act_scale": float(act_scale),
            "act_zero": act_zero,
            "act_bits": act_bits,
        },
        tensors={"weight": weight, "scale": scale, "bias": bias},
    )


@lowers("lutra.int8_linear.default", works="last")
def _int8_linear(
    ctx: Lowering,
    x: Ref,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
) -> Ref:
    return ctx.emit(
        "int8_linear",
        x,
        attrs={"act_scale": float(act_scale), "act_zero": act_zero, "act_bits": act_bits},
        tensors={"weight": weight, "scale": scale, "bias": bias},
    )

"""Lookup layers: the custom operators of `lutra.train`."""

from __future__ import annotations

from torch import Tensor

from lutra.train.encoder import encoder_of
from lutra.train.exporting.lowering.arguments import need_rank
from lutra.train.exporting.lowering.core import Lowering, Ref, lowers


def _tensors(
    encoder: str,
    centroids: Tensor | None,
    splits: Tensor | None,
    thresholds: Tensor | None,
    tables: Tensor,
    scale: Tensor,
    bias: Tensor,
) -> dict[str, Tensor]:
    codebooks = encoder_of(encoder, centroids, splits, thresholds)
    return {**codebooks.tensors, "tables": tables, "scale": scale, "bias": bias}


@lowers("lutra.pq_conv2d.default")
def _pq_conv2d(
    ctx: Lowering,
    x: Ref,
    centroids: Tensor | None,
    tables: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    encoder: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    splits: Tensor | None,
    thresholds: Tensor | None,
) -> Ref:
    need_rank(x, 4)
    return ctx.emit(
        "pq_conv2d",
        x,
        attrs={
            "in_channels": x.shape[1],
            "kernel": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "act_scale": float(act_scale),
            "act_zero": act_zero,
            "act_bits": act_bits,
            "encoder": encoder,
        },
        tensors=_tensors(encoder, centroids, splits, thresholds, tables, scale, bias),
    )


@lowers("lutra.pq_linear.default", works="last")
def _pq_linear(
    ctx: Lowering,
    x: Ref,
    centroids: Tensor | None,
    tables: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    encoder: str,
    splits: Tensor | None,
    thresholds: Tensor | None,
) -> Ref:
    return ctx.emit(
        "pq_linear",
        x,
        attrs={
            "in_features": x.shape[-1],
            "act_scale": float(act_scale),
            "act_zero": act_zero,
            "act_bits": act_bits,
            "encoder": encoder,
        },
        tensors=_tensors(encoder, centroids, splits, thresholds, tables, scale, bias),
    )

"""Pools."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import need_rank, pair, single
from lutra.train.exporting.lowering.core import (
    Lowering,
    Ref,
    UnsupportedUse,
    is_dynamic,
    lowers,
)
from lutra.train.exporting.lowering.points import as_image


@lowers("aten.max_pool2d.default")
def _max_pool2d(
    ctx: Lowering,
    self: Ref,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
) -> Ref:
    need_rank(self, 4)
    return ctx.emit(
        "max_pool2d",
        self,
        attrs={
            "kernel": pair(kernel_size),
            "stride": pair(stride or kernel_size),
            "padding": pair(padding),
            "dilation": pair(dilation),
            "ceil_mode": ceil_mode,
        },
    )


@lowers("aten.max_pool2d_with_indices.default")
def _max_pool2d_with_indices(
    ctx: Lowering,
    self: Ref,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
) -> tuple[Ref, None]:
    return _max_pool2d(ctx, self, kernel_size, stride, padding, dilation, ceil_mode), None


@lowers("aten.avg_pool2d.default")
def _avg_pool2d(
    ctx: Lowering,
    self: Ref,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Ref:
    need_rank(self, 4)
    if divisor_override is not None:
        raise UnsupportedUse("it sets divisor_override; leave that out and scale the result")
    return ctx.emit(
        "avg_pool2d",
        self,
        attrs={
            "kernel": pair(kernel_size),
            "stride": pair(stride or kernel_size),
            "padding": pair(padding),
            "ceil_mode": ceil_mode,
            "count_include_pad": count_include_pad,
        },
    )


@lowers("aten.adaptive_avg_pool2d.default", "aten._adaptive_avg_pool2d.default")
def _adaptive_avg_pool2d(ctx: Lowering, self: Ref, output_size: Any) -> Ref:
    need_rank(self, 4)
    return ctx.emit("adaptive_avg_pool2d", self, attrs={"output_size": pair(output_size)})


@lowers("aten.adaptive_max_pool2d.default")
def _adaptive_max_pool2d(ctx: Lowering, self: Ref, output_size: Any) -> tuple[Ref, None]:
    need_rank(self, 4)
    return ctx.emit("adaptive_max_pool2d", self, attrs={"output_size": pair(output_size)}), None


@lowers("aten.avg_pool3d.default")
def _avg_pool3d(
    ctx: Lowering,
    self: Ref,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Ref:
    steps = list(stride or kernel_size)
    flat = [*kernel_size[1:], *steps[1:]] == [1, 1, 1, 1] and not any(padding[1:])
    if self.rank != 5 or not flat or divisor_override is not None:
        raise UnsupportedUse(
            "it averages over volumes; only means over the first of the three axes exist, as in "
            "nn.LocalResponseNorm"
        )
    if self.shape[1] == 1 and all(is_dynamic(size) for size in self.shape[3:]):
        # sums of neighbours among channels, as a product with a band of a matrix
        depth = self.shape[2]
        band = F.avg_pool1d(
            torch.eye(depth)[:, None],
            kernel_size[0],
            steps[0],
            padding[0],
            ceil_mode,
            count_include_pad,
        )[:, 0].t()
        image = views.emit_reshape(ctx, self, (None, depth, *self.shape[3:]), "image")
        made = ctx.emit(
            "conv2d",
            image,
            (None, len(band), *self.shape[3:]),
            attrs={"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1},
            tensors={"weight": band[:, :, None, None].contiguous(), "bias": torch.zeros(len(band))},
        )
        return views.emit_reshape(ctx, made, ctx.result_shape, "volumes")
    rows = views.emit_reshape(ctx, self, (*self.shape[:3], self.shape[3] * self.shape[4]), "rows")
    depth = ctx.result_shape[2]
    attrs = {
        "kernel": (kernel_size[0], 1),
        "stride": (steps[0], 1),
        "padding": (padding[0], 0),
        "ceil_mode": ceil_mode,
        "count_include_pad": count_include_pad,
    }
    made = ctx.emit("avg_pool2d", rows, (*rows.shape[:2], depth, rows.shape[3]), attrs=attrs)
    return views.emit_reshape(ctx, made, ctx.result_shape, "volumes")


@lowers("aten.adaptive_max_pool1d.default")
def _adaptive_max_pool1d(ctx: Lowering, self: Ref, output_size: Any) -> tuple[Ref, None]:
    return _adaptive_pool1d(ctx, self, output_size, "max"), None


@lowers("aten.adaptive_avg_pool1d.default")
def _adaptive_avg_pool1d(ctx: Lowering, self: Ref, output_size: Any) -> Ref:
    return _adaptive_pool1d(ctx, self, output_size, "mean")


def _adaptive_pool1d(ctx: Lowering, x: Ref, output_size: Any, op: str) -> Ref:
    need_rank(x, 3)
    size = single(output_size)
    if size == 1:
        return ctx.emit(op, x, attrs={"axes": (2,), "keepdims": True})
    kind = "avg" if op == "mean" else op
    return as_image(ctx, x, f"adaptive_{kind}_pool2d", attrs={"output_size": (1, size)})


@lowers("aten.max_pool1d.default")
def _max_pool1d(
    ctx: Lowering,
    self: Ref,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
) -> Ref:
    need_rank(self, 3)
    attrs = _line(kernel_size, stride, padding, ceil_mode)
    return as_image(ctx, self, "max_pool2d", attrs={**attrs, "dilation": (1, single(dilation))})


@lowers("aten.avg_pool1d.default")
def _avg_pool1d(
    ctx: Lowering,
    self: Ref,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
) -> Ref:
    need_rank(self, 3)
    attrs = _line(kernel_size, stride, padding, ceil_mode)
    return as_image(
        ctx, self, "avg_pool2d", attrs={**attrs, "count_include_pad": count_include_pad}
    )


def _line(kernel: Any, stride: Any, padding: Any, ceil_mode: bool) -> dict[str, Any]:
    """The window of a pool over images of one line."""
    return {
        "kernel": (1, single(kernel)),
        "stride": (1, single(stride or kernel)),
        "padding": (0, single(padding)),
        "ceil_mode": ceil_mode,
    }

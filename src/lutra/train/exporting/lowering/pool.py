"""Pools."""

from __future__ import annotations

from typing import Any

from lutra.train.exporting.lowering.arguments import need_rank, pair, single
from lutra.train.exporting.lowering.core import (
    Lowering,
    Ref,
    UnsupportedUse,
    lowers,
)
from lutra.train.exporting.lowering.functions import line
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
    if divisor_override is not None and ceil_mode:
        raise UnsupportedUse(
            "divisor_override does not go with ceil_mode; leave one of the two out"
        )
    height, width = pair(kernel_size)
    attrs = {
        "kernel": (height, width),
        "stride": pair(stride or kernel_size),
        "padding": pair(padding),
        "ceil_mode": ceil_mode,
        "count_include_pad": count_include_pad or divisor_override is not None,
    }
    if divisor_override is None:
        return ctx.emit("avg_pool2d", self, attrs=attrs)
    made = ctx.emit("avg_pool2d", self, attrs=attrs, suffix="mean")
    return line(ctx, made, height * width / divisor_override, 0.0)


@lowers("aten.adaptive_avg_pool2d.default", "aten._adaptive_avg_pool2d.default")
def _adaptive_avg_pool2d(ctx: Lowering, self: Ref, output_size: Any) -> Ref:
    need_rank(self, 4)
    return ctx.emit("adaptive_avg_pool2d", self, attrs={"output_size": pair(output_size)})


@lowers("aten.adaptive_max_pool2d.default")
def _adaptive_max_pool2d(ctx: Lowering, self: Ref, output_size: Any) -> tuple[Ref, None]:
    need_rank(self, 4)
    return ctx.emit("adaptive_max_pool2d", self, attrs={"output_size": pair(output_size)}), None


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

"""Operators that give images another size, and windows of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import need_rank, pair
from lutra.train.exporting.lowering.core import Lowering, Ref, UnsupportedUse, is_dynamic, lowers
from lutra.train.exporting.lowering.operands import constant
from lutra.train.exporting.lowering.points import as_image


@lowers("aten.pixel_shuffle.default")
def _pixel_shuffle(ctx: Lowering, self: Ref, upscale_factor: int) -> Ref:
    need_rank(self, 4)
    return ctx.emit("pixel_shuffle", self, attrs={"factor": upscale_factor})


@lowers("aten.im2col.default")
def _im2col(
    ctx: Lowering,
    self: Ref,
    kernel_size: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Ref:
    """Windows as columns: a convolution whose filters each take one value."""
    need_rank(self, 4)
    channels, size = self.shape[1], kernel_size[0] * kernel_size[1]
    one = torch.eye(size).reshape(size, 1, *kernel_size)
    rows, columns = (
        (length + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for length, pad, spread, kernel, step in zip(
            self.shape[2:], padding, dilation, kernel_size, stride, strict=True
        )
    )
    made = ctx.emit(
        "conv2d",
        self,
        (None, channels * size, rows, columns),
        attrs={
            "stride": pair(stride),
            "padding": pair(padding),
            "dilation": pair(dilation),
            "groups": channels,
        },
        tensors={
            "weight": one.repeat(channels, 1, 1, 1),
            "bias": torch.zeros(channels * size),
        },
    )
    return views.emit_reshape(ctx, made, ctx.result_shape, "columns")


@lowers("aten.col2im.default")
def _col2im(
    ctx: Lowering,
    self: Ref,
    output_size: list[Any],
    kernel_size: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Ref:
    """Columns added up where their windows lie: the transposed convolution of `_im2col`."""
    need_rank(self, 3)
    if any(is_dynamic(length) for length in ctx.result_shape[1:]):
        raise UnsupportedUse("it makes an image of a size that is known at run time only")
    channels, *lengths = (int(size) for size in ctx.result_shape[1:])
    size = kernel_size[0] * kernel_size[1]
    reach = [spread * (kernel - 1) for spread, kernel in zip(dilation, kernel_size, strict=True)]
    counts, left = zip(
        *(
            divmod(length + 2 * pad - own - 1, step)
            for length, pad, own, step in zip(lengths, padding, reach, stride, strict=True)
        ),
        strict=True,
    )
    grid = (self.shape[0], channels * size, counts[0] + 1, counts[1] + 1)
    windows = views.emit_reshape(ctx, self, grid, "windows")
    one = torch.eye(size).reshape(1, size, *kernel_size)
    return ctx.emit(
        "conv_transpose2d",
        windows,
        attrs={
            "stride": pair(stride),
            "padding": pair(padding),
            "output_padding": (left[0], left[1]),
            "dilation": pair(dilation),
            "groups": channels,
        },
        tensors={"weight": one.repeat(channels, 1, 1, 1), "bias": torch.zeros(channels)},
    )


@lowers("aten.upsample_nearest1d.vec", takes_sizes=True)
def _nearest1d(ctx: Lowering, input: Ref, scale_factors: Any) -> Ref:
    return _upsample1d(ctx, input, scale_factors, "nearest", False)


@lowers("aten._upsample_nearest_exact1d.vec", takes_sizes=True)
def _nearest_exact1d(ctx: Lowering, input: Ref, scale_factors: Any) -> Ref:
    return _upsample1d(ctx, input, scale_factors, "nearest-exact", False)


@lowers("aten.upsample_linear1d.vec", takes_sizes=True)
def _linear1d(ctx: Lowering, input: Ref, align_corners: bool, scale_factors: Any) -> Ref:
    return _upsample1d(ctx, input, scale_factors, "bilinear", align_corners)


def _upsample1d(
    ctx: Lowering, x: Ref, scales: Sequence[Any] | None, mode: str, align_corners: bool
) -> Ref:
    need_rank(x, 3)
    attrs: dict[str, Any] = {"mode": mode, "align_corners": align_corners}
    size = ctx.result_shape[2]
    if scales is None and is_dynamic(size):
        ratio = _multiple(size, x.shape[2])
        scales = None if ratio is None else [ratio]
    if scales is not None:
        return as_image(
            ctx,
            x,
            "upsample",
            attrs={**attrs, "size": (), "scale_h": 1.0, "scale_w": float(scales[0])},
        )
    if is_dynamic(size):
        raise UnsupportedUse(
            "its size is computed from sizes that are known at run time only; give a scale_factor"
        )
    return as_image(
        ctx, x, "upsample", attrs={**attrs, "size": (1, size), "scale_h": 0.0, "scale_w": 0.0}
    )


@lowers("aten.upsample_nearest2d.vec", takes_sizes=True)
def _nearest(ctx: Lowering, input: Ref, scale_factors: Any) -> Ref:
    return _upsample(ctx, input, scale_factors, "nearest", False)


@lowers("aten._upsample_nearest_exact2d.vec", takes_sizes=True)
def _nearest_exact(ctx: Lowering, input: Ref, scale_factors: Any) -> Ref:
    return _upsample(ctx, input, scale_factors, "nearest-exact", False)


@lowers("aten.upsample_bilinear2d.vec", takes_sizes=True)
def _bilinear(ctx: Lowering, input: Ref, align_corners: bool, scale_factors: Any) -> Ref:
    return _upsample(ctx, input, scale_factors, "bilinear", align_corners)


@lowers("aten.upsample_bicubic2d.vec", takes_sizes=True)
def _bicubic(ctx: Lowering, input: Ref, align_corners: bool, scale_factors: Any) -> Ref:
    return _scaled(ctx, input, scale_factors, "upsample_bicubic", {"align_corners": align_corners})


@lowers("aten.affine_grid_generator.default", takes_sizes=True)
def _affine_grid(ctx: Lowering, theta: Any, size: list[int], align_corners: bool) -> Ref:
    if not isinstance(theta, Ref) or len(size) != 4:
        raise UnsupportedUse("it makes a grid of volumes, or for each sample of a constant")
    h, w = size[-2:]
    same = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    points = F.affine_grid(same, [1, 1, h, w], align_corners).reshape(1, h * w, 2)
    points = torch.cat([points, torch.ones(1, h * w, 1)], 2)
    turned = ctx.emit("transpose", theta, (None, 3, 2), attrs={"axes": (0, 2, 1)}, suffix="turned")
    places = constant(ctx, points, theta, 3)
    attrs = {"transpose_a": False, "transpose_b": False}
    grid = ctx.emit("matmul", (places, turned), (None, h * w, 2), attrs=attrs)
    return views.emit_reshape(ctx, grid, ctx.result_shape, "grid")


@lowers("aten._upsample_bilinear2d_aa.vec", "aten._upsample_bicubic2d_aa.vec")
def _antialiased(
    ctx: Lowering, input: Ref, align_corners: bool, scale_factors: list[float] | None
) -> Ref:
    # a product with a matrix along each of two axes of fixed size
    need_rank(input, 4)
    mode = "bicubic" if "bicubic" in str(ctx.node.target) else "bilinear"
    x = input
    for axis in (3, 2):
        old, new = input.shape[axis], ctx.result_shape[axis]
        if not isinstance(old, int) or not isinstance(new, int):
            raise UnsupportedUse(
                "its sizes are known at run time only; take them out of dynamic_axes, or use "
                "antialias=False"
            )
        how: dict[str, Any] = {"size": (new, old)}
        if scale_factors is not None:
            how = {"scale_factor": (scale_factors[axis - 2], 1.0)}
        made = F.interpolate(
            torch.eye(old)[None, None],
            mode=mode,
            align_corners=align_corners,
            antialias=True,
            **how,
        )
        weight = made[0, 0].contiguous()  # of each row before on each row behind
        shape = (*x.shape[:3], new)
        tensors = {"weight": weight, "bias": torch.zeros(new)}
        x = ctx.emit("linear", x, shape, tensors=tensors, suffix="resized")
        order = (0, 1, 3, 2)
        turned = tuple(shape[i] for i in order)
        x = ctx.emit("transpose", x, turned, attrs={"axes": order}, suffix="turned")
    return x


@lowers("aten.grid_sampler.default", "aten.grid_sampler_2d.default")
def _grid_sampler(
    ctx: Lowering,
    input: Ref,
    grid: Any,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
) -> Ref:
    if not isinstance(input, Ref):
        raise UnsupportedUse("its image is a constant; it must be an activation")
    if not isinstance(grid, Ref):  # the same for every sample
        same = bool((grid == grid[:1]).all())
        grid = constant(ctx, grid[:1] if same else grid, input, 4)
    need_rank(input, 4)
    if interpolation_mode > 1:
        raise UnsupportedUse("it samples bicubically; use mode='bilinear'")
    attrs = {
        "mode": ("bilinear", "nearest")[interpolation_mode],
        "padding": ("zeros", "border", "reflection")[padding_mode],
        "align_corners": bool(align_corners),
    }
    return ctx.emit("grid_sample", (input, grid), attrs=attrs)


def _upsample(
    ctx: Lowering, x: Ref, scales: Sequence[Any] | None, mode: str, align_corners: bool
) -> Ref:
    return _scaled(ctx, x, scales, "upsample", {"mode": mode, "align_corners": align_corners})


def _scaled(
    ctx: Lowering, x: Ref, scales: Sequence[Any] | None, op: str, how: dict[str, Any]
) -> Ref:
    """Emit an operator that gives images the size that torch's result has."""
    need_rank(x, 4)
    attrs = {**how, "size": (), "scale_h": 0.0, "scale_w": 0.0}
    sizes = ctx.result_shape[2:]
    if scales is None and any(map(is_dynamic, sizes)):
        # whole multiples have the same steps as sizes
        ratios = [_multiple(new, old) for new, old in zip(sizes, x.shape[2:], strict=True)]
        scales = None if None in ratios else ratios
    if scales is not None:
        rows, columns = map(float, scales)
        return ctx.emit(op, x, attrs={**attrs, "scale_h": rows, "scale_w": columns})
    if not any(map(is_dynamic, sizes)):
        return ctx.emit(op, x, attrs={**attrs, "size": sizes})
    like = ctx.find(lambda ref: ref.rank == 4 and ref.shape[2:] == sizes)
    if like is None:
        raise UnsupportedUse(
            "its size is computed from sizes that are known at run time only; give a scale_factor, "
            "or the size of another activation as size=y.shape[2:]"
        )
    return ctx.emit(op, (x, like), attrs=attrs)


def _multiple(new: Any, old: Any) -> int | None:
    """How many times as large a dynamic size is as another, where that is a small whole number."""
    if not is_dynamic(new) or not is_dynamic(old):
        return None
    return next((k for k in range(1, 17) if (new - k * old).expand() == 0), None)

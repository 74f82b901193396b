"""Dense layers in int8 as ordinary modules: `Int8Conv2d` and `Int8Linear`.

The forward pass is hard: it rounds input and weights and adds up integer products, exactly as the
engine does. The backward pass is the dense layer's, with the rounded values (straight through).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lutra.errors import LutraError
from lutra.ops.limits import INT8_MAX, MAX_INT8_DEPTH
from lutra.train.geometry import Geometry, Quantization
from lutra.train.layers.base import QuantizedLayer, check_input, clip_gradient
from lutra.train.operators import native, portable
from lutra.train.recipe import Int8

_EXACT = 1 << 24  # up to here float32 holds every integer
_LEAST_PEAK = 1e-30  # smaller weights are zero: their scale would not be a normal float32


def quantize_weight(weight: Tensor, grid: Quantization) -> tuple[Tensor, Tensor]:
    """int8 weights (M, ...), and float32 scale (M) of their products with steps of the grid."""
    peak = weight.abs().flatten(1).amax(1)
    step = torch.where(peak > _LEAST_PEAK, peak / INT8_MAX, 1.0)
    steps = weight / step.view(-1, *[1] * (weight.dim() - 1))
    return steps.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), step * grid.scale


def integer_sums(x: Tensor, weight: Tensor, geometry: Geometry, grid: Quantization) -> Tensor:
    """Exact sums of products, as float32 (N, M, H', W').

    Args:
        x: (N, C, H, W), real values.
        weight: int8 (M, C / G, kh, kw).
    """
    g, outputs = geometry, weight.shape[0]
    height, width = g.out_size(x.shape[2], x.shape[3])
    if not x.numel():
        return native.empty_output(x, outputs, height, width)
    largest = INT8_MAX * max(grid.zero, grid.qmax - grid.zero)
    if _plain_conv(x, g, largest):
        with torch.autocast(x.device.type, enabled=False):
            steps = portable.quantize(x, grid) - grid.zero
            return F.conv2d(
                steps, weight.float(), None, g.stride, g.padding, g.dilation, g.groups
            ).contiguous(memory_format=native.layout(x))
    matrices = weight.reshape(g.groups, outputs // g.groups, -1).float()
    images = max(1, portable.block_size(x) // max(1, g.depth * height * width))
    parts = []
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 sums would not be exact
        for part in torch.split(x, images):
            steps = portable.quantize(part, grid) - grid.zero
            rows = portable.unfold(steps, g, g.depth, 0.0).view(g.groups, g.depth // g.groups, -1)
            sums = _products(matrices, rows, largest)
            parts.append(sums.view(outputs, len(part), height, width).transpose(0, 1))
    return torch.cat(parts).contiguous(memory_format=native.layout(x))


def _plain_conv(x: Tensor, geometry: Geometry, largest: int) -> bool:
    """Whether PyTorch's own convolution adds up the same integers, and is faster.

    On a CPU depthwise convolutions are computed directly, product by product, and all sums of a few
    products are exact in float32. Others may go through transforms that are not.
    """
    depthwise = geometry.groups == geometry.channels > 1
    return (
        depthwise
        and x.device.type == "cpu"
        and geometry.kernel[0] * geometry.kernel[1] * largest < _EXACT
    )


def _products(matrices: Tensor, rows: Tensor, largest: int) -> Tensor:
    """Integer matrices (G, M, D) times (G, D, R), in float32: exact sums, rounded once.

    Args:
        largest: that a product of two entries can be. So many are added at a time that every sum
            on the way is exact in float32, in whatever order it is formed.
    """
    depth = _EXACT // largest
    if rows.shape[1] <= depth:
        return torch.bmm(matrices, rows)
    total = torch.zeros((), dtype=torch.int32, device=rows.device)
    parts = zip(torch.split(matrices, depth, 2), torch.split(rows, depth, 1), strict=True)
    for some, others in parts:
        total = total + torch.bmm(some, others).to(torch.int32)
    return total.float()


@torch.library.custom_op("lutra::int8_conv2d", mutates_args=())
def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution of x (N, C, H, W) float32 in integers: weight (M, C / G, kh, kw) int8, scale (M)
    and bias (M) float32."""
    geometry = _geometry(weight, stride, padding, dilation, groups)
    sums = integer_sums(x, weight, geometry, Quantization(act_scale, act_zero, act_bits))
    y: Tensor = sums * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
    return y


@int8_conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = _geometry(weight, stride, padding, dilation, groups)
    return native.empty_output(x, weight.shape[0], *geometry.out_size(x.shape[2], x.shape[3]))


@torch.library.custom_op("lutra::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
) -> Tensor:
    """Linear layer of x (..., D) float32 in integers: weight (M, D) int8, scale (M) and bias (M)
    float32."""
    rows = x.reshape(-1, x.shape[-1])[:, :, None, None]
    grid = Quantization(act_scale, act_zero, act_bits)
    sums = integer_sums(rows, weight, Geometry(weight.shape[1]), grid)
    y = sums.reshape(*x.shape[:-1], weight.shape[0]) * scale + bias
    return y.contiguous()


@int8_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


def _geometry(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Geometry:
    return Geometry(
        weight.shape[1] * groups,
        (weight.shape[2], weight.shape[3]),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        (dilation[0], dilation[1]),
        groups,
    )


class StraightThroughInt8(torch.autograd.Function):
    """The integer layer without its bias; its gradients are those of the rounded values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, call: tuple[Any, ...]) -> Tensor:
        geometry, grid, int8_weight, scale, dtype = call
        ctx.geometry, ctx.grid, ctx.dtype = geometry, grid, dtype
        ctx.save_for_backward(x, int8_weight, scale)
        y: Tensor = integer_sums(x, int8_weight, geometry, grid) * scale.view(-1, 1, 1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, int8_weight, scale = ctx.saved_tensors
        geometry, grid, dtype = ctx.geometry, ctx.grid, ctx.dtype
        rounded_x = (portable.quantize(x, grid) - grid.zero) * grid.scale
        rounded_weight = int8_weight.float() * (scale / grid.scale).view(-1, 1, 1, 1)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            gradient.to(dtype), rounded_x.to(dtype), rounded_weight.to(dtype), None,
            geometry.stride, geometry.padding, geometry.dilation,
            False, [0, 0], geometry.groups, [*ctx.needs_input_grad[:2], False],
        )  # fmt: skip
        if grad_x is not None:
            grad_x = clip_gradient(grad_x.to(x.dtype), x, grid)
        return grad_x, None if grad_weight is None else grad_weight.float(), None


class Int8Layer(QuantizedLayer):
    """What `Int8Conv2d` and `Int8Linear` share. Build them with `from_float`."""

    family = "Int8"
    method: Int8

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: Geometry, method: Int8
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.method = method
        depth = geometry.depth // geometry.groups
        if depth > MAX_INT8_DEPTH:
            raise LutraError(
                f"a layer that adds up {depth} products for each output cannot be Int8: int32 "
                f"holds {MAX_INT8_DEPTH} for certain; keep it"
            )
        self._hold(weight, bias)

    def _kernel(self) -> Tensor:
        """Weights (M, C / G, kh, kw)."""
        return self.weight.view(self.outputs, -1, *self.geometry.kernel)

    def _run(self, x: Tensor) -> Tensor:
        """y (N, M, H', W') of x (N, C, H, W), in float32."""
        self.forget_frozen()  # fused optimizers do not count their writes
        device = x.device.type
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else torch.float32  # of the gradients
        with torch.autocast(device, enabled=False):
            grid, weight = self.grid(), self._kernel().float()
            with torch.no_grad():
                int8_weight, scale = quantize_weight(weight, grid)
            call = (self.geometry, grid, int8_weight, scale, dtype)
            y = cast(Tensor, StraightThroughInt8.apply(x.float(), weight, call))  # type: ignore[no-untyped-call]
            return y if self.bias is None else y + self.bias.float().view(-1, 1, 1)

    def freeze(self) -> FrozenInt8:
        """The layer as the engine runs it: int8 weights, scale and bias."""
        device = self.weight.device.type
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device, enabled=False),
        ):
            weight, scale = quantize_weight(self.weight.float(), self.grid())
            bias = torch.zeros_like(scale) if self.bias is None else self.bias.float().clone()
            linear = isinstance(self, Int8Linear)
            return FrozenInt8(self.geometry, self.grid(), linear, weight, scale, bias)

    def extra_repr(self) -> str:
        g = self.geometry
        return (
            f"{g.channels} -> {self.outputs}, kernel={g.kernel}, stride={g.stride}, "
            f"groups={g.groups}, act_bits={self.method.act_bits}"
        )


class Int8Conv2d(Int8Layer):
    """A 2-D convolution in int8, of any number of groups."""

    @classmethod
    def from_float(cls, layer: nn.Conv2d, method: Int8) -> Int8Conv2d:
        """Copies the weights; the activation range must still be set (`lutra.convert` does both).

        Raises:
            LutraError: unsupported padding, or too many inputs.
        """
        return cls(layer.weight, layer.bias, Geometry.of(layer, grouped=True), method)

    def forward(self, x: Tensor) -> Tensor:
        """y (N, M, H', W') of x (N, C, H, W)."""
        return self._forward_images(x)


class Int8Linear(Int8Layer):
    """A linear layer in int8."""

    @classmethod
    def from_float(cls, layer: nn.Linear, method: Int8) -> Int8Linear:
        """Copies the weights; the activation range must still be set (`lutra.convert` does both).

        Raises:
            LutraError: too many inputs.
        """
        return cls(layer.weight, layer.bias, Geometry.of(layer), method)

    def forward(self, x: Tensor) -> Tensor:
        """y (..., M) of x (..., D)."""
        return self._forward_rows(x)


class FrozenInt8(nn.Module):
    """An int8 layer without float weights: what is exported. Buffers are the file's tensors."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(
        self,
        geometry: Geometry,
        grid: Quantization,
        linear: bool,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
    ) -> None:
        super().__init__()
        self.geometry, self.grid, self.linear = geometry, grid, linear
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Same shapes as the layer that was frozen."""
        g, q = self.geometry, self.grid
        check_input(x, g, self.linear, "Int8")
        values = (x.float(), self.weight, self.scale, self.bias, q.scale, q.zero, q.bits)
        if self.linear:
            return cast(Tensor, int8_linear(*values))
        return cast(Tensor, int8_conv2d(*values, g.stride, g.padding, g.dilation, g.groups))


@torch.no_grad()
def output_error(layer: Int8Layer, rows: Tensor) -> float:
    """Mean squared output error relative to the output's variance.

    Args:
        layer: a layer whose activation range is set.
        rows: samples of its input (n, D).
    """
    g, grid, kernel = layer.geometry, layer.grid(), layer._kernel().float()
    patches = rows.view(-1, g.channels, *g.kernel)
    weight, scale = quantize_weight(kernel, grid)
    once = replace(g, stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    got = integer_sums(patches, weight, once, grid) * scale.view(-1, 1, 1)
    want = F.conv2d(patches, kernel, groups=g.groups)
    return float((got - want).square().mean() / want.var(correction=0).clamp_min(1e-12))

"""Dense layers in int8 as ordinary modules: `Int8Conv2d` and `Int8Linear`.

The forward pass is hard: it rounds input and weights and adds up integer products, exactly as the
engine does. The backward pass is the dense layer's, with the rounded values (straight through).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lutra.errors import LutraError
from lutra.ops.limits import INT8_MAX, MAX_INT8_DEPTH
from lutra.train import distributed
from lutra.train.geometry import Geometry, Grid
from lutra.train.layers.base import (
    Family,
    ImageLayer,
    clip_gradient,
    register,
)
from lutra.train.layers.goal import Goal
from lutra.train.layers.grid_refit import fit_range, fit_rounded
from lutra.train.layers.int8_embedding import Int8Embedding
from lutra.train.layers.smoothed import FrozenSmoothed, SmoothedLinear
from lutra.train.layers.zero_point import ZeroPointLayer
from lutra.train.operators import portable
from lutra.train.operators.int8 import integer_sums
from lutra.train.recipe import Int8

_LEAST_PEAK = 1e-30  # smaller weights are zero: their scale would not be a normal float32


def quantize_weight(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """int8 weights (M, ...), and float32 scale (M) of their products with steps of the grid."""
    peak = weight.abs().flatten(1).amax(1)
    step = torch.where(peak > _LEAST_PEAK, peak / INT8_MAX, 1.0)
    steps = weight / step.view(-1, *[1] * (weight.dim() - 1))
    return steps.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), step * grid.scale


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


class Int8Layer(ZeroPointLayer):
    """What `Int8Conv2d` and `Int8Linear` share. Build them with `from_float`."""

    method: Int8
    takes_groups = True

    @torch.no_grad()
    def refit(self, rows: Tensor, goal: Goal, *, keep_weight: bool = False) -> None:
        """The activation range by the error of the outputs, the weights on the rounded input, the
        bias."""
        fit_range(self, rows, goal)
        if self.geometry.groups == 1 and not keep_weight:
            fit_rounded(self, rows, goal)
        self._center(rows, goal)

    @classmethod
    def check(cls, geometry: Geometry, method: Int8) -> None:
        """Refuses layers whose sums int32 may not hold."""
        depth = geometry.depth // geometry.groups
        if depth > MAX_INT8_DEPTH:
            raise LutraError(
                f"a layer that adds up {depth} products for each output cannot be Int8: int32 "
                f"holds {MAX_INT8_DEPTH} for certain; keep it"
            )

    def _kernel(self) -> Tensor:
        """Weights (M, C / G, kh, kw) of the input as the grid meets it."""
        kernel = self.kernel_weight.reshape(self.outputs, -1, *self.geometry.kernel)
        return kernel if self.smoothing is None else kernel * self.smoothing.view(1, -1, 1, 1)

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
            weight = self._kernel().flatten(1) if self.weight.dim() == 2 else self._kernel()
            weight, scale = quantize_weight(weight.float(), self.grid())
            frozen = self._freeze(FrozenInt8, {"weight": weight, "scale": scale})
            frozen.divide_by(self.smoothing)
            return frozen

    @torch.no_grad()
    def settle(self, rows: Tensor) -> dict[str, Any]:
        """Fields of the report."""
        return {
            "label": "int8",
            "int8_bytes": self.weight.numel(),
            "stored": (("int8 weights", self.weight.numel()),),
            "multiplies_per_row": self.weight.numel(),
            "error": distributed.mean(self._output_error(rows)),
        }

    def _output_error(self, rows: Tensor) -> float:
        """Mean squared output error relative to the output's variance, of samples (n, D)."""
        g, grid, kernel = self.geometry, self.grid(), self._kernel().float()
        patches = self.smoothed(rows).view(-1, g.channels, *g.kernel)
        weight, scale = quantize_weight(kernel, grid)
        once = replace(g, stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        got = integer_sums(patches, weight, once, grid) * scale.view(-1, 1, 1)
        want = F.conv2d(patches, kernel, groups=g.groups)
        return float((got - want).square().mean() / want.var(correction=0).clamp_min(1e-12))

    def extra_repr(self) -> str:
        g = self.geometry
        return (
            f"{g.channels} -> {self.outputs}, kernel={g.kernel}, stride={g.stride}, "
            f"groups={g.groups}, act_bits={self.method.act_bits}"
        )


class Int8Conv2d(ImageLayer, Int8Layer):
    """A 2-D convolution in int8, of any number of groups."""

    op = "int8_conv2d"


class Int8Linear(SmoothedLinear, Int8Layer):
    """A linear layer in int8. With `smooth` its state has `smoothing` (D)."""

    op = "int8_linear"


class FrozenInt8(FrozenSmoothed):
    """A frozen layer of int8 weights."""

    weight: Tensor
    scale: Tensor
    bias: Tensor


register(
    Family(
        Int8,
        {nn.Conv2d: Int8Conv2d, nn.Linear: Int8Linear, nn.Embedding: Int8Embedding},
        is_rival=True,
        takes_recurrent=True,
    )
)

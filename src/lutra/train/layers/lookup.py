"""Layers of response tables as ordinary modules: `LookupConv2d` and `LookupLinear`.

The forward pass is the engine's: indices of activations and weights, reads from the int8 table,
exact sums. The backward pass is that of the layer with looked-up operands, straight through
(Deep Lookup Network, arXiv 2509.13662; LLT, CVPR 2022).
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lutra.errors import LutraError
from lutra.ops.limits import INT8_MAX, MAX_LOOKUP_DEPTH
from lutra.ops.lookup import bits_for
from lutra.train.functions.calls import exact_functions
from lutra.train.geometry import Geometry, Quantization
from lutra.train.layers.base import QuantizedLayer, check_input
from lutra.train.layers.lookup_table import Response, default_entries, quantize_table
from lutra.train.layers.lookup_table import weight_steps as linear_weights
from lutra.train.operators import lookup as lookup_ops
from lutra.train.recipe import Lookup

TABLE_SHARE = 8  # one image in so many gives the gradient of the cells of a table of rank > 1
_LEAST_SCALE = 1e-8
_MOST_RESCALED = 100.0  # factor of the gradient of a cell that is hardly ever read
_CANDIDATES = 64  # clipping points tried for the weights


def cell_factor(counts: Tensor) -> Tensor:
    """What the gradient of a cell is multiplied by, given how often each cell is read.

    The sum of n gradients of random sign grows with sqrt(n); divided by it, rare cells learn as
    fast as frequent ones. 1 where all are equally frequent. (LLT has (N / K) / sqrt(n), which is
    this times a constant of the layer.)
    """
    n = counts.double()
    return ((n.sum() / n.numel()).sqrt() / (n.sqrt() + 1e-5)).clamp(max=_MOST_RESCALED).float()


def weight_index(weight: Tensor, scale: Tensor, count: int) -> Tensor:
    """Indices (M, D) uint8 of weights (M, D), with scale (M) of the largest."""
    half = count // 2
    unit = (weight / scale[:, None]).clamp(-1.0, 1.0)
    return ((unit + 1.0) * half).round().to(torch.uint8)


class WeightLevels(torch.autograd.Function):
    """Weights (M, D) to looked-up weights: level of the index times the scale of the output."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, levels: Tensor, scale: Tensor, index: Tensor, rescale: bool
    ) -> Tensor:
        ctx.rescale = rescale
        ctx.save_for_backward(weight, levels, scale, index)
        return levels[index.int()] * scale[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, levels, scale, index = ctx.saved_tensors
        unit = weight / scale[:, None]
        inside = unit.abs() <= 1.0
        by_scale = levels[index.int()] - unit * inside
        kinds = torch.arange(len(levels), dtype=torch.uint8, device=index.device)[:, None]
        member = (index.flatten() == kinds).float()
        cells = member @ (gradient * scale[:, None]).flatten()
        if ctx.rescale:
            cells = cells * cell_factor(member.sum(1))
        return gradient * inside, cells, (gradient * by_scale).sum(1), None, None


class StraightThroughResponse(torch.autograd.Function):
    """Sums of table reads. The gradients are those of a convolution of looked-up operands.

    Inputs: x (N, C, H, W), looked-up weights (M, D), activation levels (N_f), the activation that
    the largest index stands for, and the table (N_f, N_w), or None where its gradient is that of
    the levels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        levels: Tensor,
        top: Tensor,
        table: Tensor | None,
        call: tuple[Any, ...],
    ) -> Tensor:
        geometry, grid, index, int8_table, scale, entries, rescale, dtype = call
        y, indices = lookup_ops.forward(x, geometry, grid, index, int8_table, scale)
        ctx.geometry, ctx.grid, ctx.entries = geometry, grid, entries
        ctx.rescale, ctx.dtype, ctx.columns = rescale, dtype, int8_table.shape[1]
        ctx.save_for_backward(x, indices, weight, levels, top, index, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, indices, weight, levels, top, index, scale = ctx.saved_tensors
        g, grid = ctx.geometry, ctx.grid
        need_x, need_weight, need_levels, need_top, need_table = ctx.needs_input_grad[:5]
        through_x = need_x or need_levels or need_top
        values = _take((levels * top).to(ctx.dtype), indices)
        kernel = weight.view(-1, g.channels, *g.kernel).to(ctx.dtype)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            gradient.to(ctx.dtype), values, kernel, None, g.stride, g.padding, g.dilation,
            False, [0, 0], 1, [through_x, need_weight, False],
        )  # fmt: skip
        grad_levels = grad_top = grad_table = None
        if through_x:
            grad_x = _like(grad_x.float(), x)
            low, high = -grid.zero * grid.scale, (grid.qmax - grid.zero) * grid.scale
            cells, counts, inside = lookup_ops.input_gradient(
                x, indices, grad_x, low, high, len(levels)
            )
            grad_top = ((levels.double() * cells).sum() - inside / top.double()).float()
            grad_levels = cells.float() * top
            if ctx.rescale:
                grad_levels = grad_levels * cell_factor(counts)
        if need_table:
            unit = scale * ctx.entries  # of a table whose largest entry is 1
            grad_table = table_gradient(gradient, indices, index, unit, g, len(levels), ctx.columns)
        if grad_weight is not None:
            grad_weight = grad_weight.float().reshape(weight.shape)
        return grad_x if need_x else None, grad_weight, grad_levels, grad_top, grad_table, None


def _take(levels: Tensor, indices: Tensor) -> Tensor:
    """levels[indices], in the memory layout of the indices."""
    flat = torch.as_strided(indices, (indices.numel(),), (1,))
    values = torch.empty_like(indices, dtype=levels.dtype)
    torch.index_select(levels, 0, flat.int(), out=values.as_strided((values.numel(),), (1,)))
    return values


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor in the memory layout of another of the same shape."""
    if tensor.stride() == other.stride():
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


def table_gradient(
    gradient: Tensor,
    indices: Tensor,
    index: Tensor,
    scale: Tensor,
    geometry: Geometry,
    levels: int,
    columns: int,
) -> Tensor:
    """Gradient (N_f, N_w) of every cell, estimated from one image in TABLE_SHARE.

    For each weight index the gradient that reaches the activations through the weights of this
    index alone, added up by activation index.
    """
    images = -(-len(indices) // TABLE_SHARE)
    part = gradient[:images].float()
    g, outputs = geometry, index.shape[0]
    kinds = torch.arange(columns, dtype=torch.uint8, device=index.device).view(-1, 1, 1)
    chosen = (index == kinds) * scale[:, None]  # (N_w, M, D)
    kernel = chosen.view(columns, outputs, g.channels, *g.kernel).transpose(0, 1)
    kernel = kernel.reshape(outputs, -1, *g.kernel)
    shape = (images, kernel.shape[1], *indices.shape[2:])
    through = torch.ops.aten.convolution_backward(
        part, part.new_empty(shape), kernel, None, g.stride, g.padding, g.dilation,
        False, [0, 0], 1, [True, False, False],
    )[0]  # fmt: skip
    through = through.view(images, columns, -1).transpose(0, 1).reshape(columns, -1)
    flat = indices[:images].reshape(-1)
    cells = [through @ (flat == k).float() for k in range(levels)]
    return torch.stack(cells) * (len(indices) / images)


class LookupLayer(QuantizedLayer):
    """What `LookupConv2d` and `LookupLinear` share. Build them with `from_float`.

    State: `weight` and `bias` of the dense layer; `log_weight_scale` (M), the logarithm of the
    weight that the largest index stands for, by output; `log_act_scale`, that of the step of the
    activation grid; `response`, the table.
    """

    family = "Lookup"
    method: Lookup

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: Geometry, method: Lookup
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.method = method
        if geometry.depth > MAX_LOOKUP_DEPTH:
            raise LutraError(
                f"a layer that adds up {geometry.depth} table entries for each output cannot be "
                f"Lookup: int32 holds {MAX_LOOKUP_DEPTH} for certain; keep it"
            )
        self._hold(weight, bias)
        self.log_weight_scale = nn.Parameter(_weight_scale(self._rows(), method.weights).log())
        self.response = Response(method, weight.device)

    def _hold_grid(self, device: torch.device) -> None:
        self.log_act_scale = nn.Parameter(torch.zeros((), device=device))
        self.register_buffer("signed", torch.zeros((), dtype=torch.bool, device=device))

    def _step_source(self) -> Tensor:
        return self.log_act_scale

    def _step(self) -> Tensor:
        return self.log_act_scale.float().exp()

    def set_activation_range(self, low: float, high: float) -> None:
        """Sets the grid to cover low..high, unsigned if nothing is below zero, and the table to
        that of exact products."""
        super().set_activation_range(low, high)
        self.response.start(self.grid().zero)

    def _set_step(self, step: float) -> None:
        with torch.no_grad():
            self.log_act_scale.fill_(math.log(step))

    def table_parameters(self) -> list[nn.Parameter]:
        """The scales and what makes the table: what weight decay must spare."""
        return [self.log_weight_scale, self.log_act_scale, *self.response.parameters()]

    def _rows(self) -> Tensor:
        return self.weight.reshape(self.outputs, -1).float()

    @property
    def entries(self) -> int:
        """The integer of the table's entry for the largest activation and weight."""
        zero = self.grid().zero
        most = default_entries(Lookup(self.method.levels, self.method.weights), zero)
        if self.method.entries is None:
            return most
        reach = max(1.0, zero / max(1, self.method.levels - 1 - zero))
        return min(self.method.entries, int(INT8_MAX / reach))

    def _run(self, x: Tensor) -> Tensor:
        """y (N, M, H', W') of x (N, C, H, W), in float32."""
        self.forget_frozen()  # fused optimizers do not count their writes
        device = x.device.type
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else torch.float32  # of the gradients
        with torch.autocast(device, enabled=False):
            method, grid, entries = self.method, self.grid(), self.entries
            levels = self.response(grid.zero, x.device)
            with torch.no_grad():
                table = quantize_table(levels.table, entries)
                index, scale = self._weight_index(), self._scale(grid, entries)
            weight = WeightLevels.apply(  # type: ignore[no-untyped-call]
                self._rows(), levels.weight, self._weight_scale(), index, method.rescale
            )
            apart = method.table == "free" or method.rank > 1
            call = (self.geometry, grid, index, table, scale, entries, method.rescale, dtype)
            y = StraightThroughResponse.apply(  # type: ignore[no-untyped-call]
                dense(x.float()), weight, levels.activation, self._top(grid),
                levels.table if apart else None, call,
            )  # fmt: skip
            y = cast(Tensor, y)
            return y if self.bias is None else y + self.bias.float().view(-1, 1, 1)

    def _weight_scale(self) -> Tensor:
        return self.log_weight_scale.float().exp()

    def _weight_index(self) -> Tensor:
        return weight_index(self._rows(), self._weight_scale(), self.method.weights)

    def _top(self, grid: Quantization) -> Tensor:
        """The activation that the largest index stands for."""
        return self._step() * (grid.qmax - grid.zero)

    def _scale(self, grid: Quantization, entries: int) -> Tensor:
        """Of the sums of table entries (M)."""
        return self._weight_scale() * (self._top(grid) / entries)

    def freeze(self) -> FrozenLookup:
        """The layer as the engine runs it: packed indices, the int8 table, scale and bias."""
        device = self.weight.device
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            grid, entries = self.grid(), self.entries
            table = quantize_table(self.response(grid.zero, device).table, entries)
            scale = self._scale(grid, entries)
            bias = torch.zeros_like(scale) if self.bias is None else self.bias.float().clone()
            linear = isinstance(self, LookupLinear)
            index = self._weight_index()
            return FrozenLookup(self.geometry, grid, linear, index, table, scale, bias)

    def extra_repr(self) -> str:
        g, m = self.geometry, self.method
        return (
            f"{g.channels} -> {self.outputs}, kernel={g.kernel}, stride={g.stride}, "
            f"levels={m.levels}, weights={m.weights}, table={m.table}, rank={m.rank}"
        )


class LookupConv2d(LookupLayer):
    """A 2-D convolution by reads from one table (groups = 1)."""

    @classmethod
    def from_float(cls, layer: nn.Conv2d, method: Lookup) -> LookupConv2d:
        """Copies the weights; the activation range must still be set (`lutra.convert` does both).

        Raises:
            LutraError: grouped convolution, unsupported padding, or too many inputs.
        """
        return cls(layer.weight, layer.bias, Geometry.of(layer), method)

    @exact_functions()
    def forward(self, x: Tensor) -> Tensor:
        """y (N, M, H', W') of x (N, C, H, W)."""
        return self._forward_images(x)


class LookupLinear(LookupLayer):
    """A linear layer by reads from one table."""

    @classmethod
    def from_float(cls, layer: nn.Linear, method: Lookup) -> LookupLinear:
        """Copies the weights; the activation range must still be set (`lutra.convert` does both).

        Raises:
            LutraError: too many inputs.
        """
        return cls(layer.weight, layer.bias, Geometry.of(layer), method)

    @exact_functions()
    def forward(self, x: Tensor) -> Tensor:
        """y (..., M) of x (..., D)."""
        return self._forward_rows(x)


class FrozenLookup(nn.Module):
    """A lookup layer without float weights: what is exported. Buffers are the file's tensors."""

    weight: Tensor
    table: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(
        self,
        geometry: Geometry,
        grid: Quantization,
        linear: bool,
        index: Tensor,
        table: Tensor,
        scale: Tensor,
        bias: Tensor,
    ) -> None:
        super().__init__()
        self.geometry, self.grid, self.linear = geometry, grid, linear
        self.weight_bits = bits_for(table.shape[1])
        self.register_buffer("weight", lookup_ops.pack(index, self.weight_bits))
        self.register_buffer("table", table)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Same shapes as the layer that was frozen."""
        g, q = self.geometry, self.grid
        check_input(x, g, self.linear, "Lookup")
        tensors = (x.float(), self.weight, self.table, self.scale, self.bias)
        values = (*tensors, q.scale, q.zero, q.bits, self.weight_bits)
        if self.linear:
            return cast(Tensor, lookup_ops.lookup_linear(*values))
        y = lookup_ops.lookup_conv2d(*values, g.channels, g.kernel, g.stride, g.padding, g.dilation)
        return cast(Tensor, y)


def dense(x: Tensor) -> Tensor:
    """x with no gaps in memory, channels last if it is so already."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


@torch.no_grad()
def _weight_scale(rows: Tensor, count: int) -> Tensor:
    """The scale (M) with the least squared error of the looked-up weights (M, D)."""
    levels = linear_weights(count, rows.device)
    peak = rows.abs().amax(1).clamp_min(_LEAST_SCALE)
    best, least = peak, torch.full_like(peak, math.inf)
    for share in torch.linspace(0.1, 1.0, _CANDIDATES).tolist():
        scale = peak * share
        made = levels[weight_index(rows, scale, count).int()] * scale[:, None]
        error = (made - rows).square().sum(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


@torch.no_grad()
def output_error(layer: LookupLayer, rows: Tensor) -> float:
    """Mean squared output error relative to the output's variance.

    Args:
        layer: a layer whose activation range is set.
        rows: samples of its input (n, D).
    """
    grid, entries = layer.grid(), layer.entries
    table = quantize_table(layer.response(grid.zero, rows.device).table, entries)
    one, scale = Geometry(rows.shape[1]), layer._scale(grid, entries)
    got, _ = lookup_ops.forward(
        rows[:, :, None, None].contiguous(), one, grid, layer._weight_index(), table, scale
    )
    want = rows @ layer._rows().t()
    error = (got.flatten(1) - want).square().mean() / want.var(correction=0).clamp_min(1e-12)
    return float(error)

"""Layers of response tables as ordinary modules: `LookupConv2d` and `LookupLinear`.

The forward pass is the engine's: indices of activations and weights, reads from the int8 table,
exact sums. The backward pass is that of the layer with looked-up operands, straight through
(Deep Lookup Network, arXiv 2509.13662; LLT, CVPR 2022).
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lutra.errors import LutraError
from lutra.ops.limits import INT8_MAX, MAX_LOOKUP_DEPTH
from lutra.ops.lookup import bits_for
from lutra.train import distributed
from lutra.train.functions.calls import exact_functions
from lutra.train.geometry import Geometry, Grid
from lutra.train.layers.base import (
    Family,
    ImageLayer,
    register,
)
from lutra.train.layers.goal import Goal
from lutra.train.layers.grid_refit import fit_range, fit_rounded, replace_weight
from lutra.train.layers.lookup_table import Response, default_entries, quantize_table
from lutra.train.layers.products import Products
from lutra.train.layers.smoothed import FrozenSmoothed, SmoothedLinear
from lutra.train.layers.weight_rounding import Feedback, round_weights
from lutra.train.layers.zero_point import ZeroPointLayer
from lutra.train.operators import lookup as lookup_ops
from lutra.train.recipe import Lookup

TABLE_SHARE = 8  # one image in so many gives the gradient of the cells of a table of rank > 1
_LEAST_SCALE = 1e-8
_MOST_RESCALED = 100.0  # factor of the gradient of a cell that is hardly ever read
_CANDIDATES = 64  # clipping points tried for the weights
_SAMPLED = 1024  # weights of an output that they are tried on, or up to twice as many
_INSIDE = 0.49  # steps between a weight and the level that it rounds to
_MOST_GAIN = 1.5
_BLOCK = 1 << 18  # weights that are looked at together


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
    index = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    with torch.no_grad():
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            unit = (weight[part] / scale[part, None]).clamp_(-1.0, 1.0)
            index[part] = unit.add_(1.0).mul_(half).round_()
    return index


@torch.no_grad()
def nearest_levels(weight: Tensor, count: int) -> Tensor:
    """Weights (M, D) rounded to a number of even levels, each output by its own best scale."""
    scale, half = _weight_scale(weight, count), count // 2
    index = weight_index(weight, scale, count)
    return (index.float() - half) * (scale / half)[:, None]


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


class LookupLayer(ZeroPointLayer):
    """What `LookupConv2d` and `LookupLinear` share. Build them with `from_float`.

    State: `weight` and `bias` of the dense layer; `log_weight_scale` (M), the logarithm of the
    weight that the largest index stands for, by output; `log_act_scale`, that of the step of the
    activation grid; `zero_point`, its integer for zero; `response`, the table.
    """

    method: Lookup
    output_tensors = ("weight", "bias", "log_weight_scale")
    spare = 1  # the table is in units of the largest activation

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: Geometry, method: Lookup
    ) -> None:
        super().__init__(weight, bias, geometry, method)
        self.log_weight_scale = nn.Parameter(_weight_scale(self._rows(), method.weights).log())
        self.response = Response(method, weight.device)

    @classmethod
    def check(cls, geometry: Geometry, method: Lookup) -> None:
        """Refuses layers whose sums int32 may not hold."""
        if geometry.depth > MAX_LOOKUP_DEPTH:
            raise LutraError(
                f"a layer that adds up {geometry.depth} table entries for each output cannot be "
                f"Lookup: int32 holds {MAX_LOOKUP_DEPTH} for certain; keep it"
            )

    def _hold_step(self, device: torch.device) -> None:
        self.log_act_scale = nn.Parameter(torch.zeros((), device=device))

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
        """Weights (M, D) of the input as the grid meets it."""
        rows = self.kernel_weight.reshape(self.outputs, -1).float()
        return rows if self.smoothing is None else rows * self.smoothing

    def _put(self, rows: Tensor) -> None:
        """Sets the weights to what makes `_rows` these."""
        replace_weight(self, rows if self.smoothing is None else rows / self.smoothing)

    @property
    def entries(self) -> int:
        """The integer of the table's entry for the largest activation and weight."""
        zero = self.grid().zero
        most = default_entries(Lookup(self.method.levels, self.method.weights), zero)
        if self.method.entries is None:
            return most
        reach = max(1.0, zero / max(1, self.method.levels - 1 - zero))
        return min(self.method.entries, int(INT8_MAX / reach))

    @exact_functions()
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

    def _top(self, grid: Grid) -> Tensor:
        """The activation that the largest index stands for."""
        return self._step() * (grid.qmax - grid.zero)

    def _scale(self, grid: Grid, entries: int) -> Tensor:
        """Of the sums of table entries (M)."""
        return self._weight_scale() * (self._top(grid) / entries)

    def anneal(self, progress: float) -> None:
        """Sets the temperature of the table."""
        self.response.anneal(progress)

    @exact_functions()
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
            bits = bits_for(self.method.weights)
            weight = lookup_ops.pack(self._weight_index(), bits)
            tensors = {"weight": weight, "table": table, "scale": self._scale(grid, entries)}
            frozen = self._freeze(FrozenLookup, tensors, {"weight_bits": bits})
            frozen.divide_by(self.smoothing)
            return frozen

    @torch.no_grad()
    def refit(self, rows: Tensor, goal: Goal, *, keep_weight: bool = False) -> None:
        """The activation range by the error of the outputs; weights, on the rounded input and
        rounded one after the other, with their scales; the bias."""
        fit_range(self, rows, goal)
        if not keep_weight:
            fit_rounded(self, rows, goal, self._round_weights)
            self._fit_scale(rows, goal)
        self._center(rows, goal)

    def _round_weights(self, products: Products) -> None:
        """Moves weights to where their rounding changes the outputs least. Each stays as near to
        what it was as its index allows, so that training may still take it elsewhere."""
        rows, half = self._rows(), self.method.weights // 2
        scale = _weight_scale(rows, self.method.weights)
        step = scale / half
        codes = round_weights(rows, step, -half, half, Feedback.of(products))
        found = codes * step[:, None]
        reach = _INSIDE * step[:, None]
        moved = torch.maximum(torch.minimum(rows, found + reach), found - reach)
        self.log_weight_scale.copy_(scale.log())
        self._put(moved)

    def _fit_scale(self, rows: Tensor, goal: Goal) -> None:
        """The scale of each output by least squares, if that makes the outputs better."""
        y = self.of_rows(rows)
        start = goal.error(y)
        rest = goal.targets(y) - y
        y = y - distributed.mean_row(y)
        products = distributed.mean_row(y * (rest - distributed.mean_row(rest)))
        gain = 1.0 + products / distributed.mean_row(y * y).clamp_min(1e-30)
        gain = gain.clamp(1.0 / _MOST_GAIN, _MOST_GAIN)
        weight, scale = self.weight, self.log_weight_scale.clone()
        self._put(self._rows() * gain[:, None])
        self.log_weight_scale.add_(gain.log())
        if goal.error(self.of_rows(rows)) >= start:
            self.weight = weight
            self.log_weight_scale.copy_(scale)

    @torch.no_grad()
    def settle(self, rows: Tensor) -> dict[str, Any]:
        """Fields of the report."""
        levels, weights = self.method.levels, self.method.weights
        index_bytes = self.outputs * -(-self.geometry.depth * bits_for(weights) // 8)
        stored = (("response tables", levels * weights), ("indices", index_bytes))
        return {
            "label": f"lookup {levels}x{weights}",
            "table_bytes": levels * weights,
            "index_bytes": index_bytes,
            "stored": stored,
            "levels": levels,
            "weights": weights,
            "lookups_per_row": self.weight.numel(),
            "multiplies_per_row": self.weight.numel(),
            "error": distributed.mean(self._output_error(rows)),
        }

    @exact_functions()
    def _output_error(self, rows: Tensor) -> float:
        """Mean squared output error relative to the output's variance, of samples (n, D)."""
        grid, entries = self.grid(), self.entries
        table = quantize_table(self.response(grid.zero, rows.device).table, entries)
        one, scale, rows = Geometry(rows.shape[1]), self._scale(grid, entries), self.smoothed(rows)
        got, _ = lookup_ops.forward(
            rows[:, :, None, None].contiguous(), one, grid, self._weight_index(), table, scale
        )
        want = rows @ self._rows().t()
        error = (got.flatten(1) - want).square().mean() / want.var(correction=0).clamp_min(1e-12)
        return float(error)

    def extra_repr(self) -> str:
        g, m = self.geometry, self.method
        return (
            f"{g.channels} -> {self.outputs}, kernel={g.kernel}, stride={g.stride}, "
            f"levels={m.levels}, weights={m.weights}, table={m.table}, rank={m.rank}"
        )


class LookupConv2d(ImageLayer, LookupLayer):
    """A 2-D convolution by reads from one table (groups = 1)."""

    op = "lookup_conv2d"


class LookupLinear(SmoothedLinear, LookupLayer):
    """A linear layer by reads from one table. With `smooth` its state has `smoothing` (D)."""

    op = "lookup_linear"

    def smooth(self, factors: Tensor) -> None:
        """Divides the features of the input by factors (D), and multiplies the weights by them."""
        super().smooth(factors)
        with torch.no_grad():
            self.log_weight_scale.copy_(_weight_scale(self._rows(), self.method.weights).log())


class FrozenLookup(FrozenSmoothed):
    """A frozen layer of packed weight indices and one table."""

    weight: Tensor
    table: Tensor
    scale: Tensor
    bias: Tensor

    @property
    def weight_bits(self) -> int:
        """Bits of a packed weight index."""
        return int(self.node.attrs["weight_bits"])  # type: ignore[arg-type]


register(Family(Lookup, {nn.Conv2d: LookupConv2d, nn.Linear: LookupLinear}))


def dense(x: Tensor) -> Tensor:
    """x with no gaps in memory, channels last if it is so already."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


@torch.no_grad()
def _weight_scale(rows: Tensor, count: int) -> Tensor:
    """The scale (M) with the least squared error of the looked-up weights (M, D).

    Of sorted magnitudes w with cumulative sums, the error of a step s is known from the numbers of
    magnitudes above each bound between two levels: a magnitude of level j is above j bounds, so

        sum (w - s j)^2 = sum w^2 - 2 s sum_t sum_{w above t} w + s^2 sum_t (2 t - 1) #{w above t}.
    """
    half, device = count // 2, rows.device
    shares = torch.linspace(0.1, 1.0, _CANDIDATES, dtype=torch.float64, device=device)
    level = torch.arange(1, half + 1, dtype=torch.float64, device=device)
    bounds = torch.outer(shares, (level - 0.5) / half).flatten()
    scales = []
    for block in torch.split(rows, max(1, _BLOCK // rows.shape[1])):
        size = block.abs()
        peak = size.amax(1, keepdim=True).clamp_min(_LEAST_SCALE)
        size = _sorted(size[:, :: max(1, size.shape[1] // _SAMPLED)])
        sums = F.pad(size.double().cumsum(1), (1, 0))
        below = torch.searchsorted(size, (bounds * peak.double()).to(size.dtype))
        shape = (len(block), _CANDIDATES, half)
        number = (size.shape[1] - below).view(shape).double()
        above = (sums[:, -1:] - sums.gather(1, below)).view(shape)
        step = shares * peak.double() / half
        less = 2.0 * step * above.sum(2) - step.square() * (number @ (2.0 * level - 1.0))
        scales.append(peak[:, 0] * shares.to(peak.dtype)[less.argmax(1)])
    return torch.cat(scales)


def _sorted(rows: Tensor) -> Tensor:
    """Each row ascending."""
    if rows.device.type == "cpu":  # NumPy sorts many times as fast
        return torch.from_numpy(np.sort(rows.numpy(), axis=1))
    return rows.sort(1).values

"""Linear layers of low-bit weights as ordinary modules: `LowBitLinear`.

The forward pass is hard: it rounds weights to 1 to 4 bits, activations to int8 row by row, and adds
up integers, exactly as the engine does. The backward pass is the dense layer's, with the rounded
values (straight through; BitNet b1.58, arXiv 2402.17764). Scales are the mean magnitude of the
weights, or learned (LSQ, arXiv 1902.08153).
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lutra.errors import LutraError
from lutra.node import Array
from lutra.ops.limits import MAX_LOWBIT_DEPTH
from lutra.ops.lowbit import store_rows
from lutra.ops.lowbit_storage import levels_of
from lutra.train import distributed
from lutra.train.geometry import Geometry
from lutra.train.layers.base import Family, FrozenLayer, RowLayer, register
from lutra.train.layers.forms import LINEAR
from lutra.train.layers.goal import Goal
from lutra.train.layers.grid_refit import replace_weight
from lutra.train.layers.lowbit_scales import LEAST, fit_scales, mean_scales, round_codes
from lutra.train.layers.pq_refit import fit_weight
from lutra.train.layers.products import Products
from lutra.train.layers.weight_rounding import Feedback, round_weights
from lutra.train.operators.lowbit import lowbit_products, quantize_rows
from lutra.train.recipe import LowBit

_INSIDE = 0.49  # steps between a weight and what it rounds to


class StraightThroughLowBit(torch.autograd.Function):
    """The layer without its bias; its gradients are those of the rounded values.

    Inputs: rows x (n, K), weight (M, G, group), the logarithm of the scales (M, G) or None where
    they are no parameter, and the rounded forms of both.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, log_scale: Tensor | None, call: tuple[Any, ...]
    ) -> Tensor:
        scale, zero, top, unit, dtype = call
        codes = round_codes(weight, scale[:, :, None], zero[:, :, None], top)
        steps = codes - zero[:, :, None]
        q, step = quantize_rows(x)
        ctx.dtype, ctx.top = dtype, top
        ctx.save_for_backward(q, step, weight, steps, scale, zero)
        return lowbit_products(q, step, steps * unit, scale / unit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, step, weight, steps, scale, zero = ctx.saved_tensors
        need_x, need_weight, need_scale = ctx.needs_input_grad[:3]
        gradient = gradient.to(ctx.dtype)
        rounded = steps * scale[:, :, None]
        grad_x = grad_scale = grad_weight = None
        if need_x:
            grad_x = (gradient @ rounded.flatten(1).to(ctx.dtype)).float()
        if need_weight or need_scale:
            grad_weight = (gradient.t() @ (q * step).to(ctx.dtype)).float().view_as(weight)
        if need_scale and grad_weight is not None:
            # a weight beyond the codes is moved by its scale alone
            exact = weight / scale[:, :, None]
            place = exact + zero[:, :, None]
            inside = (place >= -0.5) & (place <= ctx.top + 0.5)
            by_scale = (steps - exact * inside) * scale[:, :, None]
            grad_scale = (grad_weight * by_scale).sum(2)
            grad_weight = grad_weight * inside
        return grad_x, grad_weight, grad_scale, None


class LowBitLinear(RowLayer):
    """A linear layer of low-bit weights. Build it with `from_float`.

    State: `weight` and `bias` of the dense layer; `log_scale` (M, G), the logarithm of what a step
    of a code is, of the groups of an output, unless the scales are mean magnitudes; and
    `zero_point` (M, G), the code that stands for zero, of layers that have zero points.
    """

    op = "lowbit_linear"
    method: LowBit
    has_grid = False

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: Geometry, method: LowBit
    ) -> None:
        super().__init__(weight, bias, geometry, method)
        if method.rounding != "absmean":
            scale, zero = self._fitted(self._grouped())
            self.log_scale = nn.Parameter(scale.log())
            if method.zero_points:
                self.register_buffer("zero_point", zero)

    @classmethod
    def check(cls, geometry: Geometry, method: LowBit) -> None:
        """Refuses layers whose sums int32 may not hold, or whose inputs a group does not divide."""
        depth = geometry.depth
        if depth > MAX_LOWBIT_DEPTH:
            raise LutraError(
                f"a layer that adds up {depth} products for each output cannot be LowBit: int32 "
                f"holds {MAX_LOWBIT_DEPTH} for certain; keep it"
            )
        if method.group is not None and depth % method.group:
            raise LutraError(
                f"a group of {method.group} does not divide the {depth} inputs of a layer; choose "
                "another group, or None"
            )

    # ---- codes ----------------------------------------------------------------------------------

    @property
    def levels(self) -> int:
        """Values of a code."""
        return levels_of(self.method.bits)

    @property
    def _unit(self) -> float:
        """Levels of a step of a code; see `lutra.reference.lowbit`."""
        return 1.0 if self.levels == 3 else 2.0

    def _grouped(self) -> Tensor:
        """Weights (M, G, group)."""
        group = self.method.group or self.geometry.depth
        return self.kernel_weight.float().reshape(self.outputs, -1, group)

    def _fitted(self, weight: Tensor, share: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if share is not None:
            share = share.view(weight.shape[1:])
        zeros = self.method.zero_points
        return fit_scales(weight.detach(), self.levels, share, zero_points=zeros)

    def _scale_and_zero(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points (M, G) of the groups."""
        if self.method.rounding == "absmean":
            scale = mean_scales(weight, self.levels)
        else:
            scale = self.log_scale.float().exp().clamp_min(LEAST)
        if self.method.zero_points:
            return scale, cast(Tensor, self.zero_point)
        return scale, torch.full_like(scale, (self.levels - 1) / 2)

    @torch.no_grad()
    def _set_scales(self, scale: Tensor, zero: Tensor) -> None:
        self.log_scale.copy_(scale.log())
        if self.method.zero_points:
            cast(Tensor, self.zero_point).copy_(zero)

    # ---- forward --------------------------------------------------------------------------------

    def _run(self, x: Tensor) -> Tensor:
        """y (n, M, 1, 1) of x (n, K, 1, 1), in float32."""
        self.forget_frozen()  # fused optimizers do not count their writes
        device = x.device.type
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else torch.float32  # of the gradients
        with torch.autocast(device, enabled=False):
            weight = self._grouped()
            with torch.no_grad():
                scale, zero = self._scale_and_zero(weight)
            learned = None if self.method.rounding == "absmean" else self.log_scale
            call = (scale, zero, self.levels - 1, self._unit, dtype)
            rows = x.flatten(1).float()
            y = cast(Tensor, StraightThroughLowBit.apply(rows, weight, learned, call))  # type: ignore[no-untyped-call]
            y = y if self.bias is None else y + self.bias.float()
            return y[:, :, None, None]

    def freeze(self) -> FrozenLowBit:
        """The layer as the engine runs it: codes, scales of levels, zeros and bias."""
        device = self.weight.device
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            weight, levels = self._grouped(), self.levels
            scale, zero = self._scale_and_zero(weight)
            codes = round_codes(weight, scale[:, :, None], zero[:, :, None], levels - 1)
            rows = store_rows(codes.flatten(1).to("cpu", torch.uint8).numpy(), levels)
            tensors = {"weight": torch.from_numpy(rows).to(device), "scale": scale / self._unit}
            if self.method.zero_points:
                tensors["zero"] = (2.0 * zero - (levels - 1)).to(torch.int8)
            group = self.method.group or self.geometry.depth
            return self._freeze(FrozenLowBit, tensors, {"levels": levels, "group": group})

    # ---- calibration ----------------------------------------------------------------------------

    def randomize(self) -> None:
        """Nothing: the speed does not depend on the codes."""

    @torch.no_grad()
    def learn(self, rows: Tensor, *, steps: int, seed: int) -> None:
        """Scales by the error of the outputs, if those are calibrated: an error of a weight counts
        as the square of its input does."""
        if self.method.rounding == "calibrated":
            self._set_scales(*self._fitted(self._grouped(), _mean_square(rows)))

    @torch.no_grad()
    def refit(self, rows: Tensor, goal: Goal, *, keep_weight: bool = False) -> None:
        """Weights on the rounded input, rounded one after the other (GPTQ, arXiv 2210.17323), where
        that makes the outputs better; the bias."""
        if self.method.rounding == "calibrated" and not keep_weight:
            self._fit_rounded(rows, goal)
        self._center(rows, goal)

    def _fit_rounded(self, rows: Tensor, goal: Goal) -> None:
        others = [t for t in (*self.parameters(), *self.buffers()) if t is not self.weight]
        before = [(tensor, tensor.clone()) for tensor in others]
        weight, bias = self.weight, self.bias
        self._center(rows, goal)
        start = goal.error(self.of_rows(rows))
        self.bias = bias
        q, step = quantize_rows(rows)
        x = q * step
        y = x @ self.kernel_weight.float().t()
        fit = fit_weight(x, y if bias is None else y + bias.float(), goal)
        assert fit.products is not None
        replace_weight(self, self.kernel_weight.float() + fit.change)
        self.shift_bias(fit.shift)
        self._round_weights(fit.products)
        self._center(rows, goal)
        if goal.error(self.of_rows(rows)) >= start:
            self.weight, self.bias = weight, bias
            for tensor, value in before:
                tensor.copy_(value)

    def _round_weights(self, products: Products) -> None:
        """Moves weights to where their rounding changes the outputs least. Each stays as near to
        what it was as its code allows, so that training may still take it elsewhere."""
        weight = self._grouped()
        scale, zero = self._fitted(weight, products.diagonal().float())
        self._set_scales(scale, zero)
        scale, zero = self._scale_and_zero(weight)
        step, middle = ((t[:, :, None].expand_as(weight)).flatten(1) for t in (scale, zero))
        rows = weight.flatten(1)
        codes = round_weights(rows, step, 0, self.levels - 1, Feedback.of(products), middle)
        found, reach = (codes - middle) * step, _INSIDE * step
        moved = torch.maximum(torch.minimum(rows, found + reach), found - reach)
        # beyond the codes there is no other to round to
        moved = torch.where((codes == 0) & (rows < found), rows, moved)
        moved = torch.where((codes == self.levels - 1) & (rows > found), rows, moved)
        replace_weight(self, moved)

    def table_parameters(self) -> list[nn.Parameter]:
        """The scales, which weight decay must spare."""
        return [] if self.method.rounding == "absmean" else [self.log_scale]

    @torch.no_grad()
    def settle(self, rows: Tensor) -> dict[str, Any]:
        """Fields of the report."""
        frozen = self.freeze()
        size = sum(t.numel() * t.element_size() for t in frozen.tensors.values())
        size -= frozen.bias.numel() * frozen.bias.element_size()
        bits, group = self.method.bits, self.method.group
        label = f"low-bit {bits:g}" + ("" if group is None else f" groups of {group}")
        return {
            "label": label,
            "stored": (("low-bit weights", size),),
            "multiplies_per_row": self.weight.numel(),
            "error": distributed.mean(self._output_error(rows)),
        }

    def _output_error(self, rows: Tensor) -> float:
        """Mean squared output error relative to the output's variance, of samples (n, K)."""
        got, want = self.of_rows(rows), self.dense_forward(rows)
        error = (got - want).square().mean() / want.var(correction=0).clamp_min(1e-12)
        return float(error)

    def extra_repr(self) -> str:
        m = self.method
        group = "" if m.group is None else f", group={m.group}"
        return f"{self.geometry.channels} -> {self.outputs}, bits={m.bits:g}{group}"


def _mean_square(rows: Tensor) -> Tensor:
    """Mean squares (K) of rows (n, K) in all processes, above zero."""
    return distributed.mean_row(rows.square()).clamp_min(LEAST)


class FrozenLowBit(FrozenLayer):
    """A frozen layer of low-bit weights."""

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor


def frozen_of_codes(
    codes: Array, levels: int, scale: Array, zero: Array | None, bias: Tensor | None
) -> FrozenLowBit:
    """A frozen layer of codes that are there already, as in a file of another library.

    Args:
        codes: uint8 (M, K), each below `levels`.
        levels: values of a code: 2, 3, 4, 8 or 16.
        scale: float32 (M, G) of the levels of the groups, see `lutra.ops.lowbit`.
        zero: int8 (M, G), the level that stands for zero; None for 0.
        bias: (M,), or None.
    """
    outputs, depth = codes.shape
    tensors = {
        "weight": torch.from_numpy(store_rows(codes, levels)),
        "scale": torch.from_numpy(np.ascontiguousarray(scale, np.float32)),
        **({} if zero is None else {"zero": torch.from_numpy(np.ascontiguousarray(zero, np.int8))}),
        "bias": torch.zeros(outputs) if bias is None else bias.detach().float().clone(),
    }
    attrs = {"levels": levels, "group": depth // scale.shape[1]}
    made = FrozenLowBit("LowBitLinear", LowBitLinear.op, Geometry(depth), None, tensors, attrs)
    made.form = LINEAR
    return made.eval()


register(Family(LowBit, {nn.Linear: LowBitLinear}))

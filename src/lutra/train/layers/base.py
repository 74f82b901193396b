"""What the layers that compute in integers share: the activation grid and the frozen form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train.geometry import Geometry, Quantization
from lutra.train.recipe import PQ, Int8, Lookup
from lutra.train.watch import Watch

if TYPE_CHECKING:
    from typing_extensions import Self

#: What layers keep and can make again: it is neither copied nor pickled.
_DERIVED = ("_frozen", "_grid", "_reconstruction")


def check_input(x: Tensor, geometry: Geometry, linear: bool, family: str) -> None:
    """Refuses inputs that a layer does not take.

    Args:
        family: "PQ", "Int8" or "Lookup": how the name of the layer begins.

    Raises:
        LutraError: wrong rank, channels or features, or an image smaller than the kernel.
    """
    shape, channels = tuple(x.shape), geometry.channels
    if linear:
        if not shape or shape[-1] != channels:
            raise LutraError(
                f"{family}Linear: the input has shape {shape}; give (..., {channels}), as the "
                f"layer has {channels} input features"
            )
        return
    if len(shape) != 4 or shape[1] != channels:
        raise LutraError(
            f"{family}Conv2d: the input has shape {shape}; give (N, {channels}, H, W), as the "
            f"layer has {channels} input channels"
        )
    if min(geometry.out_size(shape[2], shape[3])) < 1:
        raise LutraError(
            f"{family}Conv2d: the input has shape {shape}, smaller than the kernel "
            f"{geometry.kernel} with dilation {geometry.dilation} and padding {geometry.padding}; "
            "give larger images"
        )


def clip_gradient(gradient: Tensor, x: Tensor, grid: Quantization) -> Tensor:
    """The gradient of x, zero where x was clipped: it does not move the output there."""
    low = -(grid.zero + 0.5) * grid.scale
    high = (grid.qmax - grid.zero + 0.5) * grid.scale
    return cast(Tensor, torch.ops.aten.hardtanh_backward(gradient, x, low, high))


class QuantizedLayer(nn.Module):
    """A layer with the weights of a dense one, whose forward pass is that of the engine.

    State: `weight` and `bias` of the dense layer, and `act_scale` and `signed`, which make the
    activation grid.
    """

    family: ClassVar[str]  # how the names of its layers begin
    geometry: Geometry
    method: PQ | Int8 | Lookup
    weight: nn.Parameter
    bias: nn.Parameter | None
    act_scale: Tensor
    signed: Tensor

    def _hold(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copies weight and bias, and registers the grid."""
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self._hold_grid(weight.device)

    def _hold_grid(self, device: torch.device) -> None:
        """Registers what the grid is made of: `signed` and what `_step_source` returns."""
        self.register_buffer("act_scale", torch.ones((), device=device))
        self.register_buffer("signed", torch.zeros((), dtype=torch.bool, device=device))

    def _step_source(self) -> Tensor:
        """The tensor that holds the step of the grid, in some form."""
        return self.act_scale

    def _step(self) -> Tensor:
        """The step of the grid."""
        return self.act_scale

    def _set_step(self, step: float) -> None:
        self.act_scale.fill_(step)

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    def grid(self) -> Quantization:
        """The activation grid; read from the device again only after it was written."""
        source = (self._step_source(), self.signed)
        kept: tuple[Watch, Quantization] | None = self.__dict__.get("_grid")
        if kept is None or not kept[0].unchanged(source):
            bits = self.method.act_bits
            zero = 1 << (bits - 1) if bool(self.signed) else 0
            kept = (Watch(source), Quantization(float(self._step().detach()), zero, bits))
            self.__dict__["_grid"] = kept
        return kept[1]

    def set_activation_range(self, low: float, high: float) -> None:
        """Sets the grid to cover low..high: unsigned if nothing is below zero."""
        bits = self.method.act_bits
        signed = low < 0.0
        reach = max(high, -low) if signed else high
        levels = (1 << (bits - 1)) - 1 if signed else (1 << bits) - 1
        self.signed.fill_(signed)
        self._set_step(max(reach, 1e-6) / max(levels, 1))

    def _run(self, x: Tensor) -> Tensor:
        """y (N, M, H', W') of x (N, C, H, W), in float32, with gradients."""
        raise NotImplementedError

    def _forward_images(self, x: Tensor) -> Tensor:
        """y (N, M, H', W') of x (N, C, H, W): frozen where no gradient is asked for."""
        if self.training or torch.is_grad_enabled():
            check_input(x, self.geometry, False, self.family)
            return self._run(x)
        return cast(Tensor, self.frozen()(x))

    def _forward_rows(self, x: Tensor) -> Tensor:
        """y (..., M) of x (..., D), in the same way."""
        if self.training or torch.is_grad_enabled():
            check_input(x, self.geometry, True, self.family)
            y = self._run(x.reshape(-1, x.shape[-1])[:, :, None, None])
            return y.reshape(*x.shape[:-1], self.outputs)
        return cast(Tensor, self.frozen()(x))

    def freeze(self) -> nn.Module:
        """The layer as the engine runs it: integers in place of the weights."""
        raise NotImplementedError

    def frozen(self) -> nn.Module:
        """`freeze()`, kept until a parameter or buffer is written or replaced."""
        source = (*self.parameters(), *self.buffers())
        kept: tuple[Watch, nn.Module] | None = self.__dict__.get("_frozen")
        if kept is None or not kept[0].unchanged(source):
            kept = (Watch(source), self.freeze())
            self.__dict__["_frozen"] = kept  # not a submodule: it must not reach state_dict
        return kept[1]

    def forget_frozen(self) -> None:
        """Forgets what `frozen` kept: not every write to a parameter can be noticed."""
        self.__dict__.pop("_frozen", None)
        if self._step_source().requires_grad:
            self.__dict__.pop("_grid", None)

    def train(self, mode: bool = True) -> Self:
        """As of every module; also forgets what was kept for eval mode."""
        if mode != self.training:
            self.forget_frozen()  # weights may have been written through .data
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _DERIVED}

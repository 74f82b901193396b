"""Transposed convolutions as ordinary ones: every output pixel reads the pixels that reach it.

With stride s, the outputs whose place is the same modulo s are an ordinary convolution of the
input, with every s-th tap of the kernel in reverse order. One convolution computes them all, s
times s outputs for each channel; its outputs are interleaved and the border is cut off (Shi et al.,
"Is the deconvolution layer the same as a convolutional layer?", arXiv 1609.07009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train.layers.forms import runs_forward_of
from lutra.train.layers.wrapper import Wrapper

_KINDS: dict[type[nn.Module], type[nn.Conv1d | nn.Conv2d]] = {
    nn.ConvTranspose1d: nn.Conv1d,
    nn.ConvTranspose2d: nn.Conv2d,
}


def why_no_conv(module: nn.Module) -> str | None:
    """Why a transposed convolution is no ordinary one; None where it is."""
    name = type(module).__name__
    kind = next((kind for kind in _KINDS if isinstance(module, kind)), None)
    if kind is None:
        return f"{name} has no lookup form"
    if not runs_forward_of(module, kind):
        return f"{name} has a forward of its own, other than that of {kind.__name__}"
    assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d)
    for axis in _axes(module):
        if axis.dilation > 1 and (axis.stride > 1 or axis.extra):
            return (
                f"a transposed convolution with dilation {module.dilation}, stride {module.stride} "
                f"and output_padding {module.output_padding} has no lookup form"
            )
    return None


@dataclass(frozen=True)
class Axis:
    """A transposed convolution along one axis, and the ordinary one that computes the same.

    Attributes:
        kernel, stride, padding, dilation: of the transposed convolution.
        extra: its `output_padding`.
    """

    kernel: int
    stride: int
    padding: int
    dilation: int
    extra: int

    @property
    def taps(self) -> int:
        """Kernel size of the convolution."""
        return -(-(self.kernel + max(0, self.extra - self.padding)) // self.stride)

    @property
    def border(self) -> int:
        """Padding of the convolution: the least that reaches all outputs."""
        span = (self.taps - 1) * self.dilation
        for border in range(span):
            if min(self._cut(border)) >= 0:
                return border
        return span

    @property
    def cut(self) -> tuple[int, int]:
        """What is cut off at the start and the end, after interleaving."""
        return self._cut(self.border)

    def _cut(self, border: int) -> tuple[int, int]:
        span = (self.taps - 1) * self.dilation
        start = self.padding - (span - border) * self.stride
        reach = self.dilation * (self.kernel - 1) + 1
        # For L inputs: (L + 2 border - span) * stride outputs, of which
        # (L - 1) * stride - 2 padding + reach + extra are wanted.
        end = (2 * border - span + 1) * self.stride + 2 * self.padding - reach - self.extra - start
        return start, end


def _axes(module: nn.ConvTranspose1d | nn.ConvTranspose2d) -> list[Axis]:
    given: Any = (
        module.kernel_size, module.stride, module.padding, module.dilation, module.output_padding,
    )  # fmt: skip
    return [Axis(*values) for values in zip(*given, strict=True)]


class TransposedConv(Wrapper):
    """Computes what `nn.ConvTranspose1d` or `nn.ConvTranspose2d` does, by a call of `conv`.

    Args:
        dense: the transposed convolution, of which `why_no_conv` says nothing.
    """

    def __init__(self, dense: nn.ConvTranspose1d | nn.ConvTranspose2d) -> None:
        self_axes = _axes(dense)
        steps = [axis.stride for axis in self_axes]
        channels = dense.out_channels * math.prod(steps)
        kind = next(conv for kind, conv in _KINDS.items() if isinstance(dense, kind))
        conv = kind(
            dense.in_channels,
            channels,
            tuple(axis.taps for axis in self_axes),  # type: ignore[arg-type]
            1,
            tuple(axis.border for axis in self_axes),  # type: ignore[arg-type]
            tuple(axis.dilation for axis in self_axes),  # type: ignore[arg-type]
            dense.groups,
            dense.bias is not None,
            device="meta",
        )
        weight = _as_conv(dense.weight.detach(), self_axes, dense.groups)
        conv.weight = nn.Parameter(weight, requires_grad=dense.weight.requires_grad)
        if dense.bias is not None:
            bias = dense.bias.detach().repeat_interleave(math.prod(steps))
            conv.bias = nn.Parameter(bias, requires_grad=dense.bias.requires_grad)
        super().__init__(dense, "conv", conv)
        self.axes, self.groups = self_axes, dense.groups

    @property
    def weight(self) -> Tensor:
        """The weight of the transposed convolution (C, M / groups, ...), in float."""
        return _from_conv(super().weight, self.axes, self.groups)

    @property
    def bias(self) -> Tensor | None:
        """The mean of the biases that an output channel has at its places."""
        bias = super().bias
        steps = [axis.stride for axis in self.axes]
        return None if bias is None else bias.reshape(-1, math.prod(steps)).mean(1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Arguments and results of the transposed convolution.

        Raises:
            LutraError: an `output_size` other than that without one.
        """
        y = interleave(self.layer(x), [axis.stride for axis in self.axes])
        for i, axis in enumerate(self.axes):
            (start, end), dim = axis.cut, i - len(self.axes)
            if start or end:
                y = y.narrow(dim, start, y.shape[dim] - start - end)
        if output_size is not None:
            wanted = tuple(output_size[-len(self.axes) :])
            if wanted != tuple(y.shape[-len(self.axes) :]):
                raise LutraError(
                    f"a converted transposed convolution gives {tuple(y.shape)}, and output_size "
                    f"asks for {wanted}; keep this layer, or give it an output_padding"
                )
        return y

    def extra_repr(self) -> str:
        return f"stride={tuple(axis.stride for axis in self.axes)}"


def interleave(x: Tensor, steps: list[int]) -> Tensor:
    """Puts channels side by side: (N, M * s * t, H, W) -> (N, M, H * s, W * t), or one axis less.

    Args:
        x: images or lines.
        steps: s and t, or s alone.
    """
    if math.prod(steps) == 1:
        return x
    if len(steps) == 2 and steps[0] == steps[1]:
        return F.pixel_shuffle(x, steps[0])
    sizes = x.shape[2:]
    channels = x.shape[1] // math.prod(steps)
    x = x.reshape(-1, channels, *steps, *sizes)
    n = len(steps)
    order = [axis for i in range(n) for axis in (2 + n + i, 2 + i)]
    whole = [size * step for size, step in zip(sizes, steps, strict=True)]
    return x.permute(0, 1, *order).reshape(-1, channels, *whole)


def _as_conv(weight: Tensor, axes: list[Axis], groups: int) -> Tensor:
    """(C, M / groups, k, ...) -> (M * s * ..., C / groups, taps, ...)."""
    n = len(axes)
    short = [axis.taps * axis.stride - axis.kernel for axis in axes]
    padded = F.pad(weight, [size for value in reversed(short) for size in (0, value)])
    taps = [size for axis in axes for size in (axis.taps, axis.stride)]
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    # (groups, C / groups, M / groups, taps, s, ...): outputs, steps, inputs, taps
    parts = padded.reshape(groups, inputs, outputs, *taps)
    order = (0, 2, *range(4, 4 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2))
    made = parts.permute(*order).reshape(-1, inputs, *(axis.taps for axis in axes))
    return made.flip(*range(2, 2 + n)).contiguous()


def _from_conv(weight: Tensor, axes: list[Axis], groups: int) -> Tensor:
    """The inverse of `_as_conv`."""
    n = len(axes)
    steps, taps = [axis.stride for axis in axes], [axis.taps for axis in axes]
    parts = weight.flip(*range(2, 2 + n))
    parts = parts.reshape(groups, -1, *steps, weight.shape[1], *taps)
    order = [axis for i in range(n) for axis in (3 + n + i, 2 + i)]
    parts = parts.permute(0, 2 + n, 1, *order)
    whole = [tap * step for tap, step in zip(taps, steps, strict=True)]
    made = parts.reshape(groups * weight.shape[1], -1, *whole)
    for i, axis in enumerate(axes):
        made = made.narrow(2 + i, 0, axis.kernel)
    return torch.clone(made)

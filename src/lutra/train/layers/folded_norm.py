"""Batch norms that give in eval mode what they give in a file, to the bit.

A file has no batch norm behind an integer layer: gain and shift go into the scales and biases of
the layer. That moves the last bits of the outputs, and with them values between two steps of the
next grid. A norm of this kind computes its outputs from the integer sums of the layer before it, as
the file does, so that training, evaluation and file agree on every step.
"""

from __future__ import annotations

from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from lutra.train.layers.base import FrozenLayer, QuantizedLayer
from lutra.train.layers.dropin import adopt_attributes

_CACHED = 65536  # values whose temporaries stay in the second-level cache
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def gain_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a batch norm in eval mode multiplies by and adds, float64 (M) each."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().double()
    shift = -norm.running_mean.double() * gain
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return gain, shift


class FoldedNorm(nn.modules.batchnorm._BatchNorm):
    """What the batch norms behind integer layers share. Make them with `fold_behind`.

    In training mode, for inputs that the layer did not give, and while `torch.compile` looks, it is
    an ordinary batch norm.
    """

    _plain: type[nn.modules.batchnorm._BatchNorm]

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm, layer: QuantizedLayer) -> Self:
        """A norm with the parameters and statistics of another."""
        new = _adopted(cls, norm)
        new.__dict__["_layer"] = layer  # no child: it has a place of its own in the model
        return new

    def freeze(self) -> nn.Module:
        """The ordinary batch norm with the same parameters, for a layer that is frozen."""
        return _adopted(self._plain, self)

    def forward(self, x: Tensor) -> Tensor:
        """As of every batch norm."""
        layer: QuantizedLayer = self.__dict__["_layer"]
        if self.training or layer.training or torch.compiler.is_compiling():
            return super().forward(x)
        with torch.no_grad():
            folded = self._folded(x, cast(FrozenLayer, layer.frozen()))
        if folded is None:
            return super().forward(x)
        if not torch.is_grad_enabled():
            return folded
        y = super().forward(x)
        return y + (folded - y).detach()

    def _folded(self, x: Tensor, layer: FrozenLayer) -> Tensor | None:
        """The outputs as the file has them; None where x is not of the layer."""
        scale, bias = cast(Tensor, layer.scale), cast(Tensor, layer.bias)
        if self.running_var is None or x.dtype != torch.float32 or x.device != scale.device:
            return None
        if x.dim() < 2 or x.shape[1] != len(scale):
            return None
        shape = (-1, *[1] * (x.dim() - 2))
        step, start = scale.view(shape), bias.view(shape)
        unit = torch.where(step == 0.0, 1.0, step)
        gain, shift = gain_and_shift(self)
        scale, bias = (scale.double() * gain).float(), (bias.double() * gain + shift).float()
        y = torch.empty_like(x)
        samples = max(1, _CACHED * len(x) // max(x.numel(), 1))
        for own, out in zip(torch.split(x, samples), torch.split(y, samples), strict=True):
            sums = (own.double() - start).div_(unit).round_().float()
            if not torch.equal(sums * step + start, own):
                return None
            out.copy_(sums.mul_(scale.view(shape)).add_(bias.view(shape)))
        return y


_N = TypeVar("_N", bound=nn.modules.batchnorm._BatchNorm)


def _adopted(kind: type[_N], norm: nn.modules.batchnorm._BatchNorm) -> _N:
    """A norm of another class that shares the parameters and statistics of one."""
    new = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, tensor in (*norm._parameters.items(), *norm._buffers.items()):
        setattr(new, name, tensor)
    adopt_attributes(new, norm)
    return new.train(norm.training)


class _FoldedNorm1d(FoldedNorm, nn.BatchNorm1d):
    _plain = nn.BatchNorm1d


class _FoldedNorm2d(FoldedNorm, nn.BatchNorm2d):
    _plain = nn.BatchNorm2d


_KINDS: dict[type[Any], type[FoldedNorm]] = {
    nn.BatchNorm1d: _FoldedNorm1d,
    nn.BatchNorm2d: _FoldedNorm2d,
}


def fold_behind(norm: nn.Module, layer: QuantizedLayer) -> FoldedNorm | None:
    """What takes the place of a batch norm that reads the outputs of a layer; None where it stays:
    it is of another class, or its statistics are those of the batch."""
    kind = _KINDS.get(type(norm))
    if kind is None or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return None
    return None if norm.running_var is None else kind.of(norm, layer)

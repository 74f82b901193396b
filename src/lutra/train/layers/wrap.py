"""Which modules are seen as a dense layer and something around it."""

from __future__ import annotations

from torch import nn

from lutra.train.layers.conv_transpose import TransposedConv, why_no_conv
from lutra.train.layers.own_forward import has_own_forward, split
from lutra.train.layers.wrapper import Wrapper


def may_wrap(module: nn.Module) -> bool:
    """Whether a module is a transposed convolution, or a layer with a forward or padding of its
    own."""
    return isinstance(module, nn.modules.conv._ConvTransposeNd) or has_own_forward(module)


def wrap(module: nn.Module) -> Wrapper | str | None:
    """A module with its dense layer as a part of its own, which can be replaced.

    Args:
        module: any module; it shares its parameters with the new one where it can.

    Returns:
        The module to put in its place; the reason why there is none; None where the module is
        neither a transposed convolution nor a layer with a forward or padding of its own.
    """
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        reason = why_no_conv(module)
        if reason is not None:
            return reason
        assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d)
        return TransposedConv(module)
    return split(module) if has_own_forward(module) else None

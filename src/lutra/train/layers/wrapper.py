"""Modules around a dense layer: the layer is replaced, and what the module does beside it stays."""

from __future__ import annotations

from torch import Tensor, nn

from lutra.train.layers.dropin import adopt_attributes

#: The names that the dense layer of a wrapper can have.
PARTS = ("conv", "linear")


class Wrapper(nn.Module):
    """A module in the place of another, with a plain dense layer as a part of its own.

    Args:
        old: the module in whose place it stands; its attributes are kept.
        part: name of the dense layer: "conv" or "linear".
        layer: an `nn.Conv1d`, `nn.Conv2d` or `nn.Linear`.
    """

    def __init__(self, old: nn.Module, part: str, layer: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.add_module(part, layer)
        adopt_attributes(self, old)
        self.train(old.training)

    @property
    def layer(self) -> nn.Module:
        """The dense layer, or what has replaced it."""
        return self.get_submodule(self.part)

    @property
    def weight(self) -> Tensor:
        """The weight of the layer, in float."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer."""
        bias = self.layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

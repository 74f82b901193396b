"""Where the rows of a convolution come from: kernel, stride, padding and dilation, as pairs."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.node import AttrValue

Pair = tuple[int, int]


def pair(value: int | tuple[int, ...]) -> Pair:
    """An int or a pair, as a pair."""
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[1])


@dataclass(frozen=True)
class Geometry:
    """Sizes of a 2-D convolution over `channels` input channels; a linear layer is a 1x1 one."""

    channels: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def depth(self) -> int:
        """Length D of a row: channels * kernel height * kernel width."""
        return self.channels * self.taps

    def is_linear(self, x: Tensor) -> bool:
        """Whether x (N, C, H, W) are rows of a linear layer: images and kernel of one pixel."""
        return self.kernel == x.shape[2:] == (1, 1) and self.padding == (0, 0) and self.groups == 1

    def out_size(self, height: int, width: int) -> Pair:
        """Height and width of the output for an input of this height and width."""
        h, w = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return h, w

    def attrs(self, names: Container[str]) -> dict[str, AttrValue]:
        """The attributes of an operator that the geometry gives, of those that it has."""
        known: dict[str, AttrValue] = {
            "in_channels": self.channels,
            "in_features": self.channels,
            "kernel": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }
        return {name: value for name, value in known.items() if name in names}

    @classmethod
    def of_attrs(
        cls, attrs: Mapping[str, AttrValue], channels: int, kernel: Pair = (1, 1)
    ) -> Geometry:
        """The geometry in the attributes of an operator.

        Args:
            attrs: of the operator.
            channels: of its input.
            kernel: of the weight, where the attributes have none.
        """
        given: Any = attrs
        return cls(
            channels,
            given.get("kernel", kernel),
            given.get("stride", (1, 1)),
            given.get("padding", (0, 0)),
            given.get("dilation", (1, 1)),
            given.get("groups", 1),
        )

    @classmethod
    def of(cls, layer: nn.Module, *, grouped: bool = False) -> Geometry:
        """Geometry of a dense layer. A convolution of lines is one of images of one row; what is
        no convolution is a linear layer.

        Args:
            grouped: whether a grouped convolution will do.

        Raises:
            LutraError: grouped convolution, or a padding that is not symmetric zeros.
        """
        if isinstance(layer, nn.Linear):
            return cls(layer.in_features)
        if not isinstance(layer, nn.Conv1d | nn.Conv2d):
            weight: Any = layer.weight
            return cls(weight.shape[0])
        if layer.groups != 1 and not grouped:
            raise LutraError(
                f"a convolution with groups={layer.groups} cannot be looked up; "
                "keep it, or give it Int8()"
            )
        if layer.padding_mode != "zeros":
            raise LutraError(
                f"a convolution with padding_mode={layer.padding_mode!r} cannot be converted; "
                "keep it, or pad with zeros"
            )

        def spread(value: tuple[int, ...], before: int) -> Pair:
            return (before, int(value[0])) if isinstance(layer, nn.Conv1d) else pair(value)

        kernel, dilation = spread(layer.kernel_size, 1), spread(layer.dilation, 1)
        if layer.padding == "same":
            spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            if any(span % 2 for span in spans):
                raise LutraError(
                    f"padding='same' with kernel {kernel} and dilation {dilation} is not "
                    "symmetric; pad explicitly before the convolution"
                )
            padding = (spans[0] // 2, spans[1] // 2)
        elif layer.padding == "valid":
            padding = (0, 0)
        else:
            assert not isinstance(layer.padding, str)
            padding = spread(layer.padding, 0)
        stride = spread(layer.stride, 1)
        return cls(layer.in_channels, kernel, stride, padding, dilation, layer.groups)


@dataclass(frozen=True)
class Grid:
    """The activation grid: x_q = clamp(round(x / scale) + zero, 0, 2**bits - 1)."""

    scale: float
    zero: int
    bits: int = 7

    @property
    def qmax(self) -> int:
        return int(2**self.bits - 1)

    @property
    def attrs(self) -> dict[str, AttrValue]:
        """The attributes of an operator with this grid."""
        return {"act_scale": self.scale, "act_zero": self.zero, "act_bits": self.bits}

    @classmethod
    def of_attrs(cls, attrs: Mapping[str, AttrValue]) -> Grid:
        """The grid in the attributes of an operator."""
        given: Any = attrs
        return cls(given["act_scale"], given["act_zero"], given["act_bits"])

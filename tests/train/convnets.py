"""Convolutional classifiers in the form of well-known packages, small, and what they are made of.

Each is written from the description in its paper, as compactly as its kind of block allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Apply(nn.Module):
    """A function in a sequence of modules."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """x + body(x), with a shortcut where the shape changes."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, act: bool = True):
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.act(self.body(x) + self.shortcut(x))
        return made


class Branches(nn.Module):
    """Several ways of one input, side by side."""

    def __init__(self, *ways: nn.Module) -> None:
        super().__init__()
        self.ways = nn.ModuleList(ways)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([way(x) for way in self.ways], 1)


def unit(
    inputs: int,
    outputs: int,
    kernel: Any = 3,
    stride: int = 1,
    groups: int = 1,
    act: Callable[[], nn.Module] = nn.ReLU,
    dilation: int = 1,
) -> nn.Sequential:
    """Convolution, batch norm and activation."""
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = tuple(dilation * (side // 2) for side in sides)
    return nn.Sequential(
        nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride,
            padding,  # type: ignore[arg-type]
            groups=groups,
            dilation=dilation,
            bias=False,
        ),
        nn.BatchNorm2d(outputs),
        act(),
    )


def head(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def alexnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d((3, 3)),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(144, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 5),
    )


def vgg() -> nn.Module:
    return nn.Sequential(
        unit(3, 8),
        nn.MaxPool2d(2, 2),
        unit(8, 16),
        unit(16, 16),
        nn.MaxPool2d(2, 2),
        nn.AdaptiveAvgPool2d((2, 2)),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def basic(inputs: int, outputs: int, stride: int) -> nn.Module:
    body = nn.Sequential(unit(inputs, outputs, 3, stride), *unit(outputs, outputs)[:2])
    same = inputs == outputs and stride == 1
    return Residual(body, None if same else unit(inputs, outputs, 1, stride, act=nn.Identity))


def _bottleneck(inputs: int, width: int, outputs: int, stride: int, groups: int) -> nn.Module:
    body = nn.Sequential(
        unit(inputs, width, 1), unit(width, width, 3, stride, groups), *unit(width, outputs, 1)[:2]
    )
    return Residual(body, unit(inputs, outputs, 1, stride, act=nn.Identity))


def resnet() -> nn.Module:
    return nn.Sequential(
        unit(3, 8, 7, 2),
        nn.MaxPool2d(3, 2, 1),
        basic(8, 8, 1),
        basic(8, 16, 2),
        head(16),
    )


def resnext() -> nn.Module:
    return nn.Sequential(
        unit(3, 8, 3, 2), _bottleneck(8, 16, 32, 1, 4), _bottleneck(32, 16, 32, 2, 4), head(32)
    )


class Excite(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, gate: Callable[[], nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.ways = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, channels, 1),
            gate(),
        )

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x * self.ways(x)
        return made


def regnet() -> nn.Module:
    body = nn.Sequential(unit(8, 16, 1), unit(16, 16, 3, 2, 2), Excite(16), *unit(16, 16, 1)[:2])
    return nn.Sequential(
        unit(3, 8, 3, 2), Residual(body, unit(8, 16, 1, 2, act=nn.Identity)), head(16)
    )


class Dense(nn.Module):
    """A layer of DenseNet: what was made stays."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def densenet() -> nn.Module:
    return nn.Sequential(
        unit(3, 8, 3, 2),
        Dense(8, 4),
        Dense(12, 4),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 1, bias=False),
        nn.AvgPool2d(2, 2),
        Dense(8, 4),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        head(12),
    )


def inception() -> nn.Module:
    return nn.Sequential(
        unit(3, 8, 3, 2),
        Branches(
            unit(8, 4, 1),
            nn.Sequential(unit(8, 4, 1), unit(4, 4, (1, 7)), unit(4, 4, (7, 1))),
            nn.Sequential(unit(8, 4, 1), Branches(unit(4, 4, (1, 3)), unit(4, 4, (3, 1)))),
            nn.Sequential(nn.AvgPool2d(3, 1, 1), unit(8, 4, 1)),
        ),
        Branches(unit(20, 8, 3, 2), nn.MaxPool2d(3, 2, 1)),
        head(28),
    )


def googlenet() -> nn.Module:
    return nn.Sequential(
        unit(3, 8, 7, 2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.LocalResponseNorm(5),
        Branches(
            unit(8, 4, 1),
            nn.Sequential(unit(8, 4, 1), unit(4, 8)),
            nn.Sequential(unit(8, 4, 1), unit(4, 4, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), unit(8, 4, 1)),
        ),
        head(20),
    )


def squeezenet() -> nn.Module:
    def fire(inputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, 4, 1),
            nn.ReLU(inplace=True),
            Branches(
                nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(inplace=True)),
                nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(inplace=True)),
            ),
        )

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        fire(8),
        fire(16),
        nn.Conv2d(16, 5, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
    )


class Shuffled(nn.Module):
    """A unit of ShuffleNetV2: half goes its way, and the channels are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.way = nn.Sequential(
            unit(half, half, 1),
            unit(half, half, 3, 1, half, nn.Identity),
            unit(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        made = torch.cat((kept, self.way(changed)), dim=1)
        batch, channels, height, width = made.size()
        made = made.view(batch, 2, channels // 2, height, width)
        return made.transpose(1, 2).contiguous().view(batch, channels, height, width)


def shufflenet() -> nn.Module:
    return nn.Sequential(unit(3, 16, 3, 2), Shuffled(16), Shuffled(16), unit(16, 16, 1), head(16))


def _inverted(
    channels: int, act: Callable[[], nn.Module], *, kernel: int = 3, gate: Any = None
) -> nn.Module:
    wide = 3 * channels
    body = nn.Sequential(
        unit(channels, wide, 1, act=act),
        unit(wide, wide, kernel, 1, wide, act),
        *([] if gate is None else [Excite(wide, gate)]),
        unit(wide, channels, 1, act=nn.Identity),
    )
    return Residual(body, act=False)


def mobilenet_v2() -> nn.Module:
    return nn.Sequential(
        unit(3, 8, 3, 2, act=nn.ReLU6),
        _inverted(8, nn.ReLU6),
        unit(8, 8, 3, 2, 8, nn.ReLU6),
        _inverted(8, nn.ReLU6),
        Apply(lambda x: F.adaptive_avg_pool2d(x, (1, 1))),
        Apply(lambda x: torch.flatten(x, 1)),
        nn.Dropout(0.2),
        nn.Linear(8, 5),
    )


def mobilenet_v3() -> nn.Module:
    return nn.Sequential(
        unit(3, 8, 3, 2, act=nn.Hardswish),
        _inverted(8, nn.Hardswish, kernel=5, gate=nn.Hardsigmoid),
        _inverted(8, nn.ReLU, gate=nn.Hardsigmoid),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 16),
        nn.Hardswish(inplace=True),
        nn.Linear(16, 5),
    )


def efficientnet() -> nn.Module:
    return nn.Sequential(
        unit(3, 8, 3, 2, act=nn.SiLU),
        _inverted(8, nn.SiLU, gate=nn.Sigmoid),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(8, 8, 3, 2, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        _inverted(8, nn.SiLU, kernel=5, gate=nn.Sigmoid),
        head(8),
    )


def mnasnet() -> nn.Module:
    return nn.Sequential(
        unit(3, 8, 3, 2),
        unit(8, 8, 3, 1, 8),
        unit(8, 8, 1, act=nn.Identity),
        _inverted(8, nn.ReLU),
        Apply(lambda x: x.mean([2, 3])),
        nn.Linear(8, 5),
    )


class ConvNextBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = nn.Linear(channels, 32), nn.Linear(32, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))) * self.scale
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), ConvNextBlock(16), ConvNextBlock(16), head(16))

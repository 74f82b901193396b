"""Networks in the form of well-known packages, small: what `test_architectures` exports.

Each is written from the description in its paper, as compactly as its kind of block allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from architectures import Architecture, ids_alone, pixels, spread, tokens
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


def _basic(inputs: int, outputs: int, stride: int) -> nn.Module:
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
        _basic(8, 8, 1),
        _basic(8, 16, 2),
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


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.low = unit(3, 8), unit(8, 16), unit(16, 16)
        self.join, self.last = unit(24, 8), unit(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.down(F.max_pool2d(first, 2))
        low = self.low(F.max_pool2d(second, 2))
        rise = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=True)
        made = self.join(torch.cat([second, rise[:, :8]], 1))
        large = F.interpolate(made, size=first.shape[2:], mode="nearest")
        result: Tensor = self.out(self.last(torch.cat([first, large], 1)))
        return result


class UNetTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.low = unit(3, 8), unit(8, 16), unit(16, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.last, self.out = unit(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        up = self.up(self.low(self.down(F.max_pool2d(first, 2))))
        rows, columns = first.size(2) - up.size(2), first.size(3) - up.size(3)
        up = F.pad(up, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        result: Tensor = self.out(self.last(torch.cat([first, up], dim=1)))
        return result


class Pooled(nn.Module):
    """The branch of an ASPP that sees the whole image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ways = nn.Sequential(nn.AdaptiveAvgPool2d(1), unit(channels, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        return F.interpolate(self.ways(x), size=size, mode="bilinear", align_corners=False)


class DeepLab(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(unit(3, 8, 3, 2), unit(8, 16, 3, 2))
        self.pyramid = Branches(
            unit(16, 8, 1), unit(16, 8, dilation=2), unit(16, 8, dilation=4), Pooled(16)
        )
        self.out = nn.Sequential(unit(32, 8, 1), unit(8, 8), nn.Conv2d(8, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        made = self.out(self.pyramid(self.body(x)))
        return F.interpolate(made, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """FPN: levels of one depth, each with what the coarser ones say."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([unit(3, 8, 3, 2), unit(8, 16, 3, 2), unit(16, 24, 3, 2)])
        self.sides = nn.ModuleList([nn.Conv2d(width, 8, 1) for width in (8, 16, 24)])
        self.smooth = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        made = self.sides[-1](levels[-1])
        results = [self.smooth[-1](made)]
        for index in (1, 0):
            side = self.sides[index](levels[index])
            made = side + F.interpolate(made, size=side.shape[-2:], mode="nearest")
            results.append(self.smooth[index](made))
        return torch.cat([level.mean((2, 3)) for level in results], 1)


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 12), nn.GELU(), nn.Linear(12, tokens))
        self.over_width = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.first(x).transpose(1, 2)).transpose(1, 2)
        made: Tensor = x + self.over_width(self.second(x))
        return made


def _tokens(width: int = 16) -> list[nn.Module]:
    """An image of 32 as 16 tokens."""
    return [nn.Conv2d(3, width, 8, 8), Apply(lambda x: x.flatten(2).transpose(1, 2))]


def mixer() -> nn.Module:
    return nn.Sequential(
        *_tokens(),
        MixerBlock(16, 16),
        MixerBlock(16, 16),
        nn.LayerNorm(16),
        Apply(lambda x: x.mean(1)),
        nn.Linear(16, 5),
    )


class GatedBlock(nn.Module):
    """gMLP: tokens meet in a gate."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm, self.gate_norm = nn.LayerNorm(width), nn.LayerNorm(16)
        self.wide, self.narrow = nn.Linear(width, 32), nn.Linear(16, width)
        self.over_tokens = nn.Conv1d(tokens, tokens, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, gate = F.gelu(self.wide(self.norm(x))).chunk(2, dim=-1)
        made: Tensor = x + self.narrow(kept * self.over_tokens(self.gate_norm(gate)))
        return made


def gmlp() -> nn.Module:
    return nn.Sequential(
        *_tokens(),
        GatedBlock(16, 16),
        GatedBlock(16, 16),
        Apply(lambda x: x.mean(1)),
        nn.Linear(16, 5),
    )


class ResMlpBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, 1, width) + 0.5)
        self.shift = nn.Parameter(torch.rand(1, 1, width))
        self.gamma = nn.Parameter(torch.rand(width))
        self.tokens = nn.Linear(tokens, tokens)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addcmul(self.shift, self.scale, x)
        x = x + self.gamma * self.tokens(y.transpose(1, 2)).transpose(1, 2)
        made: Tensor = x + self.gamma * self.mlp(torch.addcmul(self.shift, self.scale, x))
        return made


def resmlp() -> nn.Module:
    return nn.Sequential(
        *_tokens(),
        ResMlpBlock(16, 16),
        ResMlpBlock(16, 16),
        Apply(lambda x: x.mean(1)),
        nn.Linear(16, 5),
    )


class Csp(nn.Module):
    """A stage of a YOLO: halves that meet again, and a spatial pyramid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.first = unit(channels, channels, 1, act=nn.SiLU)
        self.ways = nn.ModuleList(
            [Residual(nn.Sequential(unit(half, half, act=nn.SiLU)), act=False) for _ in range(2)]
        )
        self.last = unit(2 * channels, channels, 1, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).split(x.shape[1] // 2, 1))
        parts.extend(way(parts[-1]) for way in self.ways)
        made: Tensor = self.last(torch.cat(parts, 1))
        return made


class Yolo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8, 3, 2, act=nn.SiLU)
        self.high = nn.Sequential(unit(8, 16, 3, 2, act=nn.SiLU), Csp(16))
        self.low = nn.Sequential(unit(16, 16, 3, 2, act=nn.SiLU), unit(16, 8, 1, act=nn.SiLU))
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.spp = unit(32, 16, 1, act=nn.SiLU)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.join = unit(32, 16, act=nn.SiLU)
        self.detect = nn.ModuleList([nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        high = self.high(self.stem(x))
        low = self.low(high)
        once = self.pool(low)
        twice = self.pool(once)
        low = self.spp(torch.cat((low, once, twice, self.pool(twice)), 1))
        joined = self.join(torch.cat([self.up(low), high], 1))
        made = []
        for conv, level in zip(self.detect, (joined, low), strict=True):
            boxes = conv(level)
            made.append(boxes.view(boxes.shape[0], 8, -1))
        boxes, scores = torch.cat(made, 2).split((4, 4), 1)
        corner, size = boxes.chunk(2, 1)
        return torch.cat((corner - size / 2, corner + size / 2, scores.sigmoid()), 1)


def espcn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 4, 3, padding=1),
        nn.PixelShuffle(2),
        Apply(lambda x: x.clamp(0.0, 1.0)),
    )


class Rcan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.45, 0.44, 0.4]).view(1, 3, 1, 1))
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1),
                nn.ReLU(True),
                nn.Conv2d(8, 8, 3, padding=1),
                Excite(8),
            )
            for _ in range(2)
        )
        self.up = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.PixelShuffle(2))
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first((x - self.mean) * 255.0)
        y = first
        for block in self.blocks:
            y = y + block(y)
        made: Tensor = self.last(self.up(first + y)) / 255.0 + self.mean
        return made


class Crnn(nn.Module):
    """Lines of text: columns of an image as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            unit(1, 8),
            nn.MaxPool2d(2, 2),
            unit(8, 16),
            nn.MaxPool2d((2, 1), (2, 1)),
            nn.Conv2d(16, 16, (8, 1)),
            nn.ReLU(),
        )
        self.rows = nn.LSTM(16, 8, bidirectional=True, batch_first=True)
        self.out = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).squeeze(2).permute(0, 2, 1)
        return F.log_softmax(self.out(self.rows(y)[0]), dim=2)


class Causal(nn.Module):
    """A block of a TCN: padding on both sides, and the end cut off."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        pad = 2 * dilation
        norm = nn.utils.parametrizations.weight_norm
        self.pad = pad
        self.first = norm(nn.Conv1d(inputs, outputs, 3, padding=pad, dilation=dilation))
        self.second = norm(nn.Conv1d(outputs, outputs, 3, padding=pad, dilation=dilation))
        self.side = nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x)[:, :, : -self.pad].contiguous())
        y = F.relu(self.second(y)[:, :, : -self.pad].contiguous())
        return F.relu(y + self.side(x))


def tcn() -> nn.Module:
    return nn.Sequential(
        Causal(4, 8, 1), Causal(8, 8, 2), Apply(lambda x: x[:, :, -1]), nn.Linear(8, 5)
    )


class Encoder(nn.Module):
    """nn.TransformerEncoder of tokens, with the padding left out."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.position = nn.Embedding(40, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(16, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(ids.size(1), device=ids.device)
        x = self.embed(ids) + self.position(places)
        x = self.encoder(x, src_key_padding_mask=mask == 0)
        weights = mask.unsqueeze(-1).float()
        made: Tensor = self.out((x * weights).sum(1) / weights.sum(1).clamp(min=1e-9))
        return made


class Captioner(nn.Module):
    """nn.TransformerDecoder: text that looks at an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(*_tokens())
        self.embed = nn.Embedding(60, 16)
        layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.decoder = nn.TransformerDecoder(layer, 1)
        self.out = nn.Linear(16, 60)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        y = self.decoder(self.embed(ids), self.patches(image), tgt_mask=causal)
        made: Tensor = self.out(y)
        return made


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = self.qkv(self.norm1(x))
        y = y.reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = y.unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        made: Tensor = x + self.mlp(self.norm2(x))
        return made


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.Sequential(ViTBlock(16, 2), ViTBlock(16, 2))
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        made: Tensor = self.out(self.norm(self.blocks(x))[:, 0])
        return made


class Ghost(nn.Module):
    """Half of the channels are cheap copies of the others."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = (outputs + 1) // 2
        self.outputs = outputs
        self.first, self.cheap = unit(inputs, half, 1), unit(half, half, 3, 1, half)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return torch.cat([first, self.cheap(first)], dim=1)[:, : self.outputs, :, :]


def ghostnet() -> nn.Module:
    body = nn.Sequential(Ghost(8, 15), Excite(15, nn.Hardsigmoid), Ghost(15, 8))
    return nn.Sequential(unit(3, 8, 3, 2), Residual(body, act=False), head(8))


class HighResolution(nn.Module):
    """HRNet: two resolutions that exchange what they see."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lower = unit(3, 8, 3, 2), unit(8, 16, 3, 2)
        self.high, self.low = _basic(8, 8, 1), _basic(16, 16, 1)
        self.up = nn.Sequential(
            *unit(16, 8, 1, act=nn.Identity), nn.Upsample(scale_factor=2, mode="nearest")
        )
        self.down = unit(8, 16, 3, 2, act=nn.Identity)
        self.out = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.stem(x)
        low = self.low(self.lower(high))
        high = self.high(high)
        high, low = F.relu(high + self.up(low)), F.relu(low + self.down(high))
        rise = F.interpolate(low, size=high.shape[2:], mode="bilinear", align_corners=True)
        made: Tensor = self.out(torch.cat([high, rise], 1))
        return made


class WindowBlock(nn.Module):
    """A block of Swin in the form of timm and torchvision: shifted windows with masks."""

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        places = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", apart[:, :, 0] * (2 * window - 1) + apart[:, :, 1])
        regions = torch.zeros(1, side, side, 1)
        cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        if shift:
            for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
                regions[:, rows, columns] = number
        parts = self.cut(regions).squeeze(-1)
        apart = parts[:, None, :] - parts[:, :, None]
        self.register_buffer("mask", torch.where(apart == 0, 0.0, -100.0) if shift else None)

    def cut(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        w = self.window
        x = x.view(batch, height // w, w, width // w, w, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        w = self.window
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = self.cut(y)
        qkv = self.qkv(y).reshape(y.shape[0], w * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * (channels // self.heads) ** -0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(w * w, w * w, -1).permute(2, 0, 1)
        scores = scores + bias.contiguous().unsqueeze(0)
        if self.mask is not None:
            windows = self.mask.shape[0]
            scores = scores.view(batch, windows, self.heads, w * w, w * w)
            scores = scores + self.mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, self.heads, w * w, w * w)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(y.shape[0], w * w, channels)
        y = self.proj(y).view(-1, height // w, width // w, w, w, channels)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x + y
        made: Tensor = x + self.mlp(self.norm2(x))
        return made


class Merge(nn.Module):
    """Four neighbours become one token, as between the stages of Swin."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        made: Tensor = self.reduce(self.norm(torch.cat(parts, -1)))
        return made


def swin() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 4),
        Apply(lambda x: x.permute(0, 2, 3, 1)),
        WindowBlock(16, 2, 8, 4, 0),
        WindowBlock(16, 2, 8, 4, 2),
        Merge(16),
        Apply(lambda x: x.mean((1, 2))),
        nn.Linear(32, 5),
    )


#: Networks of images (3, 32, 32): how they are made, and how much an image may grow.
IMAGES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alexnet": (alexnet, 0),
    "vgg": (vgg, 8),
    "resnet": (resnet, 9),
    "resnext": (resnext, 9),
    "regnet": (regnet, 9),
    "densenet": (densenet, 9),
    "inception": (inception, 9),
    "googlenet": (googlenet, 9),
    "squeezenet": (squeezenet, 9),
    "shufflenet": (shufflenet, 9),
    "mobilenet-v2": (mobilenet_v2, 9),
    "mobilenet-v3": (mobilenet_v3, 9),
    "efficientnet": (efficientnet, 9),
    "mnasnet": (mnasnet, 9),
    "convnext": (convnext, 8),
    "unet": (UNet, 8),
    "unet-transposed": (UNetTransposed, 0),
    "deeplab": (DeepLab, 8),
    "fpn": (Pyramid, 8),
    "mixer": (mixer, 0),
    "gmlp": (gmlp, 0),
    "resmlp": (resmlp, 0),
    "yolo": (Yolo, 8),
    "rcan": (Rcan, 5),
    "vit": (ViT, 0),
    "ghostnet": (ghostnet, 9),
    "hrnet": (HighResolution, 4),
    "swin": (swin, 0),
}


def _image_and_ids(batch: int, seed: int, more: int) -> tuple[Tensor, ...]:
    return (*pixels(3, 32, 32)(batch, seed, 0), *ids_alone(batch, seed, more))


def _lines(batch: int, seed: int, more: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 1, 32, 24 + 8 * more, generator=generator),)


def _architecture(
    make: Callable[[], nn.Module], inputs: Any, axes: tuple[int, ...]
) -> Architecture:
    def spread_out() -> nn.Module:
        model = make()
        spread(model)
        return model

    return Architecture(spread_out, inputs, axes)


ARCHITECTURES: dict[str, Architecture] = {
    **{
        name: _architecture(make, pixels(3, 32, 32, step=step), (0, 2, 3) if step else ())
        for name, (make, step) in IMAGES.items()
    },
    "espcn": _architecture(espcn, pixels(1, 12, 10, step=5), (0, 2, 3)),
    "crnn": _architecture(Crnn, _lines, (0, 3)),
    "tcn": _architecture(tcn, pixels(4, 20, step=5), (0, 2)),
    "encoder": _architecture(Encoder, tokens, (0, 1)),
    "encoder-norm-first": _architecture(lambda: Encoder(True), tokens, (0, 1)),
    "captioner": _architecture(Captioner, _image_and_ids, ()),
}

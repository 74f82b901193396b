"""Networks in the form of well-known packages, small: what `test_architectures` exports.

Here are those that predict more than a class, and the table of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from architectures import Architecture, ids_alone, pixels, spread, tokens
from convnets import (
    Apply,
    Branches,
    Excite,
    Residual,
    alexnet,
    basic,
    convnext,
    densenet,
    efficientnet,
    googlenet,
    head,
    inception,
    mnasnet,
    mobilenet_v2,
    mobilenet_v3,
    regnet,
    resnet,
    resnext,
    shufflenet,
    squeezenet,
    unit,
    vgg,
)  # fmt: skip
from token_networks import Captioner, Encoder, ViT, gmlp, mixer, resmlp, swin
from torch import Tensor, nn


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
        self.high, self.low = basic(8, 8, 1), basic(16, 16, 1)
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

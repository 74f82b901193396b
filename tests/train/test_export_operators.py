"""Export of single operators and small models of them: the graph computes what torch computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exported import Fn, check_model, ops
from sweeps import quick_cover
from torch import Tensor, nn

from lutra.errors import UnsupportedModelError
from lutra.train.exporting.export import export

IMAGE = (3, 9, 8)


class PointNet(nn.Module):
    """Features of each point, then their maximum: 1x1 convolutions over (N, C, L, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU()
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x.unsqueeze(3))
        return self.head(x.squeeze(3).max(2)[0])


class Points1d(nn.Module):
    """The same with nn.Conv1d, a residual sum and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv1d(16, 16, 5, padding="same", groups=4), nn.ReLU6(), nn.Conv1d(16, 16, 1)
        )
        self.down = nn.Conv1d(16, 8, 4, stride=2, padding=2, dilation=2)
        self.pool = nn.MaxPool1d(2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.down(F.relu(self.block(x) + x))
        return self.head(self.pool(x).max(2)[0])


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.Conv2d(8, 27, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).clamp(-1, 1)
        return F.pixel_shuffle(self.up(x), 3).clamp(0, 1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str] | None]] = {
    "clamps": (
        lambda: Fn(lambda m, x: x.clamp(-0.5, 1.5).clamp(max=1) + x.clamp(min=-1)),
        IMAGE,
        ["clamp", "clamp", "clamp", "add"],
    ),
    "hardtanh": (lambda: nn.Hardtanh(-2, 0.5), IMAGE, ["clamp"]),
    "clip_crossed": (lambda: Fn(lambda m, x: torch.clip(x, 1, -1)), IMAGE, ["clamp"]),
    "amax": (lambda: Fn(lambda m, x: x.amax((-1, 2))), IMAGE, ["max"]),
    "amax_keepdim": (lambda: Fn(lambda m, x: x.amax([1, 3], keepdim=True)), IMAGE, ["max"]),
    "max_dim": (lambda: Fn(lambda m, x: x.max(1)[0]), IMAGE, ["max"]),
    "max_values": (lambda: Fn(lambda m, x: x.max(-1, True).values), IMAGE, ["max"]),
    "adaptive_max_1d": (lambda: nn.AdaptiveMaxPool1d(1), (6, 40), ["max"]),
    "adaptive_avg_1d": (lambda: nn.AdaptiveAvgPool1d(1), (6, 40), ["mean"]),
    "pixel_shuffle": (lambda: nn.PixelShuffle(2), (8, 5, 3), ["pixel_shuffle"]),
    "upsample_nearest": (lambda: nn.Upsample(scale_factor=2), IMAGE, ["upsample"]),
    "upsample_size": (lambda: nn.Upsample((20, 13), mode="bilinear"), IMAGE, ["upsample"]),
    "upsample_float": (
        lambda: Fn(lambda m, x: F.interpolate(x, scale_factor=(1.3, 0.7), mode="nearest-exact")),
        IMAGE,
        ["upsample"],
    ),
    "upsample_corners": (
        lambda: nn.UpsamplingBilinear2d(scale_factor=3),
        IMAGE,
        ["upsample"],
    ),
    "upsample_recomputed": (
        lambda: Fn(
            lambda m, x: F.interpolate(
                x, scale_factor=1.37, mode="bilinear", recompute_scale_factor=True
            )
        ),
        IMAGE,
        ["upsample"],
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Conv2d(6, 4, 1)),
        IMAGE,
        ["conv2d", "conv2d"],
    ),
    "points": (
        PointNet,
        (3, 50),
        ["reshape", "conv2d", "relu", "conv2d", "relu", "max", "linear"],
    ),
    "points_1d": (
        Points1d,
        (3, 50),
        [
            "reshape",
            "conv2d",
            "relu",
            "conv2d",
            "relu6",
            "conv2d",
            "add",
            "relu",
            "conv2d",
            "max_pool2d",
            "max",
            "linear",
        ],
    ),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), (4, 20), ["reshape", "conv2d", "reshape"]),
    "conv1d_even_same": (
        lambda: nn.Conv1d(4, 6, 4, padding="same"),
        (4, 20),
        ["pad", "reshape", "conv2d", "reshape"],
    ),
    "conv1d_twice_read": (
        lambda: Fn(
            lambda m, x: ((y := m.conv(x)), m.conv(y.relu()), y * y, y.mean(2), y.amax(2, True)),
            conv=nn.Conv1d(4, 4, 3, padding=1),
        ),
        (4, 20),
        None,
    ),
    "pools_1d": (
        lambda: Fn(
            lambda m, x: F.avg_pool1d(
                F.adaptive_max_pool1d(F.adaptive_avg_pool1d(x, 11), 7), 3, 2, 1, True, False
            )
        ),
        (4, 20),
        None,
    ),
    "product": (lambda: Fn(lambda m, x: x * (x + 1)), IMAGE, ["affine", "mul"]),
    "super_resolution": (
        SuperResolution,
        IMAGE,
        ["conv2d", "clamp", "conv2d", "pixel_shuffle", "clamp"],
    ),
}


@pytest.mark.parametrize("name", quick_cover({name: model[2] for name, model in MODELS.items()}))
def test_graph_equals_torch(tmp_path: Path, name: str) -> None:
    make, shape, wanted = MODELS[name]
    torch.manual_seed(0)
    graph = check_model(tmp_path, make(), shape)
    if wanted is not None:
        assert ops(graph) == wanted


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: x.amax((0, 1)), "batch"),
    ],
)
def test_unsupported_uses_say_what_to_do(
    tmp_path: Path, function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        export(Fn(function), tmp_path / "m.lutra", torch.randn(2, *IMAGE))

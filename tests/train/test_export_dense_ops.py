"""Export of transposed convolutions, group norms, resampling, and choices by index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported import Fn, check_model, ops
from torch import Tensor, nn

from lutra import Session
from lutra.errors import UnsupportedModelError
from lutra.train.exporting.export import export

IMAGE = (4, 6, 7)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.GroupNorm(2, 4), IMAGE),
        (nn.GroupNorm(4, 4, affine=False), IMAGE),
        (nn.GroupNorm(2, 4), (4, 9)),
        (nn.GroupNorm(2, 4), (4,)),
        (nn.InstanceNorm2d(4), IMAGE),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGE),
        (nn.InstanceNorm1d(4, affine=True), (4, 9)),
    ],
)
def test_group_norm(tmp_path: Path, layer: nn.Module, shape: tuple[int, ...]) -> None:
    tracked = getattr(layer, "track_running_stats", False)
    graph = check_model(tmp_path, nn.Sequential(layer, nn.ReLU()), shape)
    assert ("affine" if tracked else "group_norm") in ops(graph)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose2d(4, 6, 2, 2), IMAGE),
        (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, bias=False), IMAGE),
        (nn.ConvTranspose2d(4, 8, (3, 2), (1, 3), (0, 1), (0, 2), groups=2, dilation=2), IMAGE),
        (nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=4), IMAGE),
        (nn.ConvTranspose1d(4, 6, 4, 2, 1), (4, 9)),
        (nn.ConvTranspose1d(4, 6, 3, 3, 0, 1, groups=2, dilation=2), (4, 9)),
    ],
)
def test_conv_transpose(tmp_path: Path, layer: nn.Module, shape: tuple[int, ...]) -> None:
    graph = check_model(tmp_path, nn.Sequential(layer, nn.ReLU()), shape)
    assert "conv_transpose2d" in ops(graph)


def test_a_unet_of_any_size(tmp_path: Path) -> None:
    class Unet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.GroupNorm(4, 8), nn.SiLU())
            self.down = nn.Conv2d(8, 12, 2, 2)
            self.up = nn.ConvTranspose2d(12, 8, 2, 2)
            self.head = nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(torch.cat([x, F.relu(self.up(F.relu(self.down(x))) + x)], 1))

    model = Unet().eval()
    path = tmp_path / "m.lutra"
    export(model, path, torch.randn(1, 3, 12, 16), dynamic_axes=(2, 3))
    for size in ((2, 2), (8, 30)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            want = model(x).numpy()
        (got,) = Session(path).run(None, {"x": x.numpy()})
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "how", [{"scale_factor": 2}, {"scale_factor": (1.5, 0.7)}, {"size": (3, 15)}]
)
def test_bicubic(tmp_path: Path, align_corners: bool, how: dict[str, Any]) -> None:
    def up(m: Any, x: Tensor) -> Tensor:
        return F.interpolate(x, mode="bicubic", align_corners=align_corners, **how)

    assert ops(check_model(tmp_path, Fn(up), IMAGE)) == ["upsample_bicubic"]


class TwoInputs(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_grid_sample(tmp_path: Path, mode: str, padding: str, align_corners: bool) -> None:
    def sample(x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=align_corners)

    graph = check_model(tmp_path, TwoInputs(sample), IMAGE, (3, 5, 2))
    assert ops(graph) == ["grid_sample"]


def test_a_bicubic_grid_is_refused(tmp_path: Path) -> None:
    model = TwoInputs(lambda x, g: F.grid_sample(x, g, mode="bicubic", align_corners=False))
    with pytest.raises(UnsupportedModelError, match="use mode='bilinear'"):
        export(model, tmp_path / "m.lutra", (torch.randn(2, 3, 4, 4), torch.randn(2, 3, 3, 2)))


def take_best(m: Any, x: Tensor) -> Tensor:
    """The tokens of the highest scores, as two-stage detectors take them."""
    places = x.sum(-1).topk(3, dim=1)[1]
    return torch.gather(x, 1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.topk(2, dim=1)[0],
        lambda m, x: x.topk(4, dim=-1, largest=False)[0],
        take_best,
        lambda m, x: torch.gather(x, 2, x.topk(3, dim=2)[1]),
    ],
)
def test_topk(tmp_path: Path, function: Callable[..., Any]) -> None:
    graph = check_model(tmp_path, Fn(function), (6, 5))
    assert "topk" in ops(graph)


@pytest.mark.parametrize("where", ["columns", "rows"])
def test_gather_by_an_input(tmp_path: Path, where: str) -> None:
    def pick(x: Tensor, i: Tensor) -> Tensor:
        if where == "columns":
            return torch.gather(x[:, 0], 1, i)
        return torch.gather(x, 1, i.unsqueeze(-1).expand(-1, -1, x.shape[2]))

    model = TwoInputs(pick)
    x, i = torch.randn(3, 6, 5), torch.randint(0, 5, (3, 4))
    path = tmp_path / "m.lutra"
    export(model, path, (x, i))
    (got,) = Session(path).run(None, {"x": x.numpy(), "y": i.numpy()})
    np.testing.assert_array_equal(got, pick(x, i).numpy())


def test_picking_samples_is_refused(tmp_path: Path) -> None:
    model = TwoInputs(lambda x, i: torch.gather(x, 0, i))
    with pytest.raises(UnsupportedModelError, match="picks samples of the batch"):
        export(model, tmp_path / "m.lutra", (torch.randn(2, 3), torch.zeros(2, 3, dtype=int)))


@pytest.mark.parametrize("size", [(2, 3), (5, 1), (4, 7), (1, None), (9, 10)])
@pytest.mark.parametrize("kind", [nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])
def test_adaptive_pools(tmp_path: Path, kind: Any, size: tuple[int | None, int | None]) -> None:
    check_model(tmp_path, nn.Sequential(kind(size)), IMAGE)


@pytest.mark.parametrize("size", [1, 4, 9, 13])
@pytest.mark.parametrize("kind", [nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d])
def test_adaptive_pools_of_rows(tmp_path: Path, kind: Any, size: int) -> None:
    check_model(tmp_path, nn.Sequential(kind(size)), (3, 9))

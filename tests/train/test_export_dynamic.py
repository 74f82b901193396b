"""Export for inputs of any height and width: the file gives what torch gives at every size."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported import Fn, PreActBlock, ops, outputs_of, randomise
from test_export_operators import PointNet, Points1d, SuperResolution
from torch import Tensor, nn

from lutra import PQ, Int8
from lutra.errors import GraphError, InputError, LutraError, UnsupportedModelError
from lutra.format import load_graph
from lutra.graph import Graph
from lutra.runtime.session import Session
from lutra.train import convert
from lutra.train.exporting import parity as check
from lutra.train.exporting.export import export

SIZES = ((9, 8), (5, 20), (31, 6), (12, 12), (40, 33))


class Classifier(nn.Module):
    """Residual blocks, the second with a shortcut of slices, and global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(PreActBlock(4, 4, 1), PreActBlock(4, 8, 2))
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Same(nn.Module):
    """Padding that torch works out, also of an even kernel, and pooling that rounds up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 4), padding="same", dilation=(2, 1))
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.pool(self.conv(F.pad(x, (1, 0, 2, 0))))
        return torch.cat([y, y.relu()], 1), y.flatten(2).mean(2)


class Decoder(nn.Module):
    """Sizes that come from those of other activations."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.out = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        down = self.down(x).relu()
        deep = F.interpolate(self.deep(down), size=down.shape[2:], mode="bilinear")
        wide = F.interpolate(deep + down, size=x.shape[-2:])
        twice = F.interpolate(deep, size=(2 * deep.shape[2], 2 * deep.shape[3]), mode="bilinear")
        return self.out(torch.cat([wide, x], 1)), twice


MODELS: dict[str, Callable[[], nn.Module]] = {
    "classifier": Classifier,
    "super_resolution": SuperResolution,
    "same": Same,
    "decoder": Decoder,
    "upsample": lambda: Fn(
        lambda m, x: (F.interpolate(x, scale_factor=1.5), F.interpolate(x, (7, 9), mode="bilinear"))
    ),
    "identity": nn.Identity,
    "arithmetic": lambda: Fn(lambda m, x: 1 - 2 * x + x.clamp(-1, 1) - F.relu6(x)),
    "slices": lambda: Fn(lambda m, x: x[:, 1:, 1:, ::2] + x[:, :2, 1:, ::2]),
    "corner": lambda: Fn(lambda m, x: (x[:, :, :4, 1:3], x[:, :, 2])),
    "softmax": lambda: Fn(lambda m, x: x.softmax(3)),
    "reductions": lambda: Fn(lambda m, x: (x.amax((2, 3)), x.mean(3), x.max(2)[0])),
}


SLOW = ("classifier", "upsample", "arithmetic", "slices", "corner")


def compare(graph: Graph, model: nn.Module, *inputs: Tensor) -> None:
    feeds = {v.name: x.numpy() for v, x in zip(graph.inputs, inputs, strict=True)}
    wanted = outputs_of(model, inputs)
    for run in check.runners().values():
        got = run(graph, feeds)
        for name, want in zip(graph.outputs, wanted, strict=True):
            assert got[name].shape == want.shape
            assert check.difference(got[name], want) < 1e-5


def export_any_size(tmp_path: Path, model: nn.Module, example: Any, **settings: Any) -> Graph:
    path = tmp_path / "model.lutra"
    settings = {"dynamic_axes": (0, 2, 3), **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
        export(model, path, example, **settings)
    return load_graph(path)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS],
)
def test_every_size_equals_torch(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = randomise(MODELS[name]())
    graph = export_any_size(tmp_path, model, torch.randn(2, 3, 9, 8))
    assert graph.inputs[0].shape == (None, 3, None, None)
    assert graph.golden is not None
    assert graph.golden[0][0].shape[1:] == (3, 9, 8)
    for batch, (height, width) in enumerate(SIZES, start=1):
        compare(graph, model, torch.randn(batch, 3, height, width))


@pytest.mark.parametrize("make", [PointNet, Points1d])
def test_points_of_any_number(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = randomise(make())
    graph = export_any_size(tmp_path, model, torch.randn(2, 3, 50), dynamic_axes=(2,))
    assert graph.inputs[0].shape == (None, 3, None)
    for points in (8, 9, 77, 1000):
        compare(graph, model, torch.randn(3, 3, points))
    with pytest.raises(InputError, match="empty"):
        Session(graph)(np.zeros((1, 3, 0), np.float32))


@pytest.mark.slow
def test_integer_layers_give_the_same_bits_as_in_a_file_for_one_size(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2)
    )
    x = torch.randn(4, 3, 12, 12)
    converted, _ = convert(model, {"0": Int8(), "*": PQ(v=9)}, [x])
    graph = export_any_size(tmp_path, converted, x)
    assert ops(graph) == ["int8_conv2d", "relu", "pq_conv2d", "pixel_shuffle"]
    for height, width in SIZES:
        images = torch.randn(1, 3, height, width)
        fixed = export(converted, tmp_path / "fixed.lutra", images)
        assert fixed.inputs[0].shape == (None, 3, height, width)
        got, want = Session(graph)(images.numpy()), Session(fixed)(images.numpy())
        np.testing.assert_array_equal(got, want)


class Sum(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right.relu()


def test_axes_by_name(tmp_path: Path) -> None:
    example = (torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5))
    graph = export_any_size(tmp_path, Sum(), example, dynamic_axes={"left": (2,), "right": (0, 2)})
    assert [value.shape for value in graph.inputs] == [(None, 3, None, 5)] * 2
    compare(graph, Sum(), torch.randn(1, 3, 9, 5), torch.randn(1, 3, 9, 5))
    feeds = {
        "left": np.zeros((1, 3, 9, 5), np.float32),
        "right": np.zeros((1, 3, 8, 5), np.float32),
    }
    with pytest.raises(InputError, match="'left' of shape"):
        Session(graph).run(None, feeds)
    graph = export_any_size(tmp_path, Sum(), example, dynamic_axes=())
    assert graph.inputs[0].shape == (None, 3, 6, 5)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ((4,), r"axis 4 for the input 'x' of shape \(2, 3, 9, 8\)"),
        ((-1,), "axis -1"),
        ((True,), "axis True"),
        ({"y": (2,)}, r"names the inputs \['y'\]; the model has \['x'\]"),
        ({"x": (5,)}, "axis 5"),
    ],
)
def test_bad_axes(tmp_path: Path, axes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export(SuperResolution(), tmp_path / "m", torch.randn(2, 3, 9, 8), dynamic_axes=axes)


def test_an_example_of_one_row_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"axis 2 of the input 'x'.*at least 2"):
        export(SuperResolution(), tmp_path / "m", torch.randn(2, 3, 1, 8), dynamic_axes=(2, 3))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: F.avg_pool2d(x, x.shape[2:]), "one size of axis 2, 3 only.*adaptive"),
        (lambda m, x: x.reshape(x.shape[0], 3, 72), r"fails on inputs of shapes \[\(1, 3, 18, 16"),
        (lambda m, x: x.reshape(-1, 9, 2, 12), "one batch size only|works for one size"),
        (lambda m, x: x * x.shape[2], "size of an axis that is known at run time only"),
        (lambda m, x: F.interpolate(x, size=(x.shape[2] + 1, 9)), "size=y.shape"),
        (lambda m, x: x.chunk(2, 3)[0], "split|run time only"),
        (lambda m, x: x + torch.ones(8), "one size of axis 3 only"),
        (lambda m, x: x if x.shape[2] == 9 else -x, "one size of axis 2 only"),
    ],
)
def test_models_that_work_for_one_size(
    tmp_path: Path, function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        export(Fn(function), tmp_path / "m.lutra", torch.randn(2, 3, 9, 8), dynamic_axes=(2, 3))


def test_sizes_that_torch_takes_for_constants_are_found_out(tmp_path: Path) -> None:
    """Tracing says nothing here: the kernel of the pooling becomes a number."""
    model = Fn(lambda m, x: _pool_all(m.conv(x)), conv=nn.Conv2d(3, 4, 3, stride=2))
    with pytest.raises(LutraError, match=r"one size (only|of axis)") as caught:
        export(model, tmp_path / "m.lutra", torch.randn(2, 3, 9, 9), dynamic_axes=(2, 3))
    assert "F.avg_pool2d" in str(caught.value)
    assert not (tmp_path / "m.lutra").exists()


def _pool_all(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, x.shape[2:])


def test_a_linear_layer_over_a_dynamic_axis(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(216, 4))
    with pytest.raises((GraphError, UnsupportedModelError), match=r"size of axis"):
        export(model, tmp_path / "m.lutra", torch.randn(2, 3, 9, 8), dynamic_axes=(2, 3))

"""Ranges of channels made alike between layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train import PQ, Int8, Keep, Lookup, convert
from lutra.train.conversion.calibrate import collect
from lutra.train.conversion.equalize import equalize
from lutra.train.geometry import Geometry


class Network(nn.Module):
    """Channels through norms, clamps, depthwise layers, skips, concatenation and flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.narrow = nn.Conv2d(16, 8, 1)
        self.mix = nn.Conv2d(24, 6, 1)
        self.inner = nn.Linear(6 * 4, 10)
        self.last = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu6(self.depthwise(F.leaky_relu(self.wide(x), 0.1)))
        x = x + self.narrow(y)
        z = F.max_pool2d(F.relu(self.mix(F.pad(torch.cat([x, y], 1), (1, 1, 1, 1)))), 5)
        return self.last(torch.sigmoid(self.inner(z.flatten(1)))) + y.mean()


def network() -> Network:
    torch.manual_seed(0)
    model = Network()
    with torch.no_grad():
        added = torch.randn(8).mul(1.5).exp()
        factors = {
            model.norm: added,
            model.narrow: added / 4.0,
            model.wide: torch.randn(16).exp(),
            model.mix: torch.randn(6).exp(),
        }
        for layer, factor in factors.items():
            layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.dim() - 1)))
        model.depthwise.weight.mul_(0.2)
        model.train()(images(64, 0))
    return model.eval()


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - dense(x)).square().mean())


def test_the_network_computes_the_same_and_int8_is_nearer_to_it() -> None:
    dense, data = network(), list(images(96, 1).split(32))
    layers = {n: m for n, m in dense.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    geometries = {name: Geometry.of(layer, grouped=True) for name, layer in layers.items()}
    samples = collect(dense, layers, geometries, data, rows=2048, memory_bytes=1 << 24, seed=0)
    rows = {name: sample.rows for name, sample in samples.items()}
    new, taken = equalize(dense, dict.fromkeys(layers, Int8()), rows, data)
    assert set(taken) == {"norm", "narrow", "wide"}  # the others are read by a mean, or too few
    assert taken["norm"] == taken["narrow"]  # they are added
    x = torch.cat(data)
    torch.testing.assert_close(new(x), dense(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    errors = []
    for wanted in (False, True):
        recipe = {"inner": Keep(), "last": Keep(), "*": Int8()}
        model, report = convert(dense, recipe, data, equalize=wanted)
        errors.append(error(model, dense, images(64, 2)))
        assert any("made alike" in note for note in report.notes) == wanted
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("method", [Lookup(), PQ(v=4)])
def test_layers_of_product_quantisation_keep_their_channels(method: Any) -> None:
    dense, data = network(), list(images(96, 1).split(32))
    recipe = {"depthwise": Int8(), "*": method}
    _, report = convert(dense, recipe, data, equalize=True, rows=2048, kmeans_steps=2)
    (note,) = [note for note in report.notes if "made alike" in note]
    assert ("norm" in note) == isinstance(method, Lookup)
    assert "wide" in note  # the depthwise layer behind it is int8


def test_parallel_calibration_has_none() -> None:
    with pytest.raises(LutraError, match="equalize=True goes with calibration='sequential'"):
        convert(network(), {"*": Int8()}, [images(8, 1)], equalize=True, calibration="parallel")

"""Conversion: recipes, reports, what is replaced and what stays, and what is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train import (
    PQ,
    Keep,
    LayerReport,
    PQConv2d,
    PQLinear,
    convert,
    recipe_from_json,
    recipe_to_json,
)
from lutra.train.recipe import match


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))) + x


class Net(nn.Module):
    """Stem, two nested blocks, classifier; not traceable, as it looks at its values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.ModuleDict({"one": Block(8), "two": nn.Sequential(Block(8))})
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = F.relu(self.stem(x)) * scale
        for block in self.body.values():
            x = block(x)
        if float(x.mean()) > 1e9:
            raise AssertionError
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def quick(model: nn.Module, recipe: Any, data: Any, **settings: Any) -> Any:
    return convert(model, recipe, data, **{"rows": 256, "kmeans_steps": 4, **settings})


# Recipes


def test_the_first_pattern_wins() -> None:
    recipe = {"fc": Keep("small"), "body.*.conv": PQ(v=9), "*.conv": PQ(v=3), "f*": PQ(v=4)}
    assert match(recipe, "fc") == Keep("small")
    assert match(recipe, "body.one.conv") == PQ(v=9)
    assert match(recipe, "other.conv") == PQ(v=3)
    assert match(recipe, "conv") == Keep("no pattern of the recipe names it")
    assert match(recipe, "x", "fc2") == PQ(v=4)  # a layer with two names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"v": 0}, "v=0 is not in 1..64"),
        ({"v": 65}, "v=65"),
        ({"v": 9.0}, "v=9.0 is not an integer"),
        ({"v": "9"}, "v='9' is not an integer"),
        ({"v": True}, "v=True"),
        ({"k": 12}, r"k=12 is not one of \[8, 16, 32, 64\]"),
        ({"k": 16.0}, "k=16.0"),
        ({"act_bits": 8}, "act_bits=8 is not in 1..7"),
        ({"act_bits": None}, "act_bits=None"),
        ({"gradient": "hard"}, "gradient='hard'"),
        ({"centroids": "fixed"}, "centroids='fixed'"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"decay": "0.9"}, "decay='0.9'"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LutraError, match=message):
        PQ(**settings)


def test_recipes_survive_json() -> None:
    recipe = {"stem": Keep("raw pixels"), "*.conv": PQ(v=9, k=32, gradient="soft"), "*": PQ()}
    again = recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe))))
    assert again == recipe
    assert list(again) == list(recipe)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"method": "tree"},
            r"'\*' has the method 'tree'; choose one of \['function', 'int8', 'keep', 'lookup', ",
        ),
        ({"k": 16}, "has the method None"),
        ({"method": ["pq"]}, r"has the method \['pq'\]"),
        ("pq2", "has the method 'pq2'"),
        ({"method": "pq", "kk": 16}, "unexpected keyword argument 'kk'"),
        ({"method": "pq", "k": "16"}, "k='16'"),
    ],
)
def test_wrong_json_is_refused(entry: Any, message: str) -> None:
    with pytest.raises(LutraError, match=message):
        recipe_from_json({"*": entry})


# What is replaced


def test_layers_are_replaced_by_name(net: Net, images: Tensor) -> None:
    model, report = quick(
        net,
        {"stem": Keep("raw pixels"), "body.two*": PQ(v=3, k=8), "body*": PQ(v=9), "fc": PQ(v=3)},
        images.split(8),
    )
    assert type(model.stem) is nn.Conv2d
    one, two = model.body["one"].conv, model.body["two"][0].conv
    assert isinstance(one, PQConv2d)
    assert isinstance(two, PQConv2d)
    assert isinstance(model.fc, PQLinear)
    assert (one.v, one.method.k, two.v, two.method.k) == (9, 16, 3, 8)
    assert [layer.name for layer in report.layers] == [
        "stem",
        "body.one.conv",
        "body.two.0.conv",
        "fc",
    ]
    assert report["stem"] == LayerReport(
        "stem", "conv2d", False, "raw pixels", weight_bytes=4 * 8 * 27
    )
    entry = report["body.one.conv"]
    assert (entry.kind, entry.replaced, entry.v, entry.k, entry.codebooks) == (
        "conv2d",
        True,
        9,
        16,
        8,
    )
    assert entry.weight_bytes == 4 * 8 * 72
    assert entry.table_bytes == 8 * 16 * 8
    assert entry.lookups_per_row == 8 * 8
    assert entry.multiplies_per_row == 72 * 8
    assert entry.error is not None
    assert 0.0 < entry.error < 1.0
    assert entry.used is not None
    assert 0.5 < entry.used <= 1.0
    fc = report["fc"]
    assert (fc.kind, fc.codebooks, fc.table_bytes) == ("linear", 3, 3 * 16 * 10)
    assert len(report.replaced) == 3
    with pytest.raises(KeyError):
        report["nothing"]


def test_the_report_reads_well_and_is_json(net: Net, images: Tensor) -> None:
    _, report = quick(net, {"fc": PQ(v=4)}, images.split(8), seed=5)
    text = str(report)
    assert "kept: no pattern of the recipe names it" in text
    assert "1 of 4 layers replaced; tables 320 bytes for 320 bytes of float32 weights" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["seed"] == 5
    assert data["layers"][-1]["name"] == "fc"


def test_errors_in_the_report_are_those_of_the_layer(net: Net, images: Tensor) -> None:
    """More centroids and shorter sub-vectors: smaller errors."""
    errors = []
    for method in (PQ(v=9, k=8), PQ(v=9, k=64), PQ(v=3, k=64), PQ(v=1, k=64)):
        _, report = quick(net, {"body.one.conv": method}, images.split(8), rows=2048)
        errors.append(report["body.one.conv"].error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


def test_unused_centroids_are_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    _, report = quick(model, {"0": PQ(v=4, k=16)}, [torch.eye(4).repeat(10, 1)])
    assert report["0"].used == 4 / 16


def test_the_original_is_untouched(net: Net, images: Tensor) -> None:
    net.body["one"].eval()
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    model, _ = quick(net, {"*": PQ()}, images.split(8))
    assert [m.training for m in net.modules()] == modes
    assert model.body["two"][0].conv.training
    assert not model.body["one"].conv.training
    for p in model.parameters():
        with torch.no_grad():
            p.zero_()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(m._forward_pre_hooks for m in [*net.modules(), *model.modules()])


def test_conversion_is_close_and_deterministic(net: Net, images: Tensor) -> None:
    recipe = {"body*": PQ(v=3, k=64), "fc": PQ(v=2, k=64)}
    models = [quick(net, recipe, images.split(8), seed=seed)[0] for seed in (1, 1, 2)]
    with torch.no_grad():
        dense, *outputs = [m.eval()(images) for m in (net, *models)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    error = (outputs[0] - dense).square().mean() / dense.var()
    assert error < 0.1


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict", "nested", "generator"])
def test_batches_of_every_form(net: Net, images: Tensor, form: str) -> None:
    targets = torch.zeros(8)
    parts = images.split(8)
    data: Any = {
        "tensor": parts,
        "tuple": [(x, targets) for x in parts],
        "list": [[x, targets] for x in parts],
        "dict": [{"x": x, "scale": 1.0} for x in parts],
        "nested": [({"x": x}, targets) for x in parts],
        "generator": (x for x in parts),
    }[form]
    model, _ = quick(net, {"fc": PQ()}, data)
    want, _ = quick(net, {"fc": PQ()}, parts)
    assert torch.equal(model.fc.centroids, want.fc.centroids)


def test_signed_inputs_get_a_signed_grid(net: Net, images: Tensor) -> None:
    model, _ = quick(net, {"stem": PQ(), "body.one.conv": PQ(act_bits=7)}, images.split(8))
    assert bool(model.stem.signed)
    assert not bool(model.body["one"].conv.signed)
    grid = model.body["one"].conv.grid()
    assert (grid.zero, grid.qmax) == (0, 127)


@pytest.mark.parametrize(("bits", "most"), [(2, 1.3), (4, 1.3), (7, 3.1)])
def test_outliers_are_clipped_where_that_helps(bits: int, most: float) -> None:
    """A coarse grid serves the many values up to 1; a fine one has room for the one at 3."""
    x = torch.rand(2000, 4, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 3.0
    model, _ = quick(nn.Sequential(nn.Linear(4, 2)), {"0": PQ(act_bits=bits)}, [x], rows=2000)
    grid = model[0].grid()
    assert most / 2 < grid.scale * grid.qmax < most


def test_a_single_layer_is_a_model(images: Tensor) -> None:
    dense = nn.Linear(6, 3)
    model, report = quick(dense, {"*": PQ(v=3, k=8)}, [torch.randn(50, 6)])
    assert isinstance(model, PQLinear)
    assert report.layers[0].name == ""
    assert report.layers[0].replaced
    assert type(dense) is nn.Linear
    assert model(torch.randn(2, 6)).shape == (2, 3)


class Tied(nn.Module):
    """One layer object under two names, one block in two places, one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.block = nn.Sequential(nn.Linear(6, 6))
        self.again = nn.ModuleList([self.block])
        self.left = nn.Linear(6, 6)
        self.right = nn.Linear(6, 6)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.first(x)))
        x = self.again[0](F.relu(self.block(x)))
        y: Tensor = self.right(F.relu(self.left(x)))
        return y


@pytest.mark.parametrize("name", ["first", "second"])
def test_tied_modules_stay_tied(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 6)
    model, report = quick(Tied(), {name: PQ(v=3), "again.0.0": PQ(v=2), "left": PQ()}, [x])
    assert isinstance(model.first, PQLinear)
    assert model.first is model.second
    assert model.block is model.again[0]
    assert isinstance(model.block[0], PQLinear)
    assert model.left.weight is model.right.weight
    assert type(model.right) is nn.Linear
    assert len(report.layers) == 4
    assert report["first"].replaced
    model(x).sum().backward()


def test_frozen_parameters_stay_frozen(net: Net, images: Tensor) -> None:
    net.fc.requires_grad_(False)
    model, _ = quick(net, {"fc": PQ(centroids="average")}, images.split(8))
    assert not any(p.requires_grad for p in model.fc.parameters())


def test_averaged_centroids_start_with_their_counts(net: Net, images: Tensor) -> None:
    model, _ = quick(net, {"fc": PQ(centroids="average")}, images.split(8))
    assert (model.fc.cluster_counts.sum(1) == len(images)).all()


def test_constant_inputs_convert() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    for value in (0.0, 1.5, -2.0):
        converted, report = quick(model, {"0": PQ()}, [torch.full((70, 4), value)])
        with torch.no_grad():
            x = torch.full((2, 4), value)
            torch.testing.assert_close(converted.eval()(x), model(x), atol=0.05, rtol=0.05)
        assert report["0"].error is not None


# What is refused


def refused(message: str, model: nn.Module, recipe: Any, data: Any, **settings: Any) -> None:
    with pytest.raises(LutraError, match=message):
        quick(model, recipe, data, **settings)


def test_wrong_recipes_are_refused(net: Net, images: Tensor) -> None:
    data = images.split(8)
    refused(
        r"pattern 'conv\*' matches no .* of Net; its layers are: 'stem', 'body.one.conv'",
        net,
        {"conv*": PQ(), "fc": PQ()},
        data,
    )
    refused("pattern 'haed' matches no", net, {"haed": Keep(), "*": PQ()}, data)
    refused("replaces no layer", net, {"*": Keep()}, data)
    refused("replaces no layer", net, {}, data)
    for wrong, named in ((PQ(), "PQ"), ([PQ()], r"\[PQ"), (None, "None"), ({3: PQ()}, "of 3")):
        refused(f"the recipe is .*{named}.*; give a dict of patterns", net, wrong, data)
    known = r"PQ\(...\), Lookup\(...\), Int8\(\), LowBit\(...\), Function\(...\) or Keep\(\)"
    refused(rf"'fc' has 'pq'; give it {known}", net, {"fc": "pq"}, data)
    refused("'fc' has <class", net, {"fc": PQ}, data)
    refused("its layers are: none", nn.ReLU(), {"*": PQ()}, data)


def test_layers_that_cannot_be_replaced_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 11))
    x = [torch.randn(8, 4, 16, 16)]
    refused("layer '1': .*groups=4 .*keep it", model, {"*": PQ()}, x)
    refused("layer '2': .*set v", model, {"1": Keep(), "*": PQ()}, x)
    converted, _ = quick(model, {"1": Keep("depthwise"), "2": PQ(v=11), "*": PQ()}, x)
    assert isinstance(converted[2], PQConv2d)


def test_unusable_data_is_refused(net: Net, images: Tensor) -> None:
    recipe = {"body*": PQ()}
    refused("calibration data is empty", net, recipe, [])
    refused("a batch is empty", net, recipe, [()])
    refused("a batch is a str", net, recipe, ["image"])
    refused("layer 'body.one.conv' holds NaN", net, recipe, [images * float("nan")])
    images[3, 0, 0, 0] = float("inf")
    refused("holds NaN or infinity", net, {"stem": PQ()}, [images], rows=10**6)
    refused("allow at least", net, recipe, [images], memory_bytes=1000)


def test_layers_out_of_reach_are_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    data = [torch.rand(9, 4)]
    model, report = convert(Model(), {"*": PQ(v=2, k=8)}, data, progress=False)
    assert type(model.unused) is nn.Linear
    (kept,) = [layer for layer in report.layers if not layer.replaced]
    assert kept.name == "unused"
    assert kept.reason == "no batch of the calibration data reaches it"
    assert [layer.name for layer in report.replaced] == ["used"]
    refused("layer 'unused' got no input", Model(), {"unused": PQ()}, data)


def test_accuracy_survives_conversion() -> None:
    """A small trained network keeps most of what it can do."""
    torch.manual_seed(0)
    centres = torch.randn(5, 16) * 2.0
    y = torch.arange(500) % 5
    x = centres[y] + 0.5 * torch.randn(500, 16)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    converted, _ = convert(model, {"*": PQ(v=4, k=16)}, x.split(100))
    with torch.no_grad():
        dense, lookup = [(m.eval()(x).argmax(1) == y).float().mean() for m in (model, converted)]
    assert dense > 0.99
    assert lookup > 0.95

"""Distances without products in training: codes, layers, recipes, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pq_cases import CASES, Case, make_conv
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lutra
from lutra.errors import LutraError
from lutra.reference.pq import encode
from lutra.train import PQ, convert, export, finetune, recipe_from_json, recipe_to_json
from lutra.train.encoder import Nearest
from lutra.train.geometry import Geometry, Grid
from lutra.train.operators import portable
from lutra.train.operators import pq as ops

DISTANCES = ["l1", "chebyshev"]


# Codes


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("top", [2, 63])
def test_codes_are_those_of_the_reference(distance: Any, top: int) -> None:
    """With ties, in blocks, on both ways to compute them."""
    torch.manual_seed(top)
    c = torch.randint(top + 1, (5, 16, 4), dtype=torch.uint8)
    c[-1, :, 2:] = 0
    x = torch.randint(top + 1, (700, 18, 1, 1)).float()
    encoder, grid, geometry = Nearest(c, distance=distance), Grid(1.0, 0, 6), Geometry(18)
    got = portable.encode(x, geometry, grid, encoder)
    want = encode(x[:, :, 0, 0].numpy().astype(np.uint8), c.numpy(), distance)
    np.testing.assert_array_equal(got.t().numpy(), want)
    tables = torch.randint(-127, 128, (5, 16, 3), dtype=torch.int8)
    _, codes = ops.forward(x, geometry, grid, encoder, tables, torch.ones(3))
    assert torch.equal(codes, got)


# Layers


@pytest.mark.parametrize("case", [CASES[i] for i in (3, 4, 8, 12)], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_trained_layer_computes_what_it_will_in_the_engine(distance: Any, case: Case) -> None:
    layer = make_conv(case, distance=distance)
    x = torch.randn(3, case.channels, *case.size)
    trained = layer.train()(x)
    frozen = layer.freeze()
    assert frozen.node.attrs["distance"] == distance
    with torch.no_grad():
        assert torch.equal(frozen(x), trained)
        assert torch.equal(layer.eval()(x), trained)
    other = make_conv(case)  # the same numbers, of which another centroid is the nearest
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert not torch.equal(other.eval()(x), trained)


class Net(nn.Module):
    """A strided convolution, one that shares its input with a shortcut, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(5, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.short = nn.Conv2d(8, 8, 1, stride=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.norm(self.b(x)) + self.short(x))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


@pytest.mark.parametrize(
    "settings", [{}, {"group": "row"}, {"gradient": "dense", "centroids": "average"}]
)
@pytest.mark.parametrize("distance", DISTANCES)
def test_training_and_file_agree(distance: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(32, 5, 9, 7)
    method = PQ(k=8, distance=distance, **settings)
    model, report = convert(Net().eval(), {"*": method}, [inputs], rows=512, kmeans_steps=3)
    label = ", ".join(["pq", distance, *([settings["group"]] if "group" in settings else [])])
    assert [layer.label for layer in report.layers if layer.name == "b"] == [label]
    before = model.b.centroids.detach().clone()
    data = DataLoader(TensorDataset(inputs, torch.arange(32) % 4), batch_size=8)
    finetune(model, data, steps=4, lr=1e-2)
    assert not torch.equal(model.b.centroids, before)
    model.eval()
    path = tmp_path / "apart.lutra"
    export(model, path, inputs[:2])
    with torch.no_grad():
        want = model(inputs).numpy()
    for isa in lutra.runnable_isas():
        np.testing.assert_allclose(lutra.Session(path, isa=isa)(inputs.numpy()), want, atol=1e-5)
    nodes = [node for node in lutra.load_graph(path).nodes if node.op.startswith("pq")]
    assert [node.attrs["distance"] for node in nodes] == [distance] * 4


# Recipes


def test_recipes_survive_json() -> None:
    recipe = {"a": PQ(distance="l1", k=32), "*": PQ()}
    data = json.loads(json.dumps(recipe_to_json(recipe)))
    assert data["a"]["distance"] == "l1"
    assert recipe_from_json(data) == recipe
    del data["*"]["distance"]  # as older files have it
    assert recipe_from_json(data) == recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": "cosine"}, r"distance='cosine' is not one of \['l2', 'l1', 'chebyshev'\]"),
        ({"distance": "l1", "encoder": "tree"}, "encoder='tree' searches none"),
        ({"distance": "l1", "gradient": "soft"}, "distance='l1' has no soft gradient"),
    ],
)
def test_wrong_recipes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LutraError, match=message):
        PQ(**settings)

"""`PQ(weight_bits=8)`: the tables of training are those of a file with compact tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lutra
from lutra.errors import LutraError
from lutra.train import PQ, convert, export, finetune

METHODS: dict[str, dict[str, Any]] = {
    "patch": {"v": 3},
    "patch, short end": {"v": 5},
    "row": {"v": 3, "group": "row"},
    "pixel": {"v": 4, "group": "pixel"},
    "average": {"v": 3, "centroids": "average"},
    "straight-through": {"v": 3, "gradient": "straight-through"},
    "dense": {"v": 3, "gradient": "dense", "reconstruction": 1e-3},
    "tree": {"v": 3, "encoder": "tree", "free_tables": False},
    "row, tree": {"v": 3, "group": "row", "encoder": "tree", "free_tables": False},
    "pixel, tree, straight-through": {
        "v": 4, "group": "pixel", "encoder": "tree", "free_tables": False,
        "gradient": "straight-through",
    },
}  # fmt: skip


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5),
    ).eval()  # fmt: skip


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(method: PQ, steps: int) -> nn.Module:
    """A network of the method, after some steps that move every parameter."""
    x = images()
    model, _ = convert(network(), {"*": method}, [x])
    loader = DataLoader(TensorDataset(x, torch.arange(64) % 5), batch_size=32)
    if steps:
        finetune(model, loader, steps=steps, lr=1e-3, loss=nn.functional.cross_entropy)
    return model.eval()


def outputs(model: nn.Module, folder: Path, tables: Any) -> tuple[lutra.Graph, np.ndarray]:
    """The file and what it answers to 64 images."""
    graph = export(model, folder / f"{tables}.lutra", images(4), tables=tables)
    return graph, lutra.Session(folder / f"{tables}.lutra")(images().numpy())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_compact_files_have_the_tables_of_training(method: dict[str, Any], tmp_path: Path) -> None:
    model = trained(PQ(act_bits=7, weight_bits=8, **method), steps=3)
    stored, wanted = outputs(model, tmp_path, "stored")
    compact, got = outputs(model, tmp_path, "compact")
    np.testing.assert_array_equal(got, wanted)
    entries = compact.metadata["tables"]["layers"]
    assert [entry["name"] for entry in entries] == ["0", "3", "6"]
    assert [entry["changed_entries"] for entry in entries] == [0.0, 0.0, 0.0]
    for node in stored.nodes:
        if "tables" in node.tensors:
            same = next(n for n in compact.nodes if n.name == node.name)
            assert "tables" not in same.tensors
            assert "centroids" in same.tensors
    small, large = (tmp_path / f"{name}.lutra" for name in ("compact", "stored"))
    assert small.stat().st_size < large.stat().st_size


@pytest.mark.parametrize("name", ["patch", "tree"])
def test_without_it_a_compact_file_has_other_tables(name: str, tmp_path: Path) -> None:
    model = trained(PQ(act_bits=7, **METHODS[name]), steps=0)
    _, wanted = outputs(model, tmp_path, "stored")
    compact, got = outputs(model, tmp_path, "compact")
    assert not np.array_equal(got, wanted)
    assert all(entry["changed_entries"] > 0 for entry in compact.metadata["tables"]["layers"])
    error = np.square(got - wanted).mean() / wanted.var()
    assert 0.0 < error < 0.05


def test_weights_have_127_steps_to_either_side_and_gradients_pass() -> None:
    model = trained(PQ(v=3, weight_bits=8), steps=0)
    layer: Any = model[0]  # type: ignore[index]
    blocks = layer.weight_blocks()
    step = layer.weight.detach().abs().reshape(8, -1).amax(1) / 127
    levels = blocks.detach() / step
    assert (levels - levels.round()).abs().max() < 1e-4
    assert levels.abs().max().round() == 127
    blocks.sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.ones_like(layer.weight))


def test_trees_without_free_tables_have_centroids_on_the_grid() -> None:
    """Their tables are products, with the values that a file can hold."""
    layer: Any = trained(PQ(v=3, encoder="tree", free_tables=False), steps=2)[0]  # type: ignore[index]
    assert not hasattr(layer, "table_residual")
    grid = layer.grid()
    values = (layer.grid_centroids().float() - grid.zero) * grid.scale
    want = torch.bmm(values, layer.weight_blocks())
    torch.testing.assert_close(layer.tables(layer.encoder()), want)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "four": ({"weight_bits": 4}, "weight_bits=4 is neither 8 nor None"),
    "a truth": ({"weight_bits": True}, "weight_bits=True is neither 8 nor None"),
    "a float": ({"weight_bits": 8.0}, "weight_bits=8.0 is neither 8 nor None"),
    "a tree": ({"encoder": "tree", "weight_bits": 8}, "set free_tables=False"),
    "free tables": ({"free_tables": True, "weight_bits": 8}, "set free_tables=False"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_other_numbers_and_free_tables_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LutraError, match=message):
        PQ(**settings)


def test_recipes_keep_it() -> None:
    method = PQ(v=3, weight_bits=8)
    entry = lutra.recipe_to_json({"*": method})
    assert entry["*"]["weight_bits"] == 8
    assert lutra.recipe_from_json(entry) == {"*": method}
    older = {"*": {k: v for k, v in entry["*"].items() if k != "weight_bits"}}
    assert lutra.recipe_from_json(older) == {"*": replace(method, weight_bits=None)}

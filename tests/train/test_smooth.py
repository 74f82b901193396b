"""Inputs of linear layers whose features are divided by factors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lutra
from lutra.errors import LutraError
from lutra.train import (
    Int8,
    Int8Linear,
    Lookup,
    convert,
    export,
    recipe_from_json,
    recipe_to_json,
)
from lutra.train.recipe import Method

FEATURES = 48


class Attends(nn.Module):
    """Two layers that read one norm with a few large features, and one that reads their product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.a, self.b = nn.Linear(FEATURES, 32), nn.Linear(FEATURES, 32)
        self.last = nn.Linear(32, FEATURES)
        with torch.no_grad():
            self.norm.weight[3], self.norm.weight[20] = 40.0, -25.0
            self.a.weight[:, [3, 20]] *= 0.05
            self.b.weight[:, [3, 20]] *= 0.05

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.last(torch.tanh(self.a(x)) * self.b(x))


def network() -> Attends:
    torch.manual_seed(0)
    return Attends().eval()


def batches(count: int = 14) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 10, FEATURES, generator=generator) for _ in range(count)]


def error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        got, want = model(x), dense(x)
    return float((got - want).square().mean() / want.var())


methods = pytest.mark.parametrize("method", [Int8(), Lookup()], ids=["int8", "lookup"])


@pytest.mark.parametrize("calibration", ["sequential", "parallel"])
@methods
def test_large_features_get_factors(method: Int8 | Lookup, calibration: str) -> None:
    dense, data = network(), batches()
    plain, _ = convert(dense, {"*": replace(method, smooth=False)}, data, calibration=calibration)  # type: ignore[arg-type]
    smooth, report = convert(dense, {"*": method}, data, calibration=calibration)  # type: ignore[arg-type]
    assert any("features of the inputs of a, b" in note for note in report.notes)
    assert plain.a.smoothing is None
    assert smooth.a.smoothing is not None
    torch.testing.assert_close(smooth.a.smoothing, smooth.b.smoothing, rtol=0, atol=0)
    assert smooth.a.smoothing.argmax() in (3, 20)
    held = batches(15)[-1]
    assert error(smooth, dense, held) < 0.25 * error(plain, dense, held)
    with torch.no_grad():
        fitted, want = smooth.a.dense_forward(held), dense.a(held)
    assert float((fitted - want).square().mean()) < 0.1 * float(want.var())


def test_even_features_get_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    converted, _ = convert(model, {"*": Int8()}, [torch.randn(512, 32) for _ in range(4)])
    assert [layer.smoothing for layer in converted if isinstance(layer, Int8Linear)] == [None, None]


@methods
def test_the_file_divides_once_for_layers_that_read_one_value(
    method: Method, tmp_path: Path
) -> None:
    data = batches()
    model, _ = convert(network(), {"*": method}, data)
    graph = export(model, tmp_path / "m.lutra", data[0], dynamic_axes=(0, 1))
    divisions = [node for node in graph.nodes if node.op == "affine"]
    assert [node.attrs["axis"] for node in divisions] == [2] * len(divisions)
    assert "transpose" not in {node.op for node in graph.nodes}
    readers = [node for node in graph.nodes if divisions[0].output in node.inputs]
    assert [node.name for node in readers] == ["a", "b"]
    with torch.no_grad():
        want = model(data[1][:, :7]).numpy()
    for isa in lutra.cpu_info()["runnable"]:
        got = lutra.Session(tmp_path / "m.lutra", isa=isa)(data[1][:, :7].numpy())
        np.testing.assert_allclose(got, want, atol=1e-4)


@methods
def test_training_computes_what_the_frozen_layer_does(method: Method) -> None:
    data = batches()
    model, _ = convert(network(), {"*": method}, data)
    with torch.no_grad():
        want = model.eval()(data[0])
    trained = model.train()(data[0])
    torch.testing.assert_close(trained, want, rtol=0, atol=1e-5)
    trained.square().mean().backward()
    assert float(model.a.weight.grad.abs().sum()) > 0.0


@methods
def test_state_carries_the_factors(method: Int8 | Lookup) -> None:
    data = batches()
    model, _ = convert(network(), {"*": method}, data)
    plain, _ = convert(network(), {"*": replace(method, smooth=False)}, data)
    other, _ = convert(network(), {"*": replace(method, smooth=False)}, data)
    with torch.no_grad():
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other.eval()(data[0]), model.eval()(data[0]), rtol=0, atol=0)
        other.load_state_dict(plain.state_dict())  # states without factors have none
        torch.testing.assert_close(other.eval()(data[0]), plain.eval()(data[0]), rtol=0, atol=0)


def test_matrices_of_recurrent_layers_have_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.GRU(FEATURES, 16, batch_first=True).eval()
    scale = torch.ones(FEATURES)
    scale[5] = 50.0
    data = [x * scale for x in batches()]
    converted, _ = convert(model, {"**": Int8(), "*": Int8()}, data)
    layers = [layer for layer in converted.modules() if isinstance(layer, Int8Linear)]
    assert layers
    assert all(layer.smoothing is None for layer in layers)


@methods
def test_recipes_hold_the_setting(method: Int8 | Lookup) -> None:
    recipe = {"a": replace(method, smooth=False), "b": method}
    assert recipe_to_json(recipe)["a"]["smooth"] is False
    assert "smooth" not in recipe_to_json(recipe)["b"]
    assert recipe_from_json(recipe_to_json(recipe)) == recipe
    with pytest.raises(LutraError, match="smooth=True is neither None nor False"):
        type(method)(smooth=True)


def test_few_samples_decide_nothing() -> None:
    """The largest values of a few rows are not those of others."""
    model, _ = convert(network(), {"*": Int8()}, batches(2))
    assert model.a.smoothing is None

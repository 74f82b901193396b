"""Networks that people have, exported dense and in lookup form, and run as torch runs them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
import transformers_models
from architectures import Architecture
from torch import Tensor, nn

from lutra import Session
from lutra.format import load_graph
from lutra.train import PQ, Int8, Lookup, auto_recipe, convert, export

ALL: dict[str, Architecture] = {
    **networks.ARCHITECTURES,
    **{f"hf-{name}": each for name, each in transformers_models.ARCHITECTURES.items()},
}
QUICK = ("resnet", "encoder")

METHODS: dict[str, Any] = {
    "pq": PQ(k=8, v=4, otherwise=Int8()),
    "rows": PQ(k=8, v=3, group="row", encoder="tree", otherwise=Int8()),
    "lookup": Lookup(otherwise=Int8()),
    "int8": Int8(),
}


def _model(name: str) -> nn.Module:
    if name.startswith("hf-"):
        pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    return ALL[name].make().eval()


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        made = model(*(x.clone() for x in inputs))
    result: np.ndarray[Any, Any] = made.numpy()
    return result


def _compare(
    path: Path, model: nn.Module, name: str, cases: tuple[tuple[int, int], ...], tolerance: float
) -> None:
    graph = load_graph(path)
    session = Session(graph, threads=1)
    for batch, more in cases:
        inputs = ALL[name].inputs(batch, 7 + batch, more)
        feeds = {v.name: x.numpy() for v, x in zip(graph.inputs, inputs, strict=True)}
        (got,) = session.run(None, feeds)
        want = _outputs(model, inputs)
        assert got.shape == want.shape
        assert np.abs(got - want).mean() < tolerance * np.abs(want).max()


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL],
)
def test_dense(name: str, tmp_path: Path) -> None:
    model, case = _model(name), ALL[name]
    settings = {"dynamic_axes": case.axes} if case.axes else {}
    path = tmp_path / "model.lutra"
    export(model, path, case.inputs(2, 1, 0), golden=False, **settings)
    _compare(path, model, name, ((1, 0), (3, 2 if case.axes else 0)), 2e-5)


def _recipe(model: nn.Module, method: str) -> Any:
    """One method for all layers; "mixed" is one after the other."""
    if method == "auto":
        return method
    if method in METHODS:
        return {"*": METHODS[method]}
    turns = list(METHODS.values())
    return {name: turns[i % len(turns)] for i, name in enumerate(auto_recipe(model))}


def _convert(name: str, method: str, path: Path) -> None:
    model, case = _model(name), ALL[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = _recipe(model, method)
        made, _ = convert(model, recipe, [case.inputs(8, 5, 0)], progress=False)
    made.eval()
    export(made, path, case.inputs(2, 1, 0), golden=False)
    _compare(path, made, name, ((1, 0), (3, 0)), 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_mixed(name: str, tmp_path: Path) -> None:
    _convert(name, "mixed", tmp_path / "model.lutra")


@pytest.mark.sweep
@pytest.mark.parametrize("method", [*METHODS, "auto"])
@pytest.mark.parametrize("name", ALL)
def test_converted(name: str, method: str, tmp_path: Path) -> None:
    _convert(name, method, tmp_path / "model.lutra")

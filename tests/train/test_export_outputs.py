"""Models that return more than one tensor, in any structure, are exported with names for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lutra import Session
from lutra.errors import UnsupportedModelError
from lutra.format import load_graph
from lutra.train import export


class Named(NamedTuple):
    mean: Tensor
    largest: Tensor


@dataclass
class Parts:
    scores: Tensor
    note: str
    maps: list[Tensor]
    missing: None = None


class Cache:
    """What decoders keep of the positions before: no tensors that a user would read."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.layer(x))


CASES: dict[str, tuple[Callable[[Tensor], Any], tuple[str, ...]]] = {
    "tensor": (lambda y: y, ("output",)),
    "list": (lambda y: [y, y * 2], ("output_0", "output_1")),
    "nested": (lambda y: (y, [y * 2, (y + 1,)]), ("output_0", "output_1", "output_2")),
    "dict": (lambda y: {"a": y, "b": y * 2}, ("a", "b")),
    "dict_of_lists": (
        lambda y: {"a": y, "b": [y * 2, y + 1], "c": {"d": y - 1}},
        ("a", "b_0", "b_1", "c_d"),
    ),
    "named_tuple": (lambda y: Named(y.mean(1), y.amax(1)), ("mean", "largest")),
    "data_class": (
        lambda y: Parts(y, "a note", [y * 2, y + 1]),
        ("scores", "maps_0", "maps_1"),
    ),
    "cache": (lambda y: {"y": y, "cache": Cache(y), "steps": 3}, ("y",)),
    "places": (lambda y: y.topk(2, 1), ("output_0", "output_1")),
    "mask": (lambda y: {"y": y, "above": y > 0}, ("y", "above")),
}


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Parts):
        return [value.scores, *value.maps]
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    if isinstance(value, (list, tuple)):
        return [leaf for each in value for leaf in _leaves(each)]
    return []


@pytest.mark.parametrize("name", CASES)
def test_structures(name: str, tmp_path: Path) -> None:
    make, names = CASES[name]
    torch.manual_seed(0)
    model = Returns(make)
    path = tmp_path / "model.lutra"
    export(model, path, torch.randn(2, 4))
    graph = load_graph(path)
    assert graph.outputs == names
    x = torch.randn(3, 4)
    got = Session(graph).run(None, {"x": x.numpy()})
    want = _leaves(model(x))
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().float().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("made", [None, Cache, {"steps": 3}, []])
def test_nothing_but_other_objects(made: Any, tmp_path: Path) -> None:
    def returned(y: Tensor) -> Any:
        return Cache(y) if made is Cache else made

    with pytest.raises(UnsupportedModelError, match="without tensors; return a tensor"):
        export(Returns(returned), tmp_path / "m.lutra", torch.randn(2, 4))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if bool((x > 0).any()) else x


def test_refusals_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedModelError, match="could not trace Branches"):
        export(Branches(), tmp_path / "m.lutra", torch.randn(2, 4))
    assert capfd.readouterr() == ("", "")

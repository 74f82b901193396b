"""Graphs of the engine as modules: every operator, and the way there and back."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from random_graphs import random_graph
from torch import Tensor, nn

from lutra import Session, load_graph
from lutra.errors import LutraError, UnsupportedModelError
from lutra.graph import Graph
from lutra.node import Array, Node, Value
from lutra.reference import run_node, run_reference
from lutra.train import Int8, convert, example_inputs, export, from_graph
from lutra.train.importing.graph import _MAKERS

#: Nodes of each operator that are tried.
_EACH = 2


def single(graph: Graph, node: Node) -> Graph:
    """A graph of one node."""
    inputs = tuple(graph.values[name] for name in dict.fromkeys(node.inputs))
    tensors = {name: graph.tensors[name] for name in node.tensors.values()}
    return Graph(inputs, (node.output,), (node,), tensors)


def arguments(graph: Graph, values: dict[str, Array]) -> tuple[Tensor, ...]:
    made = []
    for value in graph.inputs:
        array = torch.from_numpy(np.array(values[value.name]))
        made.append(array.long() if value.dtype == "int32" else array)
    return tuple(made)


def nodes_of_random_graphs(seeds: range) -> Iterator[tuple[Graph, Node, dict[str, Array]]]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        graph, feeds = random_graph(seed)
        values: dict[str, Array] = dict(feeds)
        for node in graph.nodes:
            tensors = graph.node_tensors(node)
            values[node.output] = run_node(node, [values[x] for x in node.inputs], tensors)
            tables = any(role.endswith(("slope", "intercept")) for role in tensors)
            if node.attrs.get("indices"):  # of equal entries any is right
                continue
            fresh = all(x in values for x in node.inputs) and counts[node.op] < _EACH
            if fresh and node.op in _MAKERS and not tables:
                counts[node.op] += 1
                yield graph, node, values


@pytest.mark.slow
def test_every_operator_computes_what_the_reference_does() -> None:
    tried, refused = set(), []
    for graph, node, values in nodes_of_random_graphs(range(120)):
        one = single(graph, node)
        try:
            module = from_graph(one)
        except UnsupportedModelError as error:
            refused.append(str(error))
            continue
        with torch.no_grad():
            got = module(*arguments(one, values)).numpy()
        want = values[node.output]
        assert got.shape == want.shape, (node, got.shape, want.shape)
        finite = np.isfinite(want)
        scale = max(1.0, float(np.abs(want[finite]).max(initial=0.0)))
        np.testing.assert_allclose(
            got[finite], want[finite], atol=2e-5 * scale, rtol=0, err_msg=str(node)
        )
        tried.add(node.op)
    assert all("cell states" in text or "has a mask" in text for text in refused), refused
    assert len(tried) > 50, sorted(_MAKERS.keys() - tried)


class Network(nn.Module):
    """A bit of everything that has a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.group = nn.GroupNorm(2, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.layer_norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.group(self.up(self.norm(self.conv(x)).relu()))
        steps, _ = self.lstm(x.mean(3).transpose(1, 2))
        y = self.head(self.layer_norm(steps)[:, -1])
        return y.softmax(1), x


def test_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    model = Network().eval()
    graph = export(model, tmp_path / "a.lutra", x)
    module = from_graph(graph)
    kinds = Counter(type(each).__name__ for each in module.modules())
    for kind in ("Conv2d", "ConvTranspose2d", "GroupNorm", "LSTM", "LayerNorm", "Linear"):
        assert kinds[kind] == 1, kinds
    with torch.no_grad():
        for got, want in zip(module(x), model(x), strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(same(x)[0], module(x)[0])
    again = export(module, tmp_path / "b.lutra", example_inputs(module))
    assert Counter(node.op for node in again.nodes) == Counter(node.op for node in graph.nodes)
    assert again.outputs == graph.outputs
    feeds = {again.inputs[0].name: x.numpy()}
    for got, want in zip(run_reference(again, feeds).values(), model(x), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5)
    small, report = convert(module, {"*": Int8()}, [torch.randn(8, 3, 6, 6) for _ in range(4)])
    assert len(report.replaced) >= 2
    export(small, tmp_path / "c.lutra", x)
    got = Session(tmp_path / "c.lutra").run(None, {again.inputs[0].name: x.numpy()})[0]
    assert np.abs(got - model(x)[0].detach().numpy()).max() < 0.1


def test_dynamic_sizes_stay_dynamic(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph = export(model, tmp_path / "a.lutra", torch.randn(2, 3, 9, 9), dynamic_axes=(0, 2, 3))
    module = from_graph(graph)
    x = torch.randn(5, 3, 14, 11)
    torch.testing.assert_close(module(x), model(x))
    again = export(module, tmp_path / "b.lutra", x, dynamic_axes=(0, 2, 3))
    assert again.inputs[0].shape == (None, 3, None, None)


def test_tables_are_refused_all_at_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    small, _ = convert(model, {"*": Int8()}, [torch.randn(32, 8)])
    export(small, tmp_path / "a.lutra", torch.randn(2, 8))
    with pytest.raises(UnsupportedModelError, match="float model") as error:
        from_graph(load_graph(tmp_path / "a.lutra"))
    assert len(error.value.items) == 2


def test_other_modules_know_no_inputs() -> None:
    with pytest.raises(LutraError, match="was not made by load_onnx or from_graph"):
        example_inputs(nn.Linear(2, 2))
    graph = Graph((Value("x", "float32", (None, 3)),), ("y",), (Node("relu", "r", ("x",), "y"),))
    assert [x.shape for x in example_inputs(from_graph(graph), 3)] == [(3, 3)]

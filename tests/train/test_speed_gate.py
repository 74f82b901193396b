"""The speed gate: decisions follow the times, whoever measured them; never how large they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pq_cases import CASES, Case, make_conv, make_linear
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.format import load_graph
from lutra.graph import Graph
from lutra.ops.limits import MAX_INT8_DEPTH
from lutra.reference import run_reference
from lutra.runtime.cpu import cpu_info
from lutra.runtime.session import Session
from lutra.train import (
    PQ,
    Int8,
    Int8Conv2d,
    Int8Linear,
    Keep,
    PQConv2d,
    PQLinear,
    SpeedGate,
    convert,
    export,
)
from lutra.train.conversion.speed_gate import attached, candidates, decide, time_graphs
from lutra.train.layers import base

pytest_plugins = ["cli_support"]

Times = Mapping[str, tuple[float, ...]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 2, "valid"), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.fc = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.body(self.stem(x).relu()).flatten(1))
        return y


class Timer:
    """Knows the milliseconds of lookups, float32 and int8 by layer, and remembers what it saw.

    Where no time of int8 is given it takes twice that of float32.
    """

    def __init__(self, times: Times) -> None:
        self.times = times
        self.seen: dict[str, Mapping[str, Graph]] = {}

    def __call__(self, graphs: Mapping[str, Graph], gate: SpeedGate) -> Mapping[str, float]:
        name = graphs["lookup"].nodes[0].name
        self.seen[name] = graphs
        lookup, dense, *integer = self.times[name]
        return {"lookup": lookup, "float32": dense, "int8": integer[0] if integer else 2 * dense}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def quick(model: nn.Module, images: Tensor, gate: Any, **recipe: Any) -> Any:
    settings = {"rows": 256, "kmeans_steps": 3, "speed_gate": gate, "calibration": "parallel"}
    return convert(model, recipe or {"stem": Keep(), "*": PQ()}, images.split(8), **settings)


TIMES = {"body.0": (1.0, 3.0), "body.2": (2.0, 2.0), "fc": (0.5, 0.25)}


def test_layers_that_are_not_faster_stay_dense(net: Net, images: Tensor) -> None:
    timer = Timer(TIMES)
    model, report = quick(net, images, SpeedGate(batch=4, measure=timer))
    assert isinstance(model.body[0], PQConv2d)
    assert type(model.stem) is type(model.body[2]) is nn.Conv2d
    assert type(model.fc) is nn.Linear
    assert [layer.name for layer in report.replaced] == ["body.0"]
    assert report["stem"].gate is None
    kept = report["fc"]
    assert kept.reason == "speed gate: lookups take 0.5000 ms, float32 0.2500 ms"
    assert (kept.gate.lookup_ms, kept.gate.dense_ms, kept.gate.dense) == (0.5, 0.25, "float32")
    assert not kept.gate.lookup
    assert not report["body.2"].gate.lookup  # a tie
    assert report["body.0"].gate.lookup
    assert report["body.0"].error is not None
    # the shapes that the layers have in the network, with the batch that was asked for
    assert report["body.0"].gate.input_shape == (4, 8, 8, 8)
    assert report["body.2"].gate.input_shape == (4, 8, 3, 3)
    assert kept.gate.input_shape == (4, 36)
    assert timer.seen["fc"]["lookup"].inputs[0].shape == (4, 36)
    text = str(report)
    assert "lookup ms  dense ms  decision" in text.splitlines()[0]
    assert "1.0000     3.0000    lookup: 3.00x the speed of float32" in text
    assert "0.5000     0.2500    float32: 2.00x the speed of lookups" in text
    assert "kept: speed gate: lookups take 2.0000 ms, float32 2.0000 ms" in text
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("encoder", ["nearest", "tree"])
def test_layers_that_lose_to_int8_become_int8(
    net: Net, images: Tensor, folder: Path, encoder: Any
) -> None:
    times = {"body.0": (1.0, 3.0, 0.5), "body.2": (1.0, 3.0, 2.0), "fc": (2.0, 1.0, 1.5)}
    recipe = {"stem": Keep(), "*": PQ(encoder=encoder)}
    model, report = quick(net, images, SpeedGate(measure=Timer(times)), **recipe)
    assert isinstance(model.body[0], Int8Conv2d)
    assert isinstance(model.body[2], PQConv2d)
    assert type(model.fc) is nn.Linear
    assert [report[name].method for name in times] == ["int8", "pq", None]
    assert [report[name].gate.choice for name in times] == ["int8", "lookup", "float32"]
    assert [report[name].gate.lookup for name in times] == [False, True, False]
    entry = report["body.0"]
    assert (entry.gate.dense, entry.gate.dense_ms) == ("int8", 0.5)
    assert entry.reason == "speed gate: lookups take 1.0000 ms, int8 0.5000 ms"
    assert entry.int8_bytes == 8 * 8 * 9
    assert 0.0 < entry.error < 0.01
    assert "1.0000     0.5000    int8: 2.00x the speed of lookups" in str(report)
    assert "2 of 4 layers replaced" in str(report)
    # as if the recipe had said so
    want, _ = quick(net, images, False, **{"body.0": Int8(), **recipe})
    assert isinstance(want.body[0], Int8Conv2d)
    for ours, theirs in zip(
        model.body[0].state_dict().values(), want.body[0].state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    graph = export(model, "m.lutra", images[:4])
    ops = {node.name: node.op for node in graph.nodes}
    assert (ops["body.0"], ops["body.2"], ops["fc"]) == ("int8_conv2d", "pq_conv2d", "linear")
    layers = load_graph("m.lutra").metadata["speed_gate"]["layers"]
    assert [layer["decision"] for layer in layers] == ["int8", "lookup", "float32"]


def test_int8_layers_of_the_recipe_are_not_timed(net: Net, images: Tensor) -> None:
    timer = Timer({"fc": (1.0, 2.0)})
    model, report = quick(net, images, SpeedGate(measure=timer), stem=Int8(), fc=PQ())
    assert list(timer.seen) == ["fc"]
    assert isinstance(model.stem, Int8Conv2d)
    assert report["stem"].gate is None
    assert report["stem"].reason == "the recipe names it"


def test_the_layers_that_remain_are_those_of_an_open_gate(net: Net, images: Tensor) -> None:
    want, _ = quick(net, images, False)
    model, report = quick(net, images, SpeedGate(measure=Timer({**TIMES, "fc": (1.0, 2.0)})))
    assert torch.equal(model.fc.centroids, want.fc.centroids)
    assert torch.equal(model.body[0].centroids, want.body[0].centroids)
    assert report.speed_gate is not None
    assert quick(net, images, False)[1].speed_gate is None


def test_no_layer_may_be_left(net: Net, images: Tensor) -> None:
    timer = Timer(dict.fromkeys(TIMES, (2.0, 1.0)))
    model, report = quick(net, images, SpeedGate(measure=timer))
    assert not report.replaced
    assert not any(isinstance(m, PQConv2d | PQLinear) for m in model.modules())
    assert "0 of 4 layers replaced" in str(report)
    with torch.no_grad():
        assert torch.equal(model(images), net(images))


@pytest.mark.parametrize(("margin", "kept"), [(0.9, True), (1.0, True), (1.5, False), (2.0, False)])
def test_margin(net: Net, images: Tensor, margin: float, kept: bool) -> None:
    gate = SpeedGate(margin=margin, measure=Timer({"fc": (1.0, 1.5)}))
    _, report = quick(net, images, gate, fc=PQ())
    assert report["fc"].gate.lookup is report["fc"].replaced is kept
    assert ("with a margin of" in report["fc"].reason) == (margin != 1.0)


@pytest.mark.parametrize(
    ("against", "times", "dense", "choice", "shown"),
    [
        ("best", (1.0, 1.5, 0.75), "int8", "int8", "int8 0.7500 ms"),
        ("int8", (1.0, 1.5, 0.75), "int8", "int8", "int8 0.7500 ms"),
        ("float32", (1.0, 1.5, 0.75), "float32", "lookup", "float32 1.5000 ms"),
        ("best", (1.0, 0.5, 0.75), "float32", "float32", "float32 0.5000 ms"),
        ("int8", (1.0, 0.5, 0.75), "int8", "float32", "int8 0.7500 ms, float32 0.5000 ms"),
        ("float32", (1.0, 0.5, 0.25), "float32", "float32", "float32 0.5000 ms"),
        ("best", (1.0, 1.5, 1.25), "int8", "lookup", "int8 1.2500 ms"),
        ("int8", (1.0, 0.5, 1.25), "int8", "lookup", "int8 1.2500 ms"),
        ("best", (1.0, 0.5, 0.5), "float32", "float32", "float32 0.5000 ms"),  # no gain: exact
    ],
)
def test_against(
    net: Net,
    images: Tensor,
    against: Any,
    times: tuple[float, ...],
    dense: str,
    choice: str,
    shown: str,
) -> None:
    timer = Timer({"fc": times})
    model, report = quick(net, images, SpeedGate(against=against, measure=timer), fc=PQ())
    types = {"lookup": PQLinear, "float32": nn.Linear, "int8": Int8Linear}
    assert type(model.fc) is types[choice]
    gate = report["fc"].gate
    assert (gate.dense, gate.choice, gate.lookup) == (dense, choice, choice == "lookup")
    assert report["fc"].replaced is (choice != "float32")
    assert report["fc"].reason == f"speed gate: lookups take 1.0000 ms, {shown}"
    assert gate.milliseconds == dict(zip(("lookup", "float32", "int8"), times, strict=True))
    assert report.speed_gate["layers"][0]["int8_ms"] == times[2]
    assert report.speed_gate["layers"][0]["decision"] == choice


def test_a_lutra_without_int8(net: Net, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(base._FAMILIES, "int8")
    with pytest.raises(LutraError, match="against='int8', but this lutra has no int8 layers"):
        quick(net, images, SpeedGate(against="int8", measure=Timer(TIMES)))
    _, report = quick(net, images, SpeedGate(measure=Timer(TIMES)))
    assert set(report["fc"].gate.milliseconds) == {"lookup", "float32"}


def test_sums_that_int32_may_not_hold_have_no_int8_form() -> None:
    layer = make_linear(MAX_INT8_DEPTH + 1, 1, v=64, k=8)
    assert list(candidates("fc", layer, (1, MAX_INT8_DEPTH + 1))) == ["lookup", "float32"]
    wanted = (
        f"layer 'fc' adds up {MAX_INT8_DEPTH + 1} products for each output, and int8 layers at most"
    )
    with pytest.raises(LutraError, match=wanted):
        decide(SpeedGate(against="int8"), "fc", layer, (1, MAX_INT8_DEPTH + 1))


@pytest.mark.slow
def test_the_file_says_what_was_measured(
    net: Net, images: Tensor, folder: Path, capture: Any
) -> None:
    gate = SpeedGate(threads=2, isa="scalar", measure=Timer(TIMES))
    model, report = quick(net, images, gate)
    graph = export(nn.Sequential(model, nn.ReLU()), "m.lutra", images[:4])
    record = load_graph("m.lutra").metadata["speed_gate"]
    assert record == report.speed_gate == attached(model)
    assert record["machine"] == cpu_info()["model"]
    assert (record["isa"], record["threads"], record["batch"]) == ("scalar", 2, 1)
    assert (record["against"], record["margin"]) == ("best", 1.0)
    assert record["layers"][0] == {
        "name": "body.0",
        "input_shape": [1, 8, 8, 8],
        "lookup_ms": 1.0,
        "float32_ms": 3.0,
        "int8_ms": 6.0,
        "decision": "lookup",
        "reason": "speed gate: lookups take 1.0000 ms, float32 3.0000 ms",
    }
    assert [node.op for node in graph.nodes].count("pq_conv2d") == 1
    _, out, _ = capture("inspect", "m.lutra")
    assert "speed gate when it was converted: machine " in out
    assert "isa scalar, threads 2, batch 1, against best, margin 1.0" in out
    assert out.count("speed_gate") == 0
    for line in out.splitlines():
        if line.startswith("fc ") and "float32" in line:
            assert line.split()[-3:] == ["0.5000", "0.2500", "0.5000"]
            break
    else:
        raise AssertionError(out)
    own = export(model, "m.lutra", images[:4], metadata={"speed_gate": [1]})
    assert own.metadata["speed_gate"] == [1]
    assert "speed_gate" in capture("inspect", "m.lutra")[1]  # as any other entry
    plain, _ = quick(net, images, False)
    assert "speed_gate" not in export(plain, "m.lutra", images[:4]).metadata


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": 0}, "threads=0 is not an integer in 1..1024"),
        ({"threads": 1.0}, "threads=1.0"),
        ({"batch": True}, "batch=True"),
        ({"batch": -1}, "batch=-1"),
        ({"against": "int4"}, r"against='int4' is not one of \['best', 'float32', 'int8'\]"),
        ({"margin": 0}, "margin=0 is not a number above 0"),
        ({"margin": float("nan")}, "margin=nan"),
        ({"margin": "2"}, "margin='2'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LutraError, match=message):
        SpeedGate(**settings)


def test_an_unknown_isa_is_refused(net: Net, images: Tensor) -> None:
    with pytest.raises(LutraError, match="isa='mmx' cannot run"):
        quick(net, images, SpeedGate(isa="mmx"))


# What is measured


@pytest.mark.parametrize("case", CASES, ids=str)
def test_candidates_are_the_layer(case: Case) -> None:
    layer = make_conv(case)
    dense = layer.weight.detach().numpy().copy()
    graphs = candidates("conv", layer, (2, case.channels, *case.size))
    assert list(graphs) == ["lookup", "float32", "int8"]
    for graph in graphs.values():
        (node,) = graph.nodes
        for name in ("stride", "padding", "dilation"):
            assert node.attrs[name] == getattr(case, name)
        Session(graph, threads=1).profile(runs=1)
    assert (graphs["float32"].tensors["weight"] == dense).all()
    integers = graphs["int8"].tensors["weight"]
    assert (integers.shape, integers.dtype.name) == (dense.shape, "int8")
    assert abs(integers).max(axis=(1, 2, 3)).tolist() == [127] * case.outputs
    assert integers.min() >= -127
    shapes = {graph.values["y"].shape for graph in graphs.values()}
    assert shapes == {(2, case.outputs, *layer.geometry.out_size(*case.size))}
    assert len({c.tobytes() for c in graphs["lookup"].tensors["centroids"][0]}) > 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_candidates_of_trees(case: Case) -> None:
    """Trees are as random as centroids are, and never look beyond the row."""
    layer = make_conv(case, encoder="tree")
    graph = candidates("conv", layer, (2, case.channels, *case.size))["lookup"]
    assert graph.nodes[0].attrs["encoder"] == "tree"
    splits, thresholds = graph.tensors["splits"], graph.tensors["thresholds"]
    assert (splits // case.v == np.arange(layer.codebooks)[:, None]).all()
    assert len(np.unique(splits)) > layer.codebooks or case.v == 1
    assert len(np.unique(thresholds)) > 3
    Session(graph, threads=1).profile(runs=1)


def test_linear_candidates_keep_the_rank() -> None:
    graphs = candidates("fc", make_linear(12, 3), (2, 7, 12))
    assert list(graphs) == ["lookup", "float32", "int8"]
    assert {graph.values["y"].shape for graph in graphs.values()} == {(2, 7, 3)}
    assert set(graphs["int8"].nodes[0].attrs) == {"act_scale", "act_zero", "act_bits"}
    y = run_reference(graphs["lookup"], [torch.zeros(2, 7, 12).numpy()])["y"]
    assert y.shape == (2, 7, 3)


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        (lambda x: x.flatten(1), (3, 192)),
        (lambda x: x.flatten(2), (3, 3, 64)),
        (lambda x: x.flatten(0, 1).flatten(1), (9, 64)),  # three rows for each sample
        (lambda x: x.mean((0, 1, 2)), (3, 8)),  # no batch at all: one row each
    ],
)
def test_the_input_shape_is_that_of_the_layer(
    images: Tensor, view: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(shape[-1], 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(view(x))
            return y

    timer = Timer({"fc": (1.0, 2.0)})
    _, report = quick(Model(), images, SpeedGate(batch=3, measure=timer), fc=PQ())
    assert report["fc"].gate.input_shape == shape


def test_real_times(net: Net, images: Tensor) -> None:
    _, report = quick(net, images, True)
    assert report.speed_gate["threads"] == 1
    for name in TIMES:
        gate = report[name].gate
        times = gate.milliseconds
        assert set(times) == {"lookup", "float32", "int8"}
        assert all(value >= 0.0 for value in times.values())
        assert gate.dense_ms == min(times["float32"], times["int8"])
        assert gate.lookup == (gate.lookup_ms < gate.dense_ms)
        assert gate.choice == ("lookup" if gate.lookup else gate.dense)
        kinds = {"lookup": "pq", "float32": None, "int8": "int8"}
        assert report[name].method == kinds[gate.choice]


def test_times_are_of_the_steps_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Spy(Session):
        def profile(self, inputs: Any = None, **settings: Any) -> Any:
            profile = super().profile(inputs, **settings)
            calls.append((self.graph.nodes[0].op, inputs["x"].tobytes()))
            steps = [replace(step, milliseconds=2.0) for step in profile.steps]
            return replace(profile, steps=tuple(steps), input_ms=100.0, output_ms=100.0)

    monkeypatch.setattr("lutra.train.conversion.speed_gate.Session", Spy)
    graphs = candidates("conv", make_conv(CASES[4]), (1, 4, 7, 6))
    times = time_graphs(graphs, SpeedGate())
    # two of them with their quantisation
    assert times == {"lookup": 4.0, "float32": 2.0, "int8": 4.0}
    assert [op for op, _ in calls[:6]] == ["pq_conv2d", "conv2d", "int8_conv2d"] * 2
    assert len({data for _, data in calls}) == 8

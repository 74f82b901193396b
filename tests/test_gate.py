"""The speed gate: decisions follow the times, whoever measured them; never how large they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pq_cases import CASES, Case, make_conv, make_linear
from torch import Tensor, nn

from lutra.cpu import cpu_info
from lutra.errors import LutraError
from lutra.format import load_graph
from lutra.graph import Graph
from lutra.ops import OPS
from lutra.reference import run_reference
from lutra.session import Session
from lutra.train import PQ, Keep, PQConv2d, PQLinear, SpeedGate, convert, export
from lutra.train.gate import attached, candidates, time_graphs

pytest_plugins = ["cli_support"]

Times = Mapping[str, tuple[float, float]]


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
    """Knows the milliseconds of lookups and float32 by layer, and remembers what it saw."""

    def __init__(self, times: Times) -> None:
        self.times = times
        self.seen: dict[str, Mapping[str, Graph]] = {}

    def __call__(self, graphs: Mapping[str, Graph], gate: SpeedGate) -> Mapping[str, float]:
        name = graphs["lookup"].nodes[0].name
        self.seen[name] = graphs
        lookup, dense = self.times[name]
        return {"lookup": lookup, "float32": dense, "int8": dense / 2}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _float_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were float32 layers only."""
    for op in ("int8_conv2d", "int8_linear"):
        monkeypatch.delitem(OPS, op, raising=False)


def quick(model: nn.Module, images: Tensor, gate: Any, **recipe: Any) -> Any:
    settings = {"rows": 256, "kmeans_steps": 3, "speed_gate": gate}
    return convert(model, recipe or {"stem": Keep(), "*": PQ()}, images.split(8), **settings)


#: The int8 operators of this lutra; none where it has no such layers.
INT8 = {op: OPS[op] for op in ("int8_conv2d", "int8_linear") if op in OPS}
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
    assert "0.5000     0.2500    dense: 0.50x the speed of float32" in text
    assert "kept: speed gate: lookups take 2.0000 ms, float32 2.0000 ms" in text
    json.dumps(report.to_dict(), allow_nan=False)


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
    assert report["fc"].replaced is kept
    assert ("with a margin of" in report["fc"].reason) == (margin != 1.0)


@pytest.mark.parametrize(
    ("against", "dense", "kept"),
    [("best", "int8", False), ("int8", "int8", False), ("float32", "float32", True)],
)
def test_against(
    net: Net, images: Tensor, monkeypatch: pytest.MonkeyPatch, against: Any, dense: str, kept: bool
) -> None:
    """With an int8 operator, which takes half the time of float32 here."""
    monkeypatch.setitem(OPS, "int8_linear", replace(OPS["linear"], name="int8_linear"))
    timer = Timer({"fc": (1.0, 1.5)})
    _, report = quick(net, images, SpeedGate(against=against, measure=timer), fc=PQ())
    assert report["fc"].replaced is kept
    assert report["fc"].gate.dense == dense
    assert report["fc"].gate.milliseconds == {"lookup": 1.0, "float32": 1.5, "int8": 0.75}
    assert report.speed_gate["layers"][0]["int8_ms"] == 0.75
    node = timer.seen["fc"]["int8"].nodes[0]
    assert set(node.attrs) == {"act_scale", "act_zero", "act_bits"}
    weight = timer.seen["fc"]["int8"].tensors["weight"]
    assert (weight.dtype.name, weight.min() >= -127) == ("int8", True)
    assert abs(weight).max(axis=1).tolist() == [127] * 5


def test_against_what_is_not_there(net: Net, images: Tensor) -> None:
    with pytest.raises(LutraError, match="against='int8', but this lutra has no int8 layers"):
        quick(net, images, SpeedGate(against="int8", measure=Timer(TIMES)))


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
        "decision": "lookup",
        "reason": "speed gate: lookups take 1.0000 ms, float32 3.0000 ms",
    }
    assert [node.op for node in graph.nodes].count("pq_conv2d") == 1
    _, out, _ = capture("inspect", "m.lutra")
    assert "speed gate when it was converted: machine " in out
    assert "isa scalar, threads 2, batch 1, against best, margin 1.0" in out
    assert out.count("speed_gate") == 0
    for line in out.splitlines():
        if line.startswith("fc ") and "dense" in line:
            assert line.split()[-2:] == ["0.5000", "0.2500"]
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
    assert list(graphs) == ["lookup", "float32"]
    (conv,) = graphs["float32"].nodes
    for name in ("stride", "padding", "dilation"):
        assert conv.attrs[name] == getattr(case, name) == graphs["lookup"].nodes[0].attrs[name]
    assert (graphs["float32"].tensors["weight"] == dense).all()
    shapes = {graph.values["y"].shape for graph in graphs.values()}
    assert shapes == {(2, case.outputs, *layer.geometry.out_size(*case.size))}
    assert len({c.tobytes() for c in graphs["lookup"].tensors["centroids"][0]}) > 1


def test_linear_candidates_keep_the_rank() -> None:
    graphs = candidates("fc", make_linear(12, 3), (2, 7, 12))
    assert {graph.values["y"].shape for graph in graphs.values()} == {(2, 7, 3)}
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
        assert set(gate.milliseconds) == {"lookup", "float32"}
        assert all(value >= 0.0 for value in gate.milliseconds.values())
        assert gate.lookup == (gate.lookup_ms < gate.dense_ms) == report[name].replaced


def test_times_are_of_the_steps_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Spy(Session):
        def profile(self, inputs: Any = None, **settings: Any) -> Any:
            profile = super().profile(inputs, **settings)
            calls.append((self.graph.nodes[0].op, inputs["x"].tobytes()))
            steps = [replace(step, milliseconds=2.0) for step in profile.steps]
            return replace(profile, steps=tuple(steps), input_ms=100.0, output_ms=100.0)

    monkeypatch.setattr("lutra.train.gate.Session", Spy)
    graphs = candidates("conv", make_conv(CASES[4]), (1, 4, 7, 6))
    times = time_graphs(graphs, SpeedGate())
    assert times == {"lookup": 4.0, "float32": 2.0}  # the first with its quantisation
    assert [op for op, _ in calls[:4]] == ["pq_conv2d", "conv2d"] * 2
    assert len({data for _, data in calls}) == 8


@pytest.mark.skipif(not INT8, reason="this lutra has no int8 layers")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_int8_candidates_run(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for op, spec in INT8.items():
        monkeypatch.setitem(OPS, op, spec)
    graphs = candidates("conv", make_conv(case), (2, case.channels, *case.size))
    graphs |= {
        f"linear {kind}": graph
        for kind, graph in candidates("fc", make_linear(12, 3), (2, 7, 12)).items()
    }
    for graph in graphs.values():
        Session(graph, threads=1).profile(runs=1)
    assert "int8" in graphs
    assert "linear int8" in graphs

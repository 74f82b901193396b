"""What export does not do twice: trace, work on samples it needs not, trace what it must refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lutra.train.exporting.functional as functional
import lutra.train.exporting.parity as parity
from lutra.errors import UnsupportedModelError
from lutra.graph import Graph
from lutra.train import export
from lutra.train.exporting.lowering.core import LOWERINGS
from lutra.train.exporting.lowering.modules import NEEDS
from lutra.train.threads import SMALL_STEP, StepThreads, threads_for, threads_for_rows


def block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> Any:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class Inverted(nn.Module):
    """The block of MobileNetV2, as torchvision writes it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.adds = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *([block(inputs, hidden, 1)] if expand > 1 else []),
            block(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """As torchvision's; `stages` are (expansion, channels, blocks, stride)."""

    def __init__(self, stages: Any, last: int, classes: int) -> None:
        super().__init__()
        layers, width = [block(3, 8, 3, 2)], 8
        for expand, channels, count, stride in stages:
            for i in range(count):
                layers.append(Inverted(width, channels, stride if i == 0 else 1, expand))
                width = channels
        self.features = nn.Sequential(*layers, block(width, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        y: Tensor = self.classifier(torch.flatten(x, 1))
        return y


def small_mobilenet() -> MobileNetV2:
    return MobileNetV2([(1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 2, 2)], 32, 10)


class Gated(nn.Module):
    """In-place operators on results of others, with an argument of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.act = nn.Hardtanh(0, 1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        y.mul_(self.act(self.gate(y.mean((2, 3), keepdim=True)))).relu_()
        return y  # what was written into, not what the operators returned


class Seen(nn.Module):
    """A view that is made before its memory is written, and read after."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        flat = y.flatten(1)
        y.relu_()
        z: Tensor = self.fc(flat)
        return z


class Twice(nn.Module):
    """A value that is an output before and after it is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return torch.sigmoid(y), y.add_(1.0)


class Returned(nn.Module):
    """Returns what it wrote into, beside an operator that takes a second trace."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        y.relu_()
        return y, y.transpose(2, 3) + 1.0


MODELS: dict[str, tuple[Any, bool]] = {  # whether one trace is enough
    "mobilenet": (small_mobilenet, True),
    "gated": (Gated, True),
    "seen": (Seen, False),
    "twice": (Twice, True),
    "returned": (Returned, False),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_trace_gives_the_graph_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    torch.manual_seed(0)
    build, once = MODELS[name]
    model, x = build().eval(), torch.randn(3, 3, 8, 8)
    traces = []
    plain = torch.export.ExportedProgram.run_decompositions

    def counted(program: Any, table: Any) -> Any:
        traces.append(1)
        return plain(program, table)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    got = export(model, tmp_path / "m.lutra", x)
    assert len(traces) == (0 if once else 1)
    monkeypatch.setattr(functional, "replace_in_place", lambda program: None)
    monkeypatch.setattr(functional, "_FRESH", frozenset())
    want = export(model, tmp_path / "m.lutra", x)
    assert len(traces) == (1 if once else 2)
    assert got.nodes == want.nodes
    assert got.outputs == want.outputs
    for key, array in want.tensors.items():
        np.testing.assert_array_equal(got.tensors[key], array)


def test_the_reference_takes_fewer_samples_of_large_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}

    def watched(name: str, run: Any) -> Any:
        def call(graph: Graph, feeds: Any) -> Any:
            seen[name] = len(feeds["x"])
            return run(graph, feeds)

        return call

    monkeypatch.setattr(parity, "run_reference", watched("reference", parity.run_reference))
    monkeypatch.setattr(parity, "run_engine", watched("engine", parity.run_engine))
    model, x = small_mobilenet(), torch.randn(8, 3, 8, 8)
    export(model, tmp_path / "m.lutra", x)
    assert seen == {"reference": 8, "engine": 8}
    work = export(model, tmp_path / "m.lutra", x).total_cost().macs
    monkeypatch.setattr(parity, "_REFERENCE_WORK", 3 * work)
    export(model, tmp_path / "m.lutra", x)
    assert seen == {"reference": 3, "engine": 8}
    monkeypatch.setattr(parity, "_REFERENCE_WORK", 1)
    export(model, tmp_path / "m.lutra", x)
    assert seen == {"reference": 1, "engine": 8}


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], *, called: bool = True) -> None:
        super().__init__()
        self.cell: Any = kind(4, 8)
        self.other: Any = kind(8, 8)
        self.called = called
        self.fc = nn.Linear(8 if called else 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.called:
            x = self.other(self.cell(x)[0])[0]
        y: Tensor = self.fc(x)
        return y


def test_modules_without_a_lowering_are_found_before_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for op in NEEDS[nn.RNN]:
        monkeypatch.delitem(LOWERINGS, op, raising=False)

    def trace(*_: Any, **__: Any) -> None:
        raise AssertionError("traced")

    traced = torch.export.export
    monkeypatch.setattr(torch.export, "export", trace)
    with pytest.raises(UnsupportedModelError) as caught:
        export(Recurrent(nn.RNN), tmp_path / "m.lutra", torch.randn(2, 5, 4))
    assert [line.split(":")[0] for line in caught.value.items] == [
        "aten.rnn_tanh.input in cell",
        "aten.rnn_tanh.input in other",
    ]
    assert not (tmp_path / "m.lutra").exists()
    monkeypatch.setattr(torch.export, "export", traced)
    unused = Recurrent(nn.RNN, called=False)
    graph = export(unused, tmp_path / "m.lutra", torch.randn(2, 5, 4))
    assert [node.op for node in graph.nodes] == ["linear"]
    monkeypatch.setitem(LOWERINGS, NEEDS[nn.RNN][-1], LOWERINGS["aten.relu.default"])
    monkeypatch.setattr(torch.export, "export", trace)
    with pytest.raises(UnsupportedModelError, match=r"could not trace Recurrent .traced."):
        export(Recurrent(nn.RNN), tmp_path / "m.lutra", torch.randn(2, 5, 4))


# ---- threads ------------------------------------------------------------------------------------


@pytest.fixture
def three_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_small_steps_take_one_thread() -> None:
    model = nn.Linear(100, 10)  # 1010 weights
    most = SMALL_STEP // 1010
    threads = StepThreads(model)
    with threads:
        for batch, count in (
            (torch.zeros(64, 100), 1),
            ((torch.zeros(64, 3, 8, 8), torch.zeros(64, dtype=torch.long)), 1),
            ({"ids": torch.zeros(2, most, dtype=torch.long)}, 3),
            ((torch.zeros(4, 3, 1), torch.zeros(1)), 1),
            (torch.zeros(most // 1000 + 1, 3, 50, 20), 3),
            (torch.zeros(most // 1000 - 1, 3, 50, 20), 1),
            ("no tensor", 1),
        ):
            threads.fit(batch)
            assert torch.get_num_threads() == count, batch
        threads.fit(torch.zeros(2, 100))
    assert torch.get_num_threads() == 3
    for values, count in ((1000, 1), (SMALL_STEP, 3)):
        with threads_for_rows(values):
            assert torch.get_num_threads() == count
        assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_threads_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    x = (torch.zeros(8, 4),)
    with threads_for(nn.Linear(4, 2), x):
        assert torch.get_num_threads() == 1
    with threads_for(nn.Linear(5, 2), x):  # it fails
        assert torch.get_num_threads() == 3
    monkeypatch.setattr("lutra.train.threads._LONG", 0.0)
    with threads_for(nn.Linear(4, 2), x):
        assert torch.get_num_threads() == 3
    with pytest.raises(RuntimeError), threads_for(nn.Linear(4, 2), x):
        raise RuntimeError
    assert torch.get_num_threads() == 3

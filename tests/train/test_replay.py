"""What later passes of a calibration read instead of computing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lutra.train.conversion.convert as conversion
from lutra.train import PQ, Int8, convert
from lutra.train.conversion.prefix import is_pure
from lutra.train.conversion.replay import Replay


class Counted(nn.Module):
    """A layer that counts the passes of all its copies."""

    passes = 0

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        Counted.passes += 1
        return self.inner(x)


class Remembers(Counted):
    """One that leaves its output for others."""

    def forward(self, x: Tensor) -> Any:
        self.seen = super().forward(x)
        return self.seen


class InPlace(Counted):
    """One that writes into its input."""

    def forward(self, x: Tensor) -> Any:
        x += 1.0
        return super().forward(x)


class Pair(Counted):
    """One that returns a structure."""

    def forward(self, x: Tensor) -> Any:
        return {"x": super().forward(x), "rest": (None, 3)}


class Opaque(Counted):
    """One that returns something else than tensors."""

    def forward(self, x: Tensor) -> Any:
        return [super().forward(x), object()]


class Network(nn.Module):
    def __init__(self, first: type[Counted], hook: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = first(nn.Conv2d(3, 8, 3, padding=1))
        self.body = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
        if hook:
            self.first.inner.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        found = self.first(x * 1.0)
        y: Tensor = found["x"] if isinstance(found, dict) else found
        y = y[0] if isinstance(y, list) else y
        for layer in self.body:
            y = y.relu_() + layer(y)
        return y


RECIPE = {"body.*": PQ(k=8, v=3, group="row", encoder="tree"), "first.*": Int8()}


def _converted(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, memory: int
) -> tuple[dict[str, Any], Replay]:
    made = []

    def replay(_: int) -> Replay:
        made.append(Replay(memory))
        return made[0]

    monkeypatch.setattr(conversion, "Replay", replay)
    data = torch.rand(24, 3, 6, 6, generator=torch.Generator().manual_seed(1)).split(8)
    new, _ = convert(model, RECIPE, data, kmeans_steps=3, progress=False)
    return new.state_dict(), made[0]


@pytest.mark.parametrize("kind", [Counted, Remembers, InPlace, Pair, Opaque, "hook"])
def test_layers_are_those_of_passes_that_compute_all(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Counted if kind == "hook" else kind
    passes, found = [], []
    for memory in (0, 1 << 20):
        Counted.passes = 0
        state, replay = _converted(Network(first, kind == "hook"), monkeypatch, memory)
        passes.append(Counted.passes)
        found.append(state)
        plain = kind in (Counted, Pair, "hook")
        assert replay._never == (set() if plain else {"first"})
    for name, want in found[0].items():
        if isinstance(want, Tensor):
            assert torch.equal(found[1][name], want), name
    if kind in (Counted, Pair):
        # Of the passes of three layers on three batches one remains, and one that finds out that
        # the next operator writes into what was kept.
        assert passes[1] == passes[0] - 3
        assert "first" in replay._copied
    else:
        assert passes[1] == passes[0]


def test_what_nobody_writes_into_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careful(Network):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.first(x * 1.0)
            for layer in self.body:
                y = y.relu() + layer(y)
            return y

    passes = []
    for memory in (0, 1 << 20):
        Counted.passes = 0
        _, replay = _converted(Careful(Counted), monkeypatch, memory)
        passes.append(Counted.passes)
    assert passes[1] == passes[0] - 2 * 3
    assert replay._copied == set()


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 8 * 8 * 6 * 6 * 4  # of the outputs of a layer for a batch
    for room in (size - 1, size, 4 * size):
        _, replay = _converted(Network(Counted), monkeypatch, room)
        kept = sum(
            call.value.numel() * call.value.element_size()
            for batches in replay._kept.values()
            for calls in batches.values()
            for call in calls
        )
        assert kept <= room
        assert replay._left == room - kept
        assert bool(kept) == (room >= size)


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Network(Counted)
    data = torch.rand(8, 3, 6, 6).split(4)
    new, _ = convert(model, RECIPE, data, kmeans_steps=3, progress=False)
    for module in (*model.modules(), *new.modules()):
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks


# Traced models


class Mixed(nn.Module):
    """Layers with functions and a branch between them; a write into a value if asked for."""

    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.shift = nn.Parameter(torch.rand(8, 1, 1))
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) * 1.5
        y = torch.sigmoid(self.b(x)) + self.shift
        if self.writes:
            y = y.add_(1.0)
            x.mul_(0.5)
        x = self.c(y + x) + x
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize("memory", [1 << 30, 600_000, 200_000])
@pytest.mark.parametrize("writes", [False, True])
def test_traced_models_go_on_where_they_stopped(
    writes: bool, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = fx.symbolic_trace(Mixed(writes).eval())
    batches = [(torch.rand(6, 3, 12, 12),) for _ in range(3)]
    runs: list[str] = []
    run_node = fx.Interpreter.run_node

    def counted(self: fx.Interpreter, node: fx.Node) -> Any:
        runs.append(node.name)
        return run_node(self, node)

    monkeypatch.setattr(fx.Interpreter, "run_node", counted)
    recipe = {"a": Int8(), "b": PQ(), "c": Int8(), "last": Int8()}

    def made() -> dict[str, Tensor]:
        settings: Any = {"rows": 256, "memory_bytes": memory, "progress": False}
        return convert(model, recipe, batches, **settings)[0].state_dict()

    kept = made()
    assert runs  # they were resumed
    if memory == 1 << 30 and not writes:
        assert runs.count("sigmoid") <= 2 * len(batches)  # and not once for each layer behind it
    monkeypatch.setattr("lutra.train.conversion.replay.is_pure", lambda model: False)
    plain = made()
    assert kept.keys() == plain.keys()
    assert all(torch.equal(kept[name], plain[name]) for name in kept)


def test_what_is_a_graph_of_functions() -> None:
    assert not is_pure(Mixed())
    assert is_pure(fx.symbolic_trace(Mixed()))

    class Leaf(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, path: str) -> bool:
            return isinstance(m, Remembers) or super().is_leaf_module(m, path)

    model = nn.Sequential(Remembers(nn.ReLU()), nn.Linear(3, 3))
    assert not is_pure(fx.GraphModule(model, Leaf().trace(model)))

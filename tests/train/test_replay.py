"""What later passes of a calibration read instead of computing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lutra.train.conversion.convert as conversion
from lutra.train import PQ, Int8, convert
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
    if kind in (Counted, Pair):  # of the passes of three layers on three batches one remains
        assert passes[1] == passes[0] - 2 * 3
    else:
        assert passes[1] == passes[0]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 8 * 8 * 6 * 6 * 4  # of the outputs of a layer for a batch
    for room in (size - 1, size, 4 * size):
        _, replay = _converted(Network(Counted), monkeypatch, room)
        kept = sum(
            call.numel() * call.element_size()
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

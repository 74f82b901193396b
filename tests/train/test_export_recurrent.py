"""Export of LSTM and GRU: layers, directions, states, lengths, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import check_model, ops
from torch import Tensor, nn

from lutra import Session
from lutra.errors import UnsupportedModelError
from lutra.train.exporting.export import export

F = np.float32


class Model(nn.Module):
    """A model from a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> Any:
        given = [each for each in (h, c) if each is not None]
        return self.function(self, x, *given)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"bias": False, "bidirectional": True},
        {"num_layers": 3, "dropout": 0.5},
    ],
)
def test_sequences(tmp_path: Path, kind: type[nn.RNNBase], how: dict[str, Any]) -> None:
    layer = kind(5, 7, batch_first=True, **how)
    graph = check_model(tmp_path, Model(lambda m, x: m.rnn(x)[0], rnn=layer), (6, 5))
    nodes = how.get("num_layers", 1) * (2 if how.get("bidirectional") else 1)
    assert ops(graph).count(kind.__name__.lower()) == nodes
    assert "from_end" not in ops(graph)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_tokens_first(tmp_path: Path, kind: type[nn.RNNBase]) -> None:
    layer = kind(5, 4, num_layers=2)
    model = Model(lambda m, x: m.rnn(x.transpose(0, 1))[0].transpose(0, 1), rnn=layer)
    graph = check_model(tmp_path, model, (6, 5))
    assert ops(graph) == [kind.__name__.lower()] * 2


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_state_at_the_end(tmp_path: Path, bidirectional: bool) -> None:
    layer = nn.LSTM(5, 4, num_layers=2, batch_first=True, bidirectional=bidirectional)

    def states(m: Any, x: Tensor) -> dict[str, Tensor]:
        y, (h, c) = m.rnn(x)
        return {"y": y, "h": h.transpose(0, 1), "c": c.transpose(0, 1), "last": h[-1]}

    check_model(tmp_path, Model(states, rnn=layer), (6, 5))
    gru = nn.GRU(5, 4, num_layers=2, batch_first=True, bidirectional=bidirectional)
    check_model(tmp_path, Model(lambda m, x: m.rnn(x)[1].transpose(0, 1), rnn=gru), (6, 5))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_stream(tmp_path: Path, kind: type[nn.RNNBase]) -> None:
    """States are inputs and outputs: parts of any length give what the whole gives."""
    layer = kind(5, 4, num_layers=2, batch_first=True)
    lstm = kind is nn.LSTM

    def step(m: Any, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        first = [state.transpose(0, 1).contiguous() for state in states]
        y, ends = m.rnn(x, tuple(first) if lstm else first[0])
        return y, *(end.transpose(0, 1) for end in (ends if lstm else [ends]))

    model = Model(step, rnn=layer).eval()
    states = [torch.randn(3, 2, 4) for _ in range(2 if lstm else 1)]
    x = torch.randn(3, 9, 5)
    path = tmp_path / "m.lutra"
    export(model, path, (x, *states), dynamic_axes={"x": (1,)})
    session = Session(path)
    with torch.no_grad():
        whole = model(x, *states)
    feeds, parts = [state.numpy() for state in states], []
    for part in (x[:, :1], x[:, 1:4], x[:, 4:]):
        names = [value.name for value in session.graph.inputs]
        made, *feeds = session.run(None, dict(zip(names, [part.numpy(), *feeds], strict=True)))
        parts.append(made)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole[0].numpy(), atol=2e-6)
    for got, want in zip(feeds, whole[1:], strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=2e-6)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_cells(tmp_path: Path, kind: Any) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(5, 4)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            return self.cell(x, (h, c)) if kind is nn.LSTMCell else self.cell(x, h) + c

    check_model(tmp_path, Cell(), (5,), (4,), (4,))


@pytest.mark.parametrize("length", [1, 4, 40])
def test_any_length(tmp_path: Path, length: int) -> None:
    layer = nn.LSTM(5, 4, batch_first=True, bidirectional=True)

    def run(m: Any, x: Tensor) -> Any:
        y, (h, _) = m.rnn(x)
        return m.head(y), h[0] + h[1]

    model = Model(run, rnn=layer, head=nn.Linear(8, 3)).eval()
    path = tmp_path / "m.lutra"
    export(model, path, torch.randn(2, 6, 5), dynamic_axes=(1,))
    x = torch.randn(3, length, 5)
    with torch.no_grad():
        want = model(x)
    for a, b in zip(Session(path).run(None, {"x": x.numpy()}), want, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=2e-6)


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_the_functions_of_torch(tmp_path: Path, op: str) -> None:
    layer = nn.LSTM(5, 4) if op == "lstm" else nn.GRU(5, 4)

    def run(m: Any, x: Tensor) -> Tensor:
        zeros = torch.zeros(1, x.shape[0], 4)
        states = [zeros, zeros] if op == "lstm" else zeros
        rest = (True, 1, 0.0, False, False, True)
        return getattr(torch, op)(x, states, m.rnn._flat_weights, *rest)[0]

    assert ops(check_model(tmp_path, Model(run, rnn=layer), (6, 5))) == [op]


def test_projections_of_sequences_of_any_length_are_refused(tmp_path: Path) -> None:
    model = Model(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(5, 4, proj_size=2, batch_first=True))
    with pytest.raises(UnsupportedModelError, match="take the axis out of dynamic_axes"):
        export(model, tmp_path / "m.lutra", torch.randn(2, 3, 5), dynamic_axes=(0, 1))


def test_models_outside_of_export_keep_pytorchs_operators() -> None:
    layer = nn.LSTM(3, 2)
    path = torch.nn.modules.rnn._VF
    layer(torch.randn(4, 1, 3))
    assert path is torch._VF

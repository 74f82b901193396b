"""`Int8()` for `nn.GRU` and `nn.LSTM`: conversion, training, export, streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layers import same_bits
from torch import Tensor, nn

from lutra import Session, load_graph, runnable_isas
from lutra.errors import LutraError
from lutra.train import PQ, Int8, Keep, convert, export

C, H = 6, 10


class Model(nn.Module):
    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM], **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(C, H, **settings)
        self.head = nn.Linear(H * (2 if self.rnn.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def batches(*, batch_first: bool = True) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    made = [torch.randn(8, 12, C, generator=rng) for _ in range(2)]
    return made if batch_first else [x.transpose(0, 1).contiguous() for x in made]


def converted(model: nn.Module, **settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    return convert(model, {"rnn*": Int8()}, batches(**settings))


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"bidirectional": True},
    {"num_layers": 2, "dropout": 0.5},
    {"num_layers": 2, "bidirectional": True, "bias": False},
)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("settings", SETTINGS)
def test_conversion_is_near_and_named(kind: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Model(kind, batch_first=True, **settings).eval()
    new, report = converted(model)
    new.eval()
    x = batches()[0]
    with torch.no_grad():
        got, want = new(x), model(x)
    assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())
    names = [layer.name for layer in report.layers if layer.method == "int8"]
    assert names[:2] == ["rnn.ih_l0", "rnn.hh_l0"]
    parts = 2 * settings.get("num_layers", 1) * (1 + settings.get("bidirectional", False))
    assert len(names) == parts
    assert isinstance(model.rnn, kind)  # the one that was given is as it was


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_file_gives_what_the_layer_gives(
    tmp_path: Path, kind: Any, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = Model(kind, batch_first=True, **settings).eval()
    new, _ = converted(model)
    path = tmp_path / "m.lutra"
    export(new.eval(), path, batches()[0][:1])
    graph = load_graph(path)
    ops = [node.op for node in graph.nodes]
    wanted = settings.get("num_layers", 1) * (1 + settings.get("bidirectional", False))
    assert ops.count(f"int8_{kind.__name__.lower()}") == wanted
    x = batches()[1]
    with torch.no_grad():
        want = new(x).numpy()
    for isa in runnable_isas():
        np.testing.assert_allclose(Session(path, isa=isa)(x.numpy()), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_gradients_are_near_those_of_the_dense_layer(kind: Any) -> None:
    torch.manual_seed(0)
    model = Model(kind, batch_first=True).train()
    new, _ = converted(model)
    new.train()
    x = batches()[0]
    for m in (model, new):
        m(x).square().mean().backward()
    for name in ("ih", "hh"):
        want = getattr(model.rnn, f"weight_{name}_l0").grad.flatten()
        got = getattr(new.rnn, f"{name}_l0").weight.grad.flatten()
        assert float(torch.cosine_similarity(got, want, dim=0)) > 0.98


@pytest.mark.slow
def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    new, _ = converted(Model(nn.GRU, batch_first=True).eval())
    new.train()
    x = batches()[0]
    y = x.cumsum(1)[:, :, :3].tanh()
    optimizer, losses = torch.optim.Adam(new.parameters(), 1e-2), []
    for _ in range(30):
        loss = (new(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


class Stream(nn.Module):
    """A block of sound and the state before it; the answer and the state behind it."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.rnn = kind(C, H, num_layers=2, batch_first=True)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        h, c = h.transpose(0, 1), c.transpose(0, 1)
        if isinstance(getattr(self.rnn, "mode", None), str) and self.rnn.mode == "GRU":
            y, h = self.rnn(x, h)
            return y, h.transpose(0, 1), c.transpose(0, 1)
        y, (h, c) = self.rnn(x, (h, c))
        return y, h.transpose(0, 1), c.transpose(0, 1)


@pytest.mark.parametrize("kind", [nn.LSTM])
def test_states_go_in_and_out(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(0)
    model = Stream(kind).eval()
    state = torch.zeros(8, 2, H)
    data = [(x, state + 0.1, state - 0.1) for x in batches()]
    new, _ = convert(model, {"rnn": Int8()}, data)
    path = tmp_path / "m.lutra"
    export(new.eval(), path, tuple(t[:1] for t in data[0]), dynamic_axes={"x": [1]})
    session = Session(path)
    x = batches()[1].numpy()
    names = [value.name for value in session.get_inputs()]
    whole = session.run(None, dict(zip(names, (x, state.numpy(), state.numpy()), strict=True)))
    states, made = [state.numpy(), state.numpy()], []
    for t in range(x.shape[1]):
        feeds = dict(zip(names, (x[:, t : t + 1], *states), strict=True))
        y, *states = session.run(None, feeds)
        made.append(y)
    assert same_bits(np.concatenate(made, 1), whole[0])
    assert same_bits(states[0], whole[1])
    assert same_bits(states[1], whole[2])


def test_what_stays_a_layer_of_float32() -> None:
    model = Model(nn.GRU, batch_first=True).eval()
    new, report = convert(model, {"head": Int8(), "*": Keep()}, batches())
    assert isinstance(new.rnn, nn.GRU)
    new, report = convert(model, {"head": Int8(), "*": PQ(v=2)}, batches())
    (entry,) = [layer for layer in report.layers if layer.name == "rnn"]
    assert "Int8()" in entry.reason


def test_packed_sequences_are_refused() -> None:
    new, _ = converted(Model(nn.GRU, batch_first=True).eval())
    packed = nn.utils.rnn.pack_padded_sequence(batches()[0], [12] * 8, batch_first=True)
    with pytest.raises(LutraError, match="packed sequences"):
        new.rnn(packed)


def test_time_first_and_single_samples() -> None:
    torch.manual_seed(0)
    dense = Model(nn.LSTM, num_layers=2).eval()
    new, _ = converted(dense, batch_first=False)
    new.eval()
    x = batches(batch_first=False)[0]
    with torch.no_grad():
        got, (h, c) = new.rnn(x)
        want, (hw, cw) = dense.rnn(x)
        alone, (h1, _) = new.rnn(x[:, 3])
    assert (got.shape, h.shape, c.shape) == (want.shape, hw.shape, cw.shape)
    torch.testing.assert_close(alone, got[:, 3])
    torch.testing.assert_close(h1, h[:, 3])
    torch.testing.assert_close(got[-1], h[-1])

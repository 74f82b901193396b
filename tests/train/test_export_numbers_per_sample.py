"""Inputs and outputs of one number a sample: times, lengths, class labels; and masks of lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lutra
from lutra.train import Int8, convert, export


class Timed(nn.Module):
    """A linear layer of a time and a class, as the networks of diffusion models begin."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.label = nn.Linear(16, 4), nn.Embedding(10, 16)
        self.register_buffer("rates", torch.linspace(0, 1, 8))

    def forward(self, time: Tensor, label: Tensor) -> Tensor:
        angles = time[:, None] * self.rates
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        result: Tensor = self.linear(waves + self.label(label))
        return result


class Mean(nn.Module):
    """The mean of the first frames of each sample."""

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        seen = torch.arange(x.shape[1]) < length[:, None]
        return (x * seen[..., None]).sum(1) / length[:, None]


class Filled(nn.Module):
    """The largest value of the first frames of each sample, by their complement."""

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        unseen = torch.arange(x.shape[1])[None] >= length[:, None]
        return x.masked_fill(unseen[..., None], -1e4).amax(1)


class Compared(nn.Module):
    """A sign that depends on two integers of a sample."""

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(((a > b) | (a == 1))[:, None], x, -x)


class Squashed(nn.Module):
    """Of a number, a number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(2 * x + 1)


class Summed(nn.Module):
    """Of a vector, a number."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x).sum(1)


def _lengths(n: int) -> Tensor:
    return torch.arange(n) % 5 + 1


CASES = {
    "time and label": (Timed(), lambda n: (torch.rand(n) * 9, torch.arange(n) % 10)),
    "mean of frames": (Mean(), lambda n: (torch.randn(n, 5, 6), _lengths(n))),
    "maximum of frames": (Filled(), lambda n: (torch.randn(n, 5, 6), _lengths(n))),
    "comparisons": (Compared(), lambda n: (torch.randn(n, 6), _lengths(n), _lengths(n).flip(0))),
    "number to number": (Squashed(), lambda n: (torch.randn(n),)),
    "vector to number": (Summed(), lambda n: (torch.randn(n, 7),)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_number_a_sample(name: str, tmp_path: Path) -> None:
    model, inputs = CASES[name]
    torch.manual_seed(0)
    export(model.eval(), tmp_path / "m.lutra", inputs(3))
    for isa in lutra.runnable_isas():
        session = lutra.Session(tmp_path / "m.lutra", isa=isa)
        for count in (1, 7):
            given = inputs(count)
            feeds = {v.name: x.numpy() for v, x in zip(session.inputs, given, strict=True)}
            (got,) = session.run(None, feeds)
            want = model(*given).detach().numpy()
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_one_number_a_sample_is_calibrated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.rand(32) * 9, torch.randint(10, (32,))) for _ in range(4)]
    model = Timed().eval()
    converted, _ = convert(model, {"linear": Int8()}, batches)
    export(converted, tmp_path / "m.lutra", batches[0])
    session = lutra.Session(tmp_path / "m.lutra")
    time, label = batches[1]
    got = session.run(None, {"time": time.numpy(), "label": label.numpy()})[0]
    want = model(time, label).detach().numpy()
    assert np.square(got - want).mean() < 1e-3 * want.var()


def test_a_single_number_has_no_batch(tmp_path: Path) -> None:
    with pytest.raises(lutra.LutraError, match=r"example_input\[0\] has shape \(\)"):
        export(Squashed(), tmp_path / "m.lutra", torch.tensor(1.0))
    assert not (tmp_path / "m.lutra").exists()

"""Values with several readers, from PyTorch to the engine: who reads integers, who reads floats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra import Session, run_reference
from lutra.format import load_graph
from lutra.train import PQ, Int8, convert
from lutra.train.exporting.export import export


def check(model: nn.Module, recipe: object, x: Tensor, path: Path, **settings: bool) -> None:
    """The file's outputs are those of the converted model and of the reference."""
    torch.manual_seed(0)
    converted, _ = convert(model, {"*": recipe}, [x], progress=False, **settings)
    export(converted, path, x[:2])
    with torch.no_grad():
        wanted = converted.eval()(x[:3])
    graph, feeds = load_graph(path), {}
    feeds[graph.inputs[0].name] = x[:3].numpy()
    reference = run_reference(graph, feeds)
    got = Session(path).run(None, feeds)
    for name, y, want in zip(
        graph.outputs, got, wanted if isinstance(wanted, tuple) else (wanted,), strict=True
    ):
        np.testing.assert_allclose(y, reference[name], rtol=0, atol=1e-5)
        np.testing.assert_allclose(y, want.numpy(), rtol=0, atol=1e-4)


class Skip(nn.Module):
    """A layer, a pooled branch with a layer of its own, and a second reader of what was pooled."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.outer = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = F.relu(self.outer(x))
        return self.join(y, F.interpolate(self.inner(F.max_pool2d(y, 2)), scale_factor=2))


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]] = {
    "concat": lambda y, z: torch.cat([y, z], 1),
    "add": lambda y, z: y + z,
    "gate": lambda y, z: y.sigmoid() * z,
    "average pooling": lambda y, z: F.avg_pool2d(y, 2) + F.avg_pool2d(z, 2),
    "another pooling": lambda y, z: (z, F.max_pool2d(y, 3, 1, 1).tanh()),
    "mean": lambda y, z: y.mean((2, 3)) + z.mean((2, 3)),
    "maximum": lambda y, z: (z, y.amax((2, 3))),
    "upsampling": lambda y, z: F.interpolate(y, scale_factor=2) + F.interpolate(z, scale_factor=2),
    "flatten": lambda y, z: torch.cat([y.flatten(1), z.flatten(1)], 1),
    "function": lambda y, z: (z, F.gelu(y)),
    "permuted output": lambda y, z: (z, y.permute(0, 2, 3, 1)),
    "sliced output": lambda y, z: (z, y[:, 2:5]),
}


QUICK = ("concat", "another pooling", "sliced output")


@pytest.mark.parametrize(
    "join",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in JOINS],
)
def test_a_value_is_pooled_for_integers_and_read_again(join: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    check(Skip(JOINS[join]), Int8(), x, tmp_path / "skip.lutra")


class Branches(nn.Module):
    """Two convolutions of one tensor; a third reads what the second makes."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.short, self.long = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.last = nn.Conv2d(8, 12, 3, padding=1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        long = self.act(self.last(self.act(self.long(x))))
        return torch.cat([self.act(self.short(x)), long], 1)


class Gate(nn.Module):
    """Two linear layers of one tensor; a third reads what the second makes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.hidden, self.last = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) * self.last(self.hidden(x))


@pytest.mark.parametrize(
    ("act", "share"),
    [
        (nn.ReLU, True),
        (nn.ReLU, False),
        pytest.param(nn.Identity, True, marks=pytest.mark.slow),
        pytest.param(nn.SiLU, True, marks=pytest.mark.slow),
    ],
)
def test_layers_that_share_codes_have_readers_of_integers(
    act: type[nn.Module], share: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 16, 7, 7)
    check(Branches(act()), PQ(v=4), x, tmp_path / "branches.lutra", share_encoders=share)


@pytest.mark.parametrize("shape", [(64, 32), (64, 5, 32)])
def test_linear_layers_that_share_codes_have_readers_of_integers(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    check(Gate(), PQ(v=4), torch.randn(shape), tmp_path / "gate.lutra")

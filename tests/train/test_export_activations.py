"""Activations that are written in their parts are one operator in the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lutra
from lutra.train import Int8, convert, export

PARTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "relu6 of x + 3": ("hardswish", lambda x: x * F.relu6(x + 3) / 6),
    "divided first, in place": ("hardswish", lambda x: x.mul(F.relu6(x + 3.0).div_(6.0))),
    "hardtanh, a sixth": ("hardswish", lambda x: x * F.hardtanh(x + 3, 0, 6) * (1 / 6)),
    "hardsigmoid": ("hardswish", lambda x: x * F.hardsigmoid(x)),
    "clamp": ("hardswish", lambda x: x * torch.clamp(x / 6 + 0.5, 0, 1)),
    "sigmoid": ("silu", lambda x: x * torch.sigmoid(x)),
    "exponential": ("silu", lambda x: x / (1 + torch.exp(-x))),
    "erf": ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    "tanh of a cubic": (
        "gelu",
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "tanh of softplus": ("mish", lambda x: x * torch.tanh(F.softplus(x))),
    "log of 1 + exp": ("softplus", lambda x: torch.log(1 + torch.exp(x))),
    "one over": ("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "another slope": lambda x: x * torch.sigmoid(1.702 * x),
    "another shift": lambda x: x * F.relu6(x + 2) / 6,
    "another value": lambda x: x * torch.sigmoid(x.flip(1)),
    "a mean": lambda x: x * F.hardsigmoid(x.mean((2, 3), keepdim=True)),
}
NAMES = {"hardswish", "silu", "gelu", "mish", "softplus"}


class Net(nn.Module):
    """A convolution and a function of it; and the sum with what a reader inside would see."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def run(net: nn.Module, folder: Path) -> tuple[lutra.Session, Tensor]:
    x = 3 * torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    file = folder / "a.lutra"
    export(net.eval(), file, x)
    session = lutra.Session(file, threads=1)
    with torch.no_grad():
        want = net(x)
    np.testing.assert_allclose(session(x.numpy()), want.numpy(), rtol=1e-5, atol=1e-5)
    return session, x


@pytest.mark.parametrize("name", PARTS)
def test_parts_become_one_operator(tmp_path: Path, name: str) -> None:
    operator, function = PARTS[name]
    session, _ = run(Net(function), tmp_path)
    assert [node.op for node in session.graph.nodes] == ["conv2d", operator]


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_stay_as_they_are(tmp_path: Path, name: str) -> None:
    session, _ = run(Net(OTHERS[name]), tmp_path)
    assert not NAMES & {node.op for node in session.graph.nodes}


def test_a_part_that_is_read_elsewhere_too_stays(tmp_path: Path) -> None:
    def both(x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        return x * gate + gate

    session, _ = run(Net(both), tmp_path)
    operators = [node.op for node in session.graph.nodes]
    assert sorted(operators) == ["add", "conv2d", "sigmoid", "silu"]


def test_activations_of_activations(tmp_path: Path) -> None:
    def twice(x: Tensor) -> Tensor:
        inner = x * torch.sigmoid(x)
        return inner * F.relu6(inner + 3) / 6

    session, _ = run(Net(twice), tmp_path)
    assert [node.op for node in session.graph.nodes] == ["conv2d", "silu", "hardswish"]


def test_an_int8_layer_takes_over_the_activation(tmp_path: Path) -> None:
    net = nn.Sequential(Net(PARTS["relu6 of x + 3"][1]), nn.Conv2d(8, 8, 1)).eval()
    data = torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    converted, _ = convert(net, {"*": Int8()}, data.split(8), progress=False)
    session, x = run(converted, tmp_path)
    steps = session.profile(x.numpy(), runs=1).steps
    assert any("hardswish" in step.name and step.method == "int8" for step in steps)

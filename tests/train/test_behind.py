"""What stands behind a layer is found in any model, and an error counts there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.train import PQ, convert
from lutra.train.conversion.behind import Behind, Follower


def found(model: nn.Module, x: Tensor, *names: str) -> dict[str, Behind]:
    model.eval()
    follower = Follower({name: model.get_submodule(name) for name in names})
    with torch.no_grad(), follower.following(model):
        follower.returned(model(x))
    return follower.found()


class Block(nn.Module):
    """A residual block, whose addition and ReLU are written in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU(inplace=kind == "in place")

    def forward(self, x: Tensor) -> Any:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.kind == "in place":
            y += self.down(x)
            return self.relu(y)
        if self.kind == "function":
            return F.relu(torch.add(self.down(x), y))
        if self.kind == "kept":  # the sum is read without the ReLU as well
            y = y + self.down(x)
            return y, F.relu(y)
        if self.kind == "before":  # the norm's output is read twice
            return F.relu(y + self.down(x)) + y
        return F.relu6(y * self.down(x))


@pytest.mark.parametrize("kind", ["in place", "function", "kept", "before", "product"])
def test_norms_additions_and_clamps_are_found(kind: str) -> None:
    model = Block(kind)
    behind = found(model, torch.randn(2, 8, 6, 6), "conv1", "conv2", "down")
    assert behind["conv1"] == Behind(model.norm1, False, 0.0, math.inf)
    adds = kind not in ("before", "product")
    low = 0.0 if kind in ("in place", "function") else -math.inf
    assert behind["conv2"] == Behind(model.norm2, adds, low, math.inf)
    assert behind["down"] == Behind(None, adds or kind == "before", low if adds else (
        0.0 if kind == "before" else -math.inf
    ), math.inf)  # fmt: skip


def test_a_layer_whose_output_is_read_twice_or_returned_has_nothing_behind_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Any:
            a, b, c = self.a(x), self.b(x), self.c(x)
            again = self.c(x)
            return F.relu(a) + a.mean(), b, F.relu(b), F.relu(c), again

    behind = found(Twice(), torch.randn(3, 4), "a", "b", "c")
    assert behind == {"a": Behind(), "b": Behind()}  # c is called twice


def test_a_norm_over_another_axis_is_not_folded() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5), nn.ReLU())
    assert found(model, torch.randn(3, 5, 4), "0") == {"0": Behind()}
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Hardtanh(-2.0, 3.0))
    assert found(model, torch.randn(3, 4), "0") == {"0": Behind(model[1], False, -2.0, 3.0)}


def test_something_smaller_may_be_added() -> None:
    class Bias(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.other = torch.randn(shape)

        def forward(self, x: Tensor) -> Tensor:
            return self.other + self.layer(x)

    assert found(Bias(4), torch.randn(3, 4), "layer")["layer"].adds
    assert found(Bias(5, 1, 4), torch.randn(3, 4), "layer") == {"layer": Behind()}


class Skips(nn.Module):
    """A residual network: the error of one branch can be mended by the next."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block("in place") for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(torch.relu(self.first(x)))
        return y


def test_layers_mend_what_is_added_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dense = Skips().eval()
    for block in dense.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.running_mean.normal_(0.0, 0.2)
    x = F.interpolate(torch.randn(80, 3, 4, 4), scale_factor=2, mode="bilinear")
    held = F.interpolate(torch.randn(40, 3, 4, 4), scale_factor=2, mode="bilinear")

    def error() -> float:
        model, report = convert(dense, {"*": PQ(v=9, otherwise=PQ(v=4))}, x.split(20))
        assert all(layer.error <= layer.start_error for layer in report.replaced)
        with torch.no_grad():
            want = dense(held)
            return float((model.eval()(held) - want).square().mean() / want.var())

    followed = error()
    monkeypatch.setattr(Follower, "found", lambda self: {})
    assert followed < 0.95 * error()

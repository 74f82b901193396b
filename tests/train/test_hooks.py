"""Hooks of modules that are replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lutra import Session
from lutra.train import PQ, Int8, convert, export


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def quick(model: nn.Module, recipe: Any) -> Any:
    return convert(model, recipe, [noise(64, 8)], rows=256, kmeans_steps=2, progress=False)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def test_forward_hooks_move_and_are_exported(tmp_path: Path) -> None:
    dense = net()
    dense[0].register_forward_hook(lambda m, args, y: y * 100.0)
    dense[0].register_forward_pre_hook(lambda m, args: (args[0] + 1.0,))
    model, report = quick(dense, {"*": Int8()})
    x = noise(8, 8)
    want = dense(x).detach()
    assert not report.notes
    torch.testing.assert_close(model(x), want, rtol=0.0, atol=0.05 * float(want.abs().max()))
    export(model, tmp_path / "m.lutra", x)
    got = torch.from_numpy(Session(tmp_path / "m.lutra")(x.numpy()))
    torch.testing.assert_close(got, model.eval()(x), rtol=1e-3, atol=1e-3)


class Recorder:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def hook(self, module: nn.Module, *rest: Any) -> None:
        self.seen.append(type(module).__name__)

    def saved(self, module: nn.Module, *rest: Any) -> None:
        self.seen.append("saved")


def test_other_hooks_move_with_their_objects() -> None:
    dense, recorder = net(), Recorder()
    dense[0].register_forward_hook(lambda m, a, k, y: recorder.hook(m), with_kwargs=True)
    dense[0].register_full_backward_hook(recorder.hook)
    dense[0].register_full_backward_pre_hook(recorder.hook)
    dense[0].register_state_dict_pre_hook(recorder.saved)
    dense[0].register_load_state_dict_pre_hook(recorder.hook)
    dense[0].register_load_state_dict_post_hook(recorder.hook)
    model, _ = quick(dense, {"0": PQ(v=2)})
    recorder.seen.clear()
    model(noise(8, 8).requires_grad_()).sum().backward()
    assert recorder.seen == ["PQLinear"] * 3
    recorder.seen.clear()
    state = model.state_dict()
    model.load_state_dict(state)
    assert recorder.seen == ["saved", "PQLinear", "PQLinear"]


class Own(nn.Linear):
    """A layer with a hook that is a method of its own."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_forward_hook(self.note)

    def note(self, *args: Any) -> None:
        self.calls = getattr(self, "calls", 0) + 1


def test_hooks_that_are_lost_are_named() -> None:
    model, report = quick(nn.Sequential(Own(), nn.Linear(8, 4)), {"*": PQ(v=2)})
    assert not model[0]._forward_hooks
    assert report.notes == (
        "a forward hook of '0' is lost, as it belongs to the dense layer itself",
    )


@pytest.mark.parametrize("where", ["m", "m.out_proj"])
def test_hooks_of_an_attention(where: str) -> None:
    calls: list[int] = []
    model: Any = Attend()
    model.get_submodule(where).register_forward_hook(lambda m, a, y: calls.append(1))
    made, report = convert(model, {"*": Int8()}, [noise(16, 4, 8)], progress=False)
    calls.clear()
    made(noise(2, 4, 8))
    assert calls == [1] * (where == "m")
    assert ("'m.out_proj' are lost" in str(report)) == (where == "m.out_proj")


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.m(x, x, x)[0]
        return y

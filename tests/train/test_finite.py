"""NaN and infinity, of which a quantised layer would make numbers, stop training and conversion."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lutra.errors import LutraError
from lutra.train import PQ, Int8, Lookup, check_finite, convert, finetune
from lutra.train.finetuning import step
from lutra.train.layers.finite import FiniteCheck, is_finite

FAMILIES = {"PQ": PQ(v=4), "tree": PQ(v=4, encoder="tree"), "Lookup": Lookup(), "Int8": Int8()}
NAN, INF = float("nan"), float("inf")


class Net(nn.Module):
    """A kept layer, a function that makes NaN of negative numbers if asked to, and two others."""

    def __init__(self, root: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(12, 16), nn.BatchNorm1d(16)
        self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, 5)
        self.root = root

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm(self.stem(x))
        x = x.sqrt() if self.root else F.relu(x)
        if mask is not None:
            x = x * mask.exp()
        y: Tensor = self.head(F.relu(self.hidden(x)))
        return y


def inputs() -> Tensor:
    return torch.randn(32, 12, generator=torch.Generator().manual_seed(1))


def converted(method: Any = None, layers: str = "h*") -> Any:
    torch.manual_seed(0)
    return convert(Net(), {layers: method or PQ(v=4, k=8)}, [inputs()], progress=False)[0]


def loader(x: Tensor, *more: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, *more, torch.arange(len(x)) % 5), batch_size=8)


def refused(message: str, model: nn.Module, data: Any, **settings: Any) -> None:
    with pytest.raises(LutraError, match=message):
        finetune(model, data, progress=False, **{"steps": 8, **settings})


@pytest.mark.parametrize("method", FAMILIES.values(), ids=FAMILIES)
def test_finetune_names_batch_and_layer(method: Any) -> None:
    model, x = converted(method), inputs()
    before = copy.deepcopy(model)
    x[17, 3] = NAN
    message = (
        r"batch 3 of epoch 1 \(step 3\): input 0 has NaN in 1 of 96 values, and it reaches layer "
        "'hidden'; repair the data"
    )
    refused(message, model, loader(x), lr=0.0, weight_decay=0.0)
    for (name, got), want in zip(
        model.named_parameters(), dict(before.named_parameters()).values(), strict=True
    ):
        assert torch.isfinite(got).all(), name
        assert name.startswith("stem") or got.shape == want.shape
    assert torch.isfinite(model.norm.running_mean).all()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("value", [INF, -INF])
def test_infinity_stops_as_well(value: float) -> None:
    x = inputs()
    x[0, 0] = value
    refused("batch 1 of epoch 1 .*infinity in 1 of 96", converted(), loader(x))


def test_the_epoch_is_counted() -> None:
    """The sixth step is the second batch of the second epoch."""
    model, clean = converted(), inputs()
    seen = [0]

    class Late(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            seen[0] += 1
            x, y = super().__getitem__(index)
            return (x * NAN if seen[0] == 32 + 8 + 1 else x), y

    data = DataLoader(Late(clean, torch.arange(32) % 5), batch_size=8)
    refused(r"batch 2 of epoch 2 \(step 6\): input 0", model, data)


def test_nan_that_the_model_makes_is_found_at_the_layer() -> None:
    model = converted()
    model.root = True
    refused(
        r"batch 1 of epoch 1 \(step 1\): the input of layer 'hidden' has NaN in \d+ of 128 values",
        model,
        loader(inputs()),
    )


def test_masks_of_infinity_are_inputs_as_others() -> None:
    mask = torch.zeros(32, 16)
    mask[:, 3] = -INF
    assert finetune(converted(), loader(inputs(), mask), steps=2, progress=False).steps == 2
    mask[0, 0] = 1.0
    refused("input 1 has infinity in 8 of 128 values", converted(), loader(inputs(), mask))


def test_large_numbers_are_finite() -> None:
    """Their sum is not."""
    x = torch.full((4, 64), 3e38)
    assert not torch.isfinite(x.sum())
    assert is_finite(x)
    assert is_finite(torch.arange(3))
    assert is_finite(torch.full((1 << 12,), 60000.0, dtype=torch.float16))
    x[3, 3] = NAN
    assert not is_finite(x)


def test_a_loss_names_the_layer_that_breaks() -> None:
    model = converted(layers="hidden")
    with torch.no_grad():
        model.head.weight.fill_(NAN)
    refused(
        r"the loss is nan at step 1; lower lr.*batch 1 of epoch 1, where the output of layer "
        "'head' is the first with NaN in 40 of 40 values",
        model,
        loader(inputs()),
    )


def test_evaluation_is_not_checked() -> None:
    def evaluate(model: nn.Module) -> float:
        return float(model(inputs() * NAN).isfinite().float().mean())

    run = finetune(converted(), loader(inputs()), steps=2, evaluate=evaluate, progress=False)
    assert run.history[-1]["metric"] == 1.0


@pytest.mark.parametrize("where", ["input", "layer", "nowhere"])
def test_where_processes_must_keep_in_step(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """What was seen is judged after the forward pass, once for all processes."""
    told: list[float] = []

    def mean(value: float) -> float:
        told.append(value)
        return value

    monkeypatch.setattr(step, "collective", types.SimpleNamespace(active=lambda: True, mean=mean))
    model, x = converted(), inputs()
    if where == "nowhere":
        finetune(model, loader(x), steps=2, progress=False)
        assert all(value == value for value in told)
        return
    if where == "input":
        x[9] = NAN
        refused(r"batch 2 of epoch 1 .*input 0 has NaN in 12 of 96 values.*'hidden'", model,
                loader(x))  # fmt: skip
        assert len(told) == 2
    else:
        model.root = True
        refused(r"batch 1 of epoch 1 .*the input of layer 'hidden'", model, loader(x))
        assert len(told) == 1
    assert told[-1] != told[-1]  # the others hear of it


def test_another_process_that_stopped_stops_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    others = types.SimpleNamespace(active=lambda: True, mean=lambda value: NAN)
    monkeypatch.setattr(step, "collective", others)
    refused(r"\(step 1\): another process has", converted(), loader(inputs()))


def test_a_loop_of_ones_own() -> None:
    model, x = converted(), inputs()
    bad = x.clone()
    bad[:3, 0] = NAN
    assert torch.isfinite(model.eval()(bad)).all()  # so it would go unseen
    checks = check_finite(model)
    for training in (False, True):
        model.train(training)
        model(x)
        with pytest.raises(LutraError, match=r"input of layer 'hidden' has NaN in \d+ of 512"):
            model(bad)
    checks.remove()
    model.eval().norm.reset_running_stats()
    assert torch.isfinite(model(bad)).all()
    with check_finite(model), pytest.raises(LutraError, match="'hidden'"):
        model(bad)
    assert torch.isfinite(model(bad)).all()
    layer = model.head
    with check_finite(layer), pytest.raises(LutraError, match="input of the model has infinity"):
        layer(torch.full((2, 16), INF))


def test_checks_may_wait() -> None:
    model = converted().eval()
    model.norm.reset_running_stats()
    with FiniteCheck(model, wait=True) as check:
        model(inputs())
        check.verify()
        with check.paused():
            model(inputs() * NAN)
        check.verify()
        model(inputs() * NAN)
        with pytest.raises(LutraError, match="'hidden' has NaN in 512 of 512"):
            check.verify()
        check.verify()  # what was judged is forgotten


@pytest.mark.parametrize("method", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("value", [NAN, -INF])
def test_convert_names_the_layer(method: Any, value: float) -> None:
    """Also where the sample that it keeps has none of it."""
    data = torch.randn(4096, 12)
    data[777, 5] = value
    with pytest.raises(LutraError, match=r"the input of layer 'stem' holds NaN or infinity \("):
        convert(Net(), {"*": method}, data.split(512), rows=64, progress=False)

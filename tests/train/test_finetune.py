"""Fine-tuning: it learns, it works with accelerate, and it refuses what cannot work."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from finetuning_cases import BATCH, EPOCH, Augmented, Net, converted, loader, refused, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lutra.train import PQ, export, finetune
from lutra.train.finetuning.seeding import seed_everything

# It learns


@pytest.fixture
def model() -> nn.Module:
    return converted()


@pytest.mark.parametrize(
    "method",
    [
        PQ(v=9, k=8),
        pytest.param(PQ(v=9, k=8, centroids="average"), marks=pytest.mark.slow),
        pytest.param(PQ(v=9, k=8, gradient="soft"), marks=pytest.mark.slow),
        PQ(v=9, k=8, gradient="soft", centroids="average"),
    ],
    ids=lambda method: f"{method.gradient}-{method.centroids}",
)
def test_the_loss_falls(method: PQ) -> None:
    model = converted(method)
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = finetune(model, loader(), epochs=10, lr=1e-2, evaluate_every=EPOCH)
    losses = [entry["loss"] for entry in run.history]
    assert run.steps == 10 * EPOCH
    assert len(losses) == 10
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still
    assert run.history[-1]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_history_and_modes(model: nn.Module) -> None:
    model.norm.eval()
    modes = [m.training for m in model.modules()]
    seen: list[tuple[bool, bool]] = []

    def evaluate(current: nn.Module) -> float:
        seen.append((current.training or current.norm.training, torch.is_grad_enabled()))
        assert current is model
        torch.rand(3)
        return 0.5

    run = finetune(model, loader(), steps=7, evaluate=evaluate, evaluate_every=3, lr=1e-3)
    assert [entry["step"] for entry in run.history] == [3.0, 6.0, 7.0]
    assert all(entry["metric"] == 0.5 for entry in run.history)
    assert seen == [(False, False)] * 3
    assert [m.training for m in model.modules()] == modes
    assert [round(e["lr"], 6) for e in run.history] == sorted(
        (round(e["lr"], 6) for e in run.history), reverse=True
    )


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_evaluation_does_not_disturb_training(workers: int) -> None:
    def evaluate(current: nn.Module) -> float:
        seed_everything(999)
        return 0.0

    models = [converted() for _ in range(2)]
    data = loader(num_workers=workers)
    finetune(models[0], data, steps=EPOCH + 1)
    finetune(models[1], data, steps=EPOCH + 1, evaluate=evaluate, evaluate_every=1)
    same(*models)


def test_epochs_may_be_fractions(model: nn.Module) -> None:
    assert finetune(model, loader(), epochs=1.3).steps == 6
    assert finetune(model, loader(), epochs=0.01).steps == 1


def test_warmup_and_temperature_learning_rate() -> None:
    model = converted(PQ(v=9, k=8, gradient="soft"))
    logit = model.conv.inverse_temperature_logit
    before = (logit.item(), model.stem.weight.clone())
    finetune(model, loader(), steps=1, lr=1e-6, temperature_lr=0.5, warmup=4)
    # Adam's first step is the learning rate, here a fifth of it
    assert abs(logit.item() - before[0]) == pytest.approx(0.1, rel=1e-2)
    assert (model.stem.weight - before[1]).abs().max() < 1e-6


@pytest.mark.slow
def test_distillation_follows_the_teacher() -> None:
    torch.manual_seed(1)
    teacher = Net()
    modes = [m.training for m in teacher.modules()]
    state = copy.deepcopy(teacher.state_dict())
    model = converted()
    x = Augmented().x

    def distance(current: nn.Module) -> float:
        with torch.no_grad():
            wanted = teacher.eval()(x).softmax(1)
            result = F.kl_div(current.eval()(x).log_softmax(1), wanted, reduction="batchmean")
            teacher.train()
            return float(result)

    before = distance(model)
    wrong = DataLoader(TensorDataset(x, torch.zeros(len(x)).long()), BATCH, shuffle=True)
    finetune(model, wrong, epochs=8, lr=5e-3, teacher=teacher, feature_layers=["norm"])
    assert distance(model) < 0.5 * before
    assert [m.training for m in teacher.modules()] == modes
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, state[name])
    assert not any(m._forward_hooks for m in [*model.modules(), *teacher.modules()])


def test_batch_norm_is_renewed() -> None:
    model = converted()
    data = DataLoader(TensorDataset(Augmented().x, Augmented().y), batch_size=60)
    moved: list[Tensor] = []
    finetune(
        model,
        data,
        steps=2,
        lr=1e-9,
        batch_norm_batches=1,
        evaluate=lambda m: moved.append(m.norm.running_mean.clone()) or 0.0,
    )
    inputs: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model.eval()(Augmented().x)
    torch.testing.assert_close(model.norm.running_mean, inputs[0].mean((0, 2, 3)))
    assert torch.equal(moved[-1], model.norm.running_mean)  # before the evaluation
    assert model.norm.momentum == 0.1


def test_a_loop_of_ones_own_works(model: nn.Module) -> None:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        for x, y in loader():
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-EPOCH:]) < 0.8 * sum(losses[:EPOCH])


# accelerate


@pytest.mark.slow
def test_mixed_precision_may_change_between_runs() -> None:
    model = converted()
    for precision in ("bf16", "no", None, "bf16"):
        before = model.stem.weight.clone()
        finetune(model, loader(), steps=1, mixed_precision=precision)
        assert not torch.equal(model.stem.weight, before)
        # nothing of accelerate stays on the model
        assert "forward" not in vars(model)
        assert not [name for name in vars(model) if "accelerate" in name or "original" in name]
        assert all(p.dtype == torch.float32 for p in model.parameters())
        model.eval()
        with torch.no_grad():
            assert model(Augmented().x).dtype == torch.float32
            want = copy.deepcopy(model)(Augmented().x)
            assert torch.equal(model(Augmented().x), want)


def test_evaluation_is_in_full_precision(tmp_path: Path) -> None:
    """And may copy and export the model."""
    x = Augmented().x
    outputs: list[Tensor] = []

    def evaluate(current: nn.Module) -> float:
        outputs.append(current(x))
        export(current, tmp_path / "m.lutra", x)
        clone = copy.deepcopy(current)
        assert torch.equal(clone(x), outputs[-1])
        assert not [name for name in vars(clone) if "accelerate" in name or "original" in name]
        return 0.0

    model = converted()
    finetune(
        model,
        loader(),
        steps=2,
        mixed_precision="bf16",
        evaluate=evaluate,
        evaluate_every=1,
        teacher=Net(),
        feature_layers=["norm"],
    )
    with torch.no_grad():
        assert torch.equal(model.eval()(x), outputs[-1])


def test_an_accelerator_of_ones_own() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(mixed_precision="bf16")
    try:
        model = converted()
        finetune(model, loader(), steps=1, accelerator=accelerator)
        finetune(model, loader(), steps=1, accelerator=accelerator, mixed_precision="bf16")
        finetune(model, loader(), steps=1)  # shares its state
        refused("mixed_precision='no' contradicts", model, loader(), steps=1,
                accelerator=accelerator, mixed_precision="no")  # fmt: skip
        refused("differs from that of the accelerator this process already has, 'bf16'", model,
                loader(), steps=1, mixed_precision="no")  # fmt: skip
        assert accelerator.mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state()


def test_unknown_precision_is_refused(model: nn.Module) -> None:
    refused("mixed_precision='int3'", model, loader(), steps=1, mixed_precision="int3")
    finetune(model, loader(), steps=1, mixed_precision="bf16")


# What is refused


def test_wrong_settings_are_refused(model: nn.Module) -> None:
    refused("either epochs or steps", model, loader())
    refused("either epochs or steps", model, loader(), epochs=1, steps=1)
    refused("no training at all", model, loader(), steps=0)
    refused("no training at all", model, loader(), epochs=-1)
    refused("distillation=2", model, loader(), steps=1, teacher=Net(), distillation=2)
    refused("seed=-1", model, loader(), steps=1, seed=-1)
    refused("needs a teacher", model, loader(), steps=1, feature_layers=["norm"])
    refused("feature layer 'x'", model, loader(), steps=1, feature_layers=["x"], teacher=Net())
    refused("no parameter", model.requires_grad_(False), loader(), steps=1)


def test_unusable_data_is_refused(model: nn.Module) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield torch.zeros(2, 6, 6)

    x = Augmented().x
    refused("has no known length; give steps", model, DataLoader(Stream()), epochs=1)
    refused("has no batch sampler", model, DataLoader(TensorDataset(x), batch_size=None), steps=1)
    refused("data is a list; give", model, [(x, x)], steps=1)
    few = DataLoader(TensorDataset(x, x), batch_size=1000, drop_last=True)
    refused("has no batches", model, few, steps=1)
    refused(r"a tuple \(inputs, targets\)", model, DataLoader(TensorDataset(x)), steps=1)


def test_a_loss_that_is_not_finite_is_refused(model: nn.Module) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum() * float("nan")

    refused("the loss is nan at step 1; lower lr", model, loader(), steps=2, loss=loss)
    assert all(p.isfinite().all() for p in model.parameters())

"""Fine-tuning: it learns, it resumes with the same bits, and it runs on several processes."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lutra.errors import LutraError
from lutra.train import PQ, PQConv2d, convert, export, finetune
from lutra.train.finetuning import checkpoint
from lutra.train.finetuning.seeding import seed_everything

EPOCH = 4  # batches
BATCH = 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(F.relu(self.stem(x)))))
        y: Tensor = self.fc(self.drop(F.avg_pool2d(x, 3).flatten(1)))
        return y


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Draws from all three generators for every sample, and may crash at one of them."""

    def __init__(self, crash_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        classes = torch.randn(4, 2, 6, 6, generator=generator)
        self.y = torch.arange(EPOCH * BATCH - 5) % 4
        self.x = classes[self.y] + 0.5 * torch.randn(len(self.y), 2, 6, 6, generator=generator)
        self.reads, self.crash_at = 0, crash_at

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        if self.reads == self.crash_at:
            raise OSError("the disk is gone")
        noise = torch.randn(1) + np.random.rand() + random.random()  # noqa: NPY002
        return self.x[index] + 0.1 * noise, self.y[index]


def loader(crash_at: int | None = None, **settings: Any) -> DataLoader[Any]:
    return DataLoader(Augmented(crash_at), batch_size=BATCH, shuffle=True, **settings)


def converted(method: PQ | None = None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    dense, x = Net(), Augmented().x
    dense.norm.momentum = None
    dense(x)  # statistics, so that conversion sees the range that training has
    dense.norm.momentum = 0.1
    recipe = {"conv": method or PQ(v=9, k=8, centroids="average"), "fc": PQ(v=4, k=8)}
    return convert(dense, recipe, [x], rows=256, kmeans_steps=3)[0]


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, got), want in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(got, want), name


@pytest.fixture
def model() -> nn.Module:
    return converted()


def refused(message: str, model: nn.Module, data: Any, **settings: Any) -> None:
    with pytest.raises(LutraError, match=message):
        finetune(model, data, **settings)


# It learns


@pytest.mark.parametrize(
    "method",
    [
        PQ(v=9, k=8),
        PQ(v=9, k=8, centroids="average"),
        PQ(v=9, k=8, gradient="soft"),
        PQ(v=9, k=8, gradient="soft", centroids="average"),
    ],
    ids=str,
)
def test_the_loss_falls(method: PQ) -> None:
    model = converted(method)
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = finetune(model, loader(), epochs=10, lr=1e-2, evaluate_every=EPOCH)
    losses = [entry["loss"] for entry in run.history]
    assert run.steps == 10 * EPOCH
    assert len(losses) == 10
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
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


@pytest.mark.parametrize("workers", [0, 1])
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


# It resumes


@pytest.mark.parametrize(("crash", "workers"), [("evaluate", 0), ("data", 0), ("evaluate", 2)])
def test_a_crashed_run_continues_bit_equal(tmp_path: Path, crash: str, workers: int) -> None:
    """With random augmentation and dropout, in the middle of an epoch and at its last batch."""
    total, every = 2 * EPOCH + 2, EPOCH - 1
    if workers:
        every = EPOCH  # worker processes draw their random numbers once an epoch

    def run(model: nn.Module, data: DataLoader[Any], fails: bool, folder: Path) -> Any:
        count = [0]

        def evaluate(current: nn.Module) -> float:
            count[0] += 1
            if fails and count[0] == 2:
                raise KeyboardInterrupt
            return float(current.stem.weight.sum())

        return finetune(
            model,
            data,
            steps=total,
            lr=3e-3,
            warmup=2,
            clip_norm=1.0,
            evaluate=evaluate,
            evaluate_every=every,
            batch_norm_batches=2,
            checkpoint_dir=folder,
            checkpoint_every=every,
        )

    whole, parts = converted(), converted()
    want = run(whole, loader(num_workers=workers), False, tmp_path / "whole")
    reads = EPOCH * BATCH + 20 if crash == "data" else None
    with pytest.raises((KeyboardInterrupt, OSError)):
        run(parts, loader(reads, num_workers=workers), crash == "evaluate", tmp_path / "parts")
    assert [p.name for p in (tmp_path / "parts").iterdir()] == [f"step-{every:09d}"]
    torch.rand(7)
    fresh = converted()
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1.0)  # everything must come from the checkpoint
    got = run(fresh, loader(num_workers=workers), False, tmp_path / "parts")
    same(fresh, whole)
    assert got.history == want.history
    again = run(converted(), loader(num_workers=workers), True, tmp_path / "parts")  # done already
    assert again.history == want.history


def test_checkpoints_at_every_step_lead_to_the_same_end(tmp_path: Path) -> None:
    whole = converted()
    finetune(whole, loader(), steps=EPOCH + 2, checkpoint_dir=tmp_path / "a", checkpoint_every=1)
    for stop in range(1, EPOCH + 2):
        folder = tmp_path / f"stop-{stop}"

        def evaluate(_: nn.Module, stop: int = stop, count: list[int] = [0]) -> float:  # noqa: B006
            count[0] += 1
            if count[0] == stop + 1:
                count[0] = 0
                raise KeyboardInterrupt
            return 0.0

        settings: dict[str, Any] = {"steps": EPOCH + 2, "checkpoint_dir": folder}
        with pytest.raises(KeyboardInterrupt):
            finetune(
                converted(),
                loader(),
                evaluate=evaluate,
                evaluate_every=1,
                checkpoint_every=1,
                **settings,
            )
        parts = converted()
        assert checkpoint.checkpoints(folder)[-1].name == f"step-{stop:09d}"
        finetune(parts, loader(), **settings)
        same(parts, whole)


def test_tied_layers_resume(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 2, 3, padding=1)
            self.second = self.first
            self.fc = nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(self.second(F.relu(self.first(x))).mean((2, 3)))
            return y

    def make() -> nn.Module:
        torch.manual_seed(0)
        return convert(Tied(), {"first": PQ(v=9, k=8)}, [Augmented().x], rows=99)[0]

    model = make()
    settings: dict[str, Any] = {"steps": 4, "checkpoint_dir": tmp_path, "checkpoint_every": 2}
    finetune(model, loader(), **settings)
    shutil.rmtree(tmp_path / "step-000000004")
    again = make()
    finetune(again, loader(), **settings)
    assert again.first is again.second
    same(again, model)


def test_two_checkpoints_are_kept_and_none_incomplete(tmp_path: Path) -> None:
    stale = tmp_path / "incomplete-000000002"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    (tmp_path / "step-000000009").write_text("a file of the user")
    (tmp_path / "my-step-000000001").mkdir()
    finetune(converted(), loader(), steps=7, checkpoint_dir=tmp_path, checkpoint_every=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "my-step-000000001",
        "step-000000006",
        "step-000000007",
        "step-000000009",
    ]


def test_starting_over_replaces_the_old_checkpoints(tmp_path: Path) -> None:
    finetune(converted(), loader(), steps=6, checkpoint_dir=tmp_path, checkpoint_every=3)
    settings: dict[str, Any] = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    run = finetune(converted(), loader(), steps=5, resume=False, **settings)
    assert run.steps == 5
    assert [p.name[-1] for p in checkpoint.checkpoints(tmp_path)] == ["4", "5"]


def test_other_settings_are_refused_and_change_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 4, "checkpoint_dir": tmp_path}
    finetune(converted(), loader(), **settings)
    model = converted()
    before = copy.deepcopy(model)
    for name, value in [
        ("steps", 5),
        ("lr", 0.5),
        ("seed", 7),
        ("warmup", 1),
        ("clip_norm", 1.0),
        ("mixed_precision", "bf16"),
    ]:
        shown = r"step-000000004 was made with {}=.*, this run has {}={!r}; use the same"
        refused(shown.format(name, name, value), model, loader(), **{**settings, name: value})
    small = DataLoader(Augmented(), batch_size=8)
    refused("made with batch_size=16", model, small, **settings)
    same(model, before)


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 2, "checkpoint_dir": tmp_path}
    finetune(converted(), loader(), **settings)
    refused("does not fit this model", converted(PQ(v=9, k=16)), loader(), **settings)
    folder = checkpoint.checkpoints(tmp_path)[0]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("does not fit this model, or is damaged", converted(), loader(), **settings)
    (folder / "run.json").write_text("{}")
    refused("cannot be read .*delete it", converted(), loader(), **settings)


def test_unwritable_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    refused("cannot create checkpoint_dir .*file", converted(), loader(), steps=2,
            checkpoint_dir=tmp_path / "file")  # fmt: skip

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("accelerate.Accelerator.save_state", full)
    refused("cannot write the checkpoint .*No space left", converted(), loader(), steps=2,
            checkpoint_dir=tmp_path / "new")  # fmt: skip
    assert not list((tmp_path / "new").iterdir())


def test_checkpoints_say_what_they_are_of(tmp_path: Path) -> None:
    finetune(converted(), loader(), steps=2, checkpoint_dir=tmp_path)
    saved = json.loads((checkpoint.checkpoints(tmp_path)[0] / "run.json").read_text())
    assert saved["step"] == 2
    assert saved["settings"]["processes"] == 1
    assert [entry["step"] for entry in saved["history"]] == [2.0]


# accelerate


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


# Several processes


def launch(folder: Path, processes: int) -> list[dict[str, Any]]:
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
        }
        if processes > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        worker = Path(__file__).with_name("distributed_worker.py")
        running.append(
            subprocess.Popen(
                [sys.executable, str(worker), str(folder)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        logs = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(logs)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One process, and two with the same global batch."""
    folder = tmp_path_factory.mktemp("distributed")
    (alone,) = launch(folder / "one", 1)
    return alone, launch(folder / "two", 2)


Runs = tuple[dict[str, Any], list[dict[str, Any]]]


def test_processes_agree(runs: Runs) -> None:
    _, (first, second) = runs
    for part in ("converted", "trained", "norm"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), (part, name)
    for part in ("history", "errors", "used"):
        assert first[part] == second[part]


def test_processes_learn_the_codebooks_of_one(runs: Runs) -> None:
    alone, (two, _) = runs
    for error, other in zip(alone["errors"], two["errors"], strict=True):
        assert other == pytest.approx(error, rel=0.25)
    counts = [r["converted"]["mixed.cluster_counts"].sum(1) for r in (alone, two)]
    assert torch.equal(*counts)  # each process has half of the rows
    assert alone["converted"]["conv.act_scale"] == pytest.approx(
        float(two["converted"]["conv.act_scale"]), rel=0.3
    )


def test_kmeans_where_one_process_has_too_few_samples(runs: Runs) -> None:
    for result in (runs[0], *runs[1]):
        assert result["line_counts"].sum() == 40
        assert (result["line_counts"] > 0).all()
    assert torch.equal(runs[1][0]["line"], runs[1][1]["line"])


def test_two_processes_train_like_one(runs: Runs) -> None:
    alone, (two, _) = runs
    for name, value in alone["trained"].items():
        torch.testing.assert_close(
            two["trained"][name], value, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    for got, want in zip(two["history"], alone["history"], strict=True):
        assert got == pytest.approx(want, rel=1e-3)


def test_layers_are_importable_where_the_docs_say() -> None:
    assert isinstance(converted().conv, PQConv2d)

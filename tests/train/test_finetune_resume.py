"""A fine-tuning run that was stopped continues to the same bits; bad checkpoints are refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finetuning_cases import BATCH, EPOCH, Augmented, converted, loader, refused, same
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lutra.train import PQ, convert, finetune
from lutra.train.finetuning import checkpoint


@pytest.mark.parametrize(
    ("crash", "workers"),
    [
        ("evaluate", 0),
        pytest.param("data", 0, marks=pytest.mark.slow),
        pytest.param("evaluate", 2, marks=pytest.mark.slow),
    ],
)
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


@pytest.mark.slow
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


@pytest.mark.slow
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

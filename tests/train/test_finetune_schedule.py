"""Averages of the parameters, and what the schedule freezes: by their definitions, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning_cases import EPOCH, converted, loader, refused, same
from torch import Tensor, nn

from lutra.train import PQ, finetune
from lutra.train.layers import pq_tree

TREE = PQ(v=9, k=8, encoder="tree")


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """All that is averaged: with the running statistics of batch norms."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found |= {name: value for name, value in model.named_buffers() if ".running_" in name}
    return {name: value.detach().clone() for name, value in found.items()}


def test_the_model_has_the_average_in_the_end() -> None:
    seen: list[dict[str, Tensor]] = []
    plain = converted()
    finetune(
        plain, loader(), steps=6, lr=1e-2, evaluate_every=1,
        evaluate=lambda model: seen.append(parameters(model)) or 0.0,
    )  # fmt: skip
    want = parameters(converted())
    assert any("running_mean" in name for name in want)
    for step, values in enumerate(seen):
        decay = min(0.5, (1 + step) / (10 + step))
        want = {name: value.lerp(values[name], 1 - decay) for name, value in want.items()}
    averaged = converted()
    at_the_end: list[dict[str, Tensor]] = []
    finetune(
        averaged, loader(), steps=6, lr=1e-2, average=0.5,
        evaluate=lambda model: at_the_end.append(parameters(model)) or 0.0,
    )  # fmt: skip
    for name, value in parameters(averaged).items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(value, at_the_end[0][name])
    assert not torch.equal(averaged.fc.weight, plain.fc.weight)


def test_looking_at_the_average_does_not_disturb_training() -> None:
    models = [converted() for _ in range(2)]
    settings: dict[str, Any] = {"steps": EPOCH + 1, "average": 0.9}
    finetune(models[0], loader(), **settings)
    finetune(models[1], loader(), evaluate=lambda _: 0.0, evaluate_every=1, **settings)
    same(models[1], models[0])


@pytest.mark.parametrize("method", [PQ(v=9, k=8), TREE], ids=["nearest", "tree"])
@pytest.mark.parametrize(
    "schedule",
    [
        {"average": 0.9},
        {"frozen_batch_norm": 0.5},
        {"frozen_codebooks": 0.5},
        {"frozen_weights": 0.5},
        {"codebook_lr": 1e-4, "average": 0.99, "frozen_batch_norm": 0.3, "frozen_codebooks": 0.3},
    ],
    ids=lambda schedule: "+".join(schedule),
)
def test_a_resumed_run_ends_with_the_same_bits(
    method: PQ, schedule: dict[str, float], tmp_path: Path
) -> None:
    whole, parts = converted(method), converted(method)
    settings: dict[str, Any] = {**schedule, "steps": EPOCH + 2, "batch_norm_batches": 2}
    finetune(whole, loader(), **settings)

    def stop(_: nn.Module) -> float:
        raise KeyboardInterrupt

    settings |= {"checkpoint_dir": tmp_path, "checkpoint_every": 3}
    with pytest.raises(KeyboardInterrupt):
        finetune(parts, loader(), evaluate=stop, evaluate_every=4, **settings)
    fresh = converted(method)
    finetune(fresh, loader(), **settings)
    same(fresh, whole)


def test_batch_norms_keep_their_statistics_while_frozen() -> None:
    model = converted()
    before = model.norm.running_mean.clone()
    means: list[Tensor] = []
    finetune(
        model, loader(), steps=6, frozen_batch_norm=0.5, evaluate_every=1,
        evaluate=lambda current: means.append(current.norm.running_mean.clone()) or 0.0,
    )  # fmt: skip
    assert [torch.equal(mean, before) for mean in means] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    "method",
    [PQ(v=9, k=8, centroids="gradient"), PQ(v=9, k=8, centroids="average"), TREE],
    ids=["gradient", "average", "tree"],
)
def test_codebooks_do_not_move_while_frozen(method: PQ, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pq_tree, "REFIT", 1)  # at every step
    model = converted(method)
    name = "thresholds" if method.encoder == "tree" else "centroids"
    states: list[Tensor] = []
    finetune(
        model, loader(), steps=8, lr=1e-2, frozen_codebooks=0.5, evaluate_every=1,
        evaluate=lambda current: states.append(getattr(current.conv, name).clone()) or 0.0,
    )  # fmt: skip
    assert not torch.equal(states[0], states[3])
    assert all(torch.equal(states[3], later) for later in states[4:])
    assert not model.conv.held  # a loop of one's own moves them again
    weight = model.conv.weight.clone()
    finetune(model, loader(), steps=1, lr=1e-2, frozen_codebooks=1.0)
    assert not torch.equal(model.conv.weight, weight)


@pytest.mark.parametrize(
    "method", [PQ(v=9, k=8, centroids="gradient"), TREE], ids=["nearest", "tree"]
)
def test_weights_do_not_move_while_frozen(method: PQ) -> None:
    model = converted(method)
    own = "centroids" if method.encoder == "nearest" else "table_residual"
    states: list[dict[str, Tensor]] = []
    finetune(
        model, loader(), steps=6, lr=1e-2, frozen_weights=0.5, evaluate_every=1,
        evaluate=lambda current: states.append(
            {name: p.detach().clone() for name, p in current.named_parameters()}
        ) or 0.0,
    )  # fmt: skip
    for name, first in states[0].items():
        if "centroids" not in name and "table" not in name:
            assert torch.equal(states[2][name], first), name
    assert not torch.equal(states[0][f"conv.{own}"], states[2][f"conv.{own}"])
    assert not torch.equal(states[2]["conv.weight"], states[3]["conv.weight"])


def test_codebooks_have_a_learning_rate_of_their_own() -> None:
    model = converted(PQ(v=9, k=8, centroids="gradient"))
    centroids, weight = model.conv.centroids.clone(), model.conv.weight.clone()
    finetune(model, loader(), steps=3, lr=1e-2, codebook_lr=0.0)
    assert torch.equal(model.conv.centroids, centroids)
    assert not torch.equal(model.conv.weight, weight)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"average": 1.0}, "average=1.0 would never move"),
        ({"average": -0.1}, "average=-0.1 is not a number of 0 or more"),
        ({"frozen_batch_norm": 1.5}, "frozen_batch_norm=1.5 is a share"),
        ({"frozen_codebooks": float("nan")}, "frozen_codebooks=nan"),
        ({"frozen_weights": 2.0}, "frozen_weights=2.0 is a share"),
        ({"codebook_lr": -1.0}, "codebook_lr=-1.0"),
    ],
)
def test_refusals(schedule: dict[str, float], message: str) -> None:
    refused(message, converted(), loader(), steps=1, **schedule)


def test_a_checkpoint_without_an_average_is_refused_for_a_run_with_one(tmp_path: Path) -> None:
    finetune(converted(), loader(), steps=2, checkpoint_dir=tmp_path)
    refused("average=None, this run has average=0.9", converted(), loader(),
            steps=2, checkpoint_dir=tmp_path, average=0.9)  # fmt: skip

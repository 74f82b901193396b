"""Fine-tuning of a recipe on the calibration samples, with the dense model as teacher."""

from __future__ import annotations

import copy
import time
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lutra.train.finetuning.finetune import finetune
from lutra.train.modes import evaluating
from lutra.train.search.quality import Measure, Top1
from lutra.train.search.samples import Part

_TEMPERATURE: Final = 2.0
_LR: Final = 1e-3
_TRIED_STEPS: Final = 4
_RENEWED: Final = 10  # batches for batch norms
_BATCH: Final = 64
_MOST_STEPS: Final = 200_000


class _Batches(Dataset[Any]):
    """Batches of arguments with the outputs of the teacher behind them."""

    def __init__(self, batches: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Any:
        return self._batches[index]


def teach(
    model: nn.Module, teacher: nn.Module, part: Part, measure: Measure, minutes: float, seed: int
) -> tuple[int, float]:
    """Trains a model in place to give what the dense model gives; no labels are needed.

    Args:
        model: converted.
        teacher: the dense model.
        part: the samples that calibrated.
        measure: scores are compared as shares of classes, other outputs by their squares.
        minutes: to train for, with the time of a step as a few steps have it.
        seed: of the order.

    Returns:
        Steps, and seconds of all of it.
    """
    begin = time.perf_counter()
    batches = _taught(teacher, part, seed)
    loader = DataLoader(_Batches(batches), batch_size=None, shuffle=True)
    loss = _divergence if isinstance(measure, Top1) else _squares

    def train(student: nn.Module, steps: int) -> float:
        start = time.perf_counter()
        finetune(
            student, loader, steps=steps, loss=loss, lr=_LR, warmup=steps // 20, seed=seed,
            clip_norm=1.0, batch_norm_batches=min(_RENEWED, len(batches)), progress=False,
        )  # fmt: skip
        return time.perf_counter() - start

    trial = copy.deepcopy(model)
    train(trial, 1)  # what is done once
    step = train(trial, _TRIED_STEPS) / _TRIED_STEPS
    del trial
    left = 60.0 * minutes - (time.perf_counter() - begin)
    steps = max(1, min(_MOST_STEPS, int(left / step)))
    train(model, steps)
    return steps, time.perf_counter() - begin


@torch.no_grad()
def _taught(
    teacher: nn.Module, part: Part, seed: int
) -> list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Batches in a new order, with the outputs of the teacher."""
    found = []
    generator = torch.Generator().manual_seed(seed)
    with evaluating(teacher):
        for batch in part.batches:
            order = torch.randperm(len(batch[0]), generator=generator)
            shuffled = tuple(tensor[order] for tensor in batch)
            for first in range(0, len(order), _BATCH):
                args = tuple(tensor[first : first + _BATCH] for tensor in shuffled)
                if len(args[0]) > 1 or len(part.batches) == 1:  # batch norms need two
                    found.append((args, tuple(_tensors(teacher(*args)))))
    return found


def _divergence(output: Any, wanted: Any) -> Tensor:
    """KL divergence from the teacher's softened scores."""
    mine, theirs = (_tensors(x)[0].float() / _TEMPERATURE for x in (output, wanted))
    return _TEMPERATURE**2 * F.kl_div(
        F.log_softmax(mine, 1), F.log_softmax(theirs, 1), log_target=True, reduction="batchmean"
    )


def _squares(output: Any, wanted: Any) -> Tensor:
    """Squared error relative to the teacher's mean square, a sum over the outputs."""
    total = None
    for mine, theirs in zip(_tensors(output), _tensors(wanted), strict=True):
        term = F.mse_loss(mine.float(), theirs.float())
        term = term / theirs.float().square().mean().clamp_min(1e-12)
        total = term if total is None else total + term
    assert total is not None
    return total


def _tensors(output: Any) -> list[Tensor]:
    """The float tensors of an output of any structure."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

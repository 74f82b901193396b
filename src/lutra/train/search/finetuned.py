"""Fine-tuning of a recipe on the calibration samples, with the dense model as teacher."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

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


class _Taught(Dataset[Any]):
    """Samples: the arguments, and the outputs of the teacher."""

    def __init__(self, samples: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        return self._samples[index]


class _SameShape(Sampler[list[int]]):
    """Batches of samples of one shape, in a new order each time.

    Args:
        groups: places of the samples of each shape.
    """

    drop_last = False

    def __init__(self, groups: list[list[int]]) -> None:
        self._groups = groups
        self.batch_size = _BATCH

    def __iter__(self) -> Iterator[list[int]]:
        batches = []
        for group in self._groups:
            order = [group[i] for i in torch.randperm(len(group)).tolist()]
            batches += [order[first : first + _BATCH] for first in _starts(len(group))]
        yield from (batches[i] for i in torch.randperm(len(batches)).tolist())

    def __len__(self) -> int:
        return sum(len(_starts(len(group))) for group in self._groups)


def _starts(count: int) -> list[int]:
    """Where batches begin; a last one of one sample, of which batch norms make nothing, is left
    out."""
    return [first for first in range(0, count, _BATCH) if count - first > 1 or count == 1]


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
    samples, groups = _taught(teacher, part)
    sampler = _SameShape(groups)
    loader = DataLoader(_Taught(samples), batch_sampler=sampler)
    loss = _divergence if isinstance(measure, Top1) else _squares

    def train(student: nn.Module, steps: int) -> float:
        start = time.perf_counter()
        finetune(
            student, loader, steps=steps, loss=loss, lr=_LR, warmup=steps // 20, seed=seed,
            clip_norm=1.0, batch_norm_batches=min(_RENEWED, len(sampler)), progress=False,
        )  # fmt: skip
        return time.perf_counter() - start

    trial = copy.deepcopy(model)
    once = train(trial, 1)
    several = train(trial, 1 + _TRIED_STEPS)
    # The first run pays for more than a step; a step never costs less than a part of the mean.
    step = max((several - once) / _TRIED_STEPS, several / (4 * _TRIED_STEPS))
    del trial
    left = 60.0 * minutes - (time.perf_counter() - begin) - once
    steps = max(1, min(_MOST_STEPS, int(left / step)))
    train(model, steps)
    return steps, time.perf_counter() - begin


@torch.no_grad()
def _taught(
    teacher: nn.Module, part: Part
) -> tuple[list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]], list[list[int]]]:
    """Samples with the outputs of the teacher, and the places of those of each shape."""
    found: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    groups: dict[Any, list[int]] = {}
    with evaluating(teacher):
        for batch in part.batches:
            outputs = _tensors(teacher(*batch))
            group = groups.setdefault(tuple(tensor.shape[1:] for tensor in batch), [])
            for i in range(len(batch[0])):
                group.append(len(found))
                found.append((tuple(t[i] for t in batch), tuple(t[i] for t in outputs)))
    return found, list(groups.values())


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

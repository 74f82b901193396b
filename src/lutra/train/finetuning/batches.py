"""The batches of a run: epoch after epoch, each with random numbers of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from lutra.errors import LutraError
from lutra.train.finetuning.checkpoint import RunState
from lutra.train.finetuning.seeding import MODEL_STREAM, Order, seed_everything

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Position:
    """Where a run stands, all counted from 0: step, epoch, and batch of the epoch."""

    step: int
    epoch: int
    batch: int

    def __str__(self) -> str:
        return f"batch {self.batch + 1} of epoch {self.epoch + 1} (step {self.step + 1})"


def training_batches(
    accelerator: Accelerator,
    loader: DataLoader[Any],
    order: Order,
    run: RunState,
    total: int,
    seed: int,
) -> Iterator[tuple[Any, Position]]:
    """Batches from where the run stands until its step is `total`; the caller counts the steps.

    Raises:
        LutraError: an epoch has no batches.
    """
    while run.step < total:
        if order.length is not None:
            run.epoch, done = divmod(run.step, order.length)
            run.begun = run.step - done
        done = run.step - run.begun
        order.source.epoch = run.epoch
        batches = accelerator.skip_first_batches(loader, done) if done else loader
        seed_everything(seed, run.epoch)
        for index, batch in enumerate(batches, done):
            # For dropout and the like; a stream of its own, as batches are drawn ahead.
            seed_everything(seed, run.epoch, index + 1, accelerator.process_index, MODEL_STREAM)
            yield batch, Position(run.step, run.epoch, index)
            if run.step == total:
                return
        if run.step == run.begun:
            raise LutraError(
                f"finetune: the data set gave no batch in epoch {run.epoch + 1}; an iterable data "
                "set must begin anew each time"
            )
        run.epoch, run.begun = run.epoch + 1, run.step

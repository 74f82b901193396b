"""Data order and random numbers that depend only on (seed, epoch, batch).

A resumed run must see what the uninterrupted one would have seen. Saving generator states is not
enough, because loaders draw ahead of the training loop. So every batch is fetched with freshly
seeded generators, and a run can start in the middle of an epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, get_worker_info

from lutra.errors import LutraError
from lutra.train import distributed as collective

MODEL_STREAM = 1  # sets the random numbers of the model apart from those of the data


def seed_everything(seed: int, *position: int) -> None:
    """Seeds Python, NumPy and PyTorch from a seed and a position such as (epoch, batch)."""
    words = np.random.SeedSequence([seed, *position]).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))  # noqa: NPY002 - data sets in the wild use the global generator
    torch.manual_seed(int(words[1]))


class SeededBatchSampler(BatchSampler):
    """A batch sampler that reseeds before the permutation of an epoch and before every batch.

    Set `epoch` before iterating. The order is that of one process in every process; the random
    numbers that follow a batch are not.
    """

    def __init__(self, batches: Any, seed: int) -> None:
        self.batches, self.seed = batches, seed
        self.epoch = 0
        self.batch_size = getattr(batches, "batch_size", None) or 1
        self.drop_last = bool(getattr(batches, "drop_last", False))
        self.sampler = getattr(batches, "sampler", batches)
        self._generator: torch.Generator | None = getattr(self.sampler, "generator", None)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        seed_everything(self.seed, self.epoch)
        if self._generator is not None:
            self._generator.manual_seed(torch.initial_seed() % (1 << 63))
        elif hasattr(self.sampler, "generator"):
            # accelerate gives samplers one in distributed runs; without, they use the seed above
            self.sampler.generator = None
        for i, batch in enumerate(self.batches):
            seed_everything(self.seed, self.epoch, i + 1, collective.rank())
            yield batch


class SeededStream(IterableDataset[Any]):
    """An iterable data set that reseeds when it begins and before every `every` samples.

    Set `epoch` before iterating; a data set with `set_epoch` is told it. The samples are the same
    in every process, so that each can take its share of them.
    """

    def __init__(self, stream: Any, seed: int, every: int) -> None:
        self.stream, self.seed, self.every = stream, seed, every
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        place = 0 if worker is None else worker.id
        seed_everything(self.seed, self.epoch)
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(self.epoch)
        samples = iter(self.stream)
        for i in count():
            if i % self.every == 0:
                seed_everything(self.seed, self.epoch, i // self.every + 1, place)
            try:
                sample = next(samples)
            except StopIteration:
                return
            yield sample


@dataclass
class Order:
    """The order of the batches of a loader.

    Attributes:
        source: what reseeds; its epoch is set here.
        batch_size: of the loader; None if an iterable data set makes its own batches.
        length: batches of an epoch in this process, once the loader is prepared; None if unknown.
    """

    source: SeededBatchSampler | SeededStream
    batch_size: int | None
    length: int | None = None

    @property
    def known(self) -> bool:
        """Whether epochs have a length."""
        return isinstance(self.source, SeededBatchSampler)

    def measure(self, loader: DataLoader[Any], processes: int) -> None:
        """Sets `length` from the prepared loader.

        Raises:
            LutraError: batches that a data set makes itself cannot be shared among processes.
        """
        if self.known:
            self.length = len(loader)
        elif self.batch_size is None and processes > 1:
            raise LutraError(
                f"finetune: an iterable data set that makes its own batches cannot be shared among "
                f"{processes} processes; let it yield samples, and set batch_size of the DataLoader"
            )


def seeded_loader(loader: DataLoader[Any], seed: int) -> tuple[DataLoader[Any], Order]:
    """A copy of the loader over the same data, whose order is seeded.

    Raises:
        LutraError: it is no loader, or has no batch sampler or no batches.
    """
    if not isinstance(loader, DataLoader):
        raise LutraError(
            f"finetune: data is a {type(loader).__name__}; give a torch.utils.data.DataLoader"
        )
    if isinstance(loader.dataset, IterableDataset):
        size = loader.batch_size
        stream = SeededStream(loader.dataset, seed, size or 1)
        return (
            _copy(loader, stream, batch_size=size, drop_last=loader.drop_last),
            Order(stream, size),
        )
    if loader.batch_sampler is None:
        raise LutraError(
            "finetune: the data loader has no batch sampler, so its order cannot be repeated; give "
            "a DataLoader with batch_size or batch_sampler set"
        )
    sampler = SeededBatchSampler(loader.batch_sampler, seed)
    if len(sampler) == 0:
        raise LutraError(
            f"finetune: the data loader has no batches ({len(loader.dataset)} samples, "  # type: ignore[arg-type]
            f"batch size {sampler.batch_size}, drop_last={sampler.drop_last})"
        )
    return _copy(loader, loader.dataset, batch_sampler=sampler), Order(sampler, sampler.batch_size)


def _copy(loader: DataLoader[Any], dataset: Any, **order: Any) -> DataLoader[Any]:
    """A loader like another, with a data set and an order of its own."""
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": False,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    return DataLoader(
        dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        **order,
        **workers,
    )

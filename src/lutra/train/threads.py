"""How many threads PyTorch computes with, where that is for lutra to say.

Small operators are slower on several threads than on one: the threads wait for each other, awake,
and while other programs want the cores a wait takes milliseconds. So small work takes one thread.
What is small depends on sizes alone where results are to be the same bits in every run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree

#: Training steps of fewer products than this take one thread: some milliseconds.
SMALL_STEP: Final = 2**28
_CENTROIDS: Final = 64
#: Seconds that a model may take on one thread before it gets them all.
_LONG: Final = 1.0


class StepThreads:
    """The threads of a training run: of each batch, by its size and that of the model.

    Args:
        model: the model; on another device than the CPU the threads stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        self._weights = sum(parameter.numel() for parameter in parameters)
        self._matters = all(parameter.device.type == "cpu" for parameter in parameters)
        self._all = torch.get_num_threads()

    def __enter__(self) -> StepThreads:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Sets the threads that there were."""
        _set(self._all)

    def fit(self, batch: Any) -> None:
        """Sets the threads for a step on a batch."""
        if self._matters:
            _set(1 if self._weights * _positions(batch) < SMALL_STEP else self._all)


@contextmanager
def threads_for_rows(values: int) -> Iterator[None]:
    """One thread for as long as the block runs, if it learns from few values.

    Args:
        values: in the rows that are learned from; each makes up to 64 products at a time.
    """
    everything = torch.get_num_threads()
    if values * _CENTROIDS < SMALL_STEP:
        _set(1)
    try:
        yield
    finally:
        _set(everything)


@contextmanager
def threads_for(model: nn.Module, example: tuple[Tensor, ...]) -> Iterator[None]:
    """One thread for as long as the block runs, if the model takes an example in a second so.

    Args:
        model: a model on the CPU, in eval mode.
        example: its arguments; one sample is run and timed.
    """
    everything = torch.get_num_threads()
    _set(1)
    try:
        start = time.perf_counter()
        try:
            with torch.no_grad():
                model(*(tensor[:1].clone() for tensor in example))
        except Exception:  # who runs the model says what is wrong with it
            _set(everything)
        if (time.perf_counter() - start) * len(example[0]) > _LONG:
            _set(everything)
        yield
    finally:
        _set(everything)


def _positions(batch: Any) -> int:
    """The most places at which a weight may be used: pixels, tokens or rows of all samples."""
    most = 1
    for leaf in _pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            channels = 1
            if leaf.is_floating_point() and leaf.ndim > 1:  # on axis 1 or on the last one
                channels = max(1, min(leaf.shape[1], leaf.shape[-1]))
            most = max(most, leaf.numel() // channels)
    return most


def _set(threads: int) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)

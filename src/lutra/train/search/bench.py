"""A model as a file in the engine: its outputs, its time beside the dense model, its bytes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.node import Array
from lutra.runtime.session import Session
from lutra.runtime.shared_codes import SHARED_LABEL
from lutra.train.exporting.capture import argument_names
from lutra.train.exporting.export import export
from lutra.train.search.budget import Budget
from lutra.train.search.quality import Outputs
from lutra.train.search.samples import Part, Split

_POOL: Final = 8
_LEAST_ROUNDS: Final = 9
_MOST_ROUNDS: Final = 301
_PROFILE_RUNS: Final = 9
_EXAMPLES: Final = 8


class EngineModel(nn.Module):
    """A file in the engine that is called like the PyTorch model that it was made from.

    Args:
        session: of the file.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self._names = [value.name for value in session.inputs]
        self.eval()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """The outputs for a batch: a tensor, or a tuple of several."""
        feeds = dict(zip(self._names, args, strict=False)) | kwargs
        arrays = {name: value.detach().cpu().numpy() for name, value in feeds.items()}
        found = [torch.from_numpy(np.array(y)) for y in self._session.run(None, arrays)]
        return found[0] if len(found) == 1 else tuple(found)


class Bench:
    """Exports models, runs them in the engine, and times them.

    Args:
        model: the dense model.
        data: its samples.
        budget: threads and kernels.
        folder: for files.
    """

    def __init__(self, model: nn.Module, data: Split, budget: Budget, folder: Path) -> None:
        self._data, self._budget, self._folder = data, budget, folder
        batch = data.calibration.batches[0]
        self.example = tuple(tensor[:_EXAMPLES] for tensor in batch)
        self._axes = dict(zip(argument_names(model, len(batch)), data.dynamic_axes, strict=True))
        self._pool = data.judged.samples(_POOL)

    def export(self, model: nn.Module, path: Path) -> Session:
        """Writes a model, and loads it.

        Raises:
            LutraError: it cannot be exported.
        """
        try:
            with warnings.catch_warnings():
                # How far the file is from the module: every trial is judged by its file.
                warnings.simplefilter("ignore", UserWarning)
                export(model, path, self.example, dynamic_axes=self._axes, golden=False)
        except (LutraError, OSError, MemoryError):
            raise
        except Exception as error:  # what the model raises while it is traced
            raise LutraError(
                f"optimize: the model cannot be exported: {type(error).__name__}: {error}"
            ) from error
        return self.session(path)

    def session(self, path: Path) -> Session:
        """A session of a file at the threads and with the kernels of the budget."""
        return Session(path, threads=self._budget.threads, isa=self._budget.isa)

    def file(self, name: str) -> Path:
        """A file in the folder of the search."""
        return self._folder / f"{name}.lutra"

    def times(self, sessions: Mapping[str, Session], seconds: float) -> dict[str, list[float]]:
        """Milliseconds of one sample, measured in turns on samples that change.

        Args:
            sessions: what to time, by name.
            seconds: to go on for, once there are enough rounds.

        Returns:
            For each session the times of all rounds, in the order of the rounds.
        """
        found: dict[str, list[float]] = {name: [] for name in sessions}
        feeds = {
            name: [_feeds(session, sample) for sample in self._pool]
            for name, session in sessions.items()
        }
        order = list(sessions)
        begin = time.perf_counter()
        for turn in range(-2, _MOST_ROUNDS):
            for name in order:
                inputs = feeds[name][turn % len(self._pool)]
                start = time.perf_counter()
                sessions[name].run(None, inputs)
                if turn >= 0:
                    found[name].append(1e3 * (time.perf_counter() - start))
            order = order[1:] + order[:1]
            if turn >= _LEAST_ROUNDS and time.perf_counter() - begin > seconds:
                break
        return found

    def layer_times(self, session: Session, layers: Sequence[str]) -> dict[str, float]:
        """Milliseconds of the steps of each layer in its network; layers without a step of their
        own name are left out."""
        profile = session.profile(_feeds(session, self._pool[0]), runs=_PROFILE_RUNS, warmup=2)
        found: dict[str, float] = {}
        for step in profile.steps:
            nodes = step.name.split(SHARED_LABEL)
            owners = [name for node in nodes for name in layers if node == name]
            for name in owners:
                found[name] = found.get(name, 0.0) + step.milliseconds / len(owners)
        return found


def outputs_of(session: Session, part: Part) -> Outputs:
    """The outputs of a file for samples: for each batch an array for each output."""
    return [
        session.run(None, _feeds(session, tuple(tensor.numpy() for tensor in batch)))
        for batch in part.batches
    ]


def _feeds(session: Session, sample: Sequence[Array]) -> dict[str, Array]:
    names = [value.name for value in session.inputs]
    return dict(zip(names, sample, strict=True))

"""The data of a search: most of them calibrate, and a part that no calibration sees judges."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.node import Array
from lutra.train.batches import TARGETS, BatchReader

_WHERE: Final = "optimize: data"
_BATCH: Final = 64
#: A quarter judges, of many samples more: conversion learns nothing from more than a thousand.
_JUDGED: Final = 4
_MOST_CALIBRATED: Final = 1024
_MOST_JUDGED: Final = 4096
#: Fewer samples can neither calibrate nor judge.
LEAST: Final = 8


@dataclass(frozen=True)
class Part:
    """Some of the samples.

    Attributes:
        batches: the arguments of `forward`, by position.
        labels: of the samples, in the order of the batches; None without.
        index: places of the samples in the data that were given, in the order of the batches.
    """

    batches: tuple[tuple[Tensor, ...], ...]
    labels: Array | None
    index: Array

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self.index)

    def sample(self, place: int) -> tuple[Array, ...]:
        """The arguments of one sample, each (1, ...), by its place in the order of the batches."""
        for batch in self.batches:
            if place < len(batch[0]):
                return tuple(tensor[place : place + 1].numpy() for tensor in batch)
            place -= len(batch[0])
        raise IndexError(place)

    def thinned(self, most: int) -> Part:
        """At most about so many of the samples, evenly from all batches, and one of each at least;
        the part itself where it has no more."""
        if self.count <= most:
            return self
        batches, places, start, due = [], [], 0, 0.0
        for batch in self.batches:
            size = len(batch[0])
            due += size * most / self.count  # what batches before had too much or too little
            count = max(1, min(size, round(due)))
            due -= count
            own = np.arange(count) * size // count
            batches.append(tuple(tensor[torch.from_numpy(own)] for tensor in batch))
            places.append(start + own)
            start += size
        chosen = np.concatenate(places)
        labels = None if self.labels is None else self.labels[chosen]
        return Part(tuple(batches), labels, self.index[chosen])

    def samples(self, most: int) -> list[tuple[Array, ...]]:
        """The first samples, each as a batch of one, from all shapes that there are."""
        found = [
            tuple(tensor[i : i + 1].numpy() for tensor in batch)
            for batch in self.batches
            for i in range(len(batch[0]))
        ]
        step = max(1, len(found) // most)
        return found[::step][:most]


@dataclass(frozen=True)
class Split:
    """The data of a search.

    Attributes:
        calibration: what layers are fitted to.
        judged: what decides; no calibration sees it.
        given: how many samples there were.
        dynamic_axes: of each input, the axes in which samples differ, and 0.
    """

    calibration: Part
    judged: Part
    given: int
    dynamic_axes: tuple[tuple[int, ...], ...]

    @property
    def text(self) -> str:
        """How the data were split, in one sentence."""
        left = self.given - self.calibration.count - self.judged.count
        more = f"; {left} are not used" if left else ""
        return (
            f"{self.calibration.count} of {self.given} samples calibrate, and {self.judged.count} "
            f"others, which no calibration sees, judge{more}"
        )


def split(model: nn.Module, data: Any, labels: Any, seed: int) -> Split:
    """Reads the data, and divides them by chance.

    Args:
        model: that takes them.
        data: a tensor or array (N, ...) of the first input; a mapping with one for each argument;
            or batches, as `convert` takes them. Numbers for each sample behind the arguments, or
            `labels` of a mapping, are labels.
        labels: (N, ...), one for each sample, in the order of the data; None takes those in the
            batches, if any.
        seed: of the choice.

    Raises:
        LutraError: no data, too few samples, or labels of another length.
    """
    batches, found = _read(model, data)
    counts = [len(batch[0]) for batch in batches]
    total = sum(counts)
    if total < LEAST:
        raise LutraError(
            f"{_WHERE} hold {total} sample{'s' * (total != 1)}; give at least {LEAST}, some "
            "hundred are better: a part calibrates, and the others judge"
        )
    own = _labels(labels, found, total)
    shapes = [tuple(tuple(tensor.shape[1:]) for tensor in batch) for batch in batches]
    groups: dict[Any, list[tuple[int, int]]] = {}
    for number, (shape, count) in enumerate(zip(shapes, counts, strict=True)):
        groups.setdefault(shape, []).extend((number, i) for i in range(count))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rng = np.random.default_rng(seed)
    parts: tuple[list[list[tuple[int, int]]], list[list[tuple[int, int]]]] = ([], [])
    room = [_MOST_CALIBRATED / total, _MOST_JUDGED / total]
    for places in groups.values():
        order = [places[i] for i in rng.permutation(len(places))]
        judged = max(1, len(order) // _JUDGED) if len(order) > 1 else 0
        judged = max(judged, len(order) - max(1, int(len(order) * room[0])))
        most = max(1, int(len(order) * room[1]))
        parts[1].append(order[:judged][:most])
        parts[0].append(order[judged:])
    if not any(parts[1]):
        raise LutraError(
            f"{_WHERE}: no two of the {total} samples have the same shape, so that none is left to "
            "judge; give more of each size"
        )
    axes = []
    for position in range(len(shapes[0])):
        sizes = {shape[position] for shape in shapes}
        if len({len(size) for size in sizes}) > 1:
            raise LutraError(
                f"{_WHERE}: input {position} has different numbers of axes; give samples alike"
            )
        columns = enumerate(zip(*sizes, strict=True), 1)
        axes.append((0, *(axis for axis, column in columns if len(set(column)) > 1)))
    made = [_part(batches, starts, chosen, own) for chosen in parts]
    return Split(made[0], made[1], total, tuple(axes))


def _part(
    batches: Sequence[tuple[Tensor, ...]],
    starts: Array,
    groups: Sequence[Sequence[tuple[int, int]]],
    labels: Array | None,
) -> Part:
    """Samples of each group in batches."""
    made, index = [], []
    for places in groups:
        for first in range(0, len(places), _BATCH):
            chosen = places[first : first + _BATCH]
            made.append(
                tuple(
                    torch.stack([batches[number][position][i] for number, i in chosen])
                    for position in range(len(batches[0]))
                )
            )
            index += [int(starts[number]) + i for number, i in chosen]
    places_ = np.array(index, np.int64)
    return Part(tuple(made), None if labels is None else labels[places_], places_)


def _read(model: nn.Module, data: Any) -> tuple[list[tuple[Tensor, ...]], list[Any]]:
    """The arguments of every batch, and the labels found in it."""
    reader = BatchReader(model, _WHERE)
    if isinstance(data, Tensor | np.ndarray | Mapping):
        data = [data]
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise LutraError(
            f"{_WHERE} are a {type(data).__name__}; give a tensor or array (N, ...), a mapping of "
            "these, or batches"
        )
    batches, found = [], []
    for batch in data:
        tensors = _as_tensors(batch)
        args, kwargs = reader.inputs(tensors, torch.device("cpu"))
        arguments = _by_position(model, args, kwargs)
        batches.append(arguments)
        found.append(_targets(tensors, len(args), len(arguments[0])))
        if len(arguments) != len(batches[0]):
            raise LutraError(
                f"{_WHERE}: one batch has {len(batches[0])} arguments, another {len(arguments)}; "
                "give all of them in each"
            )
    if not batches:
        raise LutraError(f"{_WHERE} are empty; give some hundred samples")
    return batches, found


def _as_tensors(value: Any) -> Any:
    """Arrays as tensors, however deep they lie."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Mapping):
        return {name: _as_tensors(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_as_tensors(entry) for entry in value)
    return value


def _by_position(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    """All arguments by position; files know no other."""
    if kwargs:
        names = list(inspect.signature(model.forward).parameters)
        wanted = names[: max(names.index(name) for name in kwargs) + 1]
        missing = [name for name in wanted if name not in kwargs]
        if missing:
            raise LutraError(
                f"{_WHERE} lack {', '.join(missing)}, which forward takes before the others; the "
                "inputs of a file are by position"
            )
        args = tuple(kwargs[name] for name in wanted)
    for position, value in enumerate(args):
        if not isinstance(value, Tensor) or not value.dim():
            raise LutraError(
                f"{_WHERE}: argument {position} is a {type(value).__name__}; give tensors (N, ...)"
            )
        if len(value) != len(args[0]):
            raise LutraError(
                f"{_WHERE}: argument {position} has {len(value)} samples, the first {len(args[0])}"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise LutraError(
                f"{_WHERE}: argument {position} holds NaN or infinity; remove those samples"
            )
    # models are exported in float32
    return tuple(
        value.float().contiguous() if value.is_floating_point() else value.contiguous()
        for value in args
    )


def _targets(batch: Any, taken: int, count: int) -> Tensor | None:
    """The labels in a batch: what stands behind its arguments, or `labels` of a mapping."""
    value = None
    if isinstance(batch, Mapping):
        value = next((batch[name] for name in TARGETS if name in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        nested = isinstance(batch[0], tuple | list | Mapping)
        value = batch[-1] if nested or len(batch) > taken else None
    fits = isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
    return value if fits else None


def _labels(given: Any, found: Sequence[Tensor | None], total: int) -> Array | None:
    """The labels of all samples."""
    if given is None:
        held = [value for value in found if value is not None]
        if not held or len(held) < len(found):
            return None
        return np.concatenate([value.numpy() for value in held])
    try:
        labels: Array = np.asarray(given)
    except Exception as error:
        raise LutraError(f"optimize: labels cannot be read as an array ({error})") from error
    if labels.ndim < 1 or labels.dtype.kind not in "fiub":
        raise LutraError(
            f"optimize: labels are {labels.dtype} of shape {labels.shape}; give a number or an "
            "array of numbers for each sample"
        )
    if len(labels) != total:
        raise LutraError(
            f"optimize: there are {len(labels)} labels for {total} samples; give one for each, in "
            "the order of the data"
        )
    return labels

"""What a batch of any usual structure is for a model: arguments of its forward pass, and targets.

A batch is a tensor, a tuple or list, or a mapping: a dict, or what the tokenizers and collators of
transformers make. Tensors in it are moved to the device of the model, however deep they lie.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lutra.errors import LutraError

#: Entries of a mapping that are targets; the first one that is there counts.
TARGETS = ("labels", "label", "targets", "target")


class TrainingBatch(NamedTuple):
    """Arguments of a forward pass, and what its output is compared with (None if nothing)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any


class BatchReader:
    """Reads batches for a model, by the signature of its `forward`.

    * A tensor is the first argument.
    * The entries of a mapping are keyword arguments. `labels` (or `label`, `targets`, `target`) is
      passed only if `forward` names it.
    * The entries of a tuple or list are positional arguments, as many of them as `forward` takes:
      those without a default, those whose default is None, and `*args`. An option such as
      `flag=False` ends them. If the first entry is itself a tuple, list or mapping, it holds all
      arguments: `((a, b), targets)` is the way to say exactly what is an argument.
    * The last entry of a tuple may be its targets. `training` always takes it so. `inputs` takes it
      so where `forward` does not take that many, or takes it only as an option (default None) and
      it holds one number for each sample, as classes do.

    Args:
        model: the model that reads; not one that accelerate has prepared.
        data: how errors call the batches, such as "calibration data".
    """

    def __init__(self, model: nn.Module, data: str) -> None:
        self._model, self._data = type(model).__name__, data
        self._required = self._optional = 0
        self._all_positional = self._all_named = self._options = False
        self._named: list[str] = []
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):  # no signature: it may take anything
            self._all_positional = self._all_named = True
            return
        for parameter in parameters:
            self._read(parameter)

    def _read(self, parameter: inspect.Parameter) -> None:
        """Notes what a parameter of `forward` takes."""
        kind = parameter.kind
        if kind is kind.VAR_POSITIONAL:
            self._all_positional = True
        elif kind is kind.VAR_KEYWORD:
            self._all_named = True
        else:
            if kind is not kind.POSITIONAL_ONLY:
                self._named.append(parameter.name)
            if kind is kind.KEYWORD_ONLY or self._options:
                return
            if parameter.default is parameter.empty:
                self._required += 1
            elif parameter.default is None:
                self._optional += 1
            else:
                self._options = True

    def inputs(self, batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for a batch; targets in it are left out.

        Raises:
            LutraError: the batch is empty, of another type, or has entries that `forward` lacks.
        """
        if not _is_sequence(batch) or (batch and _is_container(batch[0])):
            return self._arguments(batch[0] if _is_sequence(batch) else batch, device)
        count = min(len(batch), self._most)
        if self._required < count == len(batch) > 1 and _one_per_sample(batch):
            count -= 1
        return self._arguments(batch[:count], device)

    def training(
        self, batch: Any, device: torch.device, *, own_loss: bool = False
    ) -> TrainingBatch:
        """Arguments and targets for a batch.

        The target of a tuple is its last entry, with those before it that `forward` does not take,
        if any, as a tuple. The target of a mapping is its entry `labels` (see `TARGETS`), or the
        whole mapping if it has none. A tensor alone, or a tuple of one, has no target.

        Args:
            own_loss: the targets go to a loss that the user wrote. A mapping without `labels` may
                then have entries that `forward` does not take.

        Raises:
            LutraError: see `inputs`.
        """
        if isinstance(batch, Mapping):
            found = [name for name in TARGETS if name in batch]
            args, kwargs = self._mapping(batch, device, strict=bool(found) or not own_loss)
            return TrainingBatch(args, kwargs, move(batch[found[0]] if found else batch, device))
        if not _is_sequence(batch) or len(batch) < 2:
            return TrainingBatch(*self.inputs(batch, device), None)
        nested = _is_container(batch[0])
        count = 1 if nested else min(len(batch) - 1, self._most)
        args, kwargs = self._arguments(batch[0] if nested else batch[:count], device)
        targets = batch[count] if len(batch) == count + 1 else tuple(batch[count:])
        return TrainingBatch(args, kwargs, move(targets, device))

    @property
    def _most(self) -> int:
        """Number of positional arguments that a tuple may give, at least one."""
        return 1 << 30 if self._all_positional else max(1, self._required + self._optional)

    def _arguments(
        self, value: Any, device: torch.device
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All of a tensor, a sequence or a mapping as arguments."""
        if isinstance(value, Mapping):
            return self._mapping(value, device, strict=True)
        if _is_sequence(value):
            if not len(value):
                raise LutraError(f"{self._data}: a batch is empty; yield tensors or tuples")
            if len(value) == 1 and _is_container(value[0]):
                return self._arguments(value[0], device)
        elif isinstance(value, Tensor):
            value = (value,)
        if not _is_sequence(value) or not isinstance(value[0], Tensor):
            wrong = value[0] if _is_sequence(value) else value
            raise LutraError(
                f"{self._data}: a batch is a {type(wrong).__name__}; yield tensors, tuples whose "
                "first entry is an input, or dicts of keyword arguments"
            )
        return tuple(move(entry, device) for entry in value), {}

    def _mapping(
        self, batch: Mapping[str, Any], device: torch.device, *, strict: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        taken = {}
        for name, value in batch.items():
            if name in self._named or (self._all_named and name not in TARGETS):
                taken[name] = move(value, device)
            elif strict and name not in TARGETS:
                raise LutraError(
                    f"{self._data}: a batch has the entry '{name}', which forward of {self._model} "
                    f"does not take (it takes {', '.join(self._named)}); leave it out"
                )
        if not taken:
            raise LutraError(
                f"{self._data}: a batch has the entries {', '.join(map(repr, batch)) or 'none'}, "
                f"and forward of {self._model} takes {', '.join(self._named) or 'others'}; name "
                "the entries after its parameters"
            )
        return (), taken


def move(value: Any, device: torch.device) -> Any:
    """A structure whose tensors are on a device; mappings become dicts."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: move(entry, device) for name, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(entry, device) for entry in value))
    if isinstance(value, tuple | list):
        return type(value)(move(entry, device) for entry in value)
    return value


def named_tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors among arguments, each with a name for errors: "input 0", or "input 'mask'"."""
    found: list[tuple[str, Tensor]] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found.append((name, value))
        elif isinstance(value, Mapping):
            for entry in value.values():
                add(name, entry)
        elif _is_sequence(value):
            for entry in value:
                add(name, entry)

    for i, value in enumerate(args):
        add(f"input {i}", value)
    for key, value in kwargs.items():
        add(f"input '{key}'", value)
    return found


def _is_sequence(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _is_container(value: Any) -> bool:
    return isinstance(value, tuple | list | Mapping)


def _one_per_sample(batch: Sequence[Any]) -> bool:
    """Whether the last entry of a batch has one number for each sample, and the first has more."""
    first, last = batch[0], batch[-1]
    if not isinstance(first, Tensor) or not isinstance(last, Tensor):
        return True
    return first.dim() > 0 and last.numel() == first.shape[0] and last.shape != first.shape

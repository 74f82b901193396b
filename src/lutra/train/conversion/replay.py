"""Outputs of the parts of a model that pass after pass would compute again.

Sequential calibration runs the converted model once for each layer, up to that layer. What lies in
front of it has been fitted and does not change any more, so its outputs are kept, and later passes
read them instead of computing them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lutra.train.conversion.prefix import Prefix, bytes_of, is_pure, tensors_of
from lutra.train.layers.base import QuantizedLayer

_PLAIN: Final = (Tensor, type(None), bool, int, float, str)


class _Kept:
    """What a call returned, as it is until something writes into it, or as a copy.

    Args:
        value: tensors in any structure.
        copied: whether to keep a copy, and to give copies of it.
    """

    def __init__(self, value: Any, copied: bool) -> None:
        tensors = tensors_of(value)
        self._copied = copied or any(tensor.is_inference() for tensor in tensors)
        self.value = _copy(value) if self._copied else value
        self._versions = [] if self._copied else [tensor._version for tensor in tensors]

    def unchanged(self) -> bool:
        """Whether the value is as it was."""
        return self._copied or self._versions == [t._version for t in tensors_of(self.value)]

    def give(self) -> Any:
        """The value for a reader."""
        return _copy(self.value) if self._copied else self.value


class Replay:
    """Keeps outputs of modules, and gives them back in the modules' place; of traced graphs of
    functions, as imported files are, the values at the first layer that is not fitted (`prefix`).

    A module is left alone where its output may not be all that it does: where it has hooks, writes
    into its input, changes attributes or buffers, or returns other things than tensors.

    Args:
        memory_bytes: that the outputs may take; modules beyond it are computed in every pass.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._left = memory_bytes
        self._prefix = Prefix(memory_bytes)
        self._kept: dict[str, dict[int, list[_Kept]]] = {}  # path -> batch -> calls
        self._never: set[str] = set()
        self._copied: set[str] = set()  # paths whose outputs others write into
        self._calls: dict[str, int] = {}
        self._batch = 0
        self._reached = False  # a layer that is not fitted, in the pass of this batch

    def enter(self, batch: int) -> None:
        """Must be called before the model runs on a batch."""
        self._batch, self._reached, self._calls = batch, False, {}

    @contextmanager
    def passing(self, model: nn.Module, pending: Collection[str]) -> Iterator[None]:
        """While this lasts, modules in front of the layers that are not fitted are computed once.

        Args:
            model: the model as it is converted so far.
            pending: paths of the layers that will change still.
        """
        if is_pure(model) and "forward" not in vars(model):
            assert isinstance(model, fx.GraphModule)
            model.__dict__["forward"] = self._prefix.instead_of(model, pending, lambda: self._batch)
            try:
                yield
            finally:
                del model.__dict__["forward"]
            return
        undo: list[Callable[[], Any]] = []

        def reached(*_: Any) -> None:
            self._reached = True

        for name in pending:
            layer = model.get_submodule(name)
            undo.append(layer.register_forward_pre_hook(reached, prepend=True).remove)
        changing = {part for name in pending for part in _and_parents(name)}
        for path, module in model.named_modules():
            if path in changing or path in self._never or not _is_worth_it(module):
                continue
            if "forward" in vars(module) or any(_has_hooks(part) for part in module.modules()):
                continue
            module.__dict__["forward"] = self._instead_of(path, module, module.forward)
            undo.append(partial(module.__dict__.pop, "forward"))
        try:
            yield
        finally:
            for step in undo:
                step()
            self._drop_parts()

    def _instead_of(
        self, path: str, module: nn.Module, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = self._calls.get(path, 0)
            self._calls[path] = number + 1
            known = self._kept.get(path, {}).get(self._batch, [])
            if number < len(known):
                if known[number].unchanged():
                    return known[number].give()
                self._forget(path)  # what reads it writes into it: from now on it gets a copy
                self._copied.add(path)
                known = []
            if self._reached or number > len(known) or path in self._never:
                return forward(*args, **kwargs)
            before = _state(module, args, kwargs)
            made = forward(*args, **kwargs)
            if before != _state(module, args, kwargs) or not _is_plain(made):
                self._forget(path)
                self._never.add(path)
                return made
            size = bytes_of(made)
            if size <= self._left:
                self._left -= size
                kept = _Kept(made, path in self._copied)
                self._kept.setdefault(path, {}).setdefault(self._batch, []).append(kept)
            return made

        return call

    def _forget(self, path: str) -> None:
        calls = [call for own in self._kept.pop(path, {}).values() for call in own]
        self._left += sum(bytes_of(call.value) for call in calls)

    def _drop_parts(self) -> None:
        """Forgets the outputs inside modules whose own outputs are there for the same batches."""
        for path in list(self._kept):
            for parent in _and_parents(path)[1:]:
                whole = self._kept.get(parent, {})
                if self._kept[path].keys() <= whole.keys():
                    self._forget(path)
                    break


def _and_parents(path: str) -> list[str]:
    """A path, and those of the modules around it, the innermost first."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)] + [""]


def _is_worth_it(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _state(module: nn.Module, args: Any, kwargs: Any) -> list[Any]:
    """What a forward pass of a module may change beside what it returns."""
    found: list[Any] = [
        (id(leaf), leaf._version)
        for leaf in pytree.tree_leaves((args, kwargs))
        if isinstance(leaf, Tensor) and not leaf.is_inference()
    ]
    for part in _own_parts(module):
        for name, value in vars(part).items():
            sized = len(value) if isinstance(value, list | dict | set) else -1
            found.append((name, id(value), sized))
        buffers = [tensor for tensor in part._buffers.values() if tensor is not None]
        found.extend((id(tensor), tensor._version) for tensor in buffers)
    return found


def _own_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside a module, without those of fitted layers: these remember results of their
    own, and nothing else."""
    if isinstance(module, QuantizedLayer):
        return
    yield module
    for child in module.children():
        yield from _own_parts(child)


def _is_plain(value: Any) -> bool:
    return all(
        type(leaf) in _PLAIN and not (isinstance(leaf, Tensor) and leaf.requires_grad)
        for leaf in pytree.tree_leaves(value)
    )


def _copy(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.clone, value)

"""What stands directly behind a layer: the value of the network that calibration should match.

A layer is often followed by a batch norm, by the addition of another value (a skip connection) and
by a ReLU. An error that the addition cancels, or that the ReLU cuts off, is none; and a layer in
front of an addition can mend what is wrong with the other operand. A run of the dense network under
a mode of torch functions finds out who reads the output of each layer; the model need not be
traceable.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lutra.train.layers.folded_norm import NORMS
from lutra.train.layers.forms import form_of

ADD = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
_RELU = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_RELU6 = (F.relu6,)
_HARDTANH = (F.hardtanh, F.hardtanh_)
CLIPS = (*_RELU6, *_HARDTANH)
_DROPOUT = (F.dropout, F.dropout2d, F.alpha_dropout)


@dataclass
class Behind:
    """What is behind the one call of a layer.

    Attributes:
        norm: the batch norm that alone reads its output.
        adds: whether another value of the same shape is added to the result, which nothing else
            reads.
        low, high: where everything behind that cuts off.
    """

    norm: nn.Module | None = None
    adds: bool = False
    low: float = -math.inf
    high: float = math.inf


class _Value:
    """A tensor that came from layers by the steps that `Behind` knows."""

    def __init__(self, tensor: Tensor, names: tuple[str, ...], stage: str) -> None:
        self.tensor, self.names, self.stage = weakref.ref(tensor), names, stage
        self.shape = tensor.shape
        self.reads = 0
        self.norm: nn.Module | None = None
        self.before: list[_Value] = []
        self.clip: tuple[float, float] | None = None  # of its only reader


@dataclass
class Follower(TorchFunctionMode):
    """Follows the outputs of layers through batch norms, additions and clamps.

    Args:
        layers: by name.
        on_add: called before an addition with the name of a layer that leads to an operand, and the
            other operand.
    """

    layers: Mapping[str, nn.Module]
    on_add: Callable[[str, Tensor], None] | None = None
    _values: dict[int, _Value] = field(default_factory=dict)
    _made: list[_Value] = field(default_factory=list)
    _norm: nn.Module | None = None

    def __post_init__(self) -> None:
        super().__init__()

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[Follower]:
        """Watches the layers and norms of a model, in eval mode, as long as it is open."""
        handles = [
            layer.register_forward_hook(self._leaves(name)) for name, layer in self.layers.items()
        ]
        for module in model.modules():
            if type(module) in NORMS:
                handles.append(module.register_forward_pre_hook(self._enters_norm))
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _enters_norm(self, module: nn.Module, args: Any) -> None:
        self._norm = module

    def _leaves(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._tag(_Value(output, (name,), "layer"), output)

        return hook

    def _tag(self, value: _Value, tensor: Tensor) -> None:
        self._values[id(tensor)] = value
        self._made.append(value)

    def _find(self, tensor: Any) -> _Value | None:
        if not isinstance(tensor, Tensor):
            return None
        value = self._values.get(id(tensor))  # an address, which another tensor may have had
        return value if value is not None and value.tensor() is tensor else None

    def forget(self) -> None:
        """Forgets the values of a run."""
        self._values.clear()
        self._made.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = [
            value
            for tensor in tensors_in((args, kwargs))
            if (value := self._find(tensor)) is not None
        ]
        if not found:
            return func(*args, **kwargs)
        if self.on_add is not None and func in ADD and len(args) == 2 and not kwargs:
            for mine, other in (args, args[::-1]):
                value = self._find(mine)
                if value is not None and value.stage != "sum" and _fits(other, value.shape):
                    for name in value.names:
                        self.on_add(name, other.expand(value.shape))
        result = func(*args, **kwargs)
        if any(True for _ in tensors_in(result)):
            for value in found:
                value.reads += 1
            if isinstance(result, Tensor):
                self._step(func, args, kwargs, result, found)
        return result

    def _step(self, func: Any, args: Any, kwargs: Any, result: Tensor, found: list[_Value]) -> None:
        first, stages = found[0], {value.stage for value in found}
        made = None
        if func in _DROPOUT and not _argument(args, kwargs, 2, "training", True):
            made = _Value(result, first.names, first.stage)
            made.norm = first.norm
        elif (
            func is F.batch_norm
            and stages == {"layer"}
            and self._norm is not None
            and not _has_rows(self.layers[first.names[0]], result)
        ):
            made = _Value(result, first.names, "norm")
            made.norm = self._norm
        elif func in ADD and len(args) == 2 and not kwargs and "sum" not in stages:
            if all(_fits(operand, result.shape) for operand in args) and all(
                value.shape == result.shape for value in found
            ):
                names = tuple(name for value in found for name in value.names)
                made = _Value(result, names, "sum")
        elif (clip := clip_of(func, args, kwargs)) is not None:
            first.clip = clip
        if made is not None:
            made.before = found
            self._tag(made, result)
        elif result is args[0] and first.tensor() is result:
            self._values.pop(id(result), None)  # written in place

    def returned(self, output: Any) -> None:
        """Counts what the model gives back as read."""
        for tensor in tensors_in(output):
            value = self._find(tensor)
            if value is not None:
                value.reads += 1

    def found(self) -> dict[str, Behind]:
        """What is behind the layers that were called once."""
        starts: dict[str, list[_Value]] = {}
        for value in self._made:
            if value.stage == "layer" and not value.before:
                starts.setdefault(value.names[0], []).append(value)
        following = {id(before): value for value in self._made for before in value.before}
        result = {}
        for name, values in starts.items():
            if len(values) != 1:
                continue
            value, behind = values[0], Behind()
            while value.reads == 1:
                step = following.get(id(value))
                if step is None:
                    if value.clip is not None:
                        behind.low, behind.high = value.clip
                    break
                behind.norm = step.norm or behind.norm
                behind.adds = behind.adds or step.stage == "sum"
                value = step
            result[name] = behind
        return result


def _argument(args: Any, kwargs: Any, place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def clip_of(func: Any, args: Any, kwargs: Any) -> tuple[float, float] | None:
    """The range that a function leaves, if it does nothing else."""
    if func in _RELU:
        return 0.0, math.inf
    if func in _RELU6:
        return 0.0, 6.0
    if func in _HARDTANH:
        low, high = (
            _argument(args, kwargs, i, n, d) for i, n, d in ((1, "min_val", -1), (2, "max_val", 1))
        )
        return float(low), float(high)
    return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from tensors_in(entry)


def _fits(operand: Any, shape: torch.Size) -> bool:
    """Whether this is a tensor that can be expanded to a shape."""
    if not isinstance(operand, Tensor) or operand.dim() > len(shape):
        return False
    sizes = zip(reversed(operand.shape), reversed(shape), strict=False)
    return all(mine in (1, size) for mine, size in sizes)


def _has_rows(layer: nn.Module, output: Tensor) -> bool:
    """Whether the outputs of a layer are not on axis 1, where a batch norm looks for them."""
    form = form_of(layer)
    return (form is None or form.dense is nn.Linear) and output.dim() != 2

"""Ranges of channels made alike between layers, before they are calibrated.

A layer has one activation grid for all channels of its input. Where one channel is much larger
than the others, these get few steps. A factor for each channel can move between layers: what comes
before is divided by it, the weights behind are multiplied, and whatever stands between (ReLU,
pooling, additions, concatenation) lets it pass (Nagel and others, arXiv 1906.04721). The network
computes what it did, and its grids are used better.

A run of the dense network under a mode of torch functions finds the channels that have one factor:
those of the operands of an addition are the same. Channels that reach anything else keep theirs.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lutra.train import distributed
from lutra.train.conversion.behind import ADD, CLIPS, clip_of, tensors_in
from lutra.train.conversion.prepare import tied_parameters
from lutra.train.conversion.sequential import Batches
from lutra.train.layers.dropin import copy_model
from lutra.train.layers.lookup import nearest_levels
from lutra.train.recipe import Int8, Lookup, Method

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_PASSES = (
    F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.leaky_relu, F.leaky_relu_,
    F.prelu, torch.prelu, Tensor.prelu, F.dropout, F.dropout2d, F.max_pool1d, F.max_pool2d,
    torch.max_pool1d, torch.max_pool2d, Tensor.contiguous, Tensor.clone, Tensor.detach,
    F.interpolate,
)  # fmt: skip
_AVERAGES = (
    F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, torch.avg_pool1d,
    torch.adaptive_avg_pool1d,
)  # fmt: skip
_FLATS = (torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.reshape)
_PADS = (F.pad,)
_CATS = (torch.cat, torch.concat, torch.concatenate)
#: How much of the difference between channels is taken out: of each all are tried.
POWERS = (0.5, 0.75, 1.0)
_LEAST = 1.0 / 64.0  # of the largest channel: smaller ones are taken for as large
_GAIN = 0.95  # of the error without factors, at most
_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4)  # of the range that a grid covers
_ROWS = 512  # that an error is measured on
#: Samples of a layer: fewer say too little of the size of a channel.
NEEDED_ROWS = 1024


class _Channels:
    """Channels that have the same factors, found by union."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fixed = False
        self.cap = math.inf  # where a clamp cuts off
        self.makers: list[str] = []
        self.peaks = torch.zeros(2, size)  # of both halves of every batch
        self._into: _Channels | None = None

    def root(self) -> _Channels:
        """What they have become part of."""
        return self if self._into is None else self._into.root()

    def join(self, other: _Channels) -> None:
        """Makes both the same."""
        mine, its = self.root(), other.root()
        if mine is its:
            return
        its._into = mine
        mine.fixed |= its.fixed
        mine.cap = min(mine.cap, its.cap)
        mine.makers += its.makers


@dataclass
class _Value:
    """A tensor whose channels are known: along `axis`, `inner` entries each, over and over."""

    tensor: weakref.ref[Tensor]
    parts: tuple[_Channels, ...]
    axis: int
    inner: int = 1

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def index(self, length: int) -> Tensor:
        """The channel (length) of each entry along the axis."""
        return torch.arange(length) // self.inner % self.size


@dataclass
class Reader:
    """A layer that reads channels.

    Attributes:
        parts: channels of its input, one after the other.
        index: the channel of each input of the layer.
    """

    parts: tuple[_Channels, ...]
    index: Tensor

    def gather(self, vectors: Callable[[_Channels], Tensor]) -> Tensor:
        """A number for each input of the layer, of numbers for each channel."""
        return torch.cat([vectors(part.root()) for part in self.parts])[self.index]


@dataclass
class _Finder(TorchFunctionMode):
    """Follows channels through one run of a model.

    Args:
        modules: that make or read channels, by name.
    """

    modules: Mapping[str, nn.Module]
    readers: dict[str, Reader] = field(default_factory=dict)
    made: dict[str, _Channels] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    _values: dict[int, _Value] = field(default_factory=dict)
    _kept: list[Any] = field(default_factory=list)
    _inside: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def watch(self, model: nn.Module, batches: Batches) -> None:
        """Runs a model once."""
        handles = []
        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(self._enters(name)))
            handles.append(module.register_forward_hook(self._leaves(name)))
        try:
            with self:
                batches.first(model, lambda output: self._fix(output))
        finally:
            for handle in handles:
                handle.remove()
            self._values.clear()
            self._kept.clear()

    def _find(self, tensor: Any) -> _Value | None:
        value = self._values.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return value if value is not None and value.tensor() is tensor else None

    def _tag(self, tensor: Tensor, parts: Sequence[_Channels], axis: int, inner: int = 1) -> None:
        self._values[id(tensor)] = _Value(weakref.ref(tensor), tuple(parts), axis, inner)

    def _fix(self, values: Any) -> None:
        for tensor in tensors_in(values):
            value = self._find(tensor)
            for part in () if value is None else value.parts:
                part.root().fixed = True

    def _enters(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._inside += 1
            self.calls[name] = self.calls.get(name, 0) + 1
            value = self._find(args[0]) if len(args) == 1 else None
            axis = args[0].dim() - 1 if type(module) is nn.Linear else 1
            reads = type(module) in _LAYERS and value is not None and value.axis == axis
            if value is None or not reads:
                self._fix(args)
            else:
                length = args[0].shape[axis]
                self.readers[name] = Reader(value.parts, value.index(length))

        return hook

    def _leaves(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._inside -= 1
            last = type(module) in (nn.Linear, nn.LayerNorm)
            if isinstance(output, Tensor) and _scalable(module):
                axis = output.dim() - 1 if last else 1
                channels = _Channels(output.shape[axis])
                channels.makers.append(name)
                self.made[name] = channels
                self._tag(output, [channels], axis)

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        before = [tensor for tensor in tensors_in((args, kwargs)) if self._find(tensor) is not None]
        values = [value for tensor in before if (value := self._find(tensor)) is not None]
        shape = before[0].shape if before else None
        result = func(*args, **kwargs)
        if not values or not any(True for _ in tensors_in(result)):
            return result
        made = None
        if isinstance(result, Tensor) and shape is not None:
            made = self._passed(func, args, kwargs, values, shape, result)
        if made is None:
            for value in values:
                for part in value.parts:
                    part.root().fixed = True
        elif isinstance(result, Tensor):
            self._tag(result, *made)
        return result

    def _passed(
        self, func: Any, args: Any, kwargs: Any, values: list[_Value], shape: Any, result: Tensor
    ) -> tuple[Sequence[_Channels], int, int] | None:
        """The channels of a result; None where it has none."""
        first = values[0]
        same = first.parts, first.axis, first.inner
        if func in ADD:
            alike = (
                len(values) == len(args) == 2
                and not kwargs
                and (values[0].axis, values[0].inner) == (values[1].axis, values[1].inner)
                and [p.size for p in values[0].parts] == [p.size for p in values[1].parts]
                and all(operand.shape == result.shape for operand in args)
                and all(p.root().cap == math.inf for v in values for p in v.parts)
            )
            if not alike:
                return None
            for mine, its in zip(first.parts, values[1].parts, strict=True):
                mine.join(its)
            return same
        if func in _CATS:
            parts = args[0] if args else kwargs["tensors"]
            axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            known = [self._find(part) for part in parts]
            if any(v is None or v.inner != 1 or v.axis != axis % result.dim() for v in known):
                return None
            return [part for v in known if v is not None for part in v.parts], first.axis, 1
        if len(values) != 1 or not args or first.tensor() is not args[0]:
            return None
        if func in _PASSES or (func in _PADS and _pads_zeros(args, kwargs, first.axis, result)):
            return same if result.shape[first.axis] == shape[first.axis] else None
        if func in CLIPS:
            low, high = clip_of(func, args, kwargs) or (-1.0, 1.0)
            for part in first.parts:
                root = part.root()
                root.cap = min(root.cap, high)
                root.fixed |= low != 0.0
            return same
        if func in _AVERAGES or (func in (Tensor.mean, torch.mean) and result.dim() == len(shape)):
            capped = any(part.root().cap < math.inf for part in first.parts)
            kept = result.dim() == len(shape) and result.shape[first.axis] == shape[first.axis]
            return same if kept and not capped else None
        flat = func in _FLATS and first.inner == 1 and result.dim() == 2 < len(shape)
        if flat and result.shape[0] == shape[0]:
            return first.parts, 1, math.prod(shape[first.axis + 1 :])
        if func in (Tensor.permute, torch.permute) and first.inner == 1:
            order = args[1] if len(args) == 2 else args[1:]
            order = [int(axis) % len(shape) for axis in order]
            return first.parts, order.index(first.axis), 1
        return None


def _pads_zeros(args: Any, kwargs: Any, axis: int, result: Tensor) -> bool:
    pad = args[1] if len(args) > 1 else kwargs["pad"]
    mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
    value = args[3] if len(args) > 3 else kwargs.get("value")
    return (mode != "constant" or not value) and len(pad) // 2 < result.dim() - axis


def _scalable(module: nn.Module) -> bool:
    """Whether the outputs of a module can be divided by factors through its own parameters."""
    if type(module) in _NORMS:
        return module.weight is not None and module.running_var is not None
    if type(module) is nn.LayerNorm:
        return module.weight is not None and len(module.normalized_shape) == 1
    return type(module) in _LAYERS


@torch.no_grad()
def equalize(
    model: nn.Module,
    methods: Mapping[str, Method],
    rows: Mapping[str, Tensor],
    data: Sequence[Any],
) -> tuple[nn.Module, dict[str, float]]:
    """Gives channels between layers factors where the error of the layers behind gets smaller.

    Args:
        model: is not changed.
        methods: of the layers that are replaced, by path.
        rows: samples (n, D) of their inputs.
        data: batches.

    Returns:
        A model that computes the same on the data, and the paths of the modules whose outputs were
        scaled with the power that was taken; the model itself where that is none.
    """
    names = {module: name for name, module in model.named_modules()}
    kinds = (*_LAYERS, *_NORMS, nn.LayerNorm)
    modules = {name: module for module, name in names.items() if type(module) in kinds}
    finder = _Finder(modules)
    finder.watch(model, Batches(data, 1, 0))
    tied = tied_parameters(model)
    for name, module in modules.items():
        again = finder.calls.get(name, 0) > 1 or any(id(p) in tied for p in module.parameters())
        method = methods.get(name)
        if again and name in finder.made:
            finder.made[name].root().fixed = True
        if name in finder.readers and (again or not isinstance(method, Int8 | Lookup | None)):
            for part in finder.readers[name].parts:
                part.root().fixed = True
    roots = {c.root(): None for c in finder.made.values() if not c.root().fixed}
    read = [
        name
        for name, reader in finder.readers.items()
        if any(part.root() in roots for part in reader.parts)
    ]
    if not any(name in methods for name in read):
        return model, {}
    _peaks(model, finder, {name: modules[name] for name in read}, data)
    taken: dict[str, float] = {}
    factors: dict[_Channels, Tensor] = {}
    ones = {c: torch.ones(c.size) for c in (r.root() for r in finder.made.values())}
    for channels in roots:
        own = [
            name
            for name in read
            if name in methods and any(p.root() is channels for p in finder.readers[name].parts)
        ]
        if not own or min(len(rows[name]) for name in own) < NEEDED_ROWS:
            continue

        def total(trial: Mapping[_Channels, Tensor], own: list[str] = own) -> float:
            error = 0.0
            for name in own:
                moved = finder.readers[name].gather(trial.__getitem__)
                weight, groups = _weight_of(modules[name])
                taps = rows[name].shape[1] // len(moved)
                divisor = moved.repeat_interleave(taps)
                error += grid_error(weight, methods[name], rows[name], divisor, groups)
            return distributed.mean(error)

        start = total({**ones, **factors})
        found = []
        for power in POWERS:
            trial = _factors(channels, power)
            found.append((total({**ones, **factors, channels: trial}), power, trial))
        error, power, best = min(found, key=lambda entry: entry[0])
        if error < _GAIN * start:
            factors[channels] = best
            taken.update(dict.fromkeys(channels.makers, power))
    if not factors:
        return model, {}
    new = copy_model(model)
    for name, channels in finder.made.items():
        if channels.root() in factors:
            _divide(new.get_submodule(name), factors[channels.root()])
    for name in read:
        reader = finder.readers[name]
        if any(part.root() in factors for part in reader.parts):
            _multiply(new.get_submodule(name), reader.gather({**ones, **factors}.__getitem__))
    return new, taken


def _factors(channels: _Channels, power: float) -> Tensor:
    """What channels are divided by: 1 for the largest, and for those whose size is not known, which
    differ much between halves of the data."""
    high, low = channels.peaks.amax(0), channels.peaks.amin(0)
    top = high.max().clamp_min(1e-30)
    size = torch.where(low > 0.0, high * high / low.clamp_min(1e-30), top)
    return (size / top).clamp(_LEAST, 1.0) ** power


def _peaks(
    model: nn.Module, finder: _Finder, layers: Mapping[str, nn.Module], data: Sequence[Any]
) -> None:
    """The largest magnitude of each channel, in both halves of all batches."""
    handles = []
    for name, layer in layers.items():
        reader = finder.readers[name]

        def hook(layer: nn.Module, args: tuple[Any, ...], reader: Reader = reader) -> None:
            x = args[0].detach().abs()
            x = x if type(layer) is nn.Linear else x.transpose(1, -1)
            half = -(-len(x) // 2)
            for i, part in enumerate((x[:half], x[half:])):
                if not part.numel():
                    continue
                most = part.flatten(0, -2).amax(0).float().cpu()
                every = torch.zeros(sum(channels.size for channels in reader.parts))
                every.scatter_reduce_(0, reader.index, most, "amax")
                sizes = [channels.size for channels in reader.parts]
                for channels, own in zip(reader.parts, torch.split(every, sizes), strict=True):
                    peaks = channels.root().peaks
                    peaks[i] = torch.maximum(peaks[i], own)

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        Batches(data, 1, 0).run(model)
    finally:
        for handle in handles:
            handle.remove()
    for channels in {c.root() for c in finder.made.values()}:
        channels.peaks = distributed.all_reduce(channels.peaks, "max")


def _weight_of(layer: Any) -> tuple[Tensor, int]:
    """The weight (M, D / G) of a layer, and G, its groups."""
    weight: Tensor = layer.weight
    return weight.detach().float().flatten(1).cpu(), getattr(layer, "groups", 1)


def grid_error(
    weight: Tensor, method: Method, rows: Tensor, divisor: Tensor, groups: int = 1
) -> float:
    """Squared error of the outputs on a grid for all channels, relative to their variance.

    Args:
        weight: float32 (M, D / groups).
        rows: samples (n, D) of the input.
        divisor: by which the inputs are divided, and the weights multiplied (D).
    """
    assert isinstance(method, Int8 | Lookup)
    x = rows[:: max(1, len(rows) // _ROWS)]
    qmax = (1 << method.act_bits) - 1
    scaled = x / divisor
    low, high = float(scaled.min().clamp(max=0.0)), float(scaled.max().clamp(min=0.0))
    spread = divisor.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
    kernel = weight * spread
    if isinstance(method, Int8):
        step = kernel.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127.0
        kernel = (kernel / step).round() * step
    else:
        kernel = nearest_levels(kernel, method.weights)
    want = _product(x, weight, groups)
    best = math.inf
    for share in _SHARES:
        width = max((high - low) * share, 1e-30) / qmax
        zero = round(-low * share / width)
        grid = ((scaled / width).round() + zero).clamp(0, qmax).sub_(zero).mul_(width)
        rest = _product(grid, kernel, groups) - want
        best = min(best, float((rest - rest.mean(0)).square().mean()))
    return best / max(float(want.var(0, correction=0).mean()), 1e-30)


def _product(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Outputs (n, M) of inputs (n, D) and weights (M, D / groups)."""
    if groups == 1:
        return x @ weight.t()
    parts = x.view(len(x), groups, -1).transpose(0, 1)
    kernel = weight.view(groups, len(weight) // groups, -1)
    return (parts @ kernel.transpose(1, 2)).transpose(0, 1).flatten(1)


def _divide(module: nn.Module, factors: Tensor) -> None:
    """Divides the outputs of a module."""
    for parameter in (module.weight, module.bias):
        if isinstance(parameter, Tensor):
            shape = (-1, *[1] * (parameter.dim() - 1))
            parameter.div_(factors.to(parameter).view(shape))


def _multiply(module: Any, factors: Tensor) -> None:
    """Multiplies the weights of each input of a layer."""
    weight, groups = module.weight, getattr(module, "groups", 1)
    spread = factors.to(weight).view(groups, -1).repeat_interleave(len(weight) // groups, 0)
    weight.mul_(spread.view(*spread.shape, *[1] * (weight.dim() - 2)))

"""What flows into the layers that will be replaced: a bounded, uniform sample of their rows."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train.batches import BatchReader
from lutra.train.geometry import Geometry
from lutra.train.layers.attention import plain_attention
from lutra.train.layers.finite import describe, is_finite
from lutra.train.layers.forms import form_of
from lutra.train.modes import evaluating
from lutra.train.threads import StepThreads

_FLOAT_BYTES = 4
_LEAST_ROWS = 64  # fewer rows than centroids make no codebook


class Reservoir:
    """A uniform sample, without replacement, of all rows that pass through a layer.

    Every row draws a random key; the rows with the smallest keys stay. Memory is `capacity` rows.
    `input_shape` is that of the layer's first input, for one sample of the model: (1, C, H, W), or
    (n, ..., D) for a linear layer that sees n rows of each sample along its first axis. `sources`
    has a number for the tensor of every call: layers with the same numbers read the same tensors.
    """

    def __init__(self, geometry: Geometry, capacity: int, generator: torch.Generator) -> None:
        self.geometry, self.capacity, self.generator = geometry, capacity, generator
        self.rows = torch.empty((0, geometry.depth))
        self.keys = torch.empty(0)
        self.seen = 0
        self.input_shape: tuple[int, ...] = ()
        self.sources: list[int] = []

    def add(self, x: Tensor) -> None:
        """Takes the rows of x (N, C, H, W)."""
        g = self.geometry
        height, width = g.out_size(x.shape[2], x.shape[3])
        total = x.shape[0] * height * width
        self.seen += total
        if total == 0:
            return
        keys = torch.rand(total, generator=self.generator)
        if len(self.keys) == self.capacity:
            candidates = torch.nonzero(keys < self.keys.max()).flatten()
        else:
            candidates = torch.arange(total)
        if len(candidates) > self.capacity:
            candidates = candidates[keys[candidates].topk(self.capacity, largest=False).indices]
        if not len(candidates):
            return
        keys = keys[candidates]
        picked = patches(x, g, candidates.to(x.device), height, width).to("cpu", torch.float32)
        self.rows, self.keys = torch.cat([self.rows, picked]), torch.cat([self.keys, keys])
        if len(self.keys) > self.capacity:
            best = self.keys.topk(self.capacity, largest=False).indices
            self.rows, self.keys = self.rows[best], self.keys[best]


def patches(x: Tensor, geometry: Geometry, index: Tensor, height: int, width: int) -> Tensor:
    """Some rows (rows, D) of images x (N, C, H, W).

    Args:
        index: int64 (rows): output pixels, counted by image, row and column.
        height, width: of the output.
    """
    g = geometry
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = g.kernel, g.stride, g.padding, g.dilation
    padded = F.pad(x, (pw, pw, ph, ph))
    column, row = index % width, index // width % height
    image = index // (width * height)
    ys = row[:, None] * sh + torch.arange(kh, device=x.device) * dh
    xs = column[:, None] * sw + torch.arange(kw, device=x.device) * dw
    patch = padded.permute(0, 2, 3, 1)[
        image[:, None, None], ys[:, :, None], xs[:, None, :]
    ]  # (rows, kh, kw, C)
    return patch.permute(0, 3, 1, 2).reshape(len(index), g.depth)


def images_of(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """The input of a layer as (N, C, H, W); rows of a linear layer are images of one pixel."""
    form = form_of(layer)
    if form is None or form.dense is nn.Linear:
        return x.reshape(-1, x.shape[-1])[:, :, None, None]
    if x.dim() != (3 if form.line else 4):
        raise LutraError(
            f"calibration: the input of layer '{name}' has shape {tuple(x.shape)}; lookup "
            f"convolutions take (N, C, {'L' if form.line else 'H, W'}): give batches, or keep the "
            "layer"
        )
    return form.enter(x)


def _samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Number of samples in a batch: the first axis of its first tensor."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return 1


def _sample_shape(x: Tensor, samples: int) -> tuple[int, ...]:
    """The shape of a layer's input for one sample."""
    if x.dim() < 2:
        return (1, *x.shape)
    whole, rest = divmod(x.shape[0], max(1, samples))
    return (1 if rest else max(1, whole), *x.shape[1:])


class _Sources:
    """Numbers tensors: the same object has the same number for as long as it lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._next = 0

    def __call__(self, x: Tensor) -> int:
        known = self._known.get(id(x))  # an address, which another tensor may have had
        if known is None or known[0]() is not x:
            known = (weakref.ref(x), self._next)
            self._known[id(x)] = known
            self._next += 1
        return known[1]


@torch.no_grad()
def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    geometries: Mapping[str, Geometry],
    data: Iterable[Any],
    *,
    rows: int,
    memory_bytes: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Reservoir]:
    """Runs the data through the model in eval mode and samples the inputs of `layers`, if any.

    Args:
        rows: at most this many rows per layer.
        memory_bytes: at most this much for all samples together.

    Raises:
        LutraError: no data, or NaN or infinity in the input of a layer.
    """
    if rows < 1:
        raise LutraError(f"calibration: rows={rows} leaves no samples; allow some thousand")
    depth = max(1, sum(g.depth for g in geometries.values()))
    least = min(rows, _LEAST_ROWS)
    capacity = min(rows, memory_bytes // (_FLOAT_BYTES * depth))
    if capacity < least:
        raise LutraError(
            f"calibration: memory_bytes={memory_bytes} leaves {capacity} sample rows for each of "
            f"{len(layers)} layers; allow at least {least * _FLOAT_BYTES * depth} bytes"
        )
    reservoirs: dict[str, Reservoir] = {}
    source_of = _Sources()
    handles = []
    samples = 1  # in the batch that runs
    for i, (name, layer) in enumerate(layers.items()):
        generator = torch.Generator().manual_seed(seed * 1000003 + i)
        reservoirs[name] = Reservoir(geometries[name], capacity, generator)

        def hook(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
        ) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if not is_finite(x):
                raise LutraError(
                    f"calibration: the input of layer '{name}' holds NaN or infinity "
                    f"({describe(x)}); check the model and the calibration data"
                )
            images = images_of(layer, name, x)
            if not reservoirs[name].input_shape:
                form = form_of(layer)
                seen = x if form is None else form.enter(x)
                reservoirs[name].input_shape = _sample_shape(seen, samples)
            reservoirs[name].sources.append(source_of(x))
            reservoirs[name].add(images)

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    reader = BatchReader(model, "calibration data")
    batches, threads = 0, StepThreads(model)
    try:
        with evaluating(model):
            for batch in data:
                args, kwargs = reader.inputs(batch, device)
                samples = _samples(args, kwargs)
                threads.fit((args, kwargs))
                with plain_attention():
                    model(*args, **kwargs)
                batches += 1
                if progress is not None:
                    progress(batches)
    finally:
        threads.restore()
        for handle in handles:
            handle.remove()
    if batches == 0:
        raise LutraError("calibration data is empty; give a few batches of real inputs")
    return reservoirs

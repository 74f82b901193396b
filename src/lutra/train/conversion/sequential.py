"""Calibration in the order of execution: each layer is fitted to the dense network.

Layers that were converted give other values than the dense network. A layer behind them is fitted
on the inputs that it will get, to the outputs that the dense layer had, and so mends part of the
errors before it. The dense network runs once; the converted one runs once for each layer, up to
that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train import distributed
from lutra.train.batches import BatchReader
from lutra.train.conversion.calibrate import images_of, patches
from lutra.train.geometry import Geometry
from lutra.train.layers.attention import plain_attention
from lutra.train.layers.base import QuantizedLayer
from lutra.train.layers.forms import form_of


class _Reached(Exception):
    """Raised by a hook: nothing behind the last call of the layer is needed."""


class Batches:
    """Calibration data that can be run again and again.

    Args:
        data: batches; they are kept.
        rows: at most about this many rows of a layer are looked at, in all batches together.
        seed: of the choice of the rows.
    """

    def __init__(self, data: Sequence[Any], rows: int, seed: int) -> None:
        self._data, self._seed = data, seed
        self._share = max(1, -(-rows // max(1, len(data))))

    def run(self, model: nn.Module, enter: Callable[[int], None] = lambda batch: None) -> None:
        """Runs a model, in eval mode, on every batch; `enter` is called before each."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        reader = BatchReader(model, "calibration data")
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            for number, batch in enumerate(self._data):
                enter(number)
                args, kwargs = reader.inputs(batch, device)
                try:
                    with plain_attention():
                        model(*args, **kwargs)
                except _Reached:
                    continue
        finally:
            for module, mode in modes.items():
                module.training = mode

    def places(self, layer: str, batch: int, call: int, total: int) -> Tensor:
        """Which of `total` rows of a call are looked at: the same in every pass."""
        if total <= self._share:
            return torch.arange(total)
        generator = torch.Generator().manual_seed(_number(self._seed, layer, batch, call))
        return torch.randperm(total, generator=generator)[: self._share].sort().values


def _number(seed: int, layer: str, batch: int, call: int) -> int:
    """A seed for each of these, the same in every process."""
    result = seed
    for value in (*layer.encode(), batch, call):
        result = (result * 1000003 + value + 1) % (2**31 - 1)
    return result


class Targets:
    """Outputs of the dense layers at the places that are looked at: (rows, M) by layer."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self.outputs: dict[str, list[Tensor]] = {}
        self.calls: dict[str, list[int]] = {}  # of each batch

    @torch.no_grad()
    def collect(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Runs the dense model once."""
        position = {"batch": 0}
        handles = []

        def enter(batch: int) -> None:
            position["batch"] = batch
            for calls in self.calls.values():
                calls.append(0)

        for name, layer in layers.items():
            self.outputs[name], self.calls[name] = [], []

            def hook(module: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
                call = self.calls[name][-1]
                self.calls[name][-1] += 1
                rows = output_rows(module, output)
                where = self._batches.places(name, position["batch"], call, len(rows))
                self.outputs[name].append(rows[where.to(rows.device)].to("cpu", torch.float32))

            # before the hooks of the model, which may change the output
            handles.append(layer.register_forward_hook(hook, prepend=True))
        try:
            self._batches.run(model, enter)
        finally:
            for handle in handles:
                handle.remove()

    def of(self, name: str) -> Tensor:
        """The outputs of a layer (rows, M); they are forgotten."""
        return torch.cat(self.outputs.pop(name))

    @torch.no_grad()
    def inputs(self, model: nn.Module, name: str, layer: nn.Module, geometry: Geometry) -> Tensor:
        """Inputs (rows, D) of a layer in the converted model, at the same places.

        Args:
            model: the model, converted up to the layer.
            name: of the layer, as `collect` had it.
            layer: what stands in its place in the model.
            geometry: of the layer.
        """
        position = {"batch": 0, "call": 0}
        found: list[Tensor] = []

        def enter(batch: int) -> None:
            position.update(batch=batch, call=0)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch, call = position["batch"], position["call"]
            position["call"] += 1
            x = images_of(module, name, args[0] if args else next(iter(kwargs.values())))
            height, width = geometry.out_size(x.shape[2], x.shape[3])
            where = self._batches.places(name, batch, call, x.shape[0] * height * width)
            found.append(patches(x, geometry, where.to(x.device), height, width).to("cpu"))
            if position["call"] == self.calls[name][batch]:
                raise _Reached

        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self._batches.run(model, enter)
        finally:
            handle.remove()
        if not found:
            raise LutraError(
                f"calibration: layer '{name}' is reached in the dense model and not in the "
                "converted one; keep it in the recipe"
            )
        return torch.cat(found).float()


def output_error(layer: QuantizedLayer, rows: Tensor, targets: Tensor) -> float:
    """Mean squared difference from the targets relative to their variance.

    Args:
        layer: the new layer.
        rows: samples of its input (n, D).
        targets: the outputs (n, M) of the dense layer in the dense network.
    """
    variance = targets.var(correction=0).clamp_min(1e-12)
    error = (layer.of_rows(rows) - targets).square().mean() / variance
    return distributed.mean(float(error))


def output_rows(layer: nn.Module, output: Tensor) -> Tensor:
    """The output of a dense layer as rows (R, M), in the order of the rows of its input."""
    form = form_of(layer)
    if form is None or form.dense is nn.Linear:
        return output.reshape(-1, output.shape[-1])
    output = form.enter(output)
    return output.permute(0, 2, 3, 1).reshape(-1, output.shape[1])

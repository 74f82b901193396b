"""Calibration in the order of execution: each layer is fitted to the dense network.

Layers that were converted give other values than the dense network. A layer behind them is fitted
on the inputs that it will get, to the outputs that the dense layer had, and so mends part of the
errors before it. The dense network runs once; the converted one runs once for each layer, up to
that layer, and reads what earlier passes computed (`replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train.batches import BatchReader
from lutra.train.conversion.behind import Behind, Follower
from lutra.train.conversion.calibrate import images_of, patches
from lutra.train.conversion.replay import Replay
from lutra.train.conversion.spill import Spill
from lutra.train.geometry import Geometry
from lutra.train.layers.attention import plain_attention
from lutra.train.layers.folded_norm import gain_and_shift
from lutra.train.layers.forms import form_of
from lutra.train.layers.goal import Goal
from lutra.train.modes import evaluating


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

    def run(
        self,
        model: nn.Module,
        enter: Callable[[int], None] = lambda batch: None,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs a model, in eval mode, on every batch; `enter` is called before each, `leave` behind
        it."""
        with _calls(model) as call:
            for number, batch in enumerate(self._data):
                enter(number)
                with suppress(_Reached):
                    call(batch)
                leave()

    def first(self, model: nn.Module, look: Callable[[Any], None]) -> None:
        """Runs a model, in eval mode, on the first batch, and shows what it gives."""
        with _calls(model) as call:
            for batch in self._data[:1]:
                look(call(batch))

    def places(self, layer: str, batch: int, call: int, total: int) -> Tensor:
        """Which of `total` rows of a call are looked at: the same in every pass."""
        if total <= self._share:
            return torch.arange(total)
        generator = torch.Generator().manual_seed(_number(self._seed, layer, batch, call))
        return torch.randperm(total, generator=generator)[: self._share].sort().values


@contextmanager
def _calls(model: nn.Module) -> Iterator[Callable[[Any], Any]]:
    """Calls a model on batches, in eval mode and off PyTorch's fast path."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    reader = BatchReader(model, "calibration data")

    def call(batch: Any) -> Any:
        args, kwargs = reader.inputs(batch, device)
        with plain_attention():
            return model(*args, **kwargs)

    with evaluating(model):
        yield call


def _number(seed: int, layer: str, batch: int, call: int) -> int:
    """A seed for each of these, the same in every process."""
    result = seed
    for value in (*layer.encode(), batch, call):
        result = (result * 1000003 + value + 1) % (2**31 - 1)
    return result


@torch.no_grad()
def norms_behind(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Any
) -> dict[str, nn.Module]:
    """The batch norms that alone read the outputs of layers of a model, by layer."""
    follower = Follower(layers)
    with follower.following(model):
        Batches([batch], 1, 0).first(model, follower.returned)
    found = follower.found().items()
    return {name: behind.norm for name, behind in found if behind.norm is not None}


class Targets:
    """What the dense network has at the places that are looked at, by layer.

    Args:
        batches: that are run.
        store: keeps what the dense network gives.
        replay: keeps what the converted network gives.
    """

    def __init__(self, batches: Batches, store: Spill, replay: Replay) -> None:
        self._batches, self._store, self._replay = batches, store, replay
        self._behind: dict[str, Behind] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.added: dict[str, list[Tensor]] = {}
        self.calls: dict[str, list[int]] = {}  # of each batch

    @property
    def order(self) -> list[str]:
        """The layers in the order in which they ran first; after `collect`."""
        return list(self.calls)

    @torch.no_grad()
    def collect(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Runs the dense model: on one batch to see what is behind each layer, then on all."""
        follower = Follower(layers)
        with follower.following(model):
            self._batches.first(model, follower.returned)
        self._behind = follower.found()
        position = {"batch": 0}
        calls: dict[str, list[int]] = {name: [] for name in layers}
        self.outputs = {name: [] for name in layers}
        self.added = {name: [] for name, behind in self._behind.items() if behind.adds}

        def enter(batch: int) -> None:
            position["batch"] = batch
            for own in calls.values():
                own.append(0)

        def hook_of(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(module: nn.Module, _: Any, output: Tensor) -> None:
                call = calls[name][-1]
                calls[name][-1] += 1
                self.calls.setdefault(name, calls[name])
                found = self._looked_at(name, module, position["batch"], call, output)
                self.outputs[name].append(self._store.keep(found))

            return hook

        def on_add(name: str, other: Tensor) -> None:
            found = self._looked_at(name, layers[name], position["batch"], 0, other)
            self.added[name].append(self._store.keep(found))

        adding = Follower({name: layers[name] for name in self.added}, on_add)
        # before the hooks of the model, which may change the output
        handles = [
            layer.register_forward_hook(hook_of(name), prepend=True)
            for name, layer in layers.items()
        ]
        try:
            with adding.following(model):
                self._batches.run(model, enter, adding.forget)
        finally:
            for handle in handles:
                handle.remove()
        for name in list(self._behind):
            once = set(self.calls[name]) == {1}
            if not once or len(self.added.get(name, self.calls[name])) != len(self.calls[name]):
                del self._behind[name]  # other batches take other ways

    def _looked_at(
        self, name: str, layer: nn.Module, batch: int, call: int, value: Tensor
    ) -> Tensor:
        """The rows (n, M) of a layer's output, or of what is added to it, that are looked at."""
        rows = output_rows(layer, value)
        where = self._batches.places(name, batch, call, len(rows))
        return rows[where.to(rows.device)].to("cpu", torch.float32)

    @torch.no_grad()
    def rows(
        self,
        model: nn.Module,
        name: str,
        layer: nn.Module,
        geometry: Geometry,
        pending: Collection[str],
    ) -> tuple[Tensor, Goal]:
        """Inputs (n, D) of a layer in the converted model, and what its outputs should be; what the
        dense network had is forgotten.

        Args:
            model: the model, converted up to the layer.
            name: of the layer, as `collect` had it.
            layer: what stands in its place in the model.
            geometry: of the layer.
            pending: the paths of all layers that are not fitted, this one among them.
        """
        behind = self._behind.get(name, Behind())
        position = {"batch": 0, "call": 0}
        found: list[Tensor] = []
        added: list[Tensor] = []

        def enter(batch: int) -> None:
            position.update(batch=batch, call=0)
            self._replay.enter(batch)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch, call = position["batch"], position["call"]
            x = images_of(module, name, args[0] if args else next(iter(kwargs.values())))
            height, width = geometry.out_size(x.shape[2], x.shape[3])
            where = self._batches.places(name, batch, call, x.shape[0] * height * width)
            found.append(patches(x, geometry, where.to(x.device), height, width).to("cpu"))
            position["call"] += 1
            if position["call"] == self.calls[name][batch] and not behind.adds:
                raise _Reached

        def on_add(_: str, other: Tensor) -> None:
            added.append(self._looked_at(name, layer, position["batch"], 0, other))
            raise _Reached

        follower = Follower({name: layer} if behind.adds else {}, on_add)
        handle = layer.register_forward_pre_hook(before, with_kwargs=True)
        try:
            with (
                self._replay.passing(model, pending),
                follower.following(model) if behind.adds else nullcontext(),
            ):
                self._batches.run(model, enter, follower.forget)
        finally:
            handle.remove()
        if not found:
            raise LutraError(
                f"calibration: layer '{name}' is reached in the dense model and not in the "
                "converted one; keep it in the recipe"
            )
        want = torch.cat(self.outputs.pop(name))
        dense_added = self.added.pop(name, [])
        if name not in self._behind or behind == Behind():
            return torch.cat(found).float(), Goal(want)
        gain, shift = torch.ones(want.shape[1]), torch.zeros(want.shape[1])
        if behind.norm is not None:
            gain, shift = (t.float().cpu() for t in gain_and_shift(behind.norm))
        want, offset = want * gain + shift, shift
        if behind.adds:
            want += torch.cat(dense_added)
            offset = torch.cat(added) + shift
        goal = Goal(want, gain, offset, behind.low, behind.high)
        return torch.cat(found).float(), goal


def output_rows(layer: nn.Module, output: Tensor) -> Tensor:
    """The output of a dense layer as rows (R, M), in the order of the rows of its input."""
    form = form_of(layer)
    if form is None or form.dense is nn.Linear:
        return output.reshape(-1, output.shape[-1])
    output = form.enter(output)
    return output.permute(0, 2, 3, 1).reshape(-1, output.shape[1])

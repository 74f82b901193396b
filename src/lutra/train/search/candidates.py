"""What each layer of a model may become, with the time that it takes alone on this machine."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.graph import Graph
from lutra.runtime.cpu import choose_isa
from lutra.train.batches import move
from lutra.train.conversion.convert import convert
from lutra.train.conversion.speed_gate import (
    SpeedGate,
    float_graph,
    float_weight,
    frozen_graph,
    time_graphs,
)
from lutra.train.geometry import Geometry
from lutra.train.layers.base import QuantizedLayer, family_of
from lutra.train.layers.recurrent import Recurrent
from lutra.train.modes import evaluating
from lutra.train.recipe import PQ, Int8, Keep, Lookup, Method
from lutra.train.search.budget import Budget
from lutra.train.search.samples import Split

#: The keys of the two dense candidates, which every layer has.
FLOAT32: Final = "float32"
INT8: Final = "int8"
#: A lookup candidate may be slower alone than the dense ones by this factor: in a network the step
#: before often makes its input.
_MARGIN: Final = 1.1
#: Linear layers of so many inputs may take long sub-vectors.
_WIDE: Final = 256
#: Samples and rows that show which layers there are, and the shapes of their inputs.
_LOOKED_AT: Final = 2
_ROWS: Final = 64
#: Seconds that a layer is timed for, and the share of the minutes that all of them may take.
_SECONDS: Final = 1.0
_SHARE: Final = 0.1
#: Milliseconds by key.
Times = dict[str, float]


def lookup_methods(geometry: Geometry) -> dict[str, Method]:
    """The lookups that a layer of this geometry may become, by key, the most exact first."""
    found: dict[str, Method] = {"lookup 16x15": Lookup(16, 15)}
    if geometry.taps > 1:
        found["pq row"] = PQ(group="row")
        found["pq patch"] = PQ()
        found["pq pixel"] = PQ(group="pixel")
        found["pq row, tree"] = PQ(group="row", encoder="tree")
        found["pq patch, tree"] = PQ(encoder="tree")
        found["pq pixel, tree"] = PQ(group="pixel", encoder="tree")
    else:
        found["pq V=2"] = PQ(v=2)
        found["pq V=4"] = PQ(v=4)
        found["pq V=4, tree"] = PQ(v=4, encoder="tree")
        if geometry.depth >= _WIDE:
            found["pq V=16"] = PQ(v=16)
            found["pq V=16, tree"] = PQ(v=16, encoder="tree")
    found["lookup 4x3"] = Lookup(4, 3)
    return found


@dataclass
class Candidate:
    """What a layer may become.

    Attributes:
        method: of a recipe; None leaves the layer as it is.
        ms: milliseconds of the layer alone, for one sample; None where it was not timed.
        bytes: of what the file holds for the layer.
    """

    method: Method | None
    ms: float | None
    bytes: int


@dataclass
class SearchLayer:
    """A layer that the search decides about.

    Attributes:
        name: its path.
        kind: as reports call it.
        shape: of its input for one sample; empty where no batch reached it alone.
        candidates: what it may become, by key.
        dropped: why the search leaves some of them out, by key.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    candidates: dict[str, Candidate]
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def active(self) -> list[str]:
        """The keys that are not left out."""
        return [key for key in self.candidates if key not in self.dropped]

    @property
    def lookups(self) -> list[str]:
        """The keys that are neither dense nor left out."""
        return [key for key in self.active if key not in (FLOAT32, INT8)]

    @property
    def fastest_dense(self) -> str:
        """The dense candidate that takes the least time alone."""
        times = {key: self.candidates[key].ms for key in (INT8, FLOAT32)}
        if times[INT8] is None or times[FLOAT32] is None:
            return INT8
        return min((INT8, FLOAT32), key=lambda key: times[key] or 0.0)


def recipe_of(layers: list[SearchLayer], choice: Mapping[str, str]) -> dict[str, Method]:
    """The recipe of a choice: a pattern for each layer that does not stay as it is."""
    found = {}
    for layer in layers:
        method = layer.candidates[choice[layer.name]].method
        if method is not None:
            found[glob.escape(layer.name)] = method
    return found


def find_layers(
    model: nn.Module, data: Split, budget: Budget, known: dict[str, Times] | None = None
) -> list[SearchLayer]:
    """The layers of a model that can be replaced, with their candidates.

    Args:
        model: any module that `convert` takes.
        data: the first samples reach the layers.
        budget: for which machine, and whether time or bytes count.
        known: times by signature of a layer, as an earlier call measured them; new ones are added.

    Raises:
        LutraError: nothing can be replaced.
    """
    batch = data.calibration.batches[0]
    few = tuple(tensor[:_LOOKED_AT] for tensor in batch)
    rough, report = convert(
        model, {"*": Int8(otherwise=Keep())}, [(few,)], rows=_ROWS, calibration="parallel",
        progress=False, seed=budget.seed,
    )  # fmt: skip
    names = [entry.name for entry in report.layers if entry.replaced]
    kinds = {entry.name: entry.kind for entry in report.layers}
    inputs = _inputs(rough, names, few)
    times = {} if known is None else known
    seconds = min(_SECONDS, _SHARE * 60.0 * budget.minutes / max(1, len(names)))
    found = []
    for name in names:
        layer = rough.get_submodule(name)
        shape, calls = inputs.get(name, ((), 0))
        parent = rough.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, QuantizedLayer):
            found.append(SearchLayer(name, kinds[name], shape, _untimed(layer)))
            continue
        graphs, methods = _graphs(name, layer, shape or _one_row(layer), parent)
        if shape:
            key = _signature(layer, shape, budget)
            entry = times.setdefault(key, {})
            if not graphs.keys() <= entry.keys():
                gate = SpeedGate(threads=budget.threads, isa=budget.isa)
                entry.update(time_graphs(graphs, gate, seconds))
            timed: Mapping[str, float | None] = {k: calls * entry[k] for k in graphs}
        else:
            timed = dict.fromkeys(graphs)
        made = {
            key: Candidate(methods[key], timed[key], graph.parameter_bytes())
            for key, graph in graphs.items()
        }
        found.append(_pruned(SearchLayer(name, kinds[name], shape, made), budget))
    return found


def _pruned(layer: SearchLayer, budget: Budget) -> SearchLayer:
    """Leaves out the lookups of a layer that gain nothing."""
    for key in layer.lookups:
        own = layer.candidates[key]
        if budget.target == "size":
            least = layer.candidates[INT8].bytes
            if own.bytes >= least:
                layer.dropped[key] = f"takes {own.bytes} bytes, int8 {least}"
        elif own.ms is not None:
            dense = layer.fastest_dense
            best = layer.candidates[dense].ms or 0.0
            if own.ms > best * _MARGIN:
                layer.dropped[key] = f"takes {own.ms:.4f} ms alone, {dense} {best:.4f}"
    return layer


@torch.no_grad()
def _graphs(
    name: str, layer: QuantizedLayer, shape: tuple[int, ...], parent: nn.Module
) -> tuple[dict[str, Graph], dict[str, Method | None]]:
    """Every form of a layer as a graph of one node, and its method."""
    frozen = layer.freeze()
    graphs = {
        FLOAT32: float_graph(name, layer, frozen, shape),
        INT8: frozen_graph(name, frozen, shape),
    }
    methods: dict[str, Method | None] = {FLOAT32: None, INT8: Int8()}
    if isinstance(parent, Recurrent):
        return graphs, methods
    for key, method in lookup_methods(layer.geometry).items():
        family = family_of(method)
        assert family is not None
        form = family.layers[layer.form.dense]
        if layer.geometry.groups > 1 and not form.takes_groups:
            continue
        try:
            made = form(float_weight(layer), layer.bias, layer.geometry, method)
        except LutraError:  # the layer is too deep for it
            continue
        made.randomize()
        graphs[key], methods[key] = frozen_graph(name, made.freeze(), shape), method
    return graphs, methods


def _untimed(layer: nn.Module) -> dict[str, Candidate]:
    """The candidates of an embedding: its time is not worth a look."""
    small = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    rows = layer.state_dict().get("int8_weight")
    large = 4 * (rows.numel() if rows is not None else small)
    return {FLOAT32: Candidate(None, None, large), INT8: Candidate(Int8(), None, small)}


def _signature(layer: QuantizedLayer, shape: tuple[int, ...], budget: Budget) -> str:
    """What decides the times of a layer."""
    g = layer.geometry
    parts = (shape, layer.outputs, g, layer.form.dense.__name__)
    return f"{parts} {choose_isa(budget.isa)} {budget.threads}"


def _one_row(layer: QuantizedLayer) -> tuple[int, ...]:
    """A shape for graphs of a layer that is not timed."""
    g = layer.geometry
    if layer.form.dense is nn.Linear:
        return (1, g.channels)
    sizes = [d * (k - 1) + 1 for k, d in zip(g.kernel, g.dilation, strict=True)]
    return (1, g.channels * g.groups if g.groups > 1 else g.channels, *sizes)


@torch.no_grad()
def _inputs(
    model: nn.Module, names: list[str], batch: tuple[Tensor, ...]
) -> dict[str, tuple[tuple[int, ...], int]]:
    """The shape of the input of each layer for one sample, and how often it is called."""
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    handles = []
    for name in names:
        layer = model.get_submodule(name)

        def hook(module: Any, args: tuple[Any, ...], kwargs: Any, name: str = name) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            shape, calls = found.get(name, (None, 0))
            form = getattr(module, "form", None)
            seen = tuple((x if form is None else form.enter(x)).shape)
            found[name] = (shape or seen, calls + 1)

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with evaluating(model):
            model(*cast(Any, move(tuple(tensor[:1] for tensor in batch), device)))
    finally:
        for handle in handles:
            handle.remove()
    return found

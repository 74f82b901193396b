"""The speed gate: a layer becomes lookups only where they are faster on this machine.

Each candidate is timed alone in the engine, at the input shape that it has in the network, beside
the dense layers that could take its place: int8 and float32. Where lookups lose, the faster of
these does. The times are those of the steps themselves, the quantisation of the input included,
copies of inputs and outputs not. In a network the step before often quantises while it writes, so
lookup and int8 layers are a little faster there than here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.graph import Graph, make_node
from lutra.node import Array, AttrValue, Value
from lutra.ops import OPS
from lutra.ops.limits import MAX_INT8_DEPTH
from lutra.runtime.cpu import MAX_THREADS, choose_isa, cpu_info
from lutra.runtime.profile import input_pool
from lutra.runtime.session import Session
from lutra.train import distributed as collective
from lutra.train.layers.base import FrozenLayer, QuantizedLayer, families
from lutra.train.recipe import Method
from lutra.train.report import FLOAT32, LOOKUP, Decision

Against = Literal["best", "float32", "int8"]

_ATTRIBUTE: Final = "_lutra_speed_gate"
_WARMUP: Final = 3
_ROUNDS: Final = 31
_LEAST_ROUNDS: Final = 7
_FEW_ROUNDS: Final = 2  # of layers for which the time is short
_HOPELESS: Final = 3.0
_SECONDS: Final = 1.0  # per layer, once it has run _LEAST_ROUNDS


def time_graphs(
    graphs: Mapping[str, Graph], gate: SpeedGate, seconds: float = _SECONDS
) -> dict[str, float]:
    """Median milliseconds of networks of one node, measured in turns on inputs that change.

    Args:
        graphs: The networks by name, all with the same input.
        gate: Threads and instruction set.
        seconds: That all rounds together may take. Where the least number of rounds takes longer,
            networks that took more than three times as long as the fastest in the first round that
            counts get no further ones, and rounds end as soon as there are three.
    """
    sessions = {
        name: Session(graph, threads=gate.threads, isa=gate.isa) for name, graph in graphs.items()
    }
    pool = input_pool(next(iter(graphs.values())), gate.batch)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    begin, counted, short = time.perf_counter(), 0, False
    for turn in range(_WARMUP + _ROUNDS):
        warm = turn >= _WARMUP or short
        for name, session in sessions.items():
            profile = session.profile(pool[turn % len(pool)], runs=1, warmup=0)
            if warm:
                times[name].append(sum(step.milliseconds for step in profile.steps))
        counted += warm
        spent = time.perf_counter() - begin
        if turn == 0:
            short = spent * (_WARMUP + _LEAST_ROUNDS) > seconds
        if counted == 1 and short:
            fastest = min(values[0] for values in times.values())
            sessions = {n: s for n, s in sessions.items() if times[n][0] <= _HOPELESS * fastest}
        if counted > (_FEW_ROUNDS if short else _LEAST_ROUNDS) and spent > seconds:
            break
    return {name: float(np.median(values)) for name, values in times.items()}


#: Times networks by name, in milliseconds.
Measure: TypeAlias = "Callable[[Mapping[str, Graph], SpeedGate], Mapping[str, float]]"


@dataclass(frozen=True)
class SpeedGate:
    """When a lookup layer is fast enough to replace a dense one.

    Args:
        threads: of the sessions that are timed.
        isa: their kernels; None takes LUTRA_ISA or the best that runs here.
        batch: samples per run.
        against: what the lookups must beat: "float32", "int8", or "best", the faster of the two.
            With "float32" no layer becomes int8.
        margin: how many times faster the lookups must be; 1 keeps them where they are faster at
            all.
        measure: what times the candidates; for tests.

    Raises:
        LutraError: a value is out of range.
    """

    threads: int = 1
    isa: str | None = None
    batch: int = 1
    against: Against = "best"
    margin: float = 1.0
    measure: Measure = field(default=time_graphs, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, most in (("threads", MAX_THREADS), ("batch", 2**31 - 1)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise LutraError(f"SpeedGate: {name}={value!r} is not an integer in 1..{most}")
        if self.against not in get_args(Against):
            raise LutraError(
                f"SpeedGate: against={self.against!r} is not one of {list(get_args(Against))}"
            )
        number = isinstance(self.margin, int | float) and not isinstance(self.margin, bool)
        if not number or not 0.0 < self.margin < math.inf:
            raise LutraError(f"SpeedGate: margin={self.margin!r} is not a number above 0")


def decide(
    gate: SpeedGate, name: str, layer: QuantizedLayer, input_shape: tuple[int, ...]
) -> Decision:
    """Times a layer against its dense forms.

    Args:
        gate: The rule.
        name: Of the layer.
        layer: Its lookup form; its codebooks need not be learned, and are lost.
        input_shape: Of one sample, with the number of rows per sample (usually 1) in front.

    Raises:
        LutraError: int8 is asked for, and the layer has no such form.
    """
    shape = (input_shape[0] * gate.batch, *input_shape[1:])
    graphs = candidates(name, layer, shape)
    if gate.against not in ("best", *graphs):
        depth = layer.geometry.depth
        lack = (
            f"layer '{name}' adds up {depth} products for each output, and int8 layers at most "
            f"{MAX_INT8_DEPTH}"
            if depth > MAX_INT8_DEPTH
            else f"this lutra has no {gate.against} layers"
        )
        raise LutraError(
            f"SpeedGate: against={gate.against!r}, but {lack}; compare with 'float32' or 'best'"
        )
    times = _agreed(gate, graphs)
    kinds = [kind for kind in graphs if kind != LOOKUP]
    fastest = "float32" if gate.against == "float32" else min(kinds, key=lambda kind: times[kind])
    dense = fastest if gate.against == "best" else gate.against
    choice = LOOKUP if times[LOOKUP] * gate.margin < times[dense] else fastest
    shown = dict.fromkeys((dense,) if choice == LOOKUP else (dense, choice))
    reason = f"speed gate: lookups take {times[LOOKUP]:.4f} ms"
    reason += "".join(f", {kind} {times[kind]:.4f} ms" for kind in shown)
    if gate.margin != 1:
        reason += f" with a margin of {gate.margin:g}"
    return Decision(shape, times, dense, choice, reason)


@torch.no_grad()
def candidates(name: str, layer: QuantizedLayer, shape: tuple[int, ...]) -> dict[str, Graph]:
    """The forms of a layer, each as a graph of one node: "lookup", "float32", and every rival
    ("int8") that can hold it.

    Args:
        name: Of the node.
        layer: The lookup layer; gets random tables.
        shape: Of the input, batch included.
    """
    layer.randomize()
    frozen = layer.freeze()
    geometry, weight = layer.geometry, float_weight(layer)
    graphs = {
        LOOKUP: frozen_graph(name, frozen, shape),
        FLOAT32: float_graph(name, layer, frozen, shape),
    }
    module = nn.Linear if frozen.linear else nn.Conv2d
    for family in families():
        if family.is_rival and module in family.layers:
            try:
                dense = family.layers[module](weight, layer.bias, geometry, family.method())
            except LutraError:  # too deep for it
                continue
            dense.randomize()
            graphs[family.method.name] = frozen_graph(name, dense.freeze(), shape)
    return graphs


def float_weight(layer: QuantizedLayer) -> Tensor:
    """The dense weight of a layer: (M, C / G, kh, kw) of an image layer, (M, D) of a linear one."""
    weight = layer.kernel_weight.detach().cpu().float()
    linear = layer.form.dense is nn.Linear
    return weight if linear else weight.reshape(len(weight), -1, *layer.geometry.kernel)


def frozen_graph(name: str, frozen: FrozenLayer, shape: tuple[int, ...]) -> Graph:
    """A frozen layer as a graph of one node.

    Args:
        name: Of the node.
        frozen: The layer.
        shape: Of the input, batch included.
    """
    return _graph(frozen.node.op, name, shape, frozen.node.attrs, frozen.arrays())


def float_graph(
    name: str, layer: QuantizedLayer, frozen: FrozenLayer, shape: tuple[int, ...]
) -> Graph:
    """The dense form of a layer as a graph of one node.

    Args:
        name: Of the node.
        layer: A layer with the dense weights.
        frozen: Its frozen form, which has the bias.
        shape: Of the input, batch included.
    """
    arrays = {"weight": float_weight(layer).numpy(), "bias": frozen.arrays()["bias"]}
    op = "linear" if frozen.linear else "conv2d"
    return _graph(op, name, shape, layer.geometry.attrs(OPS[op].attrs), arrays)


def rival(choice: str) -> Method:
    """The method of the dense form that the gate chose."""
    return next(f.method() for f in families() if f.is_rival and f.method.name == choice)


def record(gate: SpeedGate, decisions: Mapping[str, Decision]) -> dict[str, Any]:
    """What the gate did, as plain JSON values for the metadata of a file."""
    return {
        "machine": cpu_info()["model"],
        "isa": choose_isa(gate.isa),
        "threads": gate.threads,
        "batch": gate.batch,
        "against": gate.against,
        "margin": gate.margin,
        "layers": [
            {
                "name": name,
                "input_shape": list(d.input_shape),
                **{f"{kind}_ms": value for kind, value in d.milliseconds.items()},
                "decision": d.choice,
                "reason": d.reason,
            }
            for name, d in decisions.items()
        ],
    }


def attach(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Leaves the record at a model, so that its export finds it."""
    setattr(model, _ATTRIBUTE, dict(entry))


def attached(model: nn.Module) -> dict[str, Any] | None:
    """The record that `convert` left at a model or a part of it."""
    for module in model.modules():
        entry: dict[str, Any] | None = module.__dict__.get(_ATTRIBUTE)
        if entry is not None:
            return entry
    return None


def _agreed(gate: SpeedGate, graphs: Mapping[str, Graph]) -> dict[str, float]:
    """The times of process 0, so that all processes decide alike."""
    times = torch.zeros(len(graphs), dtype=torch.float64)
    if collective.rank() == 0:
        measured = gate.measure(graphs, gate)
        times = torch.tensor([measured[name] for name in graphs], dtype=torch.float64)
    return dict(zip(graphs, collective.broadcast(times).tolist(), strict=True))


def _graph(
    op: str,
    name: str,
    shape: tuple[int, ...],
    attrs: Mapping[str, AttrValue],
    arrays: Mapping[str, Array],
) -> Graph:
    node = make_node(op, name or "layer", ("x",), "y", attrs, {role: role for role in arrays})
    return Graph((Value("x", "float32", shape),), ("y",), (node,), dict(arrays))

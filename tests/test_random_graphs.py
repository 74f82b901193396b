"""Random graphs give the right bits, whatever the plan makes of them.

Rounding hides nothing, because no check looks through a rounded value:

- every instruction set and number of threads gives the bits of the scalar kernels;
- a graph whose outputs are all of its values gives the same bits, though its plan fuses nothing and
  keeps every float;
- every value of that run is what the reference makes of the engine's own inputs: the same bits, but
  for operators that add up or compute functions of floats.

``LUTRA_RANDOM_GRAPHS=10000`` makes the slow test try the seeds up to 10000, ``20000:30000`` those.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
from graphs import Array
from layers import same_bits
from random_graphs import random_graph
from sweeps import sweep

from lutra import Session, runnable_isas
from lutra.errors import LutraError
from lutra.graph import Graph
from lutra.node import Node
from lutra.reference import run_node

#: The operators whose results depend on the order of sums or on how a function is computed, and by
#: how much of the largest result (or of 1, if that is more) the engine may differ. The larger of 0
#: and -0 is either.
ROUNDED = {
    **dict.fromkeys(("max", "max_pool2d", "adaptive_max_pool2d"), 0.0),
    **dict.fromkeys(
        ("conv2d", "linear", "layer_norm", "rms_norm", "softmax", "attention", "masked_attention"),
        4e-6,
    ),
    **dict.fromkeys(("mean", "masked_mean", "avg_pool2d", "adaptive_avg_pool2d"), 1e-6),
    **dict.fromkeys(("gelu", "silu", "sigmoid", "tanh", "elu", "mish", "softplus"), 1e-6),
    **dict.fromkeys(("conv_transpose2d", "group_norm", "lstm", "gru"), 4e-6),
    **dict.fromkeys(("upsample_bicubic", "grid_sample"), 4e-6),
}
FEW = range(60)


def many() -> range:
    """The seeds of the slow test."""
    first, _, last = os.environ.get("LUTRA_RANDOM_GRAPHS", "1000").rpartition(":")
    return range(int(first or len(FEW)), int(last))


def tolerance(node: Node, values: Mapping[str, Array]) -> float | None:
    """How far a value may be from the reference, relative to the largest.

    A norm divides by the deviation: where that is small beside the values, their rounding grows.
    """
    allowed = ROUNDED.get(node.op)
    if allowed is None or node.op not in ("group_norm", "layer_norm"):
        return allowed
    x = values[node.inputs[0]].astype(np.float64)
    groups = x.shape[:-1] if node.op == "layer_norm" else (len(x), node.attrs["groups"])
    parts = x.reshape(*groups, -1)
    with np.errstate(invalid="ignore"):
        ratio = np.abs(parts).max(-1) / np.sqrt(parts.var(-1) + 1e-12)
    return allowed * float(np.nanmax(ratio, initial=1.0))


def complaints(graph: Graph, feeds: Mapping[str, Array]) -> Iterator[str]:
    """What is wrong with the engine's answers, the first value that differs first."""
    everything = replace(graph, outputs=tuple(node.output for node in graph.nodes))
    session = Session(everything, isa="scalar", threads=1)
    values = dict(feeds)
    for node, got in zip(graph.nodes, session.run(None, feeds), strict=True):
        values[node.output] = got
        want = run_node(node, [values[x] for x in node.inputs], graph.node_tensors(node))
        wrong = difference(got, want, tolerance(node, values))
        if wrong:
            yield f"{node.output}, all values are outputs, against the reference: {wrong}"
    want_all = {name: values[name] for name in graph.outputs}
    yield from against(want_all, Session(graph, isa="scalar", threads=1), feeds, "scalar")
    for isa in runnable_isas():
        alone = Session(everything, isa=isa, threads=1)
        if isa != "scalar":
            yield from against(values, alone, feeds, f"{isa}, all values are outputs")
        session = Session(graph, isa=isa, threads=3)
        yield from against(want_all, session, feeds, f"{isa}, 3 threads")
        if graph.inputs[0].shape[0] is None:  # other shapes, then these again
            first = {name: array[:1] for name, array in feeds.items()}
            want_first = {name: array[:1] for name, array in want_all.items()}
            yield from against(want_first, session, first, f"{isa}, one sample")
            yield from against(want_all, session, feeds, f"{isa}, again")


def against(
    want: Mapping[str, Array], session: Session, feeds: Mapping[str, Array], where: str
) -> Iterator[str]:
    for value, got in zip(session.get_outputs(), session.run(None, feeds), strict=True):
        wrong = difference(got, want[value.name])
        if wrong:
            yield f"{value.name}, {where}: {wrong}"


def difference(got: Array, want: Array, tolerance: float | None = None) -> str:
    """Says how two arrays differ; empty where they are alike: in all bits, without a tolerance."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {got.shape} and not {want.dtype} {want.shape}"
    if same_bits(got, want):
        return ""
    with np.errstate(invalid="ignore"):  # of infinities
        apart = np.where(got == want, np.float32(0), np.abs(got - want))
    largest = np.abs(want[np.isfinite(want)]).max(initial=1.0)
    if tolerance is not None and bool((apart <= tolerance * largest).all()):
        return ""
    count = np.count_nonzero(got.view(np.int32) != want.view(np.int32))
    return f"{count} of {got.size} values differ, by up to {apart.max()}"


def check(seed: int) -> None:
    graph, feeds = random_graph(seed)
    try:
        wrong = next(complaints(graph, feeds), None)
    except LutraError as error:
        wrong = repr(error)
    assert wrong is None, f"{wrong}\n{graph}"


@sweep("seed", FEW)
def test_some_graphs(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@sweep("seed", many())
def test_many_graphs(seed: int) -> None:
    check(seed)

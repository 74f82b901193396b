"""A whole network through one accelerator: layer after layer, the rest in the engine.

The sums that come out of the simulation go on: they are scaled, and the nodes between two layers
run in the engine, one by one, as a host would run them. The accelerator is built once, for what all
layers ask for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from lutra.graph import Graph
from lutra.hardware.design import Design, HardwareError
from lutra.hardware.layer import TableLayer, graph_shapes, layer_rows, node_layer
from lutra.hardware.words import Words, layer_words, unpack
from lutra.node import Array, Node
from lutra.ops.rows import row_length
from lutra.runtime.session import Session

__all__ = ["LayerRun", "NetworkRun", "common_design", "in_amaranth", "in_tool", "run_network"]

#: Runs words through a design: the sums that come out, and the cycles.
Runner: TypeAlias = Callable[[Design, Words], tuple[list[int], int]]
_PARAMETERS: Final = ("encoder", "k", "v", "act_bits")


@dataclass(frozen=True)
class LayerRun:
    """A layer that ran through the accelerator.

    Attributes:
        name: The layer.
        rows: Its rows.
        cycles: The cycles that were counted.
    """

    name: str
    rows: int
    cycles: int


@dataclass(frozen=True)
class NetworkRun:
    """A network that ran.

    Attributes:
        outputs: float32 arrays by name.
        layers: The layers that the accelerator computed, in order.
    """

    outputs: dict[str, Array]
    layers: tuple[LayerRun, ...]


def common_design(graph: Graph, **parameters: Any) -> Design:
    """A design that every layer of product quantisation of a model fits.

    Args:
        graph: The model.
        **parameters: Of the design, where they differ from what the layers ask for.

    Raises:
        HardwareError: If the model has no such layer, or layers of more than one kind.
    """
    layers = [
        node_layer(node, graph.node_tensors(node), np.zeros((1, row_length(node)), np.uint8))
        for node in graph.nodes
        if node.op.startswith("pq_")
    ]
    if not layers:
        raise HardwareError("the model has no layer of product quantisation")
    kinds = {(layer.encoder, layer.shape[1], layer.v, layer.act_bits) for layer in layers}
    if len(kinds) > 1:
        raise HardwareError(
            f"the layers have {len(kinds)} kinds of codebooks, {sorted(kinds)}; one accelerator "
            "takes layers of one encoder, K, V and act_bits"
        )
    shapes = graph_shapes(graph)
    most = max(rows for _, rows, _, _ in shapes)
    given = {"rows": most, "sum_bits": max(8, *(layer.sum_bits for layer in layers)), **parameters}
    given.setdefault("codes", most * max(b for _, _, b, _ in shapes))
    return Design.from_dict({**dict(zip(_PARAMETERS, kinds.pop(), strict=True)), **given})


def run_network(
    graph: Graph, inputs: Mapping[str, Array], design: Design, runner: Runner
) -> NetworkRun:
    """Runs a model with its layers of product quantisation in the accelerator.

    Args:
        graph: The model.
        inputs: Inputs by name.
        design: What the accelerator is built for, see ``common_design``.
        runner: What runs it: ``in_amaranth``, or ``in_tool``.

    Raises:
        HardwareError: If a layer does not fit the design.
    """
    values = dict(inputs)
    layers: list[LayerRun] = []
    for node in graph.nodes:
        arrays = [values[name] for name in node.inputs]
        tensors = graph.node_tensors(node)
        if not node.op.startswith("pq_"):
            values[node.output] = _on_host(graph, node, values)
            continue
        layer = node_layer(node, tensors, layer_rows(node, arrays[0]))
        words, cycles = runner(design, layer_words(layer, design))
        sums = decode_sums(words, layer, design)
        made = sums.astype(np.float32) * tensors["scale"] + tensors["bias"]
        shape = [size or 1 for size in graph.values[node.output].shape]
        shape[0] = len(arrays[0])
        if node.op == "pq_conv2d":
            made = made.reshape(shape[0], *shape[2:], shape[1]).transpose(0, 3, 1, 2)
        values[node.output] = np.ascontiguousarray(made.reshape(shape))
        layers.append(LayerRun(node.name, layer.rows, cycles))
    return NetworkRun({name: values[name] for name in graph.outputs}, tuple(layers))


def _on_host(graph: Graph, node: Node, values: Mapping[str, Array]) -> Array:
    """One node in the engine."""
    inputs = tuple(graph.values[name] for name in dict.fromkeys(node.inputs))
    tensors = {name: graph.tensors[name] for name in node.tensors.values()}
    session = Session(Graph(inputs, (node.output,), (node,), tensors))
    (found,) = session.run(None, {value.name: values[value.name] for value in inputs})
    return found


def decode_sums(words: list[int], layer: TableLayer, design: Design) -> Array:
    """The sums of a layer, int64 (R, M), from the words that came out."""
    outputs = layer.shape[2]
    tiles = -(-outputs // design.tile)
    numbers = unpack(words, design.sum_bits, design.tile)
    rows = []
    for first in range(0, layer.rows, design.rows):
        size = min(design.rows, layer.rows - first)
        part = numbers[first * tiles : (first + size) * tiles].reshape(tiles, size, design.tile)
        rows.append(part.transpose(1, 0, 2).reshape(size, -1)[:, :outputs])
    return np.concatenate(rows)


def in_amaranth(design: Design, words: Words) -> tuple[list[int], int]:
    """Runs words in Amaranth's own simulator."""
    from lutra.hardware.simulate import simulate

    run = simulate(design, words)
    return run.sums, run.cycles


def in_tool(simulator: str) -> Runner:
    """Runs words in Verilator or Icarus.

    Args:
        simulator: ``"verilator"`` or ``"icarus"``.
    """
    from lutra.hardware.accelerator import Accelerator
    from lutra.hardware.bundle import accelerator_bench
    from lutra.hardware.testbench import testbench
    from lutra.hardware.tools import run_verilog
    from lutra.hardware.verilog import to_verilog

    kept: dict[Design, str] = {}

    def run(design: Design, words: Words) -> tuple[list[int], int]:
        if design not in kept:
            kept[design] = to_verilog(Accelerator(design))
        bench = accelerator_bench(design, words)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "accelerator.v").write_text(kept[design])
            (folder / "testbench.v").write_text(testbench(bench))
            for name, text in bench.images().items():
                (folder / name).write_text(text)
            outcome = run_verilog(folder, simulator)
            if not outcome.passed:
                raise HardwareError(f"the simulation differs from the reference: {outcome}")
            found = [int(word, 16) for word in (folder / "sums.out").read_text().split()]
        return found, outcome.cycles

    return run

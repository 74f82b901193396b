"""Scales and shifts of features: once, and without transposes that bring features to axis 1."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from lutra.graph import Graph
from lutra.node import Node
from lutra.ops.spec import ints


def with_affines_along_last(graph: Graph) -> Graph:
    """The graph with `affine` along the last axis where it stands between two transposes, and equal
    ones of a value once.

    Lowering brings the features of a sequence (N, T, D) to axis 1 for it. The engine holds
    sequences feature by feature, so that both transposes would only copy. Every value that stays
    has the same bits.
    """
    return _once(_joined(graph))


def _joined(graph: Graph) -> Graph:
    readers = Counter(name for node in graph.nodes for name in node.inputs)
    readers.update(graph.outputs)
    makers = {node.output: node for node in graph.nodes}
    gone: set[str] = set()
    made: dict[str, Node] = {}
    for back in graph.nodes:
        affine = makers.get(back.inputs[0]) if back.op == "transpose" else None
        if affine is None or affine.op != "affine" or readers[affine.output] != 1:
            continue
        there = makers.get(affine.inputs[0])
        if there is None or there.op != "transpose" or readers[there.output] != 1:
            continue
        axes = ints(there, "axes")
        last = len(axes) - 1
        turned = tuple(axes[axis] for axis in ints(back, "axes"))
        if axes[1] == last and turned == tuple(range(last + 1)):
            gone |= {there.output, affine.output}
            made[back.output] = replace(
                affine, inputs=there.inputs, output=back.output, attrs={"axis": last}
            )
    nodes = (made.get(node.output, node) for node in graph.nodes if node.output not in gone)
    return replace(graph, nodes=tuple(nodes))


def _once(graph: Graph) -> Graph:
    """Layers that read one tensor divide it by the same numbers, each for itself."""
    first: dict[tuple[object, ...], str] = {}
    same: dict[str, str] = {}
    nodes = []
    for given in graph.nodes:
        node = replace(given, inputs=tuple(same.get(name, name) for name in given.inputs))
        if node.op == "affine" and node.output not in graph.outputs:
            tensors = (graph.tensors[node.tensors[role]] for role in ("scale", "bias"))
            numbers = tuple(tensor.tobytes() for tensor in tensors)
            known = first.setdefault((node.inputs, node.attrs["axis"], *numbers), node.output)
            if known != node.output:
                same[node.output] = known
                continue
        nodes.append(node)
    used = {name for node in nodes for name in node.tensors.values()}
    kept = {name: array for name, array in graph.tensors.items() if name in used}
    return replace(graph, nodes=tuple(nodes), tensors=kept)

"""Paddings that go into the steps behind them.

A ``pad`` writes a copy of its input with a border. A convolution copies its input into padded
planes anyway, and a pooling can see a border that is nowhere in memory: so they take it over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from lutra.graph import Graph
from lutra.node import AttrValue, Node, Value
from lutra.ops import OPS
from lutra.ops.limits import MAX_EXTENT
from lutra.ops.shape import REST
from lutra.ops.spec import integer, ints, number, pair
from lutra.reference.pq import quantise

__all__ = ["Unpadded", "readers_of", "without_pads"]

_NO_BORDER: Final = (0, 0, 0, 0)


@dataclass(frozen=True)
class Unpadded:
    """A graph whose steps pad by themselves.

    Attributes:
        nodes: The nodes in the order in which they run.
        values: All values by name.
        origins: The nodes of the graph that took a padding over, as they stand there, by name.
    """

    nodes: Sequence[Node]
    values: Mapping[str, Value]
    origins: Mapping[str, Node]


def without_pads(graph: Graph) -> Unpadded:
    """Lets convolutions and poolings pad by themselves.

    A padding of rows and columns goes into every reader that can take it (``OpSpec.takes_pad``):

    - a convolution pads with zeros, and in integers with the zero point of its grid: it takes what
      is rounded to that. Its attribute ``padding`` becomes four numbers, before and behind the
      rows, then the columns.
    - a pooling gets a ``border``, four numbers too, and a ``border_value``.

    The bits are those of the separate steps. A padding of points (N, C, L) first moves behind the
    reshape that makes images of one line of them. What nobody reads any more goes.

    Args:
        graph: A valid graph.

    Returns:
        The nodes, their values, and what they were.
    """
    nodes, values = _behind_reshapes(graph)
    pads = {node.output: node for node in nodes if node.op == "pad"}
    origins: dict[str, Node] = {}
    result = []
    for node in nodes:
        given = node
        while OPS[node.op].takes_pad is not None and node.inputs[0] in pads:
            taken = _taken_over(node, pads[node.inputs[0]])
            if taken is None:
                break
            node = taken
            origins[given.name] = given
        result.append(node)
    return Unpadded(_read(graph, result), values, origins)


def _taken_over(node: Node, pad: Node) -> Node | None:
    """The node with the padding in front of it; None where it cannot take it."""
    pads, value = ints(pad, "pads"), np.float32(number(pad, "value"))
    if len(pads) != 8 or any(pads[:4]):
        return None
    around: tuple[int, ...] = pads[4:]
    if OPS[node.op].takes_pad == "border":
        if "border" in node.attrs:
            if np.float32(number(node, "border_value")).tobytes() != value.tobytes():
                return None
            around = _sum(ints(node, "border"), around)
        border: dict[str, AttrValue] = {"border": around, "border_value": float(value)}
        return replace(node, inputs=pad.inputs, attrs={**node.attrs, **border})
    if OPS[node.op].has_grid:
        grid = (number(node, "act_scale"), integer(node, "act_zero"), integer(node, "act_bits"))
        if quantise(np.array([value]), *grid)[0] != grid[1]:
            return None
    elif value != 0 or np.signbit(value):
        return None
    own: tuple[int, ...] = ints(node, "padding")
    if len(own) == 2:
        high, wide = pair(node, "padding")
        own = (high, high, wide, wide)
    padding = _sum(own, around)
    if max(padding) > MAX_EXTENT:
        return None
    return replace(node, inputs=pad.inputs, attrs={**node.attrs, "padding": padding})


def _sum(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _behind_reshapes(graph: Graph) -> tuple[list[Node], dict[str, Value]]:
    """The nodes with the padding of points behind the reshape into images that alone reads it."""
    values = dict(graph.values)
    readers = readers_of(graph.nodes)
    moved: dict[str, Node] = {}  # by the name of the reshape
    result = []
    for node in graph.nodes:
        alone = readers.get(node.output, [])
        if node.op == "pad" and len(alone) == 1 and node.output not in graph.outputs:
            line = _line(values[alone[0].output], values[node.output])
            if alone[0].op == "reshape" and line is not None and not any(ints(node, "pads")[:4]):
                moved[alone[0].name] = node
                continue
        pad = moved.get(node.name)
        if pad is None:
            result.append(node)
            continue
        source, image = values[pad.inputs[0]], values[node.output]
        line = _line(image, values[pad.output])
        assert line is not None
        channels, length = source.shape[1:]
        sizes = (1, length) if line == 3 else (length, 1)
        bare = image.with_shape(f"{node.output}, bare", (image.shape[0], channels, *sizes))
        values[bare.name] = bare
        shape = tuple(REST if size is None else size for size in bare.shape[1:])
        result.append(Node("reshape", node.name, pad.inputs, bare.name, {"shape": shape}))
        before, after = ints(pad, "pads")[4:]
        around = (0, 0, before, after) if line == 3 else (before, after, 0, 0)
        attrs = {**pad.attrs, "pads": (*_NO_BORDER, *around)}
        result.append(Node("pad", pad.name, (bare.name,), node.output, attrs))
    return result, values


def _line(image: Value, points: Value) -> int | None:
    """The axis of images of one line (N, C, 1, L) or (N, C, L, 1) that is that of points (N, C, L);
    None where they are none."""
    if len(points.shape) != 3 or len(image.shape) != 4 or points.shape[1] is None:
        return None
    for axis, one in ((3, 2), (2, 3)):
        if image.shape[one] == 1 and (*image.shape[:2], image.shape[axis]) == points.shape:
            return axis
    return None


def readers_of(nodes: Sequence[Node]) -> Mapping[str, list[Node]]:
    """The nodes that read each value, by its name; a node stands there once for each time."""
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    return readers


def _read(graph: Graph, nodes: Sequence[Node]) -> list[Node]:
    """The nodes without paddings that nobody reads any more."""
    read = set(graph.outputs)
    kept = []
    for node in reversed(nodes):
        if node.op == "pad" and node.output not in read:
            continue
        read.update(node.inputs)
        kept.append(node)
    return kept[::-1]

"""Which nodes of a graph share a step of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lutra.graph import Graph
from lutra.node import Node
from lutra.ops import OPS
from lutra.ops.elementwise import CLAMPS, limits
from lutra.runtime.pads import Unpadded, readers_of, without_pads

__all__ = ["FusedNode", "fuse"]


@dataclass(frozen=True)
class FusedNode:
    """A node and what its step takes over from the nodes behind it.

    Attributes:
        node: The node, with the paddings in front of it (``lutra.runtime.pads``).
        output: Name of the value that the step makes: the output of the last node in it.
        residual: Name of the value that it adds, or None.
        clamp: The limits that it clamps to in the end, or None.
        origin: The node without these paddings, where there are any.
    """

    node: Node
    output: str
    residual: str | None = None
    clamp: tuple[float, float] | None = None
    origin: Node | None = None

    @property
    def of_graph(self) -> Node:
        """The node as it stands in the graph."""
        return self.origin or self.node


def fuse(graph: Graph, unpadded: Unpadded | None = None) -> list[FusedNode]:
    """Decides which nodes share a step.

    Convolutions and poolings take over the paddings in front of them, see ``lutra.runtime.pads``.
    An operator that fuses (``OpSpec.fuses``) takes over an ``add`` of a value of the same shape
    that alone reads its output, and after it a clamp that alone reads the sum. If the other operand
    does not exist by then, the operator waits for it and runs where the ``add`` stands. Outputs of
    the graph are read from outside and never disappear.

    Args:
        graph: A valid graph.
        unpadded: What ``without_pads`` made of it; None: it is made here.

    Returns:
        The steps in the order in which they run.
    """
    unpadded = unpadded or without_pads(graph)
    nodes, values = unpadded.nodes, unpadded.values
    readers = readers_of(nodes)

    def only_reader(name: str, ops: Sequence[str]) -> Node | None:
        found = readers.get(name, [])
        if name in graph.outputs or len(found) != 1 or found[0].op not in ops:
            return None
        return found[0]

    made = {value.name for value in graph.inputs}
    taken: set[str] = set()
    waiting: dict[str, FusedNode] = {}  # by the name of the add
    steps: list[FusedNode] = []

    def emit(step: FusedNode) -> None:
        clamp = only_reader(step.output, CLAMPS) if OPS[step.node.op].fuses else None
        if clamp is not None:
            step = replace(step, output=clamp.output, clamp=limits(clamp))
            taken.add(clamp.name)
        made.add(step.output)
        steps.append(step)

    for node in nodes:
        if node.name in waiting:
            emit(waiting.pop(node.name))
            continue
        if node.name in taken:
            continue
        step = FusedNode(node, node.output, origin=unpadded.origins.get(node.name))
        add = only_reader(step.output, ("add",)) if OPS[node.op].fuses else None
        if add is not None and len({values[name].shape for name in add.inputs}) > 1:
            add = None  # the step adds values of its own shape
        if add is not None and add.name not in waiting and add.name not in taken:
            (other,) = (name for name in add.inputs if name != step.output)
            step = replace(step, output=add.output, residual=other)
            if other not in made:
                waiting[add.name] = step
                continue
            taken.add(add.name)
        emit(step)
    return steps

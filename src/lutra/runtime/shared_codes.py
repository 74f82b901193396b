"""Lookup layers that read the same tensor with the same codebooks: encoded once, for all of them.

The query, key and value layers of a transformer make the same codes. They become one step whose
tables are theirs side by side, and what each of them makes is a range of the step's planes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from lutra.graph import Graph
from lutra.node import Array

if TYPE_CHECKING:
    from lutra.runtime.plan import FusedNode

__all__ = ["SHARED_LABEL", "Siblings", "find_siblings"]

#: Between the names of the nodes in the label of a step.
SHARED_LABEL: Final = " + "
#: Layers that encode, and the axis of their output that holds what they make.
OUTPUT_AXES: Final = {"pq_conv2d": 1, "pq_linear": -1}
_ENCODER: Final = ("centroids", "splits", "thresholds")
_OUTPUTS: Final = ("tables", "scale", "bias")  # the last axis of each: one entry an output


@dataclass(frozen=True)
class Siblings:
    """One step: a fused node, or several lookup layers that share their codes.

    Attributes:
        members: The nodes; the first one stands for all in the step.
        starts: Of each member, where its outputs begin among those of the step.
    """

    members: tuple[FusedNode, ...]
    starts: tuple[int, ...]

    @property
    def label(self) -> str:
        """What the step is called in profiles."""
        return SHARED_LABEL.join(member.node.name for member in self.members)

    @property
    def axis(self) -> int:
        """The axis of the step's output that the members share; negative counts from the end."""
        return OUTPUT_AXES.get(self.members[0].node.op, 1)

    def tensors(self, graph: Graph) -> dict[str, Array]:
        """The tensors of the step by role, C-contiguous: the members' tables side by side."""
        of_each = [graph.node_tensors(member.node) for member in self.members]
        tensors = dict(of_each[0])
        if len(of_each) > 1:
            for role in _OUTPUTS:
                tensors[role] = np.concatenate([each[role] for each in of_each], axis=-1)
        return {role: np.ascontiguousarray(tensor) for role, tensor in tensors.items()}


def find_siblings(graph: Graph, steps: Sequence[FusedNode]) -> list[Siblings]:
    """Puts product-quantised layers together that make the same codes.

    They read the same value with the same geometry, grid and clamp, their centroids (or splits and
    thresholds) are equal, and they add nothing.

    Args:
        graph: A valid graph.
        steps: Its steps in the order in which they run.

    Returns:
        The steps in the order in which they run; siblings run where the first of them does.
    """
    groups: list[list[FusedNode]] = []
    alike: dict[tuple[object, ...], list[list[FusedNode]]] = {}
    for step in steps:
        group = [step]
        if step.node.op in OUTPUT_AXES and step.residual is None:
            node = step.node
            key = (node.op, node.inputs, step.clamp, *sorted(node.attrs.items()))
            candidates = alike.setdefault(key, [])
            first = next((c for c in candidates if _same_codes(graph, c[0], step)), None)
            if first is not None:
                first.append(step)
                continue
            candidates.append(group)
        groups.append(group)
    return [_siblings(graph, group) for group in groups]


def _siblings(graph: Graph, group: list[FusedNode]) -> Siblings:
    if len(group) == 1:
        return Siblings((group[0],), (0,))
    counts = [len(graph.node_tensors(member.node)["scale"]) for member in group]
    return Siblings(tuple(group), tuple(int(n) for n in np.cumsum([0, *counts[:-1]])))


def _same_codes(graph: Graph, a: FusedNode, b: FusedNode) -> bool:
    return all(
        _equal(graph.node_tensors(a.node), graph.node_tensors(b.node), role) for role in _ENCODER
    )


def _equal(a: Mapping[str, Array], b: Mapping[str, Array], role: str) -> bool:
    if role not in a or role not in b:
        return role not in a and role not in b
    return np.array_equal(a[role], b[role])

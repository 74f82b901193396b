"""Lookup layers that read the same tensor with the same codebooks: encoded once, for all of them.

The query, key and value layers of a transformer make the same codes. They become one step whose
tables are theirs side by side, and what each of them makes is a range of the step's planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lutra.graph import Graph, same_codes
from lutra.node import Array
from lutra.ops import OPS
from lutra.runtime.fuse import FusedNode

__all__ = ["SHARED_LABEL", "SharedStep", "share_codes"]

#: Between the names of the nodes in the label of a step.
SHARED_LABEL: Final = " + "


@dataclass(frozen=True)
class SharedStep:
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
        return OPS[self.members[0].node.op].output_axis or 1

    def tensors(self, graph: Graph) -> dict[str, Array]:
        """The tensors of the step by role, C-contiguous: the members' tables side by side."""
        of_each = [graph.node_tensors(member.of_graph) for member in self.members]
        tensors = dict(of_each[0])
        if len(of_each) > 1:
            for role in OPS[self.members[0].node.op].output_roles:
                tensors[role] = np.concatenate([each[role] for each in of_each], axis=-1)
        return {role: np.ascontiguousarray(tensor) for role, tensor in tensors.items()}


def share_codes(graph: Graph, steps: Sequence[FusedNode]) -> list[SharedStep]:
    """Puts layers together that make the same codes.

    They read the same value with the same geometry, grid and clamp, the tensors that make their
    codes (``OpSpec.encoder_roles``) are equal, and they add nothing.

    Args:
        graph: A valid graph.
        steps: Its steps in the order in which they run.

    Returns:
        The steps in the order in which they run; those of shared codes run where the first of them
        does.
    """
    groups: list[list[FusedNode]] = []
    for step in steps:
        group = next((group for group in groups if _share(graph, group[0], step)), None)
        if group is None:
            groups.append([step])
        else:
            group.append(step)
    return [_shared_step(graph, group) for group in groups]


def _share(graph: Graph, a: FusedNode, b: FusedNode) -> bool:
    """Whether two fused nodes are layers that share their codes."""
    if (a.node.op, a.node.inputs, a.clamp) != (b.node.op, b.node.inputs, b.clamp):
        return False
    if not OPS[a.node.op].encoder_roles or (a.residual, b.residual) != (None, None):
        return False
    tensors = graph.node_tensors(a.of_graph), graph.node_tensors(b.of_graph)
    return same_codes(a.node, tensors[0], b.node, tensors[1])


def _shared_step(graph: Graph, group: list[FusedNode]) -> SharedStep:
    if len(group) == 1:
        return SharedStep((group[0],), (0,))
    roles = OPS[group[0].node.op].output_roles
    counts = [graph.node_tensors(member.of_graph)[roles[0]].shape[-1] for member in group]
    return SharedStep(tuple(group), tuple(int(n) for n in np.cumsum([0, *counts[:-1]])))

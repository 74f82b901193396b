"""From a graph to the steps of the native engine.

A convolution or linear layer takes the ``add`` and the ``relu`` behind it into its own step, where
nobody else reads what is between them; every other node becomes one step. ``lutra.steps`` has the
function that adds the step of each operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from lutra import _engine
from lutra.errors import EngineError
from lutra.graph import Graph, Node, Value
from lutra.ops.elementwise import CLAMPS, limits
from lutra.steps import STEPS, Job

__all__ = ["FusedNode", "build_plan", "fuse"]

_MAX_RANK: Final = 6  # of the engine's arrays

#: The operators whose step can add another value and clamp while it writes.
FUSING: Final = frozenset(
    {
        "pq_conv2d",
        "pq_linear",
        "lookup_conv2d",
        "lookup_linear",
        "int8_conv2d",
        "int8_linear",
        "conv2d",
        "linear",
    }
)


@dataclass(frozen=True)
class FusedNode:
    """A node and what its step takes over from the nodes behind it.

    Attributes:
        node: The node.
        output: Name of the value that the step makes: the output of the last node in it.
        residual: Name of the value that it adds, or None.
        clamp: The limits that it clamps to in the end, or None.
    """

    node: Node
    output: str
    residual: str | None = None
    clamp: tuple[float, float] | None = None


def build_plan(graph: Graph, isa: str, threads: int) -> _engine.Plan:
    """Builds the steps of a graph and packs its tables for one instruction set.

    Args:
        graph: A graph; it is validated.
        isa: Name of the kernels, one of ``runnable_isas()``.
        threads: Number of threads, the caller's included.

    Returns:
        The plan, ready to run.

    Raises:
        GraphError: If the graph is not valid.
        EngineError: If the engine cannot run the graph, with the node named.
    """
    values = graph.values
    for value in values.values():
        if len(value.shape) > _MAX_RANK:
            raise EngineError(
                f"value {value.name!r} has {len(value.shape)} axes and the engine takes "
                f"{_MAX_RANK}; reshape it to fewer axes in the model"
            )
    try:
        plan = _engine.Plan(isa, threads)
    except (ValueError, RuntimeError) as error:
        raise EngineError(f"cannot start {threads} threads of {isa}: {error}") from error
    ids = {value.name: _input(plan, value) for value in graph.inputs}
    for fused in fuse(graph):
        node = fused.node
        job = Job(
            node,
            tuple(ids[name] for name in node.inputs),
            tuple(values[name] for name in node.inputs),
            values[node.output],
            {role: np.ascontiguousarray(t) for role, t in graph.node_tensors(node).items()},
            -1 if fused.residual is None else ids[fused.residual],
            fused.clamp,
        )
        step = STEPS.get(node.op)
        if step is None:
            raise EngineError(
                f"node {node.name!r} ({node.op}) is not an operator of the engine; run it in the "
                "reference"
            )
        plan.label(node.name)
        try:
            ids[fused.output] = step(plan, job)
        except ValueError as error:
            raise EngineError(f"node {node.name!r} ({node.op}): {error}") from error
    plan.finish([ids[name] for name in graph.outputs])
    return plan


def _input(plan: Any, value: Value) -> int:
    number: int = plan.input() if value.dtype == "float32" else plan.input(value.dtype)
    return number


def fuse(graph: Graph) -> list[FusedNode]:
    """Decides which nodes share a step.

    An operator of ``FUSING`` takes over an ``add`` of a value of the same shape that alone reads
    its output, and after it a clamp that alone reads the sum. If the other operand does not exist
    by then, the operator waits for it and runs where the ``add`` stands. Outputs of the graph are
    read from outside and never disappear.

    Args:
        graph: A valid graph.

    Returns:
        The steps in the order in which they run.
    """
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)

    def only_reader(name: str, ops: Sequence[str]) -> Node | None:
        nodes = readers.get(name, [])
        if name in graph.outputs or len(nodes) != 1 or nodes[0].op not in ops:
            return None
        return nodes[0]

    made = {value.name for value in graph.inputs}
    taken: set[str] = set()
    waiting: dict[str, FusedNode] = {}  # by the name of the add
    steps: list[FusedNode] = []

    def emit(step: FusedNode) -> None:
        clamp = only_reader(step.output, CLAMPS) if step.node.op in FUSING else None
        if clamp is not None:
            step = replace(step, output=clamp.output, clamp=limits(clamp))
            taken.add(clamp.name)
        made.add(step.output)
        steps.append(step)

    for node in graph.nodes:
        if node.name in waiting:
            emit(waiting.pop(node.name))
            continue
        if node.name in taken:
            continue
        step = FusedNode(node, node.output)
        add = only_reader(step.output, ("add",)) if node.op in FUSING else None
        if add is not None and len({graph.values[name].shape for name in add.inputs}) > 1:
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

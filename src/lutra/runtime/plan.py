"""From a graph to the steps of the native engine.

A convolution or linear layer takes the ``add`` and the ``relu`` behind it into its own step, where
nobody else reads what is between them. Lookup layers that make the same codes of the same value
share a step (``lutra.runtime.shared_codes``). Every other node becomes one step.
``lutra.runtime.steps`` has the function that adds the step of each operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from lutra import _engine
from lutra.errors import EngineError
from lutra.graph import Graph
from lutra.node import Node, Value
from lutra.ops.elementwise import CLAMPS, limits
from lutra.runtime.shared_codes import find_siblings
from lutra.runtime.steps import STEPS, Job

__all__ = ["FusedNode", "build_plan", "fuse"]

_MAX_RANK: Final = 6  # of the engine's arrays

#: The operators whose step can read planes of a larger value where they are.
READS_PLANES: Final = frozenset({"attention"})

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
    numbers = {value.name: plan.input(value.dtype) for value in graph.inputs}
    places = _Places(plan, values, numbers)
    for step in find_siblings(graph, fuse(graph)):
        fused = step.members[0]
        node = fused.node
        read = places.planes if node.op in READS_PLANES else places.value
        found = [read(name) for name in node.inputs]
        residual = -1 if fused.residual is None else places.value(fused.residual)[0]
        job = Job(
            node,
            tuple(number for number, _ in found),
            tuple(values[name] for name in node.inputs),
            values[node.output],
            step.tensors(graph),
            residual,
            fused.clamp,
            tuple(plane for _, plane in found),
        )
        add_step = STEPS.get(node.op)
        if add_step is None:
            raise EngineError(
                f"node {node.name!r} ({node.op}) is not an operator of the engine; run it in the "
                "reference"
            )
        plan.label(step.label)
        try:
            number = add_step(plan, job)
        except ValueError as error:
            raise EngineError(f"node {node.name!r} ({node.op}): {error}") from error
        for member, start in zip(step.members, step.starts, strict=True):
            places.put(member, number, start if len(step.members) > 1 else None, step.axis)
    plan.finish([places.value(name)[0] for name in graph.outputs])
    return plan


class _Places:
    """Where the values of a graph are in a plan: a value of the plan, or planes of one."""

    def __init__(
        self, plan: _engine.Plan, values: Mapping[str, Value], numbers: dict[str, int]
    ) -> None:
        self._plan = plan
        self._values = values
        self._numbers = numbers
        self._shared: dict[str, tuple[int, int, int, str]] = {}

    def put(self, made: FusedNode, number: int, start: int | None, axis: int) -> None:
        """A step has made the value ``number``, or, with ``start``, planes of it from there."""
        if start is None:
            self._numbers[made.output] = number
        else:
            self._shared[made.output] = number, start, axis, made.node.name

    def planes(self, name: str) -> tuple[int, int]:
        """The value of the plan that holds a value, and its first plane there."""
        if name in self._numbers or name not in self._shared:
            return self._numbers[name], 0
        number, start, _, _ = self._shared[name]
        return number, start

    def value(self, name: str) -> tuple[int, int]:
        """The same, with a value of its own for what is part of another: it is copied out."""
        if name not in self._numbers:
            number, start, axis, label = self._shared[name]
            shape = self._values[name].shape
            axis %= len(shape)
            size = shape[axis]
            assert size is not None  # outputs of a layer
            self._plan.label(f"{label}, copied")
            self._numbers[name] = self._plan.slice(number, axis, start, start + size, 1)
        return self._numbers[name], 0


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

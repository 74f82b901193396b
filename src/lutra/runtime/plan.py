"""From a graph to the steps of the native engine.

A convolution or linear layer takes the ``add`` and the ``relu`` behind it into its own step, where
nobody else reads what is between them, and a padding in front of it. Scales and shifts and the
functions of single values go into the step before them: the engine does that. Lookup layers that
make the same codes of the same value share a step (``lutra.runtime.shared_codes``). Every other
node becomes one step.
"""

from __future__ import annotations

from collections.abc import Mapping

from lutra._engine import Plan
from lutra.errors import EngineError
from lutra.graph import Graph
from lutra.node import Value
from lutra.ops import OPS
from lutra.ops.limits import MAX_ENGINE_RANK
from lutra.runtime.fuse import FusedNode, fuse
from lutra.runtime.pads import without_pads
from lutra.runtime.shared_codes import share_codes
from lutra.runtime.steps import PlanBuilder, StepArgs, add_step, sizes

__all__ = ["add_steps", "build_plan"]


def build_plan(graph: Graph, isa: str, threads: int) -> Plan:
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
    try:
        plan = Plan(isa, threads)
    except (ValueError, RuntimeError) as error:
        raise EngineError(f"cannot start {threads} threads of {isa}: {error}") from error
    add_steps(plan, graph)
    return plan


def add_steps(plan: PlanBuilder, graph: Graph) -> None:
    """Adds the steps of a graph to an empty plan. They depend on the graph alone.

    Args:
        plan: What they are added to.
        graph: A graph; it is validated.

    Raises:
        GraphError: If the graph is not valid.
        EngineError: If the engine cannot run the graph, with the node named.
    """
    unpadded = without_pads(graph)
    values = unpadded.values
    for value in values.values():
        if len(value.shape) > MAX_ENGINE_RANK:
            raise EngineError(
                f"value {value.name!r} has {len(value.shape)} axes and the engine takes "
                f"{MAX_ENGINE_RANK}; reshape it to fewer axes in the model"
            )
    numbers = {value.name: plan.input(value.dtype) for value in graph.inputs}
    places = _Places(plan, values, numbers)
    for step in share_codes(graph, fuse(graph, unpadded)):
        fused = step.members[0]
        node = fused.node
        reads_planes = OPS[node.op].reads_planes
        found = [
            places.planes(name) if i < reads_planes else places.value(name)
            for i, name in enumerate(node.inputs)
        ]
        residual = -1 if fused.residual is None else places.value(fused.residual)[0]
        args = StepArgs(
            node,
            tuple(number for number, _ in found),
            tuple(values[name] for name in node.inputs),
            values[node.output],
            step.tensors(graph),
            residual,
            fused.clamp,
            tuple(plane for _, plane in found),
        )
        plan.label(step.label)
        number = add_step(plan, args)
        for member, start in zip(step.members, step.starts, strict=True):
            places.put(member, number, start if len(step.members) > 1 else None, step.axis)
    plan.finish([places.value(name)[0] for name in graph.outputs])


class _Places:
    """Where the values of a graph are in a plan: a value of the plan, or planes of one."""

    def __init__(
        self, plan: PlanBuilder, values: Mapping[str, Value], numbers: dict[str, int]
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
            self._numbers[name] = self._plan.add(
                "slice",
                [number],
                {"axis": axis, "start": start, "stop": start + size, "step": 1},
                {},
                input_shapes=[[-1] * len(shape)],
                output_shape=sizes(shape),
            )
        return self._numbers[name], 0

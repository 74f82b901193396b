"""From a node of a graph to a step of the native engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lutra._engine import ops
from lutra.errors import EngineError
from lutra.node import Array, AttrValue, Node, Shape, Value

__all__ = ["PlanBuilder", "StepArgs", "add_step", "sizes"]


class PlanBuilder(Protocol):
    """What steps are added to: a plan of the engine, or what writes one down.

    Values are numbers. Shapes have -1 for a size that is known at run time only.
    """

    def input(self, dtype: str = "float32") -> int:
        """Adds an input and returns its number; inputs come before steps."""

    def label(self, name: str) -> None:
        """What steps added from now on are called."""

    def add(
        self,
        op: str,
        inputs: Sequence[int],
        attrs: Mapping[str, AttrValue],
        tensors: Mapping[str, Array],
        *,
        input_shapes: Sequence[Sequence[int]],
        output_shape: Sequence[int],
        residual: int = -1,
        clamp: tuple[float, float] | None = None,
        planes: Sequence[int] = (),
    ) -> int:
        """Adds a step, see ``StepArgs``, and returns the number of its output."""

    def finish(self, outputs: Sequence[int]) -> None:
        """Ends building."""


@dataclass(frozen=True)
class StepArgs:
    """What a step is made from.

    Attributes:
        node: The node.
        ids: The numbers of its inputs in the plan.
        inputs: Its inputs.
        output: Its output.
        tensors: Its tensors by role, C-contiguous.
        residual: Number of the value to add, or -1.
        clamp: The limits to clamp to, or None.
        planes: Of each input, its first plane in the value that ``ids`` names: 0, unless the
            operator reads planes (``OpSpec.reads_planes``).
    """

    node: Node
    ids: tuple[int, ...]
    inputs: tuple[Value, ...]
    output: Value
    tensors: Mapping[str, Array]
    residual: int = -1
    clamp: tuple[float, float] | None = None
    planes: tuple[int, ...] = ()


def add_step(plan: PlanBuilder, args: StepArgs) -> int:
    """Adds the step of a node to a plan.

    Args:
        plan: The plan.
        args: What the step is made from.

    Returns:
        The number of its output.

    Raises:
        EngineError: If the engine lacks the operator or refuses its arguments, with the node named.
    """
    node = args.node
    if node.op not in ops():
        raise EngineError(
            f"node {node.name!r} ({node.op}) is not an operator of the engine; run it in the "
            "reference"
        )
    try:
        return plan.add(
            node.op,
            args.ids,
            node.attrs,
            args.tensors,
            input_shapes=[sizes(value.shape) for value in args.inputs],
            output_shape=sizes(args.output.shape),
            residual=args.residual,
            clamp=args.clamp,
            planes=args.planes,
        )
    except ValueError as error:
        raise EngineError(f"node {node.name!r} ({node.op}): {error}") from error


def sizes(shape: Shape) -> list[int]:
    """A shape as the engine takes it: -1 for a size that is known at run time only."""
    return [-1 if size is None else size for size in shape]

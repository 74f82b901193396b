"""What the functions that lower operators stand on: their registry and what they are given.

A lowering is a small function that gets one torch operator's arguments by name and emits graph
nodes:

    @lowers("aten.relu.default")
    def _relu(ctx: Lowering, self: Ref) -> Ref:
        return ctx.emit("relu", self)

Operators that only touch constants (weights) are computed right away, so a lowering meets either
a `Ref` (an activation) or a finished `torch.Tensor`. Those that ask for it also meet a `View` (an
activation in another order) and a `Deferred` (what depends on integer inputs and sizes only).
`walk` calls them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor, fx
from torch.export import ExportedProgram

from lutra.errors import LutraError
from lutra.graph import Graph
from lutra.train.exporting.lowering.emitter import Emitter
from lutra.train.exporting.lowering.sources import Deferred, Sources
from lutra.train.exporting.lowering.values import Ref, Sizes, UnsupportedUse, View, is_dynamic

__all__ = [
    "LOWERINGS",
    "Deferred",
    "Entry",
    "Lowered",
    "Lowering",
    "Ref",
    "Sizes",
    "UnsupportedUse",
    "View",
    "is_dynamic",
    "lowers",
]


@dataclass(frozen=True)
class Lowered:
    """A graph, and where its values come from.

    Attributes:
        graph: The graph, not yet validated.
        origins: Graph value name -> name of the torch node that computes it; lets a check compare
            the two node by node.
    """

    graph: Graph
    origins: Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """A registered lowering; see `lowers`."""

    function: Callable[..., Any]
    takes_sizes: bool
    takes: frozenset[str]
    works: Literal["", "each", "last"]
    axes: tuple[str, ...] = ()


#: The longest input that a table of positions is made for where the model sets no limit.
LONGEST = 2048
_F = TypeVar("_F", bound=Callable[..., Any])
#: The lowering of each torch operator.
LOWERINGS: dict[str, Entry] = {}


def lowers(
    *targets: str,
    takes_sizes: bool = False,
    takes: Sequence[str] = (),
    works: Literal["", "each", "last"] = "",
    axes: Sequence[str] = (),
) -> Callable[[_F], _F]:
    """Register a function as the lowering of torch operators such as `"aten.relu.default"`.

    Args:
        targets: The operators.
        takes_sizes: Whether it can do with arguments that are computed from sizes known at run
            time only; they are refused otherwise.
        takes: Names of arguments that may be a `View` or a `Deferred`, or lists that hold one.
            Others are made a `Ref` (or a tensor) before the function is called.
        works: "each" for an operator that treats every element alike, "last" for one along the
            last axis: it is called with the base of a view where the batch is not in axis 0.
        axes: Names of arguments that number axes, of an operator whose result has the axes of its
            operands. Where the batch is not in axis 0 it is called with the axes in another order.

    The function is called as `fn(ctx, **arguments)`, the arguments named as in the operator's
    schema (only those the function takes). It returns a `Ref` or a `View`, or a tuple for operators
    with several results (None for a result lutra does not have), or raises `UnsupportedUse`.
    """

    def register(function: _F) -> _F:
        for target in targets:
            if target in LOWERINGS:
                raise LutraError(
                    f"lowers: {target} has a lowering already "
                    f"({LOWERINGS[target].function.__qualname__}); remove one of the two."
                )
            LOWERINGS[target] = Entry(function, takes_sizes, frozenset(takes), works, tuple(axes))
        return function

    return register


class Lowering(Emitter, ABC):
    """What a lowering is given: the graph so far, and what torch nodes have become."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph)
        self.sources = Sources(program)
        self._results: dict[fx.Node, Any] = {}
        self._integers: dict[fx.Node, Ref] = {}
        self.longest = LONGEST

    def integer_input(self, node: fx.Node) -> Ref | None:
        """Return the graph value of an input of integers, or None for any other torch node."""
        return self._integers.get(node)

    def is_integers(self, value: Ref) -> bool:
        """Return whether a graph value is an input of integers."""
        return any(value.name == each.name for each in self._integers.values())

    def constant(self, node: fx.Node) -> Tensor:
        """Return the constant that a torch node stands for.

        Raises:
            UnsupportedUse: It is none.
        """
        value = self._results.get(node)
        if not isinstance(value, Tensor):
            raise UnsupportedUse("it computes with integers and activations at once")
        return value

    @abstractmethod
    def realise(self, x: Ref | View) -> Ref:
        """Return a graph value that holds what a view shows."""

    @abstractmethod
    def force(self, node: fx.Node, lower: Callable[[fx.Node], Any]) -> Any:
        """Lower a deferred node after all, once.

        Args:
            node: The node.
            lower: Called while that is the current operator; returns a `Ref` or a `View`.
        """

    @abstractmethod
    def apply(self, node: fx.Node, arguments: Sequence[Any]) -> Any:
        """Lower one operator, which is the current one, with other positional arguments."""

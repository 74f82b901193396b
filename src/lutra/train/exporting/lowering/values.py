"""What a torch tensor is during the walk: a value of the graph, a view of one, or neither yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import fx

#: Sizes of axes, see ``Ref``.
Sizes: TypeAlias = tuple[Any, ...]

#: The axis of an ``Atom`` that repeats a view's values.
REPEATED = -1


@dataclass(frozen=True)
class Ref:
    """An activation: the name of a graph value and its shape.

    A size is an int, None for the batch, or else an expression of torch's in the sizes of the
    inputs, where those are known at run time only. The dtype is "float32", or "int32" for an input
    of token ids or of a mask.
    """

    name: str
    shape: Sizes
    dtype: str = "float32"

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class Atom:
    """A part of an axis of a view that came out of one axis of its base, whole or split.

    Attributes:
        axis: The axis of the base, or ``REPEATED`` where the view repeats its values.
        inner: How far apart two entries of it lie on that axis.
        size: Its entries; torch's expression for the batch where it is the batch.
    """

    axis: int
    inner: int
    size: Any


@dataclass(frozen=True)
class View:
    """The values of a graph value in another order or shape, before any node is made for that.

    Transposes and reshapes only make views. What they do may cancel out, or end up in an operator
    that wants the values in the order of the base anyway, such as attention; and a view may have
    shapes that no graph value has, such as (T, N, D), as long as nothing but views comes of it.

    Attributes:
        base: The graph value; every element of it is in the view.
        axes: What each axis of the view consists of, outermost first; nothing where its size is 1.
        node: The torch node that made the view.
    """

    base: Ref
    axes: tuple[tuple[Atom, ...], ...]
    node: fx.Node = field(compare=False)

    @property
    def rank(self) -> int:
        return len(self.axes)


@dataclass(frozen=True)
class Unlowered:
    """Stands for a result that could not be lowered, so that the walk can go on."""


class UnsupportedUse(Exception):
    """Raised by a lowering when it knows the operator but not this use of it; holds the hint."""


def is_dynamic(size: Any) -> bool:
    """Whether a size of a Ref is known at run time only, the batch aside."""
    return hasattr(size, "free_symbols")  # an expression of sympy

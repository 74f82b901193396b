"""The parts of a graph: values that flow, and nodes that make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from numpy.typing import NDArray

__all__ = ["Array", "AttrValue", "Node", "Shape", "Value"]

AttrValue: TypeAlias = int | float | bool | str | tuple[int, ...]
Array: TypeAlias = NDArray[Any]
#: Sizes of the axes. None is a dynamic axis: its size is known when the model runs. On axis 0 it is
#: the batch, the same for all inputs whose axis 0 is None; elsewhere nothing says that two of them
#: are equal, and an operator that needs equal sizes finds out at run time.
Shape: TypeAlias = tuple[int | None, ...]


@dataclass(frozen=True)
class Value:
    """An array that flows through the graph: its name, dtype and shape.

    The dtype is "float32", or "int32" for inputs that are token ids or masks.
    """

    name: str
    dtype: str
    shape: Shape

    @property
    def is_dynamic(self) -> bool:
        """Whether the size of a sample is known at run time only: of an axis behind axis 0."""
        return None in self.shape[1:]

    def with_shape(self, name: str, shape: Shape) -> Value:
        """A value of the same dtype with another name and shape."""
        return replace(self, name=name, shape=shape)


@dataclass(frozen=True)
class Node:
    """One operator of the graph.

    Attributes:
        op: Name of the operator, see ``lutra.ops``.
        name: Unique name, the module path in the model where there is one.
        inputs: Names of the values that it reads.
        output: Name of the value that it makes.
        attrs: Its settings; lists become tuples.
        tensors: Name of a tensor of the graph for each role.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attrs: Mapping[str, AttrValue] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: Mapping[str, Any] = self.attrs
        attrs = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "attrs", attrs)
        object.__setattr__(self, "tensors", dict(self.tensors))

"""The table of ONNX operators, and what an entry of it is given.

    @onnx_op("Relu")
    def _relu(b: Builder, op: Op, x: Value) -> Any:
        return b.call(torch.relu, x)

An entry gets the builder, the operator, and the inputs of the operator as values: constants, nodes
or numbers (see `builder`), None for an optional one that is left out. It returns a value, or a
tuple of those for the outputs that it can make. It raises `Refusal` with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lutra.errors import LutraError
from lutra.train.importing.builder import Numbers, Refusal, Value

__all__ = [
    "OPS",
    "TORCH_DTYPES",
    "Op",
    "axis_of",
    "dtype_of",
    "entries",
    "ints",
    "is_constant",
    "number",
    "onnx_op",
]


@dataclass(frozen=True)
class Op:
    """One operator of a file.

    Attributes:
        type: Such as "Conv".
        name: Of its node; may be empty.
        attrs: Python numbers, texts, lists and tensors.
        opset: Version of the operator set of the file.
        outputs: Names of the values it makes; "" for those that nobody wants.
        path: Where a module that computes it belongs.
        context: The import that it is part of.
    """

    type: str
    name: str
    attrs: Mapping[str, Any]
    opset: int
    outputs: tuple[str, ...]
    path: str
    context: Any

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attrs.get(name, default)

    def wants(self, index: int) -> bool:
        """Whether an output is used."""
        return index < len(self.outputs) and bool(self.outputs[index])

    def axes(self, given: Value | None, key: str = "axes") -> list[int] | None:
        """Axes, which newer operator sets have as an input and older ones as an attribute."""
        if given is not None:
            return ints(given, key)
        axes = self.get(key)
        return None if axes is None else [int(axis) for axis in axes]


_F = TypeVar("_F", bound=Callable[..., Any])
#: The entries by domain and type; "" is the domain of ONNX itself.
OPS: dict[tuple[str, str], Callable[..., Any]] = {}


def onnx_op(*names: str, domain: str = "") -> Callable[[_F], _F]:
    """Registers the entry of operators."""

    def register(function: _F) -> _F:
        for name in names:
            if (domain, name) in OPS:
                raise LutraError(f"onnx_op: {name} has an entry already; remove one of the two")
            OPS[domain, name] = function
        return function

    return register


#: By the numbers of `onnx.TensorProto`. The engine computes in float32, so all floats are that.
TORCH_DTYPES: Mapping[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.int32,
    5: torch.int32,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float32,
    11: torch.float32,
    12: torch.int64,
    13: torch.int64,
    16: torch.float32,
}


def dtype_of(number: int) -> torch.dtype:
    """The dtype of a number of `onnx.TensorProto.DataType`.

    Raises:
        Refusal: It is a type of texts, complex numbers or fewer than 8 bits.
    """
    if number not in TORCH_DTYPES:
        raise Refusal(f"it has the data type {number} of ONNX, and lutra reads numbers and bool")
    return TORCH_DTYPES[number]


def ints(value: Value, what: str) -> list[int]:
    """The entries of a constant of integers.

    Raises:
        Refusal: It is none.
    """
    items = value.items if isinstance(value, Numbers) else None
    if isinstance(value, Tensor):
        items = tuple(value.reshape(-1).tolist())
    if items is None or not all(isinstance(item, (int, float)) for item in items):
        raise Refusal(f"its {what} is computed while the model runs; it must be a constant")
    return [int(item) for item in items]


def entries(value: Value, what: str) -> list[Any]:
    """The entries of a tensor with one axis: numbers, and sizes known at run time only."""
    if isinstance(value, Tensor):
        return list(value.reshape(-1).tolist())
    if isinstance(value, Numbers):
        return list(value.items)
    raise Refusal(f"its {what} depends on values of the inputs; only sizes may decide about it")


def number(value: Value | None, what: str, default: Any = None) -> Any:
    """The one entry of a constant."""
    if value is None:
        return default
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, Numbers) and len(value.items) == 1:
        return value.items[0]
    raise Refusal(f"its {what} is computed while the model runs; it must be one constant number")


def is_constant(*values: Value | None) -> bool:
    """Whether all of these are constants."""
    return all(isinstance(value, Tensor) for value in values)


def axis_of(axis: int, ndim: int) -> int:
    """An axis, counted from the front.

    Raises:
        Refusal: There is no such axis.
    """
    if not -ndim <= axis < max(ndim, 1):
        raise Refusal(f"it names axis {axis} of a tensor with {ndim} axes")
    return axis % ndim if ndim else 0

"""What a caller may give for the inputs of a graph, and the casts that are made.

An array is cast where its dtype says that it is meant, and where no number changes beyond the
rounding of float32:

* for a float32 input: float16, uint8, int8 and int16 exactly; float64 to the nearest float32,
  refused where a number is beyond float32's range;
* for an int32 input: bool, uint8, int8, uint16 and int16 exactly; int64, uint64 and uint32 where
  every number fits.

Everything else is refused with what to do. Values of dtype int32 are inputs only, token ids and
masks; operators read them and make float32. An input is ids where an ``embedding`` reads it, whose
table has a row for each id, and a mask otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from lutra.errors import InputError
from lutra.graph import Graph
from lutra.node import Array, Value
from lutra.ops import OPS

__all__ = [
    "IdRange",
    "cast_input",
    "check_ids",
    "dtype_complaint",
    "id_ranges",
    "place_inputs",
    "random_ints",
]

_INT32: Final = np.iinfo(np.int32)
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
#: Dtypes that become int32; the numbers of those that do not all fit are checked.
_TO_INT32: Final = (
    "int32", "bool", "uint8", "int8", "uint16", "int16", "int64", "uint64", "uint32"
)  # fmt: skip
#: Dtypes that become float32: all but the last exactly.
_TO_FLOAT32: Final = ("float32", "float16", "uint8", "int8", "int16", "float64")


class IdRange(NamedTuple):
    """The ids that an input may hold: ``0..rows - 1``.

    Attributes:
        node: Name of the embedding that says so.
        rows: Rows of its table.
    """

    node: str
    rows: int


def id_ranges(graph: Graph) -> dict[str, IdRange]:
    """The smallest range of ids by input name, of the inputs that an embedding reads."""
    ints = {value.name for value in graph.inputs if value.dtype == "int32"}
    ranges: dict[str, IdRange] = {}
    for node in graph.nodes if ints else ():
        if node.op == "embedding" and node.inputs[0] in ints:
            name, rows = node.inputs[0], graph.tensors[node.tensors["weight"]].shape[0]
            if name not in ranges or rows < ranges[name].rows:
                ranges[name] = IdRange(node.name, rows)
    return ranges


def place_inputs(graph: Graph) -> set[str]:
    """Names of the inputs that are places in a sequence, see ``OpSpec.places``."""
    read = {
        node.inputs[index]
        for node in graph.nodes
        for index in OPS[node.op].places
        if index < len(node.inputs)
    }
    return read & {value.name for value in graph.inputs}


def check_ids(where: str, node: str, ids: Array, rows: int) -> None:
    """Raises InputError if an id has no row in the table of an embedding.

    Args:
        where: What was given them, for the error.
        node: Name of the embedding.
        ids: int32, any shape.
        rows: Rows of its table.
    """
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or high >= rows:
        raise InputError(
            f"{where}: node {node!r} (embedding) is given the id {low if low < 0 else high}, but "
            f"its table has {rows} rows; ids must be in 0..{rows - 1}: use the tokenizer that the "
            "model was trained with"
        )


def dtype_complaint(value: Value, dtype: Any) -> str | None:
    """Says what is wrong with the dtype of an array for an input, or None where it is cast."""
    if value.dtype == "int32":
        if dtype.name in _TO_INT32 and dtype.isnative:
            return None
        return (
            f"has dtype {dtype}; the model takes int32 for it (other integers and bool are "
            "converted): give ids or a mask as integers, such as x.astype(np.int32)"
        )
    if dtype.name in _TO_FLOAT32 and dtype.isnative:
        return None
    wide = dtype.kind in "iub" and dtype.isnative
    return (
        f"has dtype {dtype}; the model takes float32: "
        f"{'if these numbers are meant, ' if wide else ''}convert it with .astype(np.float32)"
    )


def cast_input(where: str, value: Value, array: Any) -> Array:
    """An array as an input takes it, by the casts that the head of this module lists.

    Args:
        where: What the array is, for errors.
        value: The input.
        array: What was given.

    Returns:
        float32 or int32; the array itself where it has that dtype.

    Raises:
        InputError: If it is no array, or of another dtype, or if it holds a number that the dtype
            of the input cannot hold.
    """
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"{where} is a {type(array).__name__}; give a numpy array, "
            f"such as np.asarray(x, dtype=np.{value.dtype})"
        )
    complaint = dtype_complaint(value, array.dtype)
    if complaint is not None:
        raise InputError(f"{where} {complaint}")
    if value.dtype == "int32":
        return _int32_array(where, array)
    return _float32_array(where, array)


def _int32_array(where: str, array: Array) -> Array:
    if array.size and array.dtype.kind in "iu" and array.dtype.itemsize >= 4:
        low, high = int(array.min()), int(array.max())
        if low < _INT32.min or high > _INT32.max:
            worst = low if low < _INT32.min else high
            raise InputError(
                f"{where} holds {worst}, which is no int32; give numbers in "
                f"{_INT32.min}..{_INT32.max}"
            )
    return array.astype(np.int32, copy=False)


def _float32_array(where: str, array: Array) -> Array:
    if array.dtype != np.float64:
        return array.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        made = array.astype(np.float32)
    lost = np.isinf(made) & np.isfinite(array)
    if lost.any():
        raise InputError(
            f"{where} holds {float(array[lost][0])!r}, which is beyond float32; give numbers in "
            f"-{_FLOAT32_MAX:.6g}..{_FLOAT32_MAX:.6g}"
        )
    return made


def random_ints(
    value: Value, ranges: Mapping[str, IdRange], shape: tuple[int, ...], rng: np.random.Generator
) -> Array:
    """Random valid content of an input of dtype int32.

    Args:
        value: The input.
        ranges: Those of its graph, see ``id_ranges``.
        shape: Its shape.
        rng: Where it comes from.

    Returns:
        int32: ids that have a row, or a mask whose last axis begins with at least one 1 and is
        filled up with 0, as that of a batch of texts is.
    """
    if value.name in ranges:
        return rng.integers(0, ranges[value.name].rows, shape, dtype=np.int32)
    lengths = rng.integers(1, shape[-1] + 1, (*shape[:-1], 1))
    return (np.arange(shape[-1]) < lengths).astype(np.int32)

"""What a caller may give for the inputs of a graph that are integers: token ids and masks.

Values of dtype int32 are inputs only; operators read them and make float32. An input is ids where
an ``embedding`` reads it, whose table has a row for each id, and a mask otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from lutra.errors import InputError
from lutra.graph import Graph
from lutra.node import Array, Value

__all__ = ["IdRange", "check_ids", "dtype_complaint", "id_ranges", "int32_array", "random_ints"]

_INT32: Final = np.iinfo(np.int32)
_TAKEN: Final = ("int32", "int64", "bool")


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
    """Says what is wrong with the dtype of an array for an input, or None where it fits."""
    if value.dtype == "int32":
        if dtype.name in _TAKEN and dtype.isnative:
            return None
        return (
            f"has dtype {dtype}; the model takes int32 for it (int64 and bool are converted): "
            "give ids or a mask as integers, such as x.astype(np.int32)"
        )
    if dtype == np.float32:
        return None
    return f"has dtype {dtype}; the model takes float32: convert it with .astype(np.float32)"


def int32_array(where: str, array: Array) -> Array:
    """An array that ``dtype_complaint`` has nothing against, as int32.

    Args:
        where: What the array is, for the error.
        array: int32, int64 or bool.

    Raises:
        InputError: If a number does not fit into int32.
    """
    if array.dtype == np.int64 and array.size:
        low, high = int(array.min()), int(array.max())
        if low < _INT32.min or high > _INT32.max:
            worst = low if low < _INT32.min else high
            raise InputError(
                f"{where} holds {worst}, which is no int32; give numbers in "
                f"{_INT32.min}..{_INT32.max}"
            )
    return array.astype(np.int32, copy=False)


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

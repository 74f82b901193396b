"""Compact tables: int8 weights, which a file may hold of a lookup layer instead of its tables.

Tables are products of centroids with weights, so a file may give int8 weights ``weight`` (M, D)
and a float32 ``factor`` (M), and the tables are built from them when it is loaded::

    acc[b, k, m]    = sum_v (centroids[b, k, v] - act_zero) * weight[m, b * V + v]    int32, exact
    tables[b, k, m] = clamp(round_half_even(float32(acc[b, k, m]) * factor[m]), -127, 127)

Entries of the last sub-vector beyond the end of a row count nothing. Where a row has parts that
are encoded alike (``group`` of ``lutra.ops.pq``), the sub-vectors are those of the parts. One
float32 multiplication is all that rounds, so every machine builds the same tables. A codebook takes
V bytes for each output instead of K: with V = 9 and K = 16 a little more than half.

An encoder that has no centroids of its own (a tree) may have ``centroids`` for this purpose only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from lutra.node import Array, Node
from lutra.ops.limits import INT8_MAX, MAX_SUBVECTOR
from lutra.ops.spec import integer, node_error

__all__ = ["ROLES", "build_tables", "expand"]

#: The tensors that stand in the place of ``tables``.
ROLES: Final = ("weight", "factor")
_NEEDED: Final = {"centroids": ("uint8", 3), "weight": ("int8", 2), "factor": ("float32", 1)}
_BLOCK: Final = 2**22  # entries of the largest temporary


def build_tables(centroids: Array, act_zero: int, weight: Array, factor: Array) -> Array:
    """Multiplies centroids with weights and rounds to table entries.

    Args:
        centroids: uint8 (G, K, V), at most 127, V at most 64
        act_zero: The integer that stands for 0.0, at most 127.
        weight: int8 (M, D), or its parts that are encoded alike (M, T, D / T)
        factor: float32 (M)

    Returns:
        int8 (G * T, K, M), read-only; T is 1 for a weight of two axes.
    """
    codebooks, count, width = centroids.shape
    parts = weight if weight.ndim == 3 else weight[:, None]
    outputs, repeats, length = parts.shape
    padded = np.zeros((outputs, repeats, codebooks * width), np.float32)
    padded[:, :, :length] = parts
    ordered = padded.reshape(outputs, repeats, codebooks, width).transpose(2, 1, 3, 0)
    blocks = ordered.reshape(codebooks * repeats, width, outputs)  # (B, V, M)
    offsets = (centroids.astype(np.float32) - np.float32(act_zero)).repeat(repeats, axis=0)
    tables = np.empty((codebooks * repeats, count, outputs), np.int8)
    step = max(1, _BLOCK // (count * outputs))
    for first in range(0, len(tables), step):
        part = slice(first, first + step)
        # float32 products are exact here, in any order, and much faster than NumPy's integer ones:
        # a sum of at most 64 products of at most 127 * 128 is far below 2**24.
        sums = offsets[part] @ blocks[part]
        with np.errstate(over="ignore"):
            scaled = np.rint(sums * factor)
        tables[part] = scaled.clip(-INT8_MAX, INT8_MAX)
    tables.flags.writeable = False
    return tables


def expand(
    node: Node,
    tensors: Mapping[str, Array],
    length: int,
    cut: Callable[[Array], Array] = lambda rows: rows[:, None],
) -> dict[str, Array]:
    """The tensors that a lookup operator works with: tables in the place of compact ones.

    Args:
        node: The node.
        tensors: Its stored tensors by role.
        length: D, the number of activations in one row.
        cut: Rows (n, D) as their parts that are encoded alike, (n, T, D / T).

    Raises:
        GraphError: If the compact tables are incomplete or do not fit each other.
    """
    if not any(role in tensors for role in ROLES):
        return dict(tensors)
    weight = _checked_weight(node, tensors, length, cut)
    tables = build_tables(
        tensors["centroids"], integer(node, "act_zero"), weight, tensors["factor"]
    )
    own = node.attrs.get("encoder", "nearest") == "nearest"
    dropped = ROLES if own else (*ROLES, "centroids")
    return {**{r: a for r, a in tensors.items() if r not in dropped}, "tables": tables}


def _checked_weight(
    node: Node, tensors: Mapping[str, Array], length: int, cut: Callable[[Array], Array]
) -> Array:
    """The weight in parts (M, T, D / T), after a check of everything that ``build_tables`` relies
    on; the rest is checked with the tables."""
    if "tables" in tensors:
        raise node_error(node, "has tables and compact tables", "give it one of the two")
    for role, (dtype, ndim) in _NEEDED.items():
        if role not in tensors:
            given = ", ".join(name for name in _NEEDED if name in tensors)
            raise node_error(
                node, f"lacks the tensor {role!r}", f"tables are built from it and {given}; add it"
            )
        array = tensors[role]
        if array.dtype != np.dtype(dtype) or array.ndim != ndim or array.size == 0:
            raise node_error(
                node,
                f"has {role} of dtype {array.dtype} and shape {array.shape}",
                f"it must be {dtype} with {ndim} axes, none of them empty",
            )
    codebooks, _, width = tensors["centroids"].shape
    weight, factor = tensors["weight"], tensors["factor"]
    if weight.shape[1] != length or factor.shape != weight.shape[:1]:
        raise node_error(
            node,
            f"has a weight of shape {weight.shape} and a factor of shape {factor.shape}",
            f"rows of {length} activations need (outputs, {length}) and (outputs,)",
        )
    parts = cut(weight)
    inside = parts.shape[2]
    if width > MAX_SUBVECTOR or codebooks != -(-inside // width):
        raise node_error(
            node,
            f"has {codebooks} codebooks for rows of {inside} in sub-vectors of {width}",
            f"it needs {-(-inside // width)} of sub-vectors of at most {MAX_SUBVECTOR}",
        )
    top = int(tensors["centroids"].max())
    zero = node.attrs.get("act_zero")
    if top > INT8_MAX or type(zero) is not int or not 0 <= zero <= INT8_MAX:
        raise node_error(
            node,
            f"has a centroid value of {top} and act_zero={zero!r}",
            f"both must be ints in 0..{INT8_MAX}",
        )
    return parts

"""Lookup layers of a table of two axes: every product is read from it, and the reads are added.

An activation has an index of ``2**act_bits`` (its grid, see ``lutra.ops.grid``), a weight one of
``J``, and one table for the layer says what the two are worth together::

    x_q[d] = clamp(round_half_even(x[d] / float32(act_scale)) + act_zero, 0, 2**act_bits - 1)
    sum[m] = sum_d table[x_q[d], weight[m, d]]                 int32
    y[m]   = float32(sum[m]) * scale[m] + bias[m]              two roundings

(``float32(sum)`` rounds to nearest even where a sum goes beyond ``2**24``.) A convolution takes its
rows in the order (channel, kernel row, kernel column) and pads ``x_q`` with ``act_zero``: the row
of the table for the real zero holds zeros only, so that padding adds nothing.

The weight indices are packed: ``weight_bits`` bits each, entry ``d`` of a row at bit
``d * weight_bits % 8`` of byte ``d * weight_bits // 8``. What is left of the last byte is 0.

The operation is that of "Deep Lookup Network" (arXiv 2509.13662).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from lutra.node import Array, Node, Value
from lutra.ops.grid import GRID, check_grid
from lutra.ops.limits import (
    INT8_MAX,
    LOOKUP_ACT_BITS,
    MAX_LOOKUP_DEPTH,
    MAX_WEIGHTS,
    MIN_WEIGHTS,
    WEIGHT_BITS,
)
from lutra.ops.rows import (
    conv_attrs,
    example_ends,
    example_rows,
    infer_conv,
    infer_linear,
    linear_attrs,
    row_length,
)
from lutra.ops.spec import Attr, Cost, Example, OpSpec, TensorRole, inner, integer, node_error

__all__ = [
    "bits_for",
    "has_shifted_zero",
    "pack_weights",
    "unpack_weights",
]


_GRID: Final = {
    **GRID,
    "act_bits": Attr(int, low=LOOKUP_ACT_BITS[0], high=LOOKUP_ACT_BITS[-1]),
    "weight_bits": Attr(int, low=WEIGHT_BITS[0], high=WEIGHT_BITS[-1]),
}
_TENSORS: Final = {
    "weight": TensorRole("uint8", 2),
    "table": TensorRole("int8", 2),
    "scale": TensorRole("float32", 1),
    "bias": TensorRole("float32", 1),
}


def bits_for(weights: int) -> int:
    """The bits that a packed index takes: the fewest of ``WEIGHT_BITS``.

    Args:
        weights: How many values the index has, at most 256.
    """
    return next(bits for bits in WEIGHT_BITS if weights <= 2**bits)


def has_shifted_zero(node: Node) -> bool:
    """Whether a node is a lookup layer of one table whose zero is neither the lowest index nor the
    middle one, which files before version 3 cannot say.

    Args:
        node: A valid node.
    """
    if node.op not in ("lookup_conv2d", "lookup_linear"):
        return False
    return integer(node, "act_zero") not in (0, 2 ** (integer(node, "act_bits") - 1))


def pack_weights(index: Array, bits: int) -> Array:
    """Packs weight indices as files hold them.

    Args:
        index: uint8 (M, D), below ``2**bits``.
        bits: 2, 4 or 8.

    Returns:
        uint8 (M, ceil(D * bits / 8)), the first index in the lowest bits.
    """
    share = 8 // bits  # indices of one byte
    padded = np.zeros((index.shape[0], -(-index.shape[1] // share), share), np.uint8)
    padded.reshape(index.shape[0], -1)[:, : index.shape[1]] = index
    packed: Array = padded[:, :, 0].copy()
    for place in range(1, share):
        packed |= padded[:, :, place] << np.uint8(place * bits)
    return packed


def unpack_weights(packed: Array, bits: int, depth: int) -> Array:
    """The inverse of ``pack_weights``.

    Args:
        packed: uint8 (M, ceil(depth * bits / 8))
        bits: 2, 4 or 8.
        depth: D, indices of one row.

    Returns:
        uint8 (M, D), C-contiguous.
    """
    index = (packed[:, :, None] >> _shifts(bits)) & np.uint8(2**bits - 1)
    return np.ascontiguousarray(index.reshape(packed.shape[0], -1)[:, :depth])


def _shifts(bits: int) -> Array:
    return np.arange(0, 8, bits, dtype=np.uint8)


def _check(node: Node, tensors: Mapping[str, Array]) -> None:
    check_grid(node)
    _check_table(node, tensors["table"])
    packed = tensors["weight"]
    outputs = packed.shape[0]
    for role in ("scale", "bias"):
        if tensors[role].shape != (outputs,):
            raise node_error(
                node,
                f"has {role} of shape {tensors[role].shape}",
                f"the weight of shape {packed.shape} needs ({outputs},)",
            )
    _check_weight(node, packed, tensors["table"].shape[1])


def _check_table(node: Node, table: Array) -> None:
    rows, columns = table.shape
    levels = 2 ** integer(node, "act_bits")
    if rows != levels:
        raise node_error(
            node,
            f"has a table of shape {table.shape} with act_bits={node.attrs['act_bits']}",
            f"it needs {levels} rows, one for each activation index",
        )
    if columns % 2 == 0 or not MIN_WEIGHTS <= columns <= MAX_WEIGHTS:
        raise node_error(
            node,
            f"has a table of shape {table.shape}",
            f"it needs an odd number of columns in {MIN_WEIGHTS}..{MAX_WEIGHTS}",
        )
    if int(table.min()) < -INT8_MAX:
        raise node_error(
            node,
            f"has a table entry of {int(table.min())}",
            f"entries must be in {-INT8_MAX}..{INT8_MAX}",
        )
    zero = integer(node, "act_zero")
    if table[zero].any():
        raise node_error(
            node,
            f"has entries other than 0 in row {zero} of its table, the row of the activation 0.0",
            "set them to 0, or padding would not be exact",
        )


def _check_weight(node: Node, packed: Array, weights: int) -> None:
    bits, depth = integer(node, "weight_bits"), row_length(node)
    if bits != bits_for(weights):
        raise node_error(
            node,
            f"has weight_bits={bits} for a table of {weights} columns",
            f"it must be {bits_for(weights)}",
        )
    if depth > MAX_LOOKUP_DEPTH:
        raise node_error(
            node,
            f"adds up {depth} table entries for each output, more than int32 holds for certain",
            f"use at most {MAX_LOOKUP_DEPTH}, or the float32 operator",
        )
    size = -(-depth * bits // 8)
    if packed.shape[1] != size:
        raise node_error(
            node,
            f"has a weight of shape {packed.shape}",
            f"rows of {depth} indices of {bits} bits need ({packed.shape[0]}, {size})",
        )
    used = depth * bits - 8 * (size - 1)  # bits of the last byte
    if int(packed[:, -1].max()) >> used:
        raise node_error(
            node,
            f"has bits other than 0 behind the last of {depth} weight indices",
            f"set the highest {8 - used} bits of the last byte of every row to 0",
        )
    top = int(unpack_weights(packed, bits, depth).max())
    if top >= weights:
        raise node_error(
            node,
            f"has a weight index of {top}",
            f"the table has {weights} columns, so it must be in 0..{weights - 1}",
        )


def _infer_conv(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    return infer_conv(node, inputs, tensors["weight"].shape[0])


def _infer_linear(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    return infer_linear(node, inputs, tensors["weight"].shape[0])


def _cost(node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]) -> Cost:
    made = math.prod(inner(output))
    reads = made * row_length(node)
    return Cost(
        lookups=reads,
        quantised=math.prod(inner(inputs[0])),
        scaled=made,
        dense_macs=reads,
        table_bytes=tensors["table"].nbytes,
    )


def _examples(
    rng: np.random.Generator, inputs: int, *, kernel: tuple[int, int] | None = None
) -> list[Example]:
    """A layer of 16 activation indices and 15 weight indices."""
    zero, bits, outputs = 8, 4, 19
    table = rng.integers(-INT8_MAX, INT8_MAX + 1, (16, 15)).astype(np.int8)
    table[zero] = 0
    length = inputs * math.prod(kernel or (1,))
    weight = rng.integers(0, 15, (outputs, length), dtype=np.uint8)
    attrs = {
        **example_rows(inputs, kernel),
        "act_scale": 0.25, "act_zero": zero, "act_bits": 4, "weight_bits": bits,
    }  # fmt: skip
    arrays = {"weight": pack_weights(weight, bits), "table": table, **example_ends(rng, outputs)}
    return [(attrs, arrays)]


#: The rules of both operators beside those of the rows.
_LAYER: Final[dict[str, Any]] = {
    "fuses": True,
    "is_table_layer": True,
    "gain_role": "scale",
    "bias_role": "bias",
}

SPECS: Final = (
    OpSpec(
        "lookup_conv2d",
        attrs={**conv_attrs(MAX_LOOKUP_DEPTH), **_GRID},
        tensors=_TENSORS,
        check=_check,
        infer=_infer_conv,
        cost=_cost,
        takes_pad="padding",
        output_axis=1,
        examples=partial(_examples, kernel=(3, 3)),
        **_LAYER,
    ),
    OpSpec(
        "lookup_linear",
        attrs={**linear_attrs(MAX_LOOKUP_DEPTH), **_GRID},
        tensors=_TENSORS,
        check=_check,
        infer=_infer_linear,
        cost=_cost,
        output_axis=-1,
        examples=_examples,
        **_LAYER,
    ),
)

"""Operators that depend on the positions of tokens.

    rotary:         in each head of x (N, T, H d) the features a < d / 2 and b = a + d / 2, or 2 a
                    and 2 a + 1 where they are interleaved, are turned by the angles of the token t:
                    y[t, a] = x[t, a] * cos[t, a] - x[t, b] * sin[t, a]
                    y[t, b] = x[t, b] * cos[t, b] + x[t, a] * sin[t, b]
                    With starts (N,) of integers, token t of sequence n is turned by the angles of
                    start[n] + t.
    relative_bias:  y[n, h, i, j] = x[n, h, i, j] + weight[h, j - i + L - 1]

``cos`` and ``sin`` are (L, d), and ``weight`` is (H, 2 L - 1), for sequences of at most L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from lutra.formatting import shape_text
from lutra.node import Array, Node, Value
from lutra.ops.decoder import need_starts
from lutra.ops.limits import MAX_HEADS
from lutra.ops.spec import (
    Attr,
    Cost,
    OpSpec,
    TensorRole,
    inner,
    integer,
    need_rank,
    need_size,
    node_error,
)


def _check_rotary(node: Node, tensors: Mapping[str, Array]) -> None:
    cos, sin = tensors["cos"].shape, tensors["sin"].shape
    if cos != sin or cos[1] % 2:
        raise node_error(
            node,
            f"has cos of shape {cos} and sin of shape {sin}",
            "make them the same, with an even number of columns",
        )


def _need_length(node: Node, x: Value, axis: int, length: int) -> None:
    size = x.shape[axis]
    if size is not None and size > length:
        raise node_error(
            node,
            f"is given {size} tokens by its input {x.name!r} of shape {shape_text(x.shape)}",
            f"its table has {length} positions: cut the sequence",
        )


def _infer_rotary(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    x, *start = inputs
    need_rank(node, x, 3, 3)
    for value in start:
        need_starts(node, x, value)
    length, width = tensors["cos"].shape
    heads = integer(node, "heads")
    if need_size(node, x, 2) != heads * width:
        raise node_error(
            node,
            f"has heads={heads} of {width} features but its input {x.name!r} has the shape "
            f"{shape_text(x.shape)}",
            f"give it an input whose last axis has {heads * width} values",
        )
    _need_length(node, x, 1, length)
    return x.with_shape(node.output, x.shape)


def _cost_rotary(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    values = math.prod(inner(output))
    return Cost(float_adds=values, float_muls=2 * values)


def _check_bias(node: Node, tensors: Mapping[str, Array]) -> None:
    shape = tensors["weight"].shape
    if shape[1] % 2 == 0:
        raise node_error(
            node,
            f"has a weight of shape {shape}",
            "it needs an odd number of columns, one for each distance between two tokens",
        )


def _infer_bias(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    need_rank(node, x, 4, 4)
    heads, distances = tensors["weight"].shape
    if need_size(node, x, 1) != heads:
        raise node_error(
            node,
            f"has a weight of shape {tensors['weight'].shape} but its input {x.name!r} has the "
            f"shape {shape_text(x.shape)}",
            f"give it scores of {heads} heads on axis 1",
        )
    for axis in (2, 3):
        _need_length(node, x, axis, (distances + 1) // 2)
    return x.with_shape(node.output, x.shape)


def _cost_bias(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    return Cost(float_adds=math.prod(inner(output)))


SPECS: Final = (
    OpSpec(
        "rotary",
        attrs={
            "heads": Attr(int, low=1, high=MAX_HEADS),
            "interleaved": Attr(bool, default=False),
        },
        tensors={"cos": TensorRole("float32", 2), "sin": TensorRole("float32", 2)},
        check=_check_rotary,
        infer=_infer_rotary,
        cost=_cost_rotary,
        max_inputs=2,
        dtypes=("float32", "int32"),
        places=(1,),
        since=3,
    ),
    OpSpec(
        "relative_bias",
        tensors={"weight": TensorRole("float32", 2)},
        check=_check_bias,
        infer=_infer_bias,
        cost=_cost_bias,
        since=3,
    ),
)

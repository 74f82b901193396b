"""Operators on sequences of tokens: embeddings, attention, the mean over tokens, picks.

    embedding:           y[n, t] = weight[ids[n, t]]        times scale[ids[n, t]] where it is int8
    position_embedding:  y[n, t] = x[n, t] + weight[t], or weight[start[n] + t] with starts (N,) of
                         integers
    masked_mean:         y[n] = sum_t x[n, t] * mask[n, t] / max(sum_t mask[n, t], 1e-9)
    gather:              y = x at the entries ``index`` of an axis
    attention:           for each head, the columns h d to (h + 1) d of q, k and v:
                         s[n, t, j] = scale * sum_c q[n, t, c] * k[n, j, c]
                         p[n, t, j] = exp(s[n, t, j] - max_j s[n, t, j]) over the keys that t sees
                         y[n, t]    = sum_j p[n, t, j] * v[n, j] / sum_j p[n, t, j]
    masked_attention:    the same, with a mask of floats that the graph computes

Ids are an input of integers, or floats that are computed from one and rounded to whole numbers.
A token sees the keys whose mask is not 0, and with ``causal`` only those of index ``j <= t``. The
others have weight 0, exactly; a token that sees no key gives 0. The exp and the reciprocal of the
sum may be read from tables, see ``lutra.ops.functions``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

from lutra.formatting import shape_text
from lutra.node import Array, Node, Value
from lutra.ops.decoder import need_starts
from lutra.ops.functions import check_tables, function_cost, has_tables, table_bytes, table_roles
from lutra.ops.limits import MAX_HEADS
from lutra.ops.spec import (
    Attr,
    Cost,
    OpSpec,
    TensorRole,
    inner,
    integer,
    need_axis,
    need_rank,
    need_size,
    node_error,
)


def _check_embedding(node: Node, tensors: Mapping[str, Array]) -> None:
    weight, scale = tensors["weight"], tensors.get("scale")
    quantised = weight.dtype.name == "int8"
    if quantised != (scale is not None):
        have = "no scale" if scale is None else "a scale"
        raise node_error(
            node,
            f"has a weight of dtype {weight.dtype} and {have}",
            "an int8 weight needs a scale for each row, a float32 weight none",
        )
    if scale is not None and scale.shape != weight.shape[:1]:
        raise node_error(
            node,
            f"has a weight of shape {weight.shape} and a scale of shape {scale.shape}",
            f"the scale must be ({weight.shape[0]},)",
        )


def _infer_embedding(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (ids,) = inputs
    shape = (*ids.shape, tensors["weight"].shape[1])
    return dataclasses.replace(ids, name=node.output, dtype="float32", shape=shape)


def _cost_embedding(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    return Cost(float_muls=math.prod(inner(output)) if "scale" in tensors else 0)


def _infer_position(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    x, *start = inputs
    need_rank(node, x, 3, 3)
    for value in start:
        need_starts(node, x, value)
    length, features = tensors["weight"].shape
    if need_size(node, x, 2) != features:
        raise node_error(
            node,
            f"has a weight of shape {tensors['weight'].shape} but its input {x.name!r} has the "
            f"shape {x.shape}",
            f"give it an input whose last axis has {features} values",
        )
    if x.shape[1] is not None and x.shape[1] > length:
        raise node_error(
            node,
            f"is given {x.shape[1]} tokens by its input {x.name!r} of shape {x.shape}",
            f"the model was trained with {length} positions at most: cut the text",
        )
    return x.with_shape(node.output, x.shape)


def _cost_position(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    return Cost(float_adds=math.prod(inner(output)))


def _same_tokens(node: Node, a: Value, b: Value) -> None:
    """Raises GraphError unless both have the same batch and number of tokens, where known."""
    for axis in (0, 1):
        sizes = {value.shape[axis] for value in (a, b)}
        if len(sizes) > 1 and (axis == 0 or None not in sizes):
            what = "tokens" if axis else "samples"
            raise node_error(
                node,
                f"reads {a.name!r} of shape {shape_text(a.shape)} and {b.name!r} of shape "
                f"{shape_text(b.shape)}",
                f"both must have the same number of {what}",
            )


def _infer_masked_mean(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    x, mask = inputs
    need_rank(node, x, 3, 3)
    need_rank(node, mask, 2, 2)
    _same_tokens(node, x, mask)
    return x.with_shape(node.output, (x.shape[0], x.shape[2]))


def _cost_masked_mean(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    read, made = math.prod(inner(inputs[0])), math.prod(inner(output))
    return Cost(float_adds=read, float_muls=read + made)


def _check_attention(node: Node, tensors: Mapping[str, Array]) -> None:
    check_tables(node, tensors, "exp", "reciprocal")


def _infer_attention(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    q, k, v, *mask = inputs
    heads = integer(node, "heads")
    for value in (q, k, v):
        need_rank(node, value, 3, 3)
        need_size(node, value, 2)
    if q.shape[2] != k.shape[2] or q.shape[2] != v.shape[2]:
        raise node_error(
            node,
            f"reads queries {q.name!r} of shape {shape_text(q.shape)}, keys {k.name!r} of shape "
            f"{shape_text(k.shape)} and values {v.name!r} of shape {shape_text(v.shape)}",
            "their last axes must have the same size",
        )
    if need_size(node, q, 2) % heads:
        raise node_error(
            node,
            f"has heads={heads} for {q.name!r} of shape {shape_text(q.shape)}",
            "the heads must divide its last axis",
        )
    _same_tokens(node, k, v)
    # the queries may be other tokens than the keys
    _same_tokens(node, q.with_shape(q.name, (q.shape[0], k.shape[1], q.shape[2])), k)
    for value in mask:
        need_rank(node, value, 2, 2)
        _same_tokens(node, k, value)
    return q.with_shape(node.output, q.shape)


def _cost_attention(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    queries, width = inner(inputs[0])
    keys, _ = inner(inputs[1])
    heads = integer(node, "heads")
    macs = 2 * queries * keys * width
    weights, rows = heads * queries * keys, heads * queries
    # scale and distance to the largest; the sum; the division
    cost = Cost(
        macs=macs,
        dense_macs=macs,
        float_adds=2 * weights,
        float_muls=weights + queries * width,
    )
    if has_tables(tensors):
        return cost + Cost(pieces=weights + rows, table_bytes=table_bytes(tensors))
    return cost + function_cost(weights, "exp") + function_cost(rows, "reciprocal")


def _check_gather(node: Node, tensors: Mapping[str, Array]) -> None:
    if int(tensors["index"].min()) < 0:
        raise node_error(
            node, f"has the index {int(tensors['index'].min())}", "indices count from 0"
        )


def _infer_gather(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    axis = integer(node, "axis")
    need_axis(node, x, "axis", axis)
    size, last = x.shape[axis], int(tensors["index"].max())
    if size is not None and last >= size:
        raise node_error(
            node,
            f"has the index {last} on axis {axis} of the input {x.name!r} of shape {x.shape}",
            f"it must be below {size}",
        )
    shape = (*x.shape[:axis], tensors["index"].shape[0], *x.shape[axis + 1 :])
    return x.with_shape(node.output, shape)


_ATTENTION: Final = OpSpec(
    "attention",
    attrs={
        "heads": Attr(int, low=1, high=MAX_HEADS),
        "scale": Attr(float),
        "causal": Attr(bool, default=False),
    },
    tensors=table_roles("exp", "reciprocal"),
    check=_check_attention,
    infer=_infer_attention,
    cost=_cost_attention,
    min_inputs=3,
    max_inputs=4,
    reads_planes=3,
    dtypes=("float32", "float32", "float32", "int32"),
    since=2,
)

SPECS: Final = (
    OpSpec(
        "embedding",
        tensors={
            "weight": TensorRole("float32|int8", 2),
            "scale": TensorRole("float32", 1, required=False),
        },
        check=_check_embedding,
        infer=_infer_embedding,
        cost=_cost_embedding,
        dtypes=("int32|float32",),
        since=2,
    ),
    OpSpec(
        "position_embedding",
        tensors={"weight": TensorRole("float32", 2)},
        infer=_infer_position,
        cost=_cost_position,
        max_inputs=2,
        dtypes=("float32", "int32"),
        places=(1,),
        since=2,
    ),
    OpSpec(
        "masked_mean",
        infer=_infer_masked_mean,
        cost=_cost_masked_mean,
        min_inputs=2,
        max_inputs=2,
        dtypes=("float32", "int32"),
        since=2,
    ),
    _ATTENTION,
    dataclasses.replace(
        _ATTENTION,
        name="masked_attention",
        min_inputs=4,
        dtypes=("float32",) * 4,
        since=3,
    ),
    OpSpec(
        "gather",
        attrs={"axis": Attr(int, low=1, high=7)},
        tensors={"index": TensorRole("int32", 1)},
        check=_check_gather,
        infer=_infer_gather,
        since=2,
    ),
)

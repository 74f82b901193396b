"""Operators of decoders, which make a sequence token by token.

    cached_attention:  sequence n has start[n] tokens that earlier runs with the same cache brought,
                       and gets those of this run behind them. Of head h the queries are the columns
                       h d to (h + 1) d of q (N, T, H d); the keys and values of its group
                       g = h // (H / G) are the columns g d to (g + 1) d of k and v (N, T, G d).
                       Token t of the run sees the keys j <= start[n] + t of its sequence:
                       s[n, t, j] = scale * sum_c q[n, t, c] * k[n, j, c]
                       p[n, t, j] = exp(s[n, t, j] - max_j s[n, t, j])
                       y[n, t]    = sum_j p[n, t, j] * v[n, j] / sum_j p[n, t, j]
    pick_tokens:       y[n, p] = x[n, index[n, p]]

A run without a cache has no earlier tokens: ``start`` is 0. Tokens of a run behind those that a
sequence has (a batch of sequences of unequal length is filled up at the end) do no harm: no token
before them sees them, and a later run with a smaller ``start`` writes over them. Sums have a fixed
order over features and over tokens from the first one, so that a sequence gives the same bits in
one run, token by token, alone and in a batch. The exp and the reciprocal of the sum may be read
from tables, see ``lutra.ops.functions``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from lutra.formatting import shape_text
from lutra.node import Array, Node, Value
from lutra.ops.functions import check_tables, function_cost, has_tables, table_bytes, table_roles
from lutra.ops.limits import MAX_HEADS, MAX_TOKENS
from lutra.ops.spec import (
    Attr,
    Cost,
    OpSpec,
    inner,
    integer,
    need_rank,
    need_size,
    node_error,
)


def need_starts(node: Node, x: Value, start: Value) -> None:
    """Raises GraphError unless ``start`` has one entry for each sequence of ``x``."""
    need_rank(node, start, 1, 1)
    if start.shape[0] != x.shape[0]:
        raise node_error(
            node,
            f"reads {x.name!r} of shape {shape_text(x.shape)} and starts {start.name!r} of shape "
            f"{shape_text(start.shape)}",
            "give it one start for each sequence",
        )


def _check(node: Node, tensors: Mapping[str, Array]) -> None:
    check_tables(node, tensors, "exp", "reciprocal")
    heads, groups = integer(node, "heads"), integer(node, "kv_heads")
    if heads % groups:
        raise node_error(
            node, f"has heads={heads} and kv_heads={groups}", "the second must divide the first"
        )


def _infer_attention(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    q, k, v, start = inputs
    heads, groups = integer(node, "heads"), integer(node, "kv_heads")
    for value in (q, k, v):
        need_rank(node, value, 3, 3)
        need_size(node, value, 2)
    width, rest = divmod(need_size(node, q, 2), heads)
    if rest or any(value.shape != (*q.shape[:2], groups * width) for value in (k, v)):
        raise node_error(
            node,
            f"reads queries {q.name!r} of shape {shape_text(q.shape)}, keys {k.name!r} of shape "
            f"{shape_text(k.shape)} and values {v.name!r} of shape {shape_text(v.shape)}",
            f"with heads={heads} and kv_heads={groups} they must be (N, T, {heads} d) and twice "
            f"(N, T, {groups} d)",
        )
    need_starts(node, q, start)
    length = integer(node, "length")
    if q.shape[1] is not None and q.shape[1] > length:
        raise node_error(
            node,
            f"is given {q.shape[1]} tokens by its input {q.name!r} of shape {shape_text(q.shape)}",
            f"its sequences have {length} at most: cut them",
        )
    return q.with_shape(node.output, q.shape)


def _cost_attention(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    tokens, width = inner(inputs[0])
    heads = integer(node, "heads")
    pairs = tokens * (tokens + 1) // 2  # of a query and a key that it sees
    macs, weights, rows = 2 * pairs * width, heads * pairs, heads * tokens
    cost = Cost(
        macs=macs,
        dense_macs=macs,
        float_adds=2 * weights,
        float_muls=weights + tokens * width,
    )
    if has_tables(tensors):
        return cost + Cost(pieces=weights + rows, table_bytes=table_bytes(tensors))
    return cost + function_cost(weights, "exp") + function_cost(rows, "reciprocal")


def _infer_pick(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    x, index = inputs
    need_rank(node, x, 3, 3)
    need_rank(node, index, 2, 2)
    if x.shape[0] != index.shape[0]:
        raise node_error(
            node,
            f"reads {x.name!r} of shape {shape_text(x.shape)} and the index {index.name!r} of "
            f"shape {shape_text(index.shape)}",
            "both must have the same number of sequences",
        )
    return x.with_shape(node.output, (x.shape[0], index.shape[1], x.shape[2]))


SPECS: Final = (
    OpSpec(
        "cached_attention",
        attrs={
            "heads": Attr(int, low=1, high=MAX_HEADS),
            "kv_heads": Attr(int, low=1, high=MAX_HEADS),
            "scale": Attr(float),
            "length": Attr(int, low=1, high=MAX_TOKENS),
        },
        tensors=table_roles("exp", "reciprocal"),
        check=_check,
        infer=_infer_attention,
        cost=_cost_attention,
        min_inputs=4,
        max_inputs=4,
        reads_planes=3,
        dtypes=("float32", "float32", "float32", "int32"),
        places=(3,),
        remembers=True,
        since=3,
    ),
    OpSpec(
        "pick_tokens",
        infer=_infer_pick,
        min_inputs=2,
        max_inputs=2,
        dtypes=("float32", "int32"),
        places=(1,),
        since=3,
    ),
)

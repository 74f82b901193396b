"""Norms over the last axis, and the length of vectors.

For each row ``x`` of ``D`` values::

    layer_norm:  y = (x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps) * weight + bias
    rms_norm:    y = x * rsqrt(mean(x^2) + eps) * weight
    l2_norm:     y = sqrt(sum(x^2)) over some axes

``rsqrt`` may be read from a table, see ``lutra.ops.functions``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from lutra.node import Array, Node, Value
from lutra.ops.functions import check_tables, function_cost, has_tables, table_bytes, table_roles
from lutra.ops.pool import REDUCED, infer_reduced
from lutra.ops.spec import (
    Attr,
    Cost,
    OpSpec,
    TensorRole,
    inner,
    need_rank,
    need_size,
    node_error,
    number,
)


def _check(node: Node, tensors: Mapping[str, Array]) -> None:
    if number(node, "eps") <= 0:
        raise node_error(node, f"has eps={node.attrs['eps']}", "it must be above 0")
    weight = tensors["weight"]
    if "bias" in tensors and tensors["bias"].shape != weight.shape:
        raise node_error(
            node,
            f"has a weight of shape {weight.shape} and a bias of shape {tensors['bias'].shape}",
            "make them the same",
        )
    check_tables(node, tensors, "rsqrt")


def _infer(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    need_rank(node, x, 2)
    features = tensors["weight"].shape[0]
    if need_size(node, x, -1) != features:
        raise node_error(
            node,
            f"has a weight of shape {tensors['weight'].shape} but its input {x.name!r} has the "
            f"shape {x.shape}",
            f"give it an input whose last axis has {features} values",
        )
    return x.with_shape(node.output, x.shape)


def _cost(node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]) -> Cost:
    *rows, _ = (1, *inner(output))
    values, count = math.prod(inner(output)), math.prod(rows)
    # mean, distances, squares, and what is multiplied and added in the end
    adds, muls = (4, 3) if node.op == "layer_norm" else (1, 3)
    cost = Cost(float_adds=adds * values, float_muls=muls * values)
    if has_tables(tensors):
        return cost + Cost(pieces=count, table_bytes=table_bytes(tensors))
    return cost + function_cost(count, "rsqrt")


def _cost_length(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    read = math.prod(inner(inputs[0]))
    return Cost(float_adds=read, float_muls=read) + function_cost(math.prod(inner(output)), "sqrt")


SPECS: Final = (
    OpSpec(
        "layer_norm",
        attrs={"eps": Attr(float)},
        tensors={
            "weight": TensorRole("float32", 1),
            "bias": TensorRole("float32", 1),
            **table_roles("rsqrt"),
        },
        check=_check,
        infer=_infer,
        cost=_cost,
        since=2,
    ),
    OpSpec(
        "rms_norm",
        attrs={"eps": Attr(float)},
        tensors={"weight": TensorRole("float32", 1), **table_roles("rsqrt")},
        check=_check,
        infer=_infer,
        cost=_cost,
        since=2,
    ),
    OpSpec("l2_norm", attrs=REDUCED, infer=infer_reduced, cost=_cost_length, since=2),
)

"""Norms over groups of channels; a group of one channel makes an instance norm.

For the ``C / groups`` channels of a group of one sample, and whatever axes follow them::

    y = (x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps) * weight[c] + bias[c]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from lutra.node import Array, Node, Value
from lutra.ops.functions import function_cost
from lutra.ops.limits import MAX_GROUPS
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
    number,
)


def _check(node: Node, tensors: Mapping[str, Array]) -> None:
    if number(node, "eps") <= 0:
        raise node_error(node, f"has eps={node.attrs['eps']}", "it must be above 0")
    weight, bias = tensors["weight"].shape, tensors["bias"].shape
    if weight != bias:
        raise node_error(
            node, f"has a weight of shape {weight} and a bias of shape {bias}", "make them the same"
        )
    if weight[0] % integer(node, "groups"):
        raise node_error(
            node,
            f"has groups={node.attrs['groups']} for {weight[0]} channels",
            "the groups must divide the channels",
        )


def _infer(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    need_rank(node, x, 2)
    channels = tensors["weight"].shape[0]
    if need_size(node, x, 1) != channels:
        raise node_error(
            node,
            f"has a weight of shape {tensors['weight'].shape} but its input {x.name!r} has the "
            f"shape {x.shape}",
            f"give it an input of {channels} channels on axis 1",
        )
    return x.with_shape(node.output, x.shape)


def _cost(node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]) -> Cost:
    values = math.prod(inner(output))
    # mean, distances, squares, and what is multiplied and added in the end
    cost = Cost(float_adds=4 * values, float_muls=2 * values)
    return cost + function_cost(integer(node, "groups"), "rsqrt")


SPECS: Final = (
    OpSpec(
        "group_norm",
        attrs={"groups": Attr(int, low=1, high=MAX_GROUPS), "eps": Attr(float)},
        tensors={"weight": TensorRole("float32", 1), "bias": TensorRole("float32", 1)},
        check=_check,
        infer=_infer,
        cost=_cost,
        since=3,
    ),
)

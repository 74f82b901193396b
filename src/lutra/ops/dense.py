"""Dense operators: what stays multiplied, in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from lutra.node import Array, Node, Value
from lutra.ops.limits import MAX_EXTENT, MAX_GROUPS
from lutra.ops.spec import (
    Attr,
    Cost,
    OpSpec,
    TensorRole,
    image_sizes,
    inner,
    integer,
    need_rank,
    need_size,
    node_error,
    window_sizes,
)

#: The attributes of a convolution whose kernel is the shape of its weight.
CONVOLUTION: Final = {
    "stride": Attr(tuple, default=(1, 1), low=1, high=MAX_EXTENT, length=2),
    "padding": Attr(tuple, default=(0, 0), low=0, high=MAX_EXTENT, length=2),
    "dilation": Attr(tuple, default=(1, 1), low=1, high=MAX_EXTENT, length=2),
    "groups": Attr(int, default=1, low=1, high=MAX_GROUPS),
}


def _check_bias(node: Node, tensors: Mapping[str, Array]) -> None:
    outputs = tensors["weight"].shape[0]
    if tensors["bias"].shape != (outputs,):
        raise node_error(
            node,
            f"has a bias of shape {tensors['bias'].shape}",
            f"the weight of shape {tensors['weight'].shape} needs ({outputs},)",
        )


def check_conv(node: Node, tensors: Mapping[str, Array]) -> None:
    """Raises GraphError where bias, kernel or groups do not fit the weight (M, C / G, kh, kw)."""
    _check_bias(node, tensors)
    shape = tensors["weight"].shape
    if max(shape[2:]) > MAX_EXTENT:
        raise node_error(
            node, f"has a weight of shape {shape}", f"a kernel may span {MAX_EXTENT} at most"
        )
    if shape[0] % integer(node, "groups"):
        raise node_error(
            node,
            f"has {shape[0]} outputs in groups={node.attrs['groups']}",
            "the groups must divide the outputs",
        )


def infer_conv(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    """The output of a convolution with a weight (M, C / G, kh, kw)."""
    (x,) = inputs
    outputs, depth, *kernel = tensors["weight"].shape
    channels, _, _ = image_sizes(node, x)
    if channels != depth * integer(node, "groups"):
        raise node_error(
            node,
            f"has a weight of shape {tensors['weight'].shape} and groups={node.attrs['groups']} "
            f"but its input {x.name!r} has the shape {x.shape}",
            f"give it an input of {depth * integer(node, 'groups')} channels",
        )
    sizes = window_sizes(node, x, kernel)
    return x.with_shape(node.output, (x.shape[0], outputs, *sizes))


def infer_linear(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    """The output of a product with a weight (M, D)."""
    (x,) = inputs
    need_rank(node, x, 2)
    outputs, features = tensors["weight"].shape
    if need_size(node, x, -1) != features:
        raise node_error(
            node,
            f"has a weight of shape {tensors['weight'].shape} but its input {x.name!r} has the "
            f"shape {x.shape}",
            f"give it an input whose last axis has {features} values",
        )
    return x.with_shape(node.output, (*x.shape[:-1], outputs))


def _cost(node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]) -> Cost:
    macs = math.prod(inner(output)) * math.prod(tensors["weight"].shape[1:])
    return Cost(macs=macs, dense_macs=macs)


SPECS: Final = (
    OpSpec(
        "conv2d",
        attrs=CONVOLUTION,
        tensors={"weight": TensorRole("float32", 4), "bias": TensorRole("float32", 1)},
        check=check_conv,
        infer=infer_conv,
        cost=_cost,
        takes_pad="padding",
        output_axis=1,
        fuses=True,
        gain_role="weight",
        bias_role="bias",
    ),
    OpSpec(
        "linear",
        tensors={"weight": TensorRole("float32", 2), "bias": TensorRole("float32", 1)},
        check=_check_bias,
        infer=infer_linear,
        cost=_cost,
        output_axis=-1,
        fuses=True,
        gain_role="weight",
        bias_role="bias",
    ),
)

"""Transposed convolutions in float32.

With the kernel ``weight`` (M, C / groups, kh, kw), which has the outputs in front as that of every
convolution, and along each of the two axes::

    y[o] = bias + the sum of x[i] * weight[k] over all i, k with o = i stride - padding + k dilation
    size = (n - 1) stride - 2 padding + dilation (kernel - 1) + 1 + output_padding
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from lutra.node import Array, Node, Value
from lutra.ops.dense import CONVOLUTION, check_conv
from lutra.ops.limits import MAX_EXTENT, MAX_FACTOR
from lutra.ops.spec import Attr, Cost, OpSpec, TensorRole, image_sizes, integer, node_error, pair


def transposed_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, output_padding: int
) -> int:
    """How long an axis becomes."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 + output_padding


def transposed_sizes(
    node: Node, sizes: Sequence[int | None], kernel: Sequence[int]
) -> tuple[int | None, ...]:
    """Height and width of the result for those of the input; None where a size is None."""
    return tuple(
        None if size is None else transposed_size(size, *axis)
        for size, *axis in zip(
            sizes,
            kernel,
            pair(node, "stride"),
            pair(node, "padding"),
            pair(node, "dilation"),
            pair(node, "output_padding"),
            strict=True,
        )
    )


def _check(node: Node, tensors: Mapping[str, Array]) -> None:
    check_conv(node, tensors)
    for axis in range(2):
        extra, stride = pair(node, "output_padding")[axis], pair(node, "stride")[axis]
        dilation = pair(node, "dilation")[axis]
        if extra >= max(stride, dilation):
            raise node_error(
                node,
                f"has output_padding={extra} for stride={stride} and dilation={dilation} on axis "
                f"{axis + 2}",
                "it must be below one of the two",
            )


def _infer(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    outputs, depth, *kernel = tensors["weight"].shape
    channels, *plane = image_sizes(node, x)
    if channels != depth * integer(node, "groups"):
        raise node_error(
            node,
            f"has a weight of shape {tensors['weight'].shape} and groups={node.attrs['groups']} "
            f"but its input {x.name!r} has the shape {x.shape}",
            f"give it an input of {depth * integer(node, 'groups')} channels",
        )
    sizes = transposed_sizes(node, plane, kernel)
    if any(isinstance(size, int) and size < 1 for size in sizes):
        raise node_error(
            node,
            f"has padding={node.attrs['padding']}, which leaves nothing of its input {x.name!r} of "
            f"shape {x.shape}",
            "use a larger input or less padding",
        )
    return x.with_shape(node.output, (x.shape[0], outputs, *sizes))


def _cost(node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]) -> Cost:
    _, height, width = (size or 0 for size in inputs[0].shape[1:])
    macs = height * width * math.prod(tensors["weight"].shape)
    return Cost(macs=macs, dense_macs=macs)


SPECS: Final = (
    OpSpec(
        "conv_transpose2d",
        attrs={
            **CONVOLUTION,
            # a part of the kernel is packed for each of the stride^2 places of an output
            "stride": Attr(tuple, default=(1, 1), low=1, high=MAX_FACTOR, length=2),
            "output_padding": Attr(tuple, default=(0, 0), low=0, high=MAX_EXTENT, length=2),
        },
        tensors={"weight": TensorRole("float32", 4), "bias": TensorRole("float32", 1)},
        check=_check,
        infer=_infer,
        cost=_cost,
        output_axis=1,
        fuses=True,
        gain_role="weight",
        bias_role="bias",
        since=3,
    ),
)

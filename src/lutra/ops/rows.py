"""What the families share whose tensors do not tell the shape of a row: attributes and shapes.

A row is what one output vector is computed from: the patch under an output pixel of a convolution,
in the order (channel, kernel row, kernel column), or the last axis of a linear layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lutra.node import Array, AttrValue, Node, Value
from lutra.ops.limits import MAX_EXTENT
from lutra.ops.spec import (
    Attr,
    image_sizes,
    integer,
    need_rank,
    need_size,
    node_error,
    pair,
    window_sizes,
)


def conv_attrs(most: int) -> dict[str, Attr]:
    """The attributes of a convolution without groups, of at most so many channels."""
    return {
        "in_channels": Attr(int, low=1, high=most),
        "kernel": Attr(tuple, low=1, high=MAX_EXTENT, length=2),
        "stride": Attr(tuple, default=(1, 1), low=1, high=MAX_EXTENT, length=2),
        "padding": Attr(tuple, default=(0, 0), low=0, high=MAX_EXTENT, length=2),
        "dilation": Attr(tuple, default=(1, 1), low=1, high=MAX_EXTENT, length=2),
    }


def linear_attrs(most: int) -> dict[str, Attr]:
    """The attributes of a linear layer of at most so many features."""
    return {"in_features": Attr(int, low=1, high=most)}


def row_length(node: Node) -> int:
    """``D``, the number of activations in one row."""
    if "in_features" in node.attrs:
        return integer(node, "in_features")
    kernel_rows, kernel_columns = pair(node, "kernel")
    return integer(node, "in_channels") * kernel_rows * kernel_columns


def infer_conv(node: Node, inputs: Sequence[Value], outputs: int) -> Value:
    """The output of a convolution (N, C, H, W) -> (N, outputs, Ho, Wo).

    Raises:
        GraphError: If the input has other channels, or is smaller than the kernel.
    """
    (x,) = inputs
    channels, _, _ = image_sizes(node, x)
    if channels != integer(node, "in_channels"):
        raise node_error(
            node,
            f"has in_channels={node.attrs['in_channels']} but its input {x.name!r} has the shape "
            f"{x.shape}",
            f"give it an input of {node.attrs['in_channels']} channels",
        )
    sizes = window_sizes(node, x, pair(node, "kernel"))
    return x.with_shape(node.output, (x.shape[0], outputs, *sizes))


def infer_linear(node: Node, inputs: Sequence[Value], outputs: int) -> Value:
    """The output of a linear layer (..., D) -> (..., outputs).

    Raises:
        GraphError: If the last axis of the input is not the row.
    """
    (x,) = inputs
    need_rank(node, x, 2)
    if need_size(node, x, -1) != integer(node, "in_features"):
        raise node_error(
            node,
            f"has in_features={node.attrs['in_features']} but its input {x.name!r} has the shape "
            f"{x.shape}",
            f"give it an input whose last axis has {node.attrs['in_features']} values",
        )
    return x.with_shape(node.output, (*x.shape[:-1], outputs))


def example_rows(inputs: int, kernel: tuple[int, int] | None) -> dict[str, AttrValue]:
    """Attributes of a layer for tests: of a padded convolution, or of a linear layer."""
    if kernel is None:
        return {"in_features": inputs}
    padding = (kernel[0] // 2, kernel[1] // 2)
    return {"in_channels": inputs, "kernel": kernel, "padding": padding}


def example_ends(rng: np.random.Generator, outputs: int) -> dict[str, Array]:
    """Scale and bias of a layer for tests."""
    return {
        "scale": rng.uniform(0.001, 0.01, outputs).astype(np.float32),
        "bias": rng.standard_normal(outputs, np.float32),
    }

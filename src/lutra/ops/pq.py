"""Product quantisation: find the nearest centroid of each sub-vector, look up, add.

A row of ``D`` activations is cut into ``B`` sub-vectors of ``V`` values (the last one filled up
with zeros). Each has a codebook of ``K`` centroids; the index of the nearest is its code, and the
code picks a row of ``M`` table entries. The rows of all codebooks are added.

With ``qmax = 2**act_bits - 1``, all of it exact::

    x_q    = clamp(round_half_even(x / float32(act_scale)) + act_zero, 0, qmax)      NaN gives 0
    code_b = argmax_k (x_q . c_k - ((c_k . c_k) >> 1))              int32, the lowest k on ties
    y[m]   = float32(sum_b tables[b, code_b, m]) * scale[m] + bias[m]              two roundings

A convolution pads ``x_q`` with ``act_zero`` and takes its rows in the order (channel, kernel row,
kernel column).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from lutra.ops.factors import expand
from lutra.ops.registry import (
    MAX_EXTENT,
    Array,
    Attr,
    Cost,
    OpSpec,
    TensorRole,
    inner,
    integer,
    need_rank,
    node_error,
    number,
    pair,
    window_size,
)

if TYPE_CHECKING:
    from lutra.graph import Node, Value

CENTROID_COUNTS: Final = (8, 16, 32, 64)
MAX_SUBVECTOR: Final = 64
MAX_ACT_BITS: Final = 7
#: A sum of so many int8 table entries is exact in int32 and in float32.
MAX_BOOKS: Final = 2**24 // 128
_MAX_FEATURES: Final = MAX_BOOKS * MAX_SUBVECTOR

_QUANTISER: Final = {
    "act_scale": Attr(float),
    "act_zero": Attr(int, low=0, high=2**MAX_ACT_BITS - 1),
    "act_bits": Attr(int, low=1, high=MAX_ACT_BITS),
    "encoder": Attr(str, default="nearest", choices=("nearest",)),
}
_TENSORS: Final = {
    "centroids": TensorRole("uint8", 3),
    "tables": TensorRole("int8", 3),
    "scale": TensorRole("float32", 1),
    "bias": TensorRole("float32", 1),
}


def row_length(node: Node) -> int:
    """``D``, the number of activations in one row."""
    if node.op == "pq_linear":
        return integer(node, "in_features")
    kernel_rows, kernel_columns = pair(node, "kernel")
    return integer(node, "in_channels") * kernel_rows * kernel_columns


def _expand(node: Node, tensors: Mapping[str, Array]) -> dict[str, Array]:
    return expand(node, tensors, row_length(node))


def _check(node: Node, tensors: Mapping[str, Array]) -> None:
    scale = number(node, "act_scale")
    tiny, huge = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
    if not tiny <= scale <= huge:
        raise node_error(node, f"has act_scale={scale!r}", f"it must be in {tiny!r}..{huge!r}")
    qmax = 2 ** integer(node, "act_bits") - 1
    if integer(node, "act_zero") > qmax:
        raise node_error(
            node,
            f"has act_zero={node.attrs['act_zero']} with act_bits={node.attrs['act_bits']}",
            f"it must be in 0..{qmax}",
        )
    centroids, tables = tensors["centroids"], tensors["tables"]
    books, count, width = centroids.shape
    if count not in CENTROID_COUNTS or width > MAX_SUBVECTOR:
        raise node_error(
            node,
            f"has codebooks of {count} centroids of {width} values",
            f"use 8, 16, 32 or 64 centroids of 1 to {MAX_SUBVECTOR} values",
        )
    length = row_length(node)
    if books != -(-length // width) or books > MAX_BOOKS:
        raise node_error(
            node,
            f"has {books} codebooks for rows of {length} in sub-vectors of {width}",
            f"it needs {-(-length // width)}, and at most {MAX_BOOKS}",
        )
    if tables.shape[:2] != (books, count):
        raise node_error(
            node,
            f"has tables of shape {tables.shape}",
            f"the centroids of shape {centroids.shape} need ({books}, {count}, outputs)",
        )
    for role in ("scale", "bias"):
        if tensors[role].shape != (tables.shape[2],):
            raise node_error(
                node,
                f"has {role} of shape {tensors[role].shape}",
                f"the tables of shape {tables.shape} need ({tables.shape[2]},)",
            )
    top = int(centroids.max())
    if top > qmax:
        raise node_error(
            node,
            f"has a centroid value of {top} with act_bits={node.attrs['act_bits']}",
            f"centroids must be in 0..{qmax}",
        )
    used = length - (books - 1) * width  # values of the last sub-vector that exist
    if centroids[-1, :, used:].any():
        raise node_error(
            node,
            f"has centroid values other than 0 beyond entry {length} of its rows",
            f"set the last {width - used} values of the last codebook to 0",
        )


def _infer_conv(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    need_rank(node, x, 4, 4)
    channels, height, width = inner(x)
    if channels != integer(node, "in_channels"):
        raise node_error(
            node,
            f"has in_channels={node.attrs['in_channels']} but its input {x.name!r} has the shape "
            f"{x.shape}",
            f"give it an input of {node.attrs['in_channels']} channels",
        )
    sizes = [
        window_size(node, *axis)
        for axis in zip(
            (height, width),
            pair(node, "kernel"),
            pair(node, "stride"),
            pair(node, "padding"),
            pair(node, "dilation"),
            strict=True,
        )
    ]
    return x.with_shape(node.output, (x.shape[0], tensors["tables"].shape[2], *sizes))


def _infer_linear(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    need_rank(node, x, 2)
    if x.shape[-1] != integer(node, "in_features"):
        raise node_error(
            node,
            f"has in_features={node.attrs['in_features']} but its input {x.name!r} has the shape "
            f"{x.shape}",
            f"give it an input whose last axis has {node.attrs['in_features']} values",
        )
    return x.with_shape(node.output, (*x.shape[:-1], tensors["tables"].shape[2]))


def _cost(node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]) -> Cost:
    books, count, width = tensors["centroids"].shape
    made = math.prod(inner(output))  # rows times outputs
    rows = made // tensors["tables"].shape[2]
    return Cost(
        lookups=made * books,
        encode_ops=rows * books * count * width,
        dense_macs=made * row_length(node),
        table_bytes=tensors["tables"].nbytes,
    )


SPECS: Final = (
    OpSpec(
        "pq_conv2d",
        attrs={
            "in_channels": Attr(int, low=1, high=_MAX_FEATURES),
            "kernel": Attr(tuple, low=1, high=MAX_EXTENT, length=2),
            "stride": Attr(tuple, default=(1, 1), low=1, high=MAX_EXTENT, length=2),
            "padding": Attr(tuple, default=(0, 0), low=0, high=MAX_EXTENT, length=2),
            "dilation": Attr(tuple, default=(1, 1), low=1, high=MAX_EXTENT, length=2),
            **_QUANTISER,
        },
        tensors=_TENSORS,
        check=_check,
        infer=_infer_conv,
        cost=_cost,
        expand=_expand,
    ),
    OpSpec(
        "pq_linear",
        attrs={"in_features": Attr(int, low=1, high=_MAX_FEATURES), **_QUANTISER},
        tensors=_TENSORS,
        check=_check,
        infer=_infer_linear,
        cost=_cost,
        expand=_expand,
    ),
)

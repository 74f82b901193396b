"""Product quantisation: find the code of each codebook, look up, add.

A row of ``D`` activations has one code in ``0..K-1`` for each of ``B`` codebooks. A code picks a
row of ``M`` table entries, and the rows of all codebooks are added. The ``encoder`` makes codes:

* ``nearest``: the row is cut into ``B`` sub-vectors of ``V`` values (the last one filled up with
  zeros), and the code is the index of the nearest of ``K`` centroids;
* ``tree``: a balanced binary decision tree of ``L = log2(K)`` levels, which looks at one entry of
  the row per level (``splits``) and has a threshold per node, in heap order: node 0 is the root,
  the children of ``i`` are ``2 * i + 1`` (entry below the threshold) and ``2 * i + 2``.

With ``qmax = 2**act_bits - 1``, all of it exact::

    x_q    = clamp(round_half_even(x / float32(act_scale)) + act_zero, 0, qmax)      NaN gives 0

    nearest:  code_b = argmax_k (x_q . c_k - ((c_k . c_k) >> 1))    int32, the lowest k on ties
    tree:     node = 0
              L times, l = 0..L-1:  node = 2 * node + 1 + (x_q[splits[b, l]] >= thresholds[b, node])
              code_b = node - (K - 1)

    y[m]   = float32(sum_b tables[b, code_b, m]) * scale[m] + bias[m]              two roundings

A convolution pads ``x_q`` with ``act_zero`` and takes its rows in the order (channel, kernel row,
kernel column).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from lutra.node import Array, Node, Value
from lutra.ops.compact_tables import expand
from lutra.ops.grid import GRID, check_grid
from lutra.ops.limits import CENTROID_COUNTS, MAX_CODEBOOKS, MAX_PQ_DEPTH, MAX_SUBVECTOR
from lutra.ops.rows import (
    conv_attrs,
    example_ends,
    example_rows,
    infer_conv,
    infer_linear,
    linear_attrs,
    row_length,
)
from lutra.ops.spec import Attr, Cost, Example, OpSpec, TensorRole, inner, node_error, text

#: What makes codes, and the tensors that each takes.
ENCODERS: Final = ("nearest", "tree")
_ENCODER_TENSORS: Final = {"nearest": ("centroids",), "tree": ("splits", "thresholds")}

_GRID: Final = {
    **GRID,
    "encoder": Attr(str, default="nearest", choices=ENCODERS),
}
_TENSORS: Final = {
    "centroids": TensorRole("uint8", 3, required=False),
    "splits": TensorRole("int32", 2, required=False),
    "thresholds": TensorRole("uint8", 2, required=False),
    "tables": TensorRole("int8", 3),
    "scale": TensorRole("float32", 1),
    "bias": TensorRole("float32", 1),
}


def _expand(node: Node, tensors: Mapping[str, Array]) -> dict[str, Array]:
    return expand(node, tensors, row_length(node))


def _check(node: Node, tensors: Mapping[str, Array]) -> None:
    qmax = check_grid(node)
    encoder = text(node, "encoder")
    for name, roles in _ENCODER_TENSORS.items():
        for role in roles:
            if name == encoder and role not in tensors:
                raise node_error(
                    node, f"lacks the tensor {role!r}", f"encoder {encoder!r} needs it"
                )
            if name != encoder and role in tensors:
                raise node_error(
                    node,
                    f"has the tensor {role!r} with encoder {encoder!r}",
                    f"remove it, or set the encoder to {name!r}",
                )
    tables = tensors["tables"]
    for role in ("scale", "bias"):
        if tensors[role].shape != (tables.shape[2],):
            raise node_error(
                node,
                f"has {role} of shape {tensors[role].shape}",
                f"the tables of shape {tables.shape} need ({tables.shape[2]},)",
            )
    check = _check_tree if encoder == "tree" else _check_centroids
    check(node, tensors, tables, qmax)


def _check_centroids(node: Node, tensors: Mapping[str, Array], tables: Array, qmax: int) -> None:
    centroids = tensors["centroids"]
    codebooks, count, width = centroids.shape
    if count not in CENTROID_COUNTS or width > MAX_SUBVECTOR:
        raise node_error(
            node,
            f"has codebooks of {count} centroids of {width} values",
            f"use 8, 16, 32 or 64 centroids of 1 to {MAX_SUBVECTOR} values",
        )
    length = row_length(node)
    if codebooks != -(-length // width) or codebooks > MAX_CODEBOOKS:
        raise node_error(
            node,
            f"has {codebooks} codebooks for rows of {length} in sub-vectors of {width}",
            f"it needs {-(-length // width)}, and at most {MAX_CODEBOOKS}",
        )
    if tables.shape[:2] != (codebooks, count):
        raise node_error(
            node,
            f"has tables of shape {tables.shape}",
            f"the centroids of shape {centroids.shape} need ({codebooks}, {count}, outputs)",
        )
    top = int(centroids.max())
    if top > qmax:
        raise node_error(
            node,
            f"has a centroid value of {top} with act_bits={node.attrs['act_bits']}",
            f"centroids must be in 0..{qmax}",
        )
    used = length - (codebooks - 1) * width  # values of the last sub-vector that exist
    if centroids[-1, :, used:].any():
        raise node_error(
            node,
            f"has centroid values other than 0 beyond entry {length} of its rows",
            f"set the last {width - used} values of the last codebook to 0",
        )


def _check_tree(node: Node, tensors: Mapping[str, Array], tables: Array, qmax: int) -> None:
    splits, thresholds = tensors["splits"], tensors["thresholds"]
    codebooks, count = tables.shape[:2]
    if count not in CENTROID_COUNTS or codebooks > MAX_CODEBOOKS:
        raise node_error(
            node,
            f"has {codebooks} codebooks of {count} table rows",
            f"use at most {MAX_CODEBOOKS} codebooks of 8, 16, 32 or 64",
        )
    for role, tensor, width in (
        ("splits", splits, count.bit_length() - 1),
        ("thresholds", thresholds, count - 1),
    ):
        if tensor.shape != (codebooks, width):
            raise node_error(
                node,
                f"has {role} of shape {tensor.shape}",
                f"the tables of shape {tables.shape} need ({codebooks}, {width})",
            )
    length = row_length(node)
    low, high = int(splits.min()), int(splits.max())
    if low < 0 or high >= length:
        raise node_error(
            node,
            f"has a split at entry {low if low < 0 else high} of rows of {length}",
            f"splits must be in 0..{length - 1}",
        )
    top = int(thresholds.max())
    if top > qmax + 1:
        raise node_error(
            node,
            f"has a threshold of {top} with act_bits={node.attrs['act_bits']}",
            f"thresholds must be in 0..{qmax + 1}",
        )


def _infer_conv(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    return infer_conv(node, inputs, tensors["tables"].shape[2])


def _infer_linear(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    return infer_linear(node, inputs, tensors["tables"].shape[2])


def _cost(node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]) -> Cost:
    codebooks, _, outputs = tensors["tables"].shape
    made = math.prod(inner(output))  # rows times outputs
    # of one code: products with every centroid, or one comparison per level
    tree = "splits" in tensors
    steps = math.prod(tensors["splits" if tree else "centroids"].shape[1:])
    encode_ops = made // outputs * codebooks * steps
    return Cost(
        lookups=made * codebooks,
        encode_ops=encode_ops,
        comparisons=encode_ops if tree else 0,
        quantised=math.prod(inner(inputs[0])),
        scaled=made,
        dense_macs=made * row_length(node),
        table_bytes=tensors["tables"].nbytes,
    )


def _examples(
    rng: np.random.Generator, inputs: int, *, kernel: tuple[int, int] | None = None
) -> list[Example]:
    """A layer with the nearest centroid, and one with trees."""
    attrs = {
        **example_rows(inputs, kernel), "act_scale": 0.05, "act_zero": 64, "act_bits": 7
    }  # fmt: skip
    if kernel is not None:
        attrs["stride"] = (2, 2)
    length, k, outputs = inputs * math.prod(kernel or (1,)), 16, 11
    v = math.prod(kernel) if kernel else 4
    codebooks = -(-length // v)
    centroids = rng.integers(0, 128, (codebooks, k, v), dtype=np.uint8)
    centroids[-1, :, length - (codebooks - 1) * v :] = 0
    trees: dict[str, Array] = {
        "splits": rng.integers(0, length, (codebooks, 4), dtype=np.int32),
        "thresholds": rng.integers(0, 129, (codebooks, k - 1), dtype=np.uint8),
    }
    tables = rng.integers(-128, 128, (codebooks, k, outputs)).astype(np.int8)
    ends = {"tables": tables, **example_ends(rng, outputs)}
    return [
        ({**attrs, "encoder": "nearest"}, {"centroids": centroids, **ends}),
        ({**attrs, "encoder": "tree"}, {**trees, **ends}),
    ]


#: The rules of both operators beside those of the rows.
_LAYER: Final[dict[str, Any]] = {
    "fuses": True,
    "is_table_layer": True,
    "encoder_roles": ("centroids", "splits", "thresholds"),
    "output_roles": ("tables", "scale", "bias"),
    "table_role": "tables",
    "gain_role": "scale",
    "bias_role": "bias",
}

SPECS: Final = (
    OpSpec(
        "pq_conv2d",
        attrs={**conv_attrs(MAX_PQ_DEPTH), **_GRID},
        tensors=_TENSORS,
        check=_check,
        infer=_infer_conv,
        cost=_cost,
        expand=_expand,
        takes_pad="padding",
        output_axis=1,
        examples=partial(_examples, kernel=(3, 3)),
        **_LAYER,
    ),
    OpSpec(
        "pq_linear",
        attrs={**linear_attrs(MAX_PQ_DEPTH), **_GRID},
        tensors=_TENSORS,
        check=_check,
        infer=_infer_linear,
        cost=_cost,
        expand=_expand,
        output_axis=-1,
        examples=_examples,
        **_LAYER,
    ),
)

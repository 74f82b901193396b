"""Product quantisation: find the code of each codebook, look up, add.

A row of ``D`` activations has one code in ``0..K-1`` for each of ``B`` codebooks. A code picks a
row of ``M`` table entries, and the rows of all codebooks are added. The ``encoder`` makes codes:

* ``nearest``: the row is cut into ``B`` sub-vectors of ``V`` values (the last one filled up with
  zeros), and the code is the index of the nearest of ``K`` centroids by the ``distance``;
* ``tree``: a balanced binary decision tree of ``L = log2(K)`` levels, which looks at one entry of
  the row per level (``splits``) and has a threshold per node, in heap order: node 0 is the root,
  the children of ``i`` are ``2 * i + 1`` (entry below the threshold) and ``2 * i + 2``.

With ``qmax = 2**act_bits - 1``, all of it exact::

    x_q    = clamp(round_half_even(x / float32(act_scale)) + act_zero, 0, qmax)      NaN gives 0

    nearest:  the lowest k on ties, in int32
      l2:         code_b = argmax_k (x_q . c_k - ((c_k . c_k) >> 1))
      l1:         code_b = argmin_k sum_v |x_q[v] - c_k[v]|
      chebyshev:  code_b = argmin_k max_v |x_q[v] - c_k[v]|
    tree:     node = 0
              L times, l = 0..L-1:  node = 2 * node + 1 + (x_q[splits[b, l]] >= thresholds[b, node])
              code_b = node - (K - 1)

    y[m]   = float32(sum_b tables[b, code_b, m]) * scale[m] + bias[m]              two roundings

A convolution pads ``x_q`` with ``act_zero`` and takes its rows in the order (channel, kernel row,
kernel column). Its ``group`` says what the sub-vectors are cut from. All its parts are encoded with
the same ``G`` codebooks, so that the codes of a part, which belongs to an input pixel, serve every
patch that it is in:

* ``patch``: the whole row is the one part;
* ``row``: a part is a row of the kernel, in the order (channel, kernel column), one of ``kh``;
* ``pixel``: a part is a pixel, the channels in order, one of ``kh * kw``.

With ``T`` parts there are ``B = G * T`` tables; table ``g * T + t`` is read by codebook ``g`` at
part ``t``. Nearest, ``G`` is the number of sub-vectors of a part.
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
from lutra.ops.spec import (
    Attr,
    Cost,
    Example,
    OpSpec,
    TensorRole,
    inner,
    integer,
    node_error,
    pair,
    text,
    window_sizes,
)

#: What makes codes, and the tensors that each takes.
ENCODERS: Final = ("nearest", "tree")
_ENCODER_TENSORS: Final = {"nearest": ("centroids",), "tree": ("splits", "thresholds")}

#: What the sub-vectors of a convolution are cut from.
GROUPS: Final = ("patch", "row", "pixel")

#: How far a sub-vector is from a centroid.
DISTANCES: Final = ("l2", "l1", "chebyshev")

_GRID: Final = {
    **GRID,
    "encoder": Attr(str, default="nearest", choices=ENCODERS),
    "distance": Attr(str, default="l2", choices=DISTANCES, since=3),
}
_GROUP: Final = {"group": Attr(str, default="patch", choices=GROUPS, since=3)}
_TENSORS: Final = {
    "centroids": TensorRole("uint8", 3, required=False),
    "splits": TensorRole("int32", 2, required=False),
    "thresholds": TensorRole("uint8", 2, required=False),
    "tables": TensorRole("int8", 3),
    "scale": TensorRole("float32", 1),
    "bias": TensorRole("float32", 1),
}


def part_count(node: Node) -> int:
    """``T``, the parts of a row that are encoded with the same codebooks."""
    group = node.attrs.get("group", "patch")
    if group == "patch":
        return 1
    rows, columns = pair(node, "kernel")
    return rows if group == "row" else rows * columns


def part_length(node: Node) -> int:
    """The number of activations in one part of a row."""
    return row_length(node) // part_count(node)


def cut_rows(node: Node, rows: Array) -> Array:
    """Rows (n, D) of a layer as their parts (n, T, D / T)."""
    parts = part_count(node)
    if parts == 1:
        return rows[:, None]
    channels = integer(node, "in_channels")
    return rows.reshape(len(rows), channels, parts, -1).swapaxes(1, 2).reshape(len(rows), parts, -1)


def _expand(node: Node, tensors: Mapping[str, Array]) -> dict[str, Array]:
    return expand(node, tensors, row_length(node), partial(cut_rows, node))


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
    if encoder != "nearest" and text(node, "distance") != "l2":
        raise node_error(
            node,
            f"has distance={node.attrs['distance']!r} with encoder {encoder!r}",
            "it measures none; set it to 'l2'",
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
    length, parts = part_length(node), part_count(node)
    if codebooks != -(-length // width) or codebooks * parts > MAX_CODEBOOKS:
        raise node_error(
            node,
            f"has {codebooks} codebooks for rows of {length} in sub-vectors of {width}",
            f"it needs {-(-length // width)}, and at most {MAX_CODEBOOKS // parts}",
        )
    if tables.shape[:2] != (codebooks * parts, count):
        raise node_error(
            node,
            f"has tables of shape {tables.shape}",
            f"the centroids of shape {centroids.shape} need ({codebooks * parts}, {count}, "
            "outputs)",
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
    (made, count), parts = tables.shape[:2], part_count(node)
    if count not in CENTROID_COUNTS or made > MAX_CODEBOOKS:
        raise node_error(
            node,
            f"has {made} tables of {count} rows",
            f"use at most {MAX_CODEBOOKS} tables of 8, 16, 32 or 64",
        )
    codebooks = made // parts
    if made % parts:
        raise node_error(
            node,
            f"has {made} tables for the {parts} parts of a row that group="
            f"{node.attrs['group']!r} encodes alike",
            f"give it a multiple of {parts}",
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
    length = part_length(node)
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
    tables, _, outputs = tensors["tables"].shape
    made = math.prod(inner(output))  # rows times outputs
    # of one code: products with every centroid, or a difference and its sum or maximum, or one
    # comparison per level
    tree = "splits" in tensors
    products = not tree and node.attrs.get("distance", "l2") == "l2"
    codebooks, *steps = tensors["splits" if tree else "centroids"].shape
    coded = made // outputs  # parts that get codes
    if codebooks != tables:
        height, width = inputs[0].shape[2:]
        assert height is not None
        assert width is not None
        columns = window_sizes(node, inputs[0], pair(node, "kernel"))[1]
        coded = height * (width if node.attrs["group"] == "pixel" else columns or width)
    encode_ops = coded * codebooks * math.prod(steps) * (1 if tree or products else 2)
    return Cost(
        lookups=made * tables,
        encode_ops=encode_ops,
        comparisons=0 if products else encode_ops,
        quantised=math.prod(inner(inputs[0])),
        scaled=made,
        dense_macs=made * row_length(node),
        table_bytes=tensors["tables"].nbytes,
    )


def _examples(
    rng: np.random.Generator, inputs: int, *, kernel: tuple[int, int] | None = None
) -> list[Example]:
    """Layers with the nearest centroid by each distance and with trees, a convolution in each
    group."""
    attrs = {
        **example_rows(inputs, kernel), "act_scale": 0.05, "act_zero": 64, "act_bits": 7
    }  # fmt: skip
    k, outputs, found = 16, 11, []
    if kernel is not None:
        attrs["stride"] = (2, 2)
    of_group = {"patch": 4}
    if kernel is not None:
        of_group = {"patch": math.prod(kernel), "row": kernel[1], "pixel": 3}
    for group, v in of_group.items():
        rows, columns = kernel or (1, 1)
        parts = {"patch": 1, "row": rows, "pixel": rows * columns}[group]
        length = inputs * rows * columns // parts
        codebooks = -(-length // v)
        centroids = rng.integers(0, 128, (codebooks, k, v), dtype=np.uint8)
        centroids[-1, :, length - (codebooks - 1) * v :] = 0
        trees: dict[str, Array] = {
            "splits": rng.integers(0, length, (codebooks, 4), dtype=np.int32),
            "thresholds": rng.integers(0, 129, (codebooks, k - 1), dtype=np.uint8),
        }
        tables = rng.integers(-128, 128, (codebooks * parts, k, outputs)).astype(np.int8)
        ends = {"tables": tables, **example_ends(rng, outputs)}
        given = attrs if kernel is None else {**attrs, "group": group}
        found += [
            *(
                ({**given, "encoder": "nearest", "distance": d}, {"centroids": centroids, **ends})
                for d in DISTANCES
            ),
            ({**given, "encoder": "tree"}, {**trees, **ends}),
        ]
    return found


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
        attrs={**conv_attrs(MAX_PQ_DEPTH), **_GRID, **_GROUP},
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

"""Layers as an accelerator sees them: sub-vectors, codebooks, tables; and what must come out.

Codes and sums are those of ``lutra.reference.pq``, which the engine computes too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lutra.graph import Graph
from lutra.hardware.design import Design, HardwareError
from lutra.node import Array, Node
from lutra.ops.pq import cut_rows, part_count
from lutra.ops.spec import integer, number, pair, text
from lutra.reference import run_node
from lutra.reference.lowbit import quantise_rows
from lutra.reference.pq import encode, encode_tree, lookup, quantise
from lutra.reference.windows import patches, windows

__all__ = ["TableLayer", "graph_layer", "layer_rows", "node_layer", "random_layer"]


@dataclass(frozen=True, eq=False)
class TableLayer:
    """Rows of one layer with the layer's codebooks and tables.

    Attributes:
        name: Of the node, or what it stands for.
        encoder: "l2", "l1", "chebyshev" or "tree".
        subvectors: uint8 (R, B, V): what each code is made of. Of a tree, value ``l`` is the entry
            of the row that level ``l`` looks at.
        codebooks: Centroids, uint8 (B, K, V), or thresholds in heap order, uint8 (B, K - 1).
        tables: int8 (B, K, M)
        act_bits: Bits of an activation.
    """

    name: str
    encoder: str
    subvectors: Array
    codebooks: Array
    tables: Array
    act_bits: int = 7

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.subvectors)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tables, codes of each, outputs."""
        b, k, m = self.tables.shape
        return b, k, m

    @property
    def v(self) -> int:
        """Values of a sub-vector."""
        width: int = self.subvectors.shape[2]
        return width

    @property
    def sum_bits(self) -> int:
        """Bits that hold every sum."""
        return (
            1 + int(np.abs(self.tables.astype(np.int64)).max(axis=1).sum(axis=0).max()).bit_length()
        )

    @cached_property
    def codes(self) -> Array:
        """int64 (R, B)"""
        count, tables, width = self.subvectors.shape
        rows = self.subvectors.reshape(count, -1)
        if self.encoder != "tree":
            return encode(rows, self.codebooks, self.encoder)
        return encode_tree(rows, np.arange(tables * width).reshape(tables, width), self.codebooks)

    @cached_property
    def sums(self) -> Array:
        """int32 (R, M)"""
        return lookup(self.codes, self.tables)

    def first(self, rows: int) -> TableLayer:
        """The layer with its first rows only."""
        return replace(self, subvectors=self.subvectors[:rows])

    def design(self, **parameters: int | bool) -> Design:
        """A design that this layer fits, with other parameters as given.

        Raises:
            HardwareError: If a parameter is out of its range.
        """
        b, k, m = self.shape
        given = {"tile": min(m, 16), "rows": min(max(1, self.rows), 256), **parameters}
        tiles = -(-m // int(given["tile"]))
        given.setdefault("codes", 0 if tiles == 1 else int(given["rows"]) * b)
        return Design.from_dict(
            {
                "encoder": self.encoder, "k": k, "v": self.v, "act_bits": self.act_bits,
                "sum_bits": max(self.sum_bits, 8), **given,
            }
        )  # fmt: skip

    def check(self, design: Design) -> None:
        """Checks that a design can run this layer.

        Raises:
            HardwareError: If it cannot, with what does not fit.
        """
        b, k, m = self.shape
        tiles = -(-m // design.tile)
        rows = min(self.rows, design.rows)
        for what, has, takes, fits in (
            ("encoder", self.encoder, design.encoder, self.encoder == design.encoder),
            ("codes of a codebook", k, design.k, k == design.k),
            ("values of a sub-vector", self.v, design.width, self.v == design.width),
            ("bits of an activation", self.act_bits, design.act_bits,
             self.act_bits <= design.act_bits),
            ("bits of a sum", self.sum_bits, design.sum_bits, self.sum_bits <= design.sum_bits),
            ("codes to keep", rows * b, design.codes, tiles == 1 or rows * b <= design.codes),
            ("codebooks", b, 2**16 - 1, b < 2**16),
        ):  # fmt: skip
            if not fits:
                raise HardwareError(
                    f"the layer {self.name!r} has {what}: {has}, and the design {takes}; give the "
                    "design what the layer has"
                )
        low = -(2 ** (design.table_bits - 1))
        if int(self.tables.min()) < low or int(self.tables.max()) >= -low:
            raise HardwareError(
                f"the layer {self.name!r} has table entries beyond {design.table_bits} bits; use "
                "table_bits=8"
            )


def random_layer(
    rng: np.random.Generator,
    encoder: str,
    rows: int,
    codebooks: int,
    k: int,
    v: int,
    outputs: int,
    *,
    act_bits: int = 7,
    tail: int = 0,
) -> TableLayer:
    """A layer of random numbers, with many ties.

    Args:
        rng: Where the numbers come from.
        encoder: "l2", "l1", "chebyshev" or "tree".
        rows: Rows.
        codebooks: Codebooks.
        k: Codes of each.
        v: Values of a sub-vector; of a tree it is ``log2(k)``.
        outputs: Outputs.
        act_bits: Bits of an activation.
        tail: Values of the last sub-vector that do not exist: zeros.
    """
    top = 2**act_bits - 1
    width = k.bit_length() - 1 if encoder == "tree" else v
    # Half of the layers have few different values, so that distances are often equal.
    high = top if rng.integers(2) else min(top, 3)
    x = rng.integers(0, high + 1, (rows, codebooks, width), dtype=np.uint8)
    if encoder == "tree":
        books = rng.integers(0, high + 2, (codebooks, k - 1), dtype=np.uint8)
    else:
        books = rng.integers(0, high + 1, (codebooks, k, width), dtype=np.uint8)
        if tail:
            x[:, -1, width - tail :] = 0
            books[-1, :, width - tail :] = 0
    tables = rng.integers(-128, 128, (codebooks, k, outputs)).astype(np.int8)
    return TableLayer("random", encoder, x, books, tables, act_bits)


def layer_rows(node: Node, x: Array, limit: int | None = None) -> Array:
    """The quantised rows of a layer.

    Args:
        node: A node whose operator has an activation grid, or ``lowbit_linear``.
        x: Its input, float32.
        limit: Rows to make; all of them where it is None.

    Returns:
        uint8 (R, D), of low-bit layers int8.
    """
    if node.op == "lowbit_linear":
        return quantise_rows(x.reshape(-1, x.shape[-1])[:limit])[0]
    scale, zero = number(node, "act_scale"), integer(node, "act_zero")
    x_q = quantise(x, scale, zero, integer(node, "act_bits"))
    if node.op.endswith("linear"):
        return x_q.reshape(-1, x.shape[-1])[:limit]
    rows, columns = pair(node, "padding")
    x_q = np.pad(x_q, ((0, 0), (0, 0), (rows, rows), (columns, columns)), constant_values=zero)
    view = windows(x_q, pair(node, "kernel"), pair(node, "stride"), pair(node, "dilation"))
    made: list[Array] = []
    for _, _, block in patches(view):
        made.append(block if limit is None else block[: limit - sum(map(len, made))])
        if limit is not None and sum(map(len, made)) >= limit:
            break
    return np.concatenate(made)


def node_layer(node: Node, tensors: Mapping[str, Array], rows: Array) -> TableLayer:
    """A layer of product quantisation with rows of its input.

    Args:
        node: A ``pq_conv2d`` or ``pq_linear``.
        tensors: Its tensors by role.
        rows: uint8 (R, D), see ``layer_rows``.

    Raises:
        HardwareError: If the node is of another operator.
    """
    if not node.op.startswith("pq_"):
        raise HardwareError(
            f"node {node.name!r} is {node.op}; an accelerator takes pq_conv2d and pq_linear"
        )
    parts = cut_rows(node, rows)  # (R, T, D / T)
    count, parted, length = parts.shape
    tables = tensors["tables"]
    if text(node, "encoder") == "tree":
        # (R, T, G, L) to (R, G * T, L): table g * T + t is read by codebook g at part t
        gathered = parts[:, :, tensors["splits"]]
        books = tensors["thresholds"]
        encoder = "tree"
    else:
        centroids = tensors["centroids"]
        books_count, _, width = centroids.shape
        padded = np.zeros((count, parted, books_count * width), np.uint8)
        padded[:, :, :length] = parts
        gathered = padded.reshape(count, parted, books_count, width)
        books = centroids
        encoder = text(node, "distance")
    subvectors = gathered.swapaxes(1, 2).reshape(count, len(tables), -1)
    return TableLayer(
        node.name, encoder, subvectors, np.repeat(books, part_count(node), axis=0), tables,
        integer(node, "act_bits"),
    )  # fmt: skip


def graph_layer(graph: Graph, name: str, inputs: Mapping[str, Array], limit: int) -> TableLayer:
    """The layer of a graph with the rows that given inputs bring to it.

    Args:
        graph: The model.
        name: The node.
        inputs: Inputs of the model by name.
        limit: Rows at most.

    Raises:
        HardwareError: If there is no such node, or an accelerator does not take it.
    """
    node = find_node(graph, name)
    return node_layer(
        node, graph.node_tensors(node), layer_rows(node, node_input(graph, node, inputs), limit)
    )


def graph_shapes(graph: Graph) -> list[tuple[str, int, int, int]]:
    """Name, rows of one sample, tables and outputs of each layer of product quantisation.

    Raises:
        HardwareError: If the model takes samples of any size and holds no golden data.
    """
    sizes = graph.nominal_sizes()
    if sizes is None:
        raise HardwareError("the model takes samples of any size and has no golden data to fix one")
    values = graph.infer(sizes)
    found = []
    for node in graph.nodes:
        if node.op.startswith("pq_"):
            b, _, m = graph.node_tensors(node)["tables"].shape
            made = math.prod(size or 1 for size in values[node.output].shape)
            found.append((node.name, made // m, b, m))
    return found


def find_node(graph: Graph, name: str) -> Node:
    """The node of that name.

    Raises:
        HardwareError: If there is none of a family that has a circuit.
    """
    usable = [node for node in graph.nodes if node.op.startswith(("pq_", "lookup_", "lowbit_"))]
    for node in usable:
        if node.name == name:
            return node
    names = ", ".join(node.name for node in usable) or "none"
    raise HardwareError(f"no layer {name!r} to build hardware for; the model has: {names}")


def node_input(graph: Graph, node: Node, inputs: Mapping[str, Array]) -> Array:
    """What comes to a node, float32; only the nodes before it run."""
    values = dict(inputs)
    for each in graph.nodes:
        if each.name == node.name:
            break
        arrays = [values[name] for name in each.inputs]
        values[each.output] = run_node(each, arrays, graph.node_tensors(each))
    return values[node.inputs[0]]

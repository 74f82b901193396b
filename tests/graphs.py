"""Small graphs for tests, with random but valid codebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lutra.graph import Graph, Node, Shape, Value, make_node
from lutra.ops.lookup import bits_for, pack_weights
from lutra.ops.lowbit import store_rows
from lutra.runtime.session import Session

Array = np.ndarray[Any, Any]


def pq_tensors(
    rng: np.random.Generator,
    length: int,
    outputs: int,
    *,
    count: int = 16,
    width: int = 9,
    bits: int = 7,
) -> dict[str, Array]:
    """Random codebooks and tables for rows of ``length`` values.

    Returns:
        centroids uint8 (B, K, V), tables int8 (B, K, M), scale float32 (M,), bias float32 (M,)
    """
    codebooks = -(-length // width)
    centroids = rng.integers(0, 2**bits, (codebooks, count, width), dtype=np.uint8)
    centroids[-1, :, length - (codebooks - 1) * width :] = 0
    return {
        "centroids": centroids,
        "tables": rng.integers(-128, 128, (codebooks, count, outputs)).astype(np.int8),
        "scale": rng.uniform(0.001, 0.01, outputs).astype(np.float32),
        "bias": rng.normal(size=outputs).astype(np.float32),
    }


def int8_tensors(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, Array]:
    """Random weight int8 of this shape (M, ...), scale float32 (M,), bias float32 (M,)."""
    return {
        "weight": rng.integers(-127, 128, shape).astype(np.int8),
        "scale": (rng.uniform(0.5, 1.5, shape[0]) / 4000 / np.sqrt(np.prod(shape[1:]))).astype(
            np.float32
        ),
        "bias": rng.normal(size=shape[0]).astype(np.float32),
    }


def lowbit_tensors(
    rng: np.random.Generator, outputs: int, inputs: int, levels: int, group: int
) -> dict[str, Array]:
    """Random weight uint8 (M, bytes), scale float32 and perhaps zero int8 (M, inputs / group), bias
    float32 (M,)."""
    codes = rng.integers(0, levels, (outputs, inputs)).astype(np.uint8)
    shape = (outputs, inputs // group)
    tensors: dict[str, Array] = {
        "weight": store_rows(codes, levels),
        "scale": (rng.uniform(0.5, 1.5, shape) / levels / np.sqrt(inputs)).astype(np.float32),
        "bias": rng.normal(size=outputs).astype(np.float32),
    }
    if levels > 3 and rng.integers(2):
        tensors["zero"] = rng.integers(1 - levels, levels, shape).astype(np.int8)
    return tensors


def lookup_tensors(
    rng: np.random.Generator,
    length: int,
    outputs: int,
    *,
    bits: int = 4,
    weights: int = 15,
    zero: int = 0,
) -> dict[str, Array]:
    """A random table and weights for rows of ``length`` values.

    Returns:
        weight uint8 (M, P), table int8 (2**bits, weights), scale float32 (M,), bias float32 (M,)
    """
    table = rng.integers(-127, 128, (2**bits, weights)).astype(np.int8)
    table[zero] = 0
    index = rng.integers(0, weights, (outputs, length), dtype=np.uint8)
    return {
        "weight": pack_weights(index, bits_for(weights)),
        "table": table,
        "scale": (rng.uniform(0.5, 1.5, outputs) / 70 / np.sqrt(length)).astype(np.float32),
        "bias": rng.normal(size=outputs).astype(np.float32),
    }


def tree_tensors(
    rng: np.random.Generator,
    length: int,
    outputs: int,
    *,
    codebooks: int = 3,
    count: int = 16,
    bits: int = 7,
) -> dict[str, Array]:
    """Random trees and tables for rows of ``length`` values.

    Returns:
        splits int32 (B, L), thresholds uint8 (B, K - 1), tables int8 (B, K, M), scale float32 (M,),
        bias float32 (M,)
    """
    return {
        "splits": rng.integers(0, length, (codebooks, count.bit_length() - 1), dtype=np.int32),
        "thresholds": rng.integers(0, 2**bits + 1, (codebooks, count - 1), dtype=np.uint8),
        "tables": rng.integers(-128, 128, (codebooks, count, outputs)).astype(np.int8),
        "scale": rng.uniform(0.001, 0.01, outputs).astype(np.float32),
        "bias": rng.normal(size=outputs).astype(np.float32),
    }


class Builder:
    """Puts a graph together: each call of ``add`` appends a node and returns its output name."""

    def __init__(self, *inputs: tuple[str, Shape] | tuple[str, Shape, str], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.inputs = tuple(
            Value(name, rest[0] if rest else "float32", shape) for name, shape, *rest in inputs
        )
        self.nodes: list[Node] = []
        self.tensors: dict[str, Array] = {}

    def add(
        self,
        op: str,
        *inputs: str,
        name: str | None = None,
        tensors: Mapping[str, Array | str] | None = None,
        **attrs: Any,
    ) -> str:
        """Appends a node; a tensor given as a string names one that exists already."""
        name = name or f"{op}_{len(self.nodes)}"
        roles: dict[str, str] = {}
        for role, tensor in (tensors or {}).items():
            if isinstance(tensor, str):
                roles[role] = tensor
            else:
                roles[role] = f"{name}.{role}"
                self.tensors[roles[role]] = tensor
        self.nodes.append(make_node(op, name, inputs, f"{name}.out", attrs, roles))
        return f"{name}.out"

    def pq_conv2d(
        self,
        x: str,
        channels: int,
        outputs: int,
        kernel: tuple[int, int] = (3, 3),
        *,
        count: int = 16,
        width: int = 9,
        act_bits: int = 7,
        act_scale: float = 0.05,
        act_zero: int = 0,
        **attrs: Any,
    ) -> str:
        length = channels * kernel[0] * kernel[1]
        return self.add(
            "pq_conv2d",
            x,
            tensors=pq_tensors(self.rng, length, outputs, count=count, width=width, bits=act_bits),
            in_channels=channels,
            kernel=kernel,
            act_scale=act_scale,
            act_zero=act_zero,
            act_bits=act_bits,
            **attrs,
        )

    def pq_linear(
        self,
        x: str,
        features: int,
        outputs: int,
        *,
        count: int = 16,
        width: int = 4,
        act_bits: int = 7,
        act_scale: float = 0.05,
        act_zero: int = 64,
    ) -> str:
        return self.add(
            "pq_linear",
            x,
            tensors=pq_tensors(
                self.rng, features, outputs, count=count, width=width, bits=act_bits
            ),
            in_features=features,
            act_scale=act_scale,
            act_zero=min(act_zero, 2**act_bits - 1),
            act_bits=act_bits,
        )

    def lookup_conv2d(
        self,
        x: str,
        channels: int,
        outputs: int,
        kernel: tuple[int, int] = (3, 3),
        *,
        weights: int = 15,
        act_bits: int = 4,
        act_scale: float = 0.25,
        act_zero: int = 0,
        **attrs: Any,
    ) -> str:
        length = channels * kernel[0] * kernel[1]
        return self.add(
            "lookup_conv2d",
            x,
            tensors=lookup_tensors(
                self.rng, length, outputs, bits=act_bits, weights=weights, zero=act_zero
            ),
            in_channels=channels,
            kernel=kernel,
            act_scale=act_scale,
            act_zero=act_zero,
            act_bits=act_bits,
            weight_bits=bits_for(weights),
            **attrs,
        )

    def lookup_linear(
        self,
        x: str,
        features: int,
        outputs: int,
        *,
        weights: int = 15,
        act_bits: int = 4,
        act_scale: float = 0.25,
        act_zero: int = 0,
    ) -> str:
        return self.add(
            "lookup_linear",
            x,
            tensors=lookup_tensors(
                self.rng, features, outputs, bits=act_bits, weights=weights, zero=act_zero
            ),
            in_features=features,
            act_scale=act_scale,
            act_zero=act_zero,
            act_bits=act_bits,
            weight_bits=bits_for(weights),
        )

    def int8_conv2d(
        self,
        x: str,
        channels: int,
        outputs: int,
        kernel: tuple[int, int] = (3, 3),
        *,
        groups: int = 1,
        act_bits: int = 7,
        act_scale: float = 0.05,
        act_zero: int = 0,
        **attrs: Any,
    ) -> str:
        return self.add(
            "int8_conv2d",
            x,
            tensors=int8_tensors(self.rng, (outputs, channels // groups, *kernel)),
            groups=groups,
            act_scale=act_scale,
            act_zero=min(act_zero, 2**act_bits - 1),
            act_bits=act_bits,
            **attrs,
        )

    def int8_linear(
        self,
        x: str,
        features: int,
        outputs: int,
        *,
        act_bits: int = 7,
        act_scale: float = 0.05,
        act_zero: int = 64,
    ) -> str:
        return self.add(
            "int8_linear",
            x,
            tensors=int8_tensors(self.rng, (outputs, features)),
            act_scale=act_scale,
            act_zero=min(act_zero, 2**act_bits - 1),
            act_bits=act_bits,
        )

    def lowbit_linear(self, x: str, features: int, outputs: int, *, levels: int = 3) -> str:
        tensors = lowbit_tensors(self.rng, outputs, features, levels, features)
        attrs = {"in_features": features, "levels": levels, "group": features}
        return self.add("lowbit_linear", x, tensors=tensors, **attrs)

    def conv2d(
        self,
        x: str,
        channels: int,
        outputs: int,
        kernel: tuple[int, int] = (3, 3),
        *,
        groups: int = 1,
        **attrs: Any,
    ) -> str:
        shape = (outputs, channels // groups, *kernel)
        weight = self.rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        bias = self.rng.normal(size=outputs)
        return self.add(
            "conv2d",
            x,
            tensors={"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)},
            groups=groups,
            **attrs,
        )

    def linear(self, x: str, features: int, outputs: int) -> str:
        weight = self.rng.normal(size=(outputs, features)) / np.sqrt(features)
        bias = self.rng.normal(size=outputs)
        return self.add(
            "linear",
            x,
            tensors={"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)},
        )

    def affine(self, x: str, channels: int) -> str:
        scale, bias = self.rng.uniform(0.5, 1.5, channels), self.rng.normal(size=channels)
        return self.add(
            "affine",
            x,
            tensors={"scale": scale.astype(np.float32), "bias": bias.astype(np.float32)},
        )

    def graph(self, *outputs: str, metadata: Mapping[str, Any] | None = None) -> Graph:
        """The graph; without names, the last value is the output."""
        return Graph(
            self.inputs,
            outputs or (self.nodes[-1].output,),
            tuple(self.nodes),
            self.tensors,
            metadata or {},
        )


def every_op_graph(seed: int = 0, batch: int | None = None) -> Graph:
    """A small network (batch, 3, 12, 12) -> (batch, 5) and (batch, 10) that uses every operator."""
    b = Builder(("x", (batch, 3, 12, 12)), seed=seed)
    stem = b.pq_conv2d("x", 3, 8, act_zero=64, padding=(1, 1))
    stem = b.add("relu", stem)
    a = b.pq_conv2d(stem, 8, 12, stride=(2, 2), padding=(1, 1), act_bits=6, count=32)
    a = b.affine(a, 12)
    side = b.add("slice", stem, axis=2, start=0, stop=12, step=2)
    side = b.add("slice", side, axis=3, start=0, stop=12, step=2)
    side = b.add("pad", side, pads=(0, 0, 2, 2, 0, 0, 0, 0))
    x = b.add("relu6", b.add("add", a, side))  # (12, 6, 6)
    x = b.add("concat", x, b.conv2d(x, 12, 6, padding=(1, 1), groups=3), axis=1)  # (18, 6, 6)
    x = b.int8_conv2d(x, 18, 18, padding=(1, 1), groups=18, act_zero=5)
    x = b.add("max_pool2d", x, kernel=(3, 3), stride=(2, 2), padding=(1, 1), ceil_mode=True)
    x = b.pq_conv2d(x, 18, 16, (2, 3), padding=(1, 1), dilation=(2, 1), count=8, width=4)
    x = b.lookup_conv2d(x, 16, 16, (1, 3), padding=(0, 1), act_zero=8)
    x = b.add("avg_pool2d", x, kernel=(2, 2), stride=(1, 1), padding=(1, 1))
    wide = b.add("clamp", b.add("pixel_shuffle", x, factor=2), low=-1.5, high=2.5)  # (4, ...)
    wide = b.add("upsample", wide, mode="bilinear", scale_h=1.5, scale_w=2.0)
    peak = b.add("max", wide, axes=(2, 3), keepdims=True)
    peak = b.add("reshape", peak, shape=(1, 4))
    top = b.add("adaptive_max_pool2d", x, output_size=(2, 2))
    top = b.add("flatten", top)  # (64,)
    low = b.add("adaptive_avg_pool2d", x, output_size=(3, 2))
    low = b.add("mean", low, axes=(2, 3))  # (16,)
    low = b.add("reshape", low, shape=(4, 4))
    low = b.add("concat", low, peak, axis=1)  # (5, 4)
    low = b.pq_linear(low, 4, 5, count=64, width=3, act_bits=5)  # (5, 5)
    low = b.add("mean", low, axes=(1,), keepdims=False)  # (5,)
    top = b.pq_linear(top, 64, 10, width=16)
    top = b.lookup_linear(top, 10, 10, weights=33, act_bits=6, act_scale=0.06, act_zero=32)
    top = b.add("relu", b.int8_linear(top, 10, 10))
    top = b.add("mul", top, b.add("clamp", top, high=3.0))
    top = b.add("softmax", b.linear(top, 10, 10), axis=1)
    return b.graph(low, top, metadata={"classes": [str(i) for i in range(10)], "seed": seed})


def tiny_graph(seed: int = 0) -> Graph:
    """The smallest useful graph, (N, 3) -> (N, 2), for tests that try every byte of its file."""
    b = Builder(("x", (None, 3)), seed=seed)
    b.add("relu", b.pq_linear("x", 3, 2, count=8, width=2))
    return b.graph()


def tied_graph() -> Graph:
    """Two linear layers that share one weight, (N, 4) -> (N, 4)."""
    b = Builder(("x", (None, 4)))
    y = b.linear("x", 4, 4)
    shared = dict(b.nodes[0].tensors)
    b.add("linear", b.add("relu", y), tensors=shared)
    return b.graph()


def random_inputs(graph: Graph, batch: int = 2, seed: int = 1) -> dict[str, Array]:
    """Normal inputs; a fixed batch wins over ``batch``."""
    rng = np.random.default_rng(seed)
    return {
        value.name: rng.normal(size=_sizes(value.shape, batch)).astype(np.float32)
        for value in graph.inputs
    }


def with_golden(graph: Graph, batch: int = 2, seed: int = 1) -> Graph:
    """The graph with random inputs and the outputs of the engine."""
    inputs = random_inputs(graph, batch, seed)
    return replace(
        graph,
        golden=(
            tuple(inputs[value.name] for value in graph.inputs),
            tuple(Session(graph).run(None, inputs)),
        ),
    )


def _sizes(shape: Sequence[int | None], batch: int) -> tuple[int, ...]:
    return tuple(batch if size is None else size for size in shape)

"""Sentence encoders as ONNX files: as exporters write them, and with ONNX Runtime's own operators.

Both hold the tensors of the lutra graph whose linear layers are multiplied, so that everybody
computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper, save

from benchmarks.lookups import Array
from benchmarks.networks_text import Sentences, encoder_graph
from lutra.graph import Node

#: The first with LayerNormalization. GELU is a pattern of operators, which both runtimes fuse.
_OPSET: Final = 17
_MICROSOFT: Final = "com.microsoft"
_EPS: Final = 1e-12  # of every layer norm
_FAR: Final = -1e9  # added to the scores of masked keys
_INPUTS: Final = ("ids", "mask")


class _Writer:
    """Appends nodes; every method returns the name of what it makes."""

    def __init__(self, network: Sentences, batch: int) -> None:
        self.network, self.batch = network, batch
        self.nodes: list[Any] = []
        self.constants: dict[str, Array] = {}

    def constant(self, name: str, value: Array) -> str:
        self.constants[name] = value
        return name

    def ints(self, *values: int) -> str:
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self.constant(f"number_{value:g}", np.array(value, np.float32))

    def node(self, op: str, name: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        made = helper.make_node(op, inputs, [name], name, domain=domain, **attributes)
        self.nodes.append(made)
        return name

    def save(self, path: Path, output: str, domains: Mapping[str, int]) -> None:
        """Writes the file: int64 `ids` and `mask` (N, T) to float32 (N, hidden), sizes fixed."""
        shape = (self.batch, self.network.tokens)
        ends = [
            [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in _INPUTS],
            [
                helper.make_tensor_value_info(
                    output, TensorProto.FLOAT, (self.batch, self.network.encoder.hidden)
                )
            ],
        ]
        tensors = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "encoder", *ends, tensors)
        opsets = [helper.make_opsetid(name, version) for name, version in domains.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        if set(domains) == {""}:
            checker.check_model(model)
        save(model, str(path))


def write_plain(network: Sentences, batch: int, path: Path) -> None:
    """Writes the encoder in standard operators, one for each that PyTorch runs.

    Args:
        network: The encoder and the tokens of an input.
        batch: Sentences of an input.
        path: Where the file goes.
    """
    graph = encoder_graph(network.encoder)
    writer = _Writer(network, batch)
    for node in graph.nodes:
        tensors = graph.node_tensors(node)
        roles = {role: f"{node.name}.{role}" for role in tensors}
        _PLAIN[node.op](writer, node, tensors, roles)
    writer.save(path, graph.outputs[0], {"": _OPSET})


def _embedding(
    w: _Writer, node: Node, tensors: Mapping[str, Array], roles: Mapping[str, str]
) -> None:
    w.node("Gather", node.output, w.constant(roles["weight"], tensors["weight"]), node.inputs[0])


def _position(
    w: _Writer, node: Node, tensors: Mapping[str, Array], roles: Mapping[str, str]
) -> None:
    rows = w.constant(roles["weight"], tensors["weight"][None, : w.network.tokens].copy())
    w.node("Add", node.output, node.inputs[0], rows)


def _norm(w: _Writer, node: Node, tensors: Mapping[str, Array], roles: Mapping[str, str]) -> None:
    made = [w.constant(roles[role], tensors[role]) for role in ("weight", "bias")]
    settings = {"axis": -1, "epsilon": node.attrs["eps"]}
    w.node("LayerNormalization", node.output, node.inputs[0], *made, **settings)


def _linear(w: _Writer, node: Node, tensors: Mapping[str, Array], roles: Mapping[str, str]) -> None:
    weight = w.constant(roles["weight"], tensors["weight"].T.copy())
    product = w.node("MatMul", f"{node.name}.product", node.inputs[0], weight)
    w.node("Add", node.output, product, w.constant(roles["bias"], tensors["bias"]))


def _gelu(w: _Writer, node: Node, *_: Mapping[str, Any]) -> None:
    x, name = node.inputs[0], node.name
    scaled = w.node("Div", f"{name}.scaled", x, w.number(2**0.5))
    share = w.node("Add", f"{name}.share", w.node("Erf", f"{name}.erf", scaled), w.number(1.0))
    w.node("Mul", node.output, w.node("Mul", f"{name}.twice", x, share), w.number(0.5))


def _attention(w: _Writer, node: Node, *_: Mapping[str, Any]) -> None:
    encoder, name = w.network.encoder, node.name
    size = encoder.hidden // encoder.heads
    *values, mask = node.inputs
    split = w.ints(w.batch, w.network.tokens, encoder.heads, size)
    parts = []
    for value, order in zip(values, ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)), strict=True):
        rows = w.node("Reshape", f"{value}.rows", value, split)
        parts.append(w.node("Transpose", f"{value}.heads", rows, perm=order))
    scores = w.node("MatMul", f"{name}.scores", parts[0], parts[1])
    scaled = w.node("Mul", f"{name}.scaled", scores, w.number(float(node.attrs["scale"])))
    masked = w.node("Add", f"{name}.masked", scaled, _far(w, mask))
    shares = w.node("Softmax", f"{name}.shares", masked, axis=-1)
    mixed = w.node("MatMul", f"{name}.mixed", shares, parts[2])
    rows = w.node("Transpose", f"{name}.mixed.rows", mixed, perm=(0, 2, 1, 3))
    w.node("Reshape", node.output, rows, w.ints(w.batch, w.network.tokens, encoder.hidden))


def _far(w: _Writer, mask: str) -> str:
    """What is added to scores, (N, 1, 1, T): all blocks share it."""
    name = f"{mask}.far"
    if not any(made.name == name for made in w.nodes):
        keep = w.node("Cast", f"{mask}.keep", mask, to=TensorProto.FLOAT)
        keys = w.node("Unsqueeze", f"{mask}.keys", keep, w.ints(1, 2))
        absent = w.node("Sub", f"{mask}.absent", w.number(1.0), keys)
        w.node("Mul", name, absent, w.number(_FAR))
    return name


def _mean(w: _Writer, node: Node, *_: Mapping[str, Any]) -> None:
    x, mask = node.inputs
    keep = w.node("Cast", f"{node.name}.keep", mask, to=TensorProto.FLOAT)
    kept = w.node("Unsqueeze", f"{node.name}.tokens", keep, w.ints(2))
    total = w.node("Mul", f"{node.name}.kept", x, kept)
    total = w.node("ReduceSum", f"{node.name}.total", total, w.ints(1), keepdims=0)
    count = w.node("ReduceSum", f"{node.name}.count", kept, w.ints(1), keepdims=0)
    w.node("Div", node.output, total, w.node("Max", f"{node.name}.most", count, w.number(1e-9)))


_PLAIN: Final[Mapping[str, Any]] = {
    "embedding": _embedding,
    "position_embedding": _position,
    "layer_norm": _norm,
    "linear": _linear,
    "gelu": _gelu,
    "attention": _attention,
    "masked_mean": _mean,
    "add": lambda w, node, *_: w.node("Add", node.output, *node.inputs),
    "div": lambda w, node, *_: w.node("Div", node.output, *node.inputs),
    "l2_norm": lambda w, node, *_: w.node("ReduceL2", node.output, *node.inputs, axes=[1]),
    "clamp": lambda w, node, *_: w.node(
        "Max", node.output, *node.inputs, w.number(node.attrs["low"])
    ),
}


def write_fused(network: Sentences, batch: int, path: Path) -> None:
    """Writes the encoder in the operators that ONNX Runtime has for encoders like it.

    They are what its transformer optimizer makes of an exported BERT: Attention, which holds the
    queries, keys and values, SkipLayerNormalization and BiasGelu.

    Args:
        network: The encoder and the tokens of an input.
        batch: Sentences of an input.
        path: Where the file goes.
    """
    encoder = network.encoder
    tensors = encoder_graph(encoder).tensors
    w = _Writer(network, batch)

    def held(name: str) -> str:
        value = tensors[name]
        transposed = value.ndim == 2 and name.startswith("layer.")
        return w.constant(name, value.T.copy() if transposed else value)

    words = w.node("Gather", "words", held("words.weight"), "ids")
    places = tensors["positions.weight"][None, : network.tokens].copy()
    x = w.node("Add", "placed", words, w.constant("positions.weight", places))
    norm = [held(f"embeddings.norm.{role}") for role in ("weight", "bias")]
    x = w.node("LayerNormalization", "normed", x, *norm, axis=-1, epsilon=_EPS)
    mask = w.node("Cast", "mask.int32", "mask", to=TensorProto.INT32)
    for index in range(encoder.layers):
        x = _fused_block(w, f"layer.{index}", x, mask, tensors, held)
    mean = Node("masked_mean", "mean", (x, "mask"), "mean")
    _mean(w, mean)
    length = w.node("ReduceL2", "length", "mean", axes=[1])
    w.node("Div", "embedding", "mean", w.node("Max", "length.clamp", length, w.number(1e-12)))
    w.save(path, "embedding", {"": _OPSET, _MICROSOFT: 1})


def _fused_block(
    w: _Writer, name: str, x: str, mask: str, tensors: Mapping[str, Array], held: Any
) -> str:
    parts = [f"{name}.attention.{part}" for part in ("query", "key", "value")]
    weight = np.concatenate([tensors[f"{part}.weight"].T for part in parts], 1)
    bias = np.concatenate([tensors[f"{part}.bias"] for part in parts])
    packed = [w.constant(f"{name}.{role}", value) for role, value in (("w", weight), ("b", bias))]
    own = {"domain": _MICROSOFT}
    heads = w.network.encoder.heads
    a = w.node("Attention", f"{name}.a", x, *packed, mask, num_heads=heads, **own)

    def normed(made: str, skip: str, linear: str, norm: str) -> str:
        product = w.node("MatMul", f"{linear}.product", made, held(f"{linear}.weight"))
        roles = [held(f"{norm}.{role}") for role in ("weight", "bias")]
        bias = held(f"{linear}.bias")
        return w.node(
            "SkipLayerNormalization", norm, product, skip, *roles, bias, epsilon=_EPS, **own
        )

    x = normed(a, x, f"{name}.attention.output", f"{name}.attention.norm")
    product = w.node("MatMul", f"{name}.inner.product", x, held(f"{name}.inner.weight"))
    wide = w.node("BiasGelu", f"{name}.gelu", product, held(f"{name}.inner.bias"), **own)
    return normed(wide, x, f"{name}.output", f"{name}.norm")

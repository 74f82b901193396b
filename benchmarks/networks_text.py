"""The lutra graph of a sentence encoder of the shape of MiniLM-L6 (BERT), with random tensors.

As in `benchmarks.graphs` nothing is trained, and everything else is as in a trained file. Its
inputs are `ids` and `mask`, int32 (N, T) of any size up to 512 tokens; its output `embedding`,
(N, hidden), has the length 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from benchmarks.lookups import Array, Parts, Pq, Range, multiplied, to_int8
from benchmarks.networks import Linear
from lutra.functions import fit, fit_exp, fit_reciprocal, fit_rsqrt
from lutra.graph import Graph, Node, Value, make_node

#: Root mean squares: of what attention gives, which are means of values, and of GELU's outputs.
_ATTENDED: Final = Range(0.5, True)
_ACTIVATED: Final = Range(0.65, True)
_NORMED: Final = Range(1.0, True)


@dataclass(frozen=True)
class Encoder:
    """The sizes of a sentence encoder; those of MiniLM-L6 where nothing is said."""

    name: str = "MiniLM-L6"
    layers: int = 6
    hidden: int = 384
    heads: int = 12
    inner: int = 1536
    vocabulary: int = 30522
    positions: int = 512


MINILM: Final = Encoder()


@dataclass(frozen=True)
class Sentences:
    """An encoder and the number of tokens that all its inputs have."""

    tokens: int
    encoder: Encoder = MINILM

    @property
    def name(self) -> str:
        """What the case is called in records."""
        return f"{self.encoder.name} {self.tokens} tokens"


@dataclass(frozen=True)
class TabledPq(Pq):
    """Product quantisation of the linear layers, and tables of functions for all between them.

    Attributes:
        entries: Of the tables of GELU, softmax and layer norm: 8, 16 or 32.
    """

    v: int = 16
    entries: int = 16

    def __str__(self) -> str:
        return f"{super().__str__()}, tables of functions"

    def columns(self) -> dict[str, Any]:
        return {**super().columns(), "function_entries": self.entries}


def encoder_graph(
    encoder: Encoder = MINILM,
    method: Pq | None = None,
    *,
    dense: str = "float32",
    entries: int = 0,
    shared: bool = True,
    words: str = "float32",
    seed: int = 0,
) -> Graph:
    """A sentence encoder with random tensors; batch and number of tokens are open.

    Args:
        encoder: Its sizes.
        method: What its linear layers are; None leaves them multiplied.
        dense: What they are then: "float32" or "int8".
        entries: Of the tables of GELU, softmax and norms: 8, 16 or 32; 0 computes them exactly.
        shared: Whether the queries, keys and values of a block have the same centroids.
        words: What the rows of the word embedding are: "float32" or "int8".
        seed: Of all tensors.
    """
    writer = _Writer(encoder, method, dense, entries, shared, seed)
    writer.words = words
    return writer.graph()


class _Writer:
    """Puts the graph together; a node and the value that it makes have one name."""

    def __init__(
        self, encoder: Encoder, method: Pq | None, dense: str, entries: int, shared: bool, seed: int
    ) -> None:
        self.encoder = encoder
        self.method = method
        self.dense = dense
        self.entries = entries
        self.shared = shared
        self.words = "float32"
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Node] = []
        self.tensors: dict[str, Array] = {}
        self.tables: dict[str, Mapping[str, Array]] = {}
        if entries:
            exp, reciprocal, rsqrt = (f(entries) for f in (fit_exp, fit_reciprocal, fit_rsqrt))
            self.tables = {
                "gelu": fit("gelu", entries=entries).tensors,
                "softmax": {**exp.tensors, **reciprocal.tensors},
                "norm": rsqrt.tensors,
            }

    def graph(self) -> Graph:
        """The whole encoder."""
        e = self.encoder
        words = self.rng.standard_normal((e.vocabulary, e.hidden), np.float32)
        places = self.rng.standard_normal((e.positions, e.hidden), np.float32)
        table = {"weight": words}
        if self.words == "int8":
            rows, units = to_int8(words, (1,))
            table = {"weight": rows, "scale": units.astype(np.float32)}
        x = self.node("embedding", "words", "ids", tensors=table)
        x = self.node("position_embedding", "positions", x, tensors={"weight": places})
        x = self.norm("embeddings.norm", x)
        for index in range(e.layers):
            x = self.block(f"layer.{index}", x)
        x = self.node("masked_mean", "mean", x, "mask")
        length = self.node("l2_norm", "length", x, attrs={"axes": (1,), "keepdims": True})
        length = self.node("clamp", "length.clamp", length, attrs={"low": 1e-12})
        x = self.node("div", "embedding", x, length)
        inputs = tuple(Value(name, "int32", (None, None)) for name in ("ids", "mask"))
        return Graph(inputs, (x,), tuple(self.nodes), self.tensors)

    def block(self, name: str, x: str) -> str:
        """Attention, then the feed-forward layer; each adds to what it reads."""
        e = self.encoder
        names = [f"{name}.attention.{part}" for part in ("query", "key", "value")]
        first = self.linear(names[0], x, e.hidden, e.hidden, _NORMED)
        same = names[0] if self.shared else None
        rest = [self.linear(n, x, e.hidden, e.hidden, _NORMED, same) for n in names[1:]]
        attended = self.node(
            "attention",
            f"{name}.attention",
            *(first, *rest, "mask"),
            attrs={"heads": e.heads, "scale": (e.hidden / e.heads) ** -0.5},
            tensors=self.tables.get("softmax"),
        )
        made = self.linear(f"{name}.attention.output", attended, e.hidden, e.hidden, _ATTENDED)
        x = self.norm(f"{name}.attention.norm", self.node("add", f"{name}.attention.add", made, x))
        made = self.linear(f"{name}.inner", x, e.hidden, e.inner, _NORMED)
        made = self.gelu(f"{name}.gelu", made)
        made = self.linear(f"{name}.output", made, e.inner, e.hidden, _ACTIVATED)
        return self.norm(f"{name}.norm", self.node("add", f"{name}.add", made, x))

    def linear(
        self, name: str, x: str, inputs: int, outputs: int, was: Range, like: str | None = None
    ) -> str:
        """A linear layer, with the centroids of the layer `like`."""
        layer = Linear(name, x, inputs, outputs)
        if self.method is None:
            parts = multiplied(layer, was, self.dense, self.rng)
        else:
            parts = self.method.node(layer, was, self.rng)
        made = self.node(parts.op, name, x, attrs=parts.attrs, tensors=_own(parts, like))
        if like is not None:
            roles = {role: f"{like}.{role}" for role in parts.tensors if role in _ENCODER}
            last = self.nodes[-1]
            tensors = {**last.tensors, **roles}
            self.nodes[-1] = make_node(parts.op, name, (x,), name, parts.attrs, tensors)
        return made

    def gelu(self, name: str, x: str) -> str:
        if self.entries:
            return self.node("piecewise", name, x, tensors=self.tables["gelu"])
        return self.node("gelu", name, x)

    def norm(self, name: str, x: str) -> str:
        size = self.encoder.hidden
        tensors = {
            "weight": np.ones(size, np.float32),
            "bias": np.zeros(size, np.float32),
            **self.tables.get("norm", {}),
        }
        return self.node("layer_norm", name, x, attrs={"eps": 1e-12}, tensors=tensors)

    def node(
        self,
        op: str,
        name: str,
        *inputs: str,
        attrs: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Array] | None = None,
    ) -> str:
        roles = {role: f"{name}.{role}" for role in tensors or {}}
        self.tensors.update({roles[role]: array for role, array in (tensors or {}).items()})
        self.nodes.append(make_node(op, name, inputs, name, attrs, roles))
        return name


#: The tensors that make codes, which layers share that read the same value.
_ENCODER: Final = ("centroids", "splits", "thresholds")


def _own(parts: Parts, like: str | None) -> dict[str, Array]:
    """The tensors of a layer that it does not share."""
    return {
        role: array for role, array in parts.tensors.items() if like is None or role not in _ENCODER
    }

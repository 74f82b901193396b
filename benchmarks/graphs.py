"""The lutra graph of a network, with random tensors.

Nothing is trained here and the outputs mean nothing. Everything else is as in a trained file:
tables fill the range that training gives them, scales keep the activations of all layers about as
large as the input, and centroids and thresholds are drawn like the activations that they are
compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.lookups import CLIP, Array, Method, Range, multiplied
from benchmarks.networks import (
    Add,
    Border,
    Conv,
    GlobalAverage,
    GlobalMax,
    Layer,
    Linear,
    MaxPool,
    Network,
    Relu,
    Shrink,
)
from lutra.graph import Graph, Node, Value, make_node


def lutra_graph(network: Network, method: Method, dense: str = "float32", seed: int = 0) -> Graph:
    """The network with random tensors; the batch is open.

    Args:
        network: The network.
        method: What its lookup layers are.
        dense: What the layers are that stay multiplied: "float32" or "int8".
        seed: Of all tensors.
    """
    writer = _Writer(method, dense, seed)
    for layer in network.layers:
        writer.write(layer)
    return Graph(
        (Value("x", "float32", (None, *network.shape)),),
        (network.layers[-1].name,),
        tuple(writer.nodes),
        writer.tensors,
    )


class _Writer:
    """Puts the graph together, layer by layer."""

    def __init__(self, method: Method, dense: str, seed: int) -> None:
        self.method = method
        self.dense = dense
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Node] = []
        self.tensors: dict[str, Array] = {}
        self.ranges = {"x": Range(1.0, True)}

    def write(self, layer: Layer) -> None:
        """Appends the nodes of a layer; the last makes the value that bears the layer's name."""
        was = self.ranges[layer.x]
        now = was
        if isinstance(layer, Conv | Linear):
            now = Range(1.0, True)
            if layer.lookup:
                parts = self.method.node(layer, was, self.rng)
            else:
                parts = multiplied(layer, was, self.dense, self.rng)
            self._node(parts.op, layer.name, layer.x, attrs=parts.attrs, tensors=parts.tensors)
        elif isinstance(layer, Relu):
            now = Range(was.rms, False)
            self._node("relu", layer.name, layer.x)
        elif isinstance(layer, Add):
            other = self.ranges[layer.other]
            now = Range(float(np.hypot(was.rms, other.rms)), was.signed or other.signed)
            self._node("add", layer.name, layer.x, layer.other)
        elif isinstance(layer, MaxPool):
            sizes = {"kernel": layer.kernel, "stride": layer.stride, "padding": layer.padding}
            pairs = {name: (size, size) for name, size in sizes.items()}
            self._node("max_pool2d", layer.name, layer.x, attrs=pairs)
        elif isinstance(layer, GlobalAverage | GlobalMax):
            op = "mean"
            if isinstance(layer, GlobalMax):
                op, now = "max", Range(CLIP * was.rms, False)  # of hundreds of normal values
            self._node(op, layer.name, layer.x, attrs={"axes": (2, 3), "keepdims": False})
        elif isinstance(layer, Border):
            (top, bottom), (left, right) = layer.rows, layer.columns
            pads = (0, 0, 0, 0, top, bottom, left, right)
            self._node("pad", layer.name, layer.x, attrs={"pads": pads})
        else:
            self._shrink(layer)
        self.ranges[layer.name] = now

    def _node(
        self,
        op: str,
        name: str,
        *inputs: str,
        attrs: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Array] | None = None,
    ) -> None:
        roles = {role: f"{name}.{role}" for role in tensors or {}}
        self.tensors.update({roles[role]: array for role, array in (tensors or {}).items()})
        self.nodes.append(make_node(op, name, inputs, name, attrs, roles))

    def _shrink(self, layer: Shrink) -> None:
        x = layer.x
        for axis, name in ((2, "rows"), (3, "columns")):
            attrs = {"axis": axis, "start": 0, "stop": layer.size, "step": 2}
            self._node("slice", f"{layer.name}.{name}", x, attrs=attrs)
            x = f"{layer.name}.{name}"
        pads = (0, 0, layer.added, layer.added, 0, 0, 0, 0)
        self._node("pad", layer.name, x, attrs={"pads": pads})

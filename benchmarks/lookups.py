"""The lutra graph of a network, with random codebooks.

How long a lookup takes does not depend on what stands in the tables, so nothing is trained here and
the outputs mean nothing. Everything else is as in a trained file: tables fill the int8 range of
every output, scales keep the activations of all layers about as large as the input, and centroids
and thresholds are drawn like the activations that they are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.networks import (
    Add,
    Conv,
    GlobalAverage,
    Layer,
    Linear,
    MaxPool,
    Network,
    Relu,
    Shrink,
)
from lutra.graph import Graph, Node, Value, make_node
from lutra.ops import OPS

Array = NDArray[Any]

#: Widths of the activation grids of lookup layers and of int8 layers, the defaults of training.
ACT_BITS: Final = 6
INT8_ACT_BITS: Final = 7
#: Sub-vectors of 1x1 convolutions.
POINTWISE_V: Final = 4
#: Activations are clipped at so many times their root mean square.
_CLIP: Final = 3.0


@dataclass(frozen=True)
class Lookup:
    """How the layers of a network are looked up.

    Attributes:
        encoder: "nearest" (the nearest of K centroids) or "tree" (log2 K comparisons).
        v: Values per sub-vector; 1x1 convolutions take `POINTWISE_V`.
        k: Entries of a table.
        dense: What the layers are that stay multiplied: "float32" or "int8".
    """

    encoder: str = "nearest"
    v: int = 9
    k: int = 16
    dense: str = "float32"

    def __str__(self) -> str:
        return f"{self.encoder} V={self.v} K={self.k}"


def known_encoders() -> tuple[str, ...]:
    """The encoders of the installed lutra."""
    return OPS["pq_conv2d"].attrs["encoder"].choices


def knows_int8() -> bool:
    """Whether the installed lutra has dense layers in int8."""
    return "int8_conv2d" in OPS


@dataclass(frozen=True)
class _Range:
    """What is known of a value: its root mean square, and whether it goes below zero."""

    rms: float
    signed: bool


class _Writer:
    """Puts the graph together, layer by layer."""

    def __init__(self, lookup: Lookup, seed: int) -> None:
        self.lookup = lookup
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Node] = []
        self.tensors: dict[str, Array] = {}
        self.ranges = {"x": _Range(1.0, True)}

    def write(self, layer: Layer) -> None:
        """Appends the nodes of a layer; the last makes the value that bears the layer's name."""
        was = self.ranges[layer.x]
        now = was
        if isinstance(layer, Conv | Linear):
            now = _Range(1.0, True)
            (self._lookup if layer.lookup else self._dense)(layer, was)
        elif isinstance(layer, Relu):
            now = _Range(was.rms, False)
            self._node("relu", layer.name, layer.x)
        elif isinstance(layer, Add):
            other = self.ranges[layer.other]
            now = _Range(float(np.hypot(was.rms, other.rms)), was.signed or other.signed)
            self._node("add", layer.name, layer.x, layer.other)
        elif isinstance(layer, MaxPool):
            window = {"kernel": layer.kernel, "stride": layer.stride, "padding": layer.padding}
            pairs = {name: (size, size) for name, size in window.items()}
            self._node("max_pool2d", layer.name, layer.x, attrs=pairs)
        elif isinstance(layer, GlobalAverage):
            self._node("mean", layer.name, layer.x, attrs={"axes": (2, 3), "keepdims": False})
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

    def _normal(self, *shape: int) -> Array:
        values: Array = self.rng.standard_normal(shape, np.float32)
        return values

    def _lookup(self, layer: Conv | Linear, was: _Range) -> None:
        attrs: dict[str, Any] = {**_grid(was, ACT_BITS), "encoder": self.lookup.encoder}
        width = self.lookup.v
        if isinstance(layer, Conv):
            op, length = "pq_conv2d", layer.inputs * layer.kernel**2
            width = width if layer.kernel > 1 else POINTWISE_V
            attrs |= _window(layer)
            attrs |= {"in_channels": layer.inputs, "kernel": (layer.kernel, layer.kernel)}
        else:
            op, length = "pq_linear", layer.inputs
            attrs |= {"in_features": layer.inputs}
        books, count = -(-length // width), self.lookup.k
        if self.lookup.encoder == "tree":
            tensors = {
                "splits": self._splits(length, width, count.bit_length() - 1),
                "thresholds": self._activations(was, books, count - 1),
            }
        else:
            centroids = self._activations(was, books, count, width)
            centroids[-1, :, length - (books - 1) * width :] = 0
            tensors = {"centroids": centroids}
        tensors |= self._tables(books, layer.outputs)
        self._node(op, layer.name, layer.x, attrs=attrs, tensors=tensors)

    def _activations(self, was: _Range, *shape: int) -> Array:
        """Values as the layer meets them, on its grid."""
        grid = _grid(was, ACT_BITS)
        x = self._normal(*shape) * np.float32(was.rms / grid["act_scale"])
        x = np.rint(x if was.signed else np.abs(x)) + grid["act_zero"]
        levels: Array = np.clip(x, 0, 2**ACT_BITS - 1).astype(np.uint8)
        return levels

    def _splits(self, length: int, width: int, levels: int) -> Array:
        """The entry of the row that each level of each book's tree compares, int32 (B, L)."""
        splits = []
        for first in range(0, length, width):
            entries = min(width, length - first)
            splits.append(first + self.rng.choice(entries, levels, replace=entries < levels))
        return np.array(splits, np.int32)

    def _tables(self, books: int, outputs: int) -> dict[str, Array]:
        """Tables of normal entries, the largest of each output 127; sums have a variance of 1."""
        entries, unit = _int8(self._normal(books, self.lookup.k, outputs), (0, 1))
        return {
            "tables": entries,
            "scale": (unit / np.sqrt(books)).astype(np.float32),
            "bias": np.zeros(outputs, np.float32),
        }

    def _dense(self, layer: Conv | Linear, was: _Range) -> None:
        """A layer that stays multiplied: the one place that decides how."""
        shape: tuple[int, ...] = (layer.outputs, layer.inputs)
        op, attrs = "linear", {}
        if isinstance(layer, Conv):
            shape += (layer.kernel, layer.kernel)
            op, attrs = "conv2d", _window(layer)
        tensors = {
            "weight": self._normal(*shape) * np.float32(was.rms**-1 * np.prod(shape[1:]) ** -0.5),
            "bias": np.zeros(layer.outputs, np.float32),
        }
        if self.lookup.dense == "int8":
            grid = _grid(was, INT8_ACT_BITS)
            op, attrs = f"int8_{op}", attrs | grid
            tensors["weight"], unit = _int8(tensors["weight"], tuple(range(1, len(shape))))
            tensors["scale"] = (unit * grid["act_scale"]).astype(np.float32)
        self._node(op, layer.name, layer.x, attrs=attrs, tensors=tensors)

    def _shrink(self, layer: Shrink) -> None:
        x = layer.x
        for axis, name in ((2, "rows"), (3, "columns")):
            attrs = {"axis": axis, "start": 0, "stop": layer.size, "step": 2}
            self._node("slice", f"{layer.name}.{name}", x, attrs=attrs)
            x = f"{layer.name}.{name}"
        pads = (0, 0, layer.added, layer.added, 0, 0, 0, 0)
        self._node("pad", layer.name, x, attrs={"pads": pads})


def lutra_graph(network: Network, lookup: Lookup, seed: int = 0) -> Graph:
    """The network with random codebooks; the batch is open.

    Args:
        network: The network.
        lookup: Encoder, V and K of all lookup layers.
        seed: Of all tensors.
    """
    writer = _Writer(lookup, seed)
    for layer in network.layers:
        writer.write(layer)
    return Graph(
        (Value("x", "float32", (None, *network.shape)),),
        (network.layers[-1].name,),
        tuple(writer.nodes),
        writer.tensors,
    )


def _grid(was: _Range, bits: int) -> dict[str, Any]:
    """The attributes of a grid of so many bits for the values of a range."""
    zero = 2 ** (bits - 1) if was.signed else 0
    scale = _CLIP * was.rms / (2**bits - 1 - zero)
    return {"act_scale": scale, "act_zero": zero, "act_bits": bits}


def _int8(values: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Rounded to -127..127, and the units: the largest value over the axes is 127."""
    units = np.abs(values).max(axis=axes, keepdims=True) / 127
    return np.rint(values / units).astype(np.int8), units.reshape(-1)


def _window(layer: Conv) -> dict[str, tuple[int, int]]:
    return {
        "stride": (layer.stride, layer.stride),
        "padding": (layer.padding, layer.padding),
    }

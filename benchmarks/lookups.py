"""The families of lookup layers: how a layer of a network becomes a node of a lutra graph.

Every family is a class of the protocol `Method`; another one is a class more, named in `FAMILIES`.
Nothing is trained: tensors are random, but of the sizes, ranges and distributions of trained ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.networks import Conv, Linear
from lutra.ops.limits import INT8_MAX
from lutra.ops.lookup import bits_for, pack_weights

Array = NDArray[Any]

#: Activations are clipped at so many times their root mean square, and so are the weights that
#: become indices.
CLIP: Final = 3.0
#: Width of the activation grids of int8 layers, the default of training.
INT8_ACT_BITS: Final = 7


@dataclass(frozen=True)
class Range:
    """What is known of a value: its root mean square, and whether it goes below zero."""

    rms: float
    signed: bool

    def grid(self, bits: int) -> dict[str, Any]:
        """The attributes of a grid of so many bits for these values."""
        zero = 2 ** (bits - 1) if self.signed else 0
        scale = CLIP * self.rms / (2**bits - 1 - zero)
        return {"act_scale": scale, "act_zero": zero, "act_bits": bits}

    def on_grid(self, values: Array, bits: int) -> Array:
        """Values in units of the root mean square, as uint8 on the grid of so many bits."""
        grid = self.grid(bits)
        steps = np.rint(values * np.float32(self.rms / grid["act_scale"])) + grid["act_zero"]
        levels: Array = np.clip(steps, 0, 2**bits - 1).astype(np.uint8)
        return levels


class Parts(NamedTuple):
    """A node, but for its name and its input."""

    op: str
    attrs: dict[str, Any]
    tensors: dict[str, Array]


class Method(Protocol):
    """A family of lookup layers with its settings; `str` gives its title in tables.

    Attributes:
        family: Its name, for `--method` and for the field `method` of a record.
        options: The options of the command line that choose among settings of this family.
    """

    family: ClassVar[str]
    options: ClassVar[tuple[str, ...]]

    @property
    def choices(self) -> dict[str, str]:
        """The value of each of these options that stands for these settings."""

    def columns(self) -> dict[str, Any]:
        """The settings, as a record names them."""

    def node(self, layer: Conv | Linear, was: Range, rng: np.random.Generator) -> Parts:
        """The layer in this family; its outputs have a variance of about 1.

        Args:
            layer: The layer.
            was: What it reads.
            rng: What makes its tensors.
        """


@dataclass(frozen=True)
class Pq:
    """Product quantisation.

    Attributes:
        encoder: "nearest" (the nearest of K centroids) or "tree" (log2 K comparisons).
        v: Values per sub-vector; 1x1 convolutions take `POINTWISE_V`, but for groups of pixels.
        k: Entries of a table.
        group: What the sub-vectors of a convolution are cut from: its "patch", a "row" of the
            kernel or a "pixel"; see `lutra.ops.pq`.
    """

    family: ClassVar[str] = "pq"
    options: ClassVar[tuple[str, ...]] = ("encoder", "group", "v")
    #: Width of the activation grid, the default of training.
    ACT_BITS: ClassVar[int] = 6
    POINTWISE_V: ClassVar[int] = 4
    #: Standard deviation of the logarithm of the size of the entries of one codebook and output.
    #: Ranges of such columns in the zoo's ResNet-20 are 34 to 55 (median), 88 to 140 (95 of 100):
    #: 0.65 draws the like, 0.5 wider ones, on which AVX2 is slower.
    TABLE_SPREAD: ClassVar[float] = 0.5

    encoder: str = "nearest"
    v: int = 9
    k: int = 16
    group: str = "patch"

    def __str__(self) -> str:
        group = "" if self.group == "patch" else f"{self.group} "
        return f"{group}{self.encoder} V={self.v} K={self.k}"

    @property
    def choices(self) -> dict[str, str]:
        return {"encoder": self.encoder, "group": self.group, "v": str(self.v)}

    def columns(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "v": self.v, "k": self.k, "group": self.group}

    def node(self, layer: Conv | Linear, was: Range, rng: np.random.Generator) -> Parts:
        pointwise = isinstance(layer, Conv) and layer.kernel == 1 and self.group != "pixel"
        width = self.POINTWISE_V if pointwise else self.v
        parts = self._parts(layer)
        length = row_length(layer) // parts
        codebooks = -(-length // width)
        tensors = {}
        if self.encoder == "tree":
            tensors["splits"] = self._splits(rng, length, width)
            tensors["thresholds"] = self._activations(rng, was, codebooks, self.k - 1)
        else:
            centroids = self._activations(rng, was, codebooks, self.k, width)
            centroids[-1, :, length - (codebooks - 1) * width :] = 0
            tensors["centroids"] = centroids
        shape = (codebooks * parts, self.k, layer.outputs)
        tensors["tables"], unit = self._tables(rng, shape)
        tensors["scale"] = (unit / np.sqrt(shape[0])).astype(np.float32)
        tensors["bias"] = np.zeros(layer.outputs, np.float32)
        attrs = {**was.grid(self.ACT_BITS), "encoder": self.encoder, **row_attrs(layer)}
        if isinstance(layer, Linear):
            return Parts("pq_linear", attrs, tensors)
        return Parts("pq_conv2d", {**attrs, "group": self.group}, tensors)

    def _tables(self, rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[Array, Array]:
        """Tables and their units: normal entries with a variance of 1 in all, the largest of each
        output 127. How far those of a codebook and an output are apart differs, as in trained
        files, if less (`TABLE_SPREAD`)."""
        size = rng.lognormal(-(self.TABLE_SPREAD**2), self.TABLE_SPREAD, (shape[0], 1, shape[2]))
        return to_int8(rng.standard_normal(shape, np.float32) * size.astype(np.float32), (0, 1))

    def _parts(self, layer: Conv | Linear) -> int:
        """The parts of a row that have the same codebooks."""
        if isinstance(layer, Linear) or self.group == "patch":
            return 1
        rows, columns = layer.kernels
        return rows if self.group == "row" else rows * columns

    def _activations(self, rng: np.random.Generator, was: Range, *shape: int) -> Array:
        """Values as the layer meets them, on its grid."""
        x = rng.standard_normal(shape, np.float32)
        return was.on_grid(x if was.signed else np.abs(x), self.ACT_BITS)

    def _splits(self, rng: np.random.Generator, length: int, width: int) -> Array:
        """The entry of the row that each level of each codebook's tree compares, int32 (B, L)."""
        levels = self.k.bit_length() - 1
        splits = []
        for first in range(0, length, width):
            entries = min(width, length - first)
            splits.append(first + rng.choice(entries, levels, replace=entries < levels))
        return np.array(splits, np.int32)


@dataclass(frozen=True)
class Response:
    """Tables of activation index and weight index (Deep Lookup Network).

    The table is that of exact products, which training begins with.

    Attributes:
        levels: Rows of the table, activation indices: 4, 8, 16, 32 or 64.
        weights: Columns, weight indices: odd, 3 to 33.
    """

    family: ClassVar[str] = "lookup"
    options: ClassVar[tuple[str, ...]] = ("table",)

    levels: int = 16
    weights: int = 15

    def __str__(self) -> str:
        return f"table {self.levels}x{self.weights}"

    @property
    def choices(self) -> dict[str, str]:
        return {"table": f"{self.levels}x{self.weights}"}

    def columns(self) -> dict[str, Any]:
        return {"levels": self.levels, "weights": self.weights}

    def node(self, layer: Conv | Linear, was: Range, rng: np.random.Generator) -> Parts:
        bits, weight_bits = self.levels.bit_length() - 1, bits_for(self.weights)
        grid = was.grid(bits)
        table = self.table(grid["act_zero"])
        shape, half = (layer.outputs, row_length(layer)), self.weights // 2
        weight = np.rint(rng.standard_normal(shape, np.float32) * np.float32(half / CLIP))
        index = (np.clip(weight, -half, half) + half).astype(np.uint8)
        # What the layer meets: half of what a ReLU gives is 0.
        x = rng.standard_normal(4096, np.float32)
        rows = table[was.on_grid(x if was.signed else np.maximum(x, 0), bits)]
        squares = np.square(rows, dtype=np.float32).mean(0)  # by weight index
        spread = np.sqrt(shape[1] * squares[index].mean())
        tensors = {
            "weight": pack_weights(index, weight_bits),
            "table": table,
            "scale": np.full(layer.outputs, 1 / spread, np.float32),
            "bias": np.zeros(layer.outputs, np.float32),
        }
        attrs = {**grid, "weight_bits": weight_bits, **row_attrs(layer)}
        op = "lookup_conv2d" if isinstance(layer, Conv) else "lookup_linear"
        return Parts(op, attrs, tensors)

    def table(self, zero: int) -> Array:
        """Products of the values that the indices stand for, int8 (levels, weights).

        Args:
            zero: The activation index of 0.
        """
        half = self.weights // 2
        products = np.outer(np.arange(self.levels) - zero, np.arange(self.weights) - half)
        largest = (self.levels - 1 - zero) * half
        rounded = np.rint(products * (self.entries(zero) / largest))
        table: Array = np.clip(rounded, -INT8_MAX, INT8_MAX).astype(np.int8)
        return table

    def entries(self, zero: int) -> int:
        """The entry of the largest activation and weight, as training chooses it by itself.

        Where entries of a column are not far apart the kernels add up several in a byte: this is
        the largest multiple of the products for which they do.
        """
        top = self.levels - 1 - zero
        product = top * (self.weights // 2)
        most = {4: 15, 8: 63}.get(self.levels, 127) * top / (self.levels - 1)
        fitting = int(most // product) * product or product
        return min(fitting, int(INT8_MAX * top / max(zero, top)))


@dataclass(frozen=True)
class Multiplied:
    """No lookups: the layers that others look up are multiplied.

    Attributes:
        precision: "float32" or "int8".
    """

    family: ClassVar[str] = "dense"
    options: ClassVar[tuple[str, ...]] = ("precision",)

    precision: str = "int8"

    def __str__(self) -> str:
        return f"dense {self.precision}"

    @property
    def choices(self) -> dict[str, str]:
        return {"precision": self.precision}

    def columns(self) -> dict[str, Any]:
        return {"precision": self.precision}

    def node(self, layer: Conv | Linear, was: Range, rng: np.random.Generator) -> Parts:
        return multiplied(layer, was, self.precision, rng)


FAMILIES: Final[tuple[type[Method], ...]] = (Pq, Response, Multiplied)


def encoders(v: int = 9, k: int = 16, group: str = "patch") -> tuple[Pq, Pq]:
    """Product quantisation of this size with both encoders."""
    return Pq("nearest", v, k, group), Pq("tree", v, k, group)


#: Codes of kernel rows and of pixels, of convolutions that are larger than a pixel.
GROUPED: Final = (
    *encoders(3, group="row"),
    *(Pq("nearest", v, group="pixel") for v in (4, 8, 16)),
    Pq("tree", 4, group="pixel"),
)


def row_length(layer: Conv | Linear) -> int:
    """The inputs that one output is computed from."""
    return layer.inputs * (math.prod(layer.kernels) if isinstance(layer, Conv) else 1)


def row_attrs(layer: Conv | Linear) -> dict[str, Any]:
    """The attributes of every lookup layer that say which inputs an output is computed from."""
    if isinstance(layer, Linear):
        return {"in_features": layer.inputs}
    return {
        **window(layer),
        "in_channels": layer.inputs,
        "kernel": layer.kernels,
    }


def window(layer: Conv) -> dict[str, tuple[int, int]]:
    """Stride and padding."""
    return {
        "stride": (layer.stride, layer.stride),
        "padding": layer.padding,
    }


def to_int8(values: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Rounded to -127..127, and the units: the largest value over the axes is 127."""
    units = np.abs(values).max(axis=axes, keepdims=True) / 127
    return np.rint(values / units).astype(np.int8), units.reshape(-1)


def multiplied(layer: Conv | Linear, was: Range, dense: str, rng: np.random.Generator) -> Parts:
    """A layer that stays multiplied; its outputs have a variance of about 1.

    Args:
        layer: The layer.
        was: What it reads.
        dense: "float32" or "int8".
        rng: What makes its tensors.
    """
    shape: tuple[int, ...] = (layer.outputs, layer.inputs)
    op, attrs = "linear", dict[str, Any]()
    if isinstance(layer, Conv):
        shape = (layer.outputs, layer.inputs // layer.groups, *layer.kernels)
        op, attrs = "conv2d", {**window(layer), "groups": layer.groups}
    size = np.float32(was.rms**-1 * np.prod(shape[1:]) ** -0.5)
    tensors = {
        "weight": rng.standard_normal(shape, np.float32) * size,
        "bias": np.zeros(layer.outputs, np.float32),
    }
    if dense == "int8":
        grid = was.grid(INT8_ACT_BITS)
        op, attrs = f"int8_{op}", attrs | grid
        tensors["weight"], unit = to_int8(tensors["weight"], tuple(range(1, len(shape))))
        tensors["scale"] = (unit * grid["act_scale"]).astype(np.float32)
    return Parts(op, attrs, tensors)

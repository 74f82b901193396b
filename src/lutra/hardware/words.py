"""A layer as the words that an accelerator takes and gives, in the order of its streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lutra.hardware.design import Design
from lutra.hardware.layer import TableLayer
from lutra.node import Array

__all__ = ["Words", "layer_words", "pack", "product_words"]


@dataclass(frozen=True)
class Words:
    """What goes in and must come out, one integer for each word of a stream.

    Attributes:
        commands: Rows, codebooks and tiles of every pass.
        command: The same, packed.
        codebook: Centroids or thresholds.
        x: Sub-vectors.
        tables: Table entries.
        code: The codes that the encoder must make.
        sums: The sums that must come out.
    """

    commands: tuple[tuple[int, int, int], ...]
    command: list[int]
    codebook: list[int]
    x: list[int]
    tables: list[int]
    code: list[int]
    sums: list[int]

    @property
    def inputs(self) -> dict[str, list[int]]:
        """The input streams that have words, the command first."""
        streams = {
            "command": self.command, "codebook": self.codebook, "x": self.x, "tables": self.tables
        }  # fmt: skip
        return {name: words for name, words in streams.items() if words}


def pack(values: Iterable[int], bits: int) -> int:
    """Packs numbers into a word, the first one in the lowest bits, in two's complement."""
    word, mask, place = 0, (1 << bits) - 1, 0
    for value in values:
        word |= (int(value) & mask) << place
        place += bits
    return word


def pack_all(rows: Array, bits: int) -> list[int]:
    """Packs every row of an array (N, C)."""
    if bits == 8:
        return [int.from_bytes(row.astype(np.uint8).tobytes(), "little") for row in rows]
    return [pack(row, bits) for row in rows.tolist()]


def unpack(words: list[int], bits: int, count: int) -> Array:
    """The signed numbers of words, int64 (words, count)."""
    mask, sign = (1 << bits) - 1, 1 << (bits - 1)
    numbers = [[(word >> bits * i & mask ^ sign) - sign for i in range(count)] for word in words]
    return np.array(numbers, np.int64).reshape(len(words), count)


def passes_of(layer: TableLayer, design: Design) -> Iterator[tuple[slice, int]]:
    """The rows of each pass, and its number of tiles."""
    tiles = -(-layer.shape[2] // design.tile)
    for first in range(0, layer.rows, design.rows):
        yield slice(first, min(first + design.rows, layer.rows)), tiles


def layer_words(layer: TableLayer, design: Design) -> Words:
    """The streams of a layer, and what must come out.

    Args:
        layer: The layer with its rows.
        design: What the accelerator is built for.

    Raises:
        HardwareError: If the layer does not fit the design.
    """
    layer.check(design)
    b, k, m = layer.shape
    tiles = -(-m // design.tile)
    padded = np.zeros((b, k, tiles * design.tile), np.int8)
    padded[:, :, :m] = layer.tables
    books = _codebook_words(layer, design)
    # (tile, b, k, outputs of a beat)
    ordered = padded.reshape(b, k, tiles, design.tile).transpose(2, 0, 1, 3)
    tables = pack_all(ordered.reshape(-1, design.beat), design.table_bits)
    sums = np.zeros((layer.rows, tiles * design.tile), np.int64)
    sums[:, :m] = layer.sums
    made = Words((), [], [], [], [], [], [])
    row_bits = design.rows.bit_length()
    commands = []
    for rows, count in passes_of(layer, design):
        size = rows.stop - rows.start
        commands.append((size, b, count))
        made.command.append(size | b << row_bits | count << (row_bits + 16))
        made.codebook.extend(books)
        x = layer.subvectors[rows].transpose(1, 0, 2).reshape(-1, layer.v)
        made.x.extend(pack_all(x, design.act_bits))
        made.tables.extend(tables)
        made.code.extend(layer.codes[rows].T.ravel().tolist())
        out = sums[rows].reshape(size, tiles, design.tile).transpose(1, 0, 2)
        made.sums.extend(pack_all(out.reshape(-1, design.tile), design.sum_bits))
    return Words(
        tuple(commands), made.command, made.codebook, made.x, made.tables, made.code, made.sums
    )


def _codebook_words(layer: TableLayer, design: Design) -> list[int]:
    if layer.encoder == "tree":
        return [int(value) for value in layer.codebooks.ravel()]
    centroids = layer.codebooks.reshape(-1, layer.v)
    words = pack_all(centroids, design.act_bits)
    if layer.encoder != "l2":
        return words
    half = (centroids.astype(np.int64) ** 2).sum(axis=1) >> 1
    place = design.v * design.act_bits
    return [word | int(h) << place for word, h in zip(words, half, strict=True)]


def product_words(x: Array, weights: Array, design: Design) -> Words:
    """The streams of a dense layer for a design that multiplies, and what must come out.

    Args:
        x: Activations in parts, uint8 (R, B, V), 0 beyond the end of a row.
        weights: int8 (B, V, M)
        design: A design with ``multiply``.
    """
    b, v, m = weights.shape
    tiles = -(-m // design.tile)
    padded = np.zeros((b, v, tiles * design.tile), np.int8)
    padded[:, :, :m] = weights
    ordered = padded.reshape(b, v, tiles, design.tile).transpose(2, 0, 1, 3)
    tables = pack_all(ordered.reshape(-1, design.beat), design.table_bits)
    sums = np.einsum("rbv,bvm->rm", x.astype(np.int64), padded.astype(np.int64))
    row_bits = design.rows.bit_length()
    commands, made = [], Words((), [], [], [], [], [], [])
    for first in range(0, len(x), design.rows):
        part = slice(first, first + design.rows)
        size = len(x[part])
        commands.append((size, b, tiles))
        made.command.append(size | b << row_bits | tiles << (row_bits + 16))
        made.x.extend(pack_all(x[part].transpose(1, 0, 2).reshape(-1, v), design.act_bits))
        made.tables.extend(tables)
        out = sums[part].reshape(size, tiles, design.tile).transpose(1, 0, 2)
        made.sums.extend(pack_all(out.reshape(-1, design.tile), design.sum_bits))
    return Words(tuple(commands), made.command, [], made.x, made.tables, [], made.sums)

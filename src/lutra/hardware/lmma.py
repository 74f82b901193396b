"""A unit for products with weights of 1 to 4 bits, as in LUT Tensor Core (arXiv 2408.06003).

A code ``q`` of ``bits`` bits stands for the level ``2 q - (2**bits - 1)``: the sum of its planes
as -1 and +1, plane ``i`` worth ``2**i``. For four activations ``x`` a plane adds one of 16 sums of
``+-x``; sums of opposite signs are half of them, so a table has 8 entries, and the bit of the last
weight is the sign::

    entry[e] = -x3 + sum_{i<3} (x_i if bit i of e else -x_i)            e = 0..7
    index of a plane (b0, b1, b2, b3): e = (b2 b1 b0), or its complement where b3 is 1; sign = b3
    sum += +-entry[e] << plane

A ternary weight -1, 0, 1 is half the sum of two planes that are both worth 1: the planes of its
code 0, 1, 2 are (0, 0), (1, 0), (1, 1). Their sums are even, and the unit gives the half.

The complement is made when weights are packed (``lmma_words``), so that the circuit has none. A
tile is ``rows`` x ``columns`` x 4, by default 2 x 64 x 4 as in the paper: few rows, because tables
are dear to spread, many columns, because indices are cheap.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from lutra.hardware.design import HardwareError
from lutra.hardware.words import pack_all
from lutra.node import Array

__all__ = ["GROUP", "LmmaDesign", "lmma_cycles", "lmma_levels", "lmma_sums", "lmma_words"]

#: Weights that share an index.
GROUP = 4
#: Bits of the counts of a command.
COUNT_BITS = 16


@dataclass(frozen=True)
class LmmaDesign:
    """What such a unit is built for.

    Attributes:
        bits: Bits of a weight, 1 to 4.
        rows: Rows of activations of a tile.
        columns: Outputs of a tile.
        sum_bits: Bits of a sum, 12 to 32.
        ternary: Whether weights are ternary, which takes ``bits=2``.

    Raises:
        HardwareError: If a parameter is out of its range.
    """

    bits: int = 2
    rows: int = 2
    columns: int = 64
    sum_bits: int = 24
    ternary: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("bits", 1, 4), ("rows", 1, 16), ("columns", 1, 256), ("sum_bits", 12, 32)
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise HardwareError(
                    f"LmmaDesign: {name}={value!r}; it must be a whole number in {low}..{high}"
                )

        if self.ternary and self.bits != 2:
            raise HardwareError(
                f"LmmaDesign: bits={self.bits} with ternary=True; a ternary weight has two planes, "
                "so give it bits=2"
            )

    def plane_shift(self, plane: int) -> int:
        """By how many bits a plane's sum is shifted."""
        return 0 if self.ternary else plane

    def to_json(self) -> str:
        """The parameters as JSON, in a fixed order."""
        return json.dumps(asdict(self), sort_keys=True)


def lmma_planes(codes: Array, design: LmmaDesign) -> Array:
    """The bit planes of codes (M, D), lowest first: uint8 (M, bits, D)."""
    if design.ternary:
        return np.stack([codes > 0, codes > 1], axis=1).astype(np.uint8)
    return (codes[:, None] >> np.arange(design.bits, dtype=np.uint8)[:, None]) & 1


def lmma_levels(codes: Array, design: LmmaDesign) -> Array:
    """What codes (M, D) stand for, int64, as in ``lutra.reference.lowbit``."""
    worth = np.array([1 << design.plane_shift(i) for i in range(design.bits)], np.int64)
    signs = 2 * lmma_planes(codes, design).astype(np.int64) - 1
    levels: Array = (signs * worth[:, None]).sum(axis=1)
    return levels // 2 if design.ternary else levels


def lmma_sums(x: Array, codes: Array, design: LmmaDesign, group: int | None = None) -> Array:
    """The sums of levels times activations: those of ``lutra.reference.lowbit.lowbit_sums``.

    Args:
        x: int8 (R, D)
        codes: uint8 (M, D), below ``2**bits``; ternary ones below 3.
        design: What the unit is built for.
        group: Neighbouring inputs that are added; divides D. None: all.

    Returns:
        int64 (R, D / group, M)
    """
    size = group or x.shape[1]
    acts = x.astype(np.int64).reshape(len(x), -1, size).transpose(1, 0, 2)
    levels = lmma_levels(codes, design).reshape(len(codes), -1, size).transpose(1, 2, 0)
    sums: Array = (acts @ levels).transpose(1, 0, 2)
    return sums


def lmma_words(
    x: Array, codes: Array, design: LmmaDesign, group: int | None = None
) -> dict[str, list[int]]:
    """The streams of a product, and the sums that must come out.

    Args:
        x: int8 (R, D)
        codes: uint8 (M, D), below ``2**bits``; ternary ones below 3.
        design: What the unit is built for.
        group: Neighbouring inputs that are added; divides D. Each group is a product of its own,
            one after the other. None: all inputs.

    Raises:
        HardwareError: If a sum does not fit, or the product has too many groups or tiles.
    """
    size = group or x.shape[1]
    steps = -(-size // GROUP)
    tiles = _tiles(design, len(x), len(codes)) * (x.shape[1] // size)
    for what, count in (("groups of four inputs", steps), ("tiles", tiles)):
        if count >= 1 << COUNT_BITS:
            raise HardwareError(
                f"the product has {count:,} {what}, and a command counts {COUNT_BITS} bits of "
                "them; give it fewer rows, or larger tiles"
            )
    made: dict[str, list[int]] = {
        "command": [steps | tiles << COUNT_BITS], "x": [], "weights": [], "sums": [],
    }  # fmt: skip
    for first in range(0, x.shape[1], size):
        part = slice(first, first + size)
        _add_words(made, x[:, part], codes[:, part], design)
    return made


def _tiles(design: LmmaDesign, count: int, outputs: int) -> int:
    return -(-count // design.rows) * -(-outputs // design.columns)


def _add_words(made: dict[str, list[int]], x: Array, codes: Array, design: LmmaDesign) -> None:
    """Adds the words of one product to the streams."""
    (count, depth), outputs = x.shape, len(codes)
    groups = -(-depth // GROUP)
    row_tiles, column_tiles = -(-count // design.rows), -(-outputs // design.columns)
    # Activations beyond the end are 0, whatever their weights.
    acts = np.zeros((row_tiles * design.rows, groups * GROUP), np.int64)
    acts[:count, :depth] = x
    weights = np.zeros((column_tiles * design.columns, groups * GROUP), np.uint8)
    weights[:outputs, :depth] = codes
    sums = lmma_sums(acts, weights, design)[:, 0]
    if int(np.abs(sums).max(initial=0)) >= 2 ** (design.sum_bits - 1):
        raise HardwareError(f"sums do not fit {design.sum_bits} bits; give the design more")
    split = lmma_planes(weights, design).reshape(len(weights), design.bits, groups, GROUP)
    sign = split[..., 3]
    low = split[..., :3] ^ sign[..., None]
    index = low[..., 0] | low[..., 1] << 1 | low[..., 2] << 2 | sign << 3  # (M, bits, groups)
    tiles = index.reshape(column_tiles, design.columns, design.bits, groups).transpose(0, 3, 2, 1)
    one_column = pack_all(tiles.reshape(-1, design.columns), GROUP)
    size = groups * design.bits
    each = acts.reshape(row_tiles, design.rows, groups, GROUP).transpose(0, 2, 1, 3)
    one_row = pack_all(each.reshape(-1, design.rows * GROUP), 8)
    out = sums.reshape(row_tiles, design.rows, column_tiles, design.columns).transpose(0, 2, 1, 3)
    made["sums"] += pack_all(out.reshape(-1, design.rows * design.columns), design.sum_bits)
    for r in range(row_tiles):
        made["x"] += one_row[r * groups : (r + 1) * groups] * column_tiles
        made["weights"] += one_column[: column_tiles * size]


def lmma_cycles(
    design: LmmaDesign, count: int, depth: int, outputs: int, group: int | None = None
) -> int:
    """Cycles from the command to the last sums, where no stream waits: one for each plane of each
    group of four of each tile, one for the first table, one for the last sum.

    Args:
        design: What the unit is built for.
        count: Rows of activations.
        depth: Inputs.
        outputs: Outputs.
        group: Neighbouring inputs that are added; divides ``depth``. None: all.
    """
    size = group or depth
    steps = depth // size * -(-size // GROUP)
    return _tiles(design, count, outputs) * steps * design.bits + 2

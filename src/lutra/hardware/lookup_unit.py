"""A unit for layers of one response table (`Lookup`), as in Deep Lookup Network (arXiv 2509.13662).

An activation index picks a row of the table, the weight index of each output an entry of that row;
entries are added. A row of a layer takes ``depth`` cycles for a tile of outputs::

    x (index) -> [table: one row of all columns] -> a multiplexer and an adder for each output

The table is loaded once for a pass. Weights come as a stream, a word of ``tile`` indices for each
activation.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from lutra.hardware.design import HardwareError
from lutra.hardware.words import pack_all
from lutra.node import Array
from lutra.ops.limits import LOOKUP_ACT_BITS, MAX_WEIGHTS, MIN_WEIGHTS

__all__ = ["COUNT_BITS", "LookupDesign", "lookup_cycles", "lookup_words"]

#: Bits of the counts of a command: inputs of a layer; its rows times tiles.
COUNT_BITS = 24


@dataclass(frozen=True)
class LookupDesign:
    """What a lookup unit is built for.

    Attributes:
        act_bits: Bits of an activation index, 2 to 6.
        weights: Columns of the table, 3 to 33.
        tile: Outputs of a row that are added in one cycle.
        sum_bits: Bits of a sum, 8 to 32.

    Raises:
        HardwareError: If a parameter is out of its range.
    """

    act_bits: int = 4
    weights: int = 15
    tile: int = 16
    sum_bits: int = 24

    def __post_init__(self) -> None:
        for name, low, high in (
            ("act_bits", LOOKUP_ACT_BITS[0], LOOKUP_ACT_BITS[-1]),
            ("weights", MIN_WEIGHTS, MAX_WEIGHTS),
            ("tile", 1, 256),
            ("sum_bits", 8, 32),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise HardwareError(
                    f"LookupDesign: {name}={value!r}; it must be a whole number in {low}..{high}"
                )

    @property
    def weight_bits(self) -> int:
        """Bits of a weight index."""
        return (self.weights - 1).bit_length()

    def to_json(self) -> str:
        """The parameters as JSON, in a fixed order."""
        return json.dumps(asdict(self), sort_keys=True)


def lookup_words(
    rows: Array, weight: Array, table: Array, design: LookupDesign
) -> dict[str, list[int]]:
    """The streams of a layer, and the sums that must come out.

    Args:
        rows: Activation indices, uint8 (R, D)
        weight: Weight indices, uint8 (M, D)
        table: int8 (2**act_bits, weights)
        design: What the unit is built for.

    Raises:
        HardwareError: If the layer does not fit the design.
    """
    if table.shape != (2**design.act_bits, design.weights):
        raise HardwareError(
            f"the layer has a table of shape {table.shape}, and the design takes "
            f"{(2**design.act_bits, design.weights)}; give the design what the layer has"
        )
    outputs, depth = weight.shape
    tiles = -(-outputs // design.tile)
    padded = np.zeros((tiles * design.tile, depth), np.uint8)
    padded[:outputs] = weight
    each = padded.reshape(tiles, design.tile, depth).transpose(0, 2, 1)  # (tiles, D, tile)
    sums = np.zeros((len(rows), tiles * design.tile), np.int64)
    for m, indices in enumerate(padded):
        sums[:, m] = table[rows, indices].astype(np.int64).sum(axis=1)
    if int(np.abs(sums).max(initial=0)) >= 2 ** (design.sum_bits - 1):
        raise HardwareError(f"sums do not fit {design.sum_bits} bits; give the design more")
    one_pass = pack_all(each.reshape(-1, design.tile), design.weight_bits)
    # A tile takes all rows, then the next tile follows.
    weights: list[int] = []
    for t in range(tiles):
        weights += one_pass[t * depth : (t + 1) * depth] * len(rows)
    out = sums.reshape(len(rows), tiles, design.tile).transpose(1, 0, 2)
    return {
        "command": [depth | len(rows) * tiles << COUNT_BITS],
        "table": pack_all(table.reshape(len(table), -1), 8),
        "x": rows.ravel().tolist() * tiles,
        "weights": weights,
        "sums": pack_all(out.reshape(-1, design.tile), design.sum_bits),
    }


def lookup_cycles(design: LookupDesign, depth: int, rows: int, outputs: int) -> int:
    """Cycles from the command to the last sums, where no stream waits.

    The table takes a cycle for each activation index; then every activation takes one for each
    tile, and the last sums come two cycles after the last activation.

    Args:
        design: What the unit is built for.
        depth: Inputs of the layer.
        rows: Rows.
        outputs: Outputs.
    """
    return (1 << design.act_bits) + depth * rows * -(-outputs // design.tile) + 3

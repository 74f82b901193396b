"""The parameters of a generated accelerator."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from lutra.errors import LutraError
from lutra.ops.limits import CENTROID_COUNTS, MAX_ACT_BITS, MAX_SUBVECTOR

__all__ = ["ENCODERS", "Design", "HardwareError"]

#: How an accelerator finds codes: the nearest centroid by a distance, or a decision tree.
ENCODERS: Final = ("l2", "l1", "chebyshev", "tree")
_MAX_TILE: Final = 256
_MAX_ROWS: Final = 2**16
_MAX_CODES: Final = 2**22


class HardwareError(LutraError, ValueError):
    """A design that cannot be built, or a layer that does not fit a design."""


@dataclass(frozen=True)
class Design:
    """What an accelerator is built for.

    A layer of ``R`` rows, ``B`` codebooks and ``M`` outputs runs in tiles of ``tile`` outputs. Each
    tile takes one table after the other, adds the entries that the rows pick to their partial
    sums, and gives the sums with the last table.

    Attributes:
        encoder: ``"l2"``, ``"l1"`` or ``"chebyshev"``: the nearest of ``k`` centroids by that
            distance, the lowest index on ties; or ``"tree"``: a decision tree with ``k`` leaves.
        k: Codes of a codebook: 8, 16, 32 or 64.
        v: Values of a sub-vector, 1 to 64. A tree looks at ``log2(k)`` values whatever this says.
        tile: Outputs that are added in one cycle.
        elements: Distance elements of the encoder, a divisor of ``k``. A code takes
            ``k / elements`` cycles. 0 means ``k``. A tree has one comparator for each level.
        beat: Table entries that are loaded in one cycle, a divisor of ``tile``. 0 means ``tile``.
        rows: Partial sums of a tile that are kept, so the rows of one pass.
        codes: Codes that are kept for the second tile and later ones. With 0 there is one tile.
        fifo: Codes that may wait between encoder and tables.
        act_bits: Bits of an activation, 1 to 7.
        table_bits: Bits of a table entry, 2 to 8.
        sum_bits: Bits of a partial sum, up to 32.
        two_clocks: Whether the encoder has a clock of its own, with an asynchronous FIFO of codes
            between it and the tables.
        multiply: Whether to multiply instead: activations come with ``v`` weights for each output
            of the tile, without encoder or tables. This is the plain array of int8 multipliers
            that designs are compared with.

    Raises:
        HardwareError: If a parameter is out of its range.

    Example:
        >>> from lutra.hardware import Design
        >>> Design(encoder="l2", k=16, v=9, tile=16, elements=4).passes
        4
    """

    encoder: str = "l2"
    k: int = 16
    v: int = 4
    tile: int = 16
    elements: int = 0
    beat: int = 0
    rows: int = 256
    codes: int = 0
    fifo: int = 32
    act_bits: int = 7
    table_bits: int = 8
    sum_bits: int = 24
    two_clocks: bool = False
    multiply: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if type(value) is not kind:
                raise HardwareError(f"Design: {field.name}={value!r} is no {kind.__name__}")
        _choice("encoder", self.encoder, ENCODERS)
        _choice("k", self.k, CENTROID_COUNTS)
        for name, low, high in (
            ("v", 1, MAX_SUBVECTOR),
            ("tile", 1, _MAX_TILE),
            ("rows", 1, _MAX_ROWS),
            ("codes", 0, _MAX_CODES),
            ("fifo", 2, 1024),
            ("act_bits", 1, MAX_ACT_BITS),
            ("table_bits", 2, 8),
            ("sum_bits", self.table_bits, 32),
        ):
            if not low <= getattr(self, name) <= high:
                raise HardwareError(
                    f"Design: {name}={getattr(self, name)}; it must be in {low}..{high}"
                )
        for name, whole in (("elements", self.k), ("beat", self.tile)):
            part = getattr(self, name) or whole
            object.__setattr__(self, name, part)
            if part < 1 or whole % part:
                raise HardwareError(f"Design: {name}={part} does not divide {whole}; use a divisor")
        if self.two_clocks and self.fifo & (self.fifo - 1):
            raise HardwareError(
                f"Design: fifo={self.fifo} with two clocks; an asynchronous FIFO needs a power of 2"
            )

    @property
    def top(self) -> int:
        """The largest activation."""
        return (1 << self.act_bits) - 1

    @property
    def levels(self) -> int:
        """Bits of a code, which are the levels of a tree."""
        return self.k.bit_length() - 1

    @property
    def width(self) -> int:
        """Activations that a code is made of: ``v``, or the levels of a tree."""
        return self.levels if self.encoder == "tree" and not self.multiply else self.v

    @property
    def passes(self) -> int:
        """Cycles that the encoder takes for one code."""
        return 1 if self.encoder == "tree" or self.multiply else self.k // self.elements

    @property
    def stages(self) -> int:
        """Pipeline stages of the encoder behind its first register."""
        return self.levels if self.encoder == "tree" else self.elements

    @property
    def codebook_beats(self) -> int:
        """Words of a codebook: a centroid or a threshold each."""
        return self.k - 1 if self.encoder == "tree" else self.k

    @property
    def codebook_bits(self) -> int:
        """Bits of such a word."""
        if self.encoder == "tree":
            return self.act_bits + 1
        return self.v * self.act_bits + (self.half_bits if self.encoder == "l2" else 0)

    @property
    def half_bits(self) -> int:
        """Bits of half the square of a centroid."""
        return max(1, ((self.v * self.top * self.top) >> 1).bit_length())

    @property
    def score_bits(self) -> int:
        """Bits of a distance; of L2 it is a signed score."""
        top = self.top
        if self.encoder == "l2":
            return (self.v * top * top).bit_length() + 1
        return self.act_bits if self.encoder == "chebyshev" else (self.v * top).bit_length()

    @property
    def table_rows(self) -> int:
        """Rows of one table: its codes, or of multipliers the activations of a sub-vector."""
        return self.v if self.multiply else self.k

    @property
    def table_beats(self) -> int:
        """Words of one table of a tile."""
        return self.table_rows * (self.tile // self.beat)

    def to_json(self) -> str:
        """The parameters as JSON, in a fixed order."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Design:
        """A design from its parameters by name.

        Raises:
            HardwareError: If there is no such parameter, or one is out of its range.
        """
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise HardwareError(f"Design: no parameter {name!r}; choose from {sorted(known)}")
        return cls(**values)


def _choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise HardwareError(f"Design: {name}={value!r}; choose from {choices}")

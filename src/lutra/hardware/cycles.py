"""How many cycles an accelerator takes: exactly those of the simulation, computed from events.

The model holds for one clock and streams that never wait. An event is a cycle in which something is
taken; each is the latest of what it waits for:

* a word of a codebook: the word before it, and its bank, which is free one cycle after the last row
  of the codebook before the last has passed the chain;
* a sub-vector: the one before it (``passes`` cycles), its codebook, and a place in the FIFO, which
  is free one cycle after the code ``fifo`` places earlier was taken;
* a code: the one before it, its table, and the encoder, ``passes + stages + 1`` cycles after the
  sub-vector entered;
* a word of a table: the word before it, and its bank, which is free two cycles after the last row
  of the table before the last was taken.

The last sum comes out two cycles after the last code is taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lutra.hardware.design import Design

__all__ = ["Timing", "count_cycles", "pass_commands"]


@dataclass(frozen=True)
class Timing:
    """The cycles of a layer.

    Attributes:
        cycles: From the first command to the last sum, both counted.
        lookups: Cycles in which a code is taken: table rows that are read.
        table_words: Words of tables that are loaded.
        codebook_words: Words of codebooks that are loaded.
    """

    cycles: int
    lookups: int
    table_words: int
    codebook_words: int

    @property
    def utilisation(self) -> float:
        """The part of all cycles in which a code is taken."""
        return self.lookups / self.cycles


def pass_commands(design: Design, rows: int, codebooks: int, outputs: int) -> list[tuple[int, ...]]:
    """The commands of a layer: rows, codebooks and tiles of each pass."""
    tiles = -(-outputs // design.tile)
    sizes = [design.rows] * (rows // design.rows) + [rows % design.rows] * (rows % design.rows > 0)
    return [(size, codebooks, tiles) for size in sizes]


class _Model:
    """The times of the latest events."""

    def __init__(self, design: Design) -> None:
        self.design = design
        self.latency = design.passes + design.stages
        self.entered = -(10**9)  # the last sub-vector
        self.taken = -(10**9)  # the last code
        self.popped: deque[int] = deque([-(10**9)] * design.fifo, maxlen=design.fifo)
        # The last word that was loaded, and when the banks of the last two are free.
        self.codebook_end = self.table_end = -1
        self.codebook_free: deque[int] = deque([0, 0], maxlen=2)
        self.table_free: deque[int] = deque([0, 0], maxlen=2)

    def load_table(self) -> int:
        """The first cycle in which codes may read the next table."""
        start = max(self.table_end + 1, self.table_free[0])
        self.table_end = start + self.design.table_beats - 1
        return self.table_end + 1

    def first_tile(self, start: int, rows: int) -> None:
        """One codebook of the first tile."""
        design = self.design
        table = max(start + 1, self.load_table())
        if design.multiply:
            self.taken = max(self.taken + 1, table) + rows - 1
        else:
            begin = max(self.codebook_end + 1, self.codebook_free[0])
            self.codebook_end = begin + design.codebook_beats - 1
            entered, taken = max(self.entered, start + 1 - design.passes), self.taken
            entered = max(entered, self.codebook_end + 1 - design.passes)
            taken = max(taken, table - 1)
            behind, passes, popped = self.latency + 1, design.passes, self.popped
            for _ in range(rows):
                entered = max(entered + passes, popped[0] + 1)
                taken = max(taken + 1, entered + behind)
                popped.append(taken)
            self.entered, self.taken = entered, taken
            self.codebook_free.append(entered + self.latency + 1)
        self.table_free.append(self.taken + 2)

    def later_tile(self, rows: int) -> None:
        """One codebook of another tile, whose codes are kept."""
        self.taken = max(self.taken + 1, self.load_table()) + rows - 1
        self.table_free.append(self.taken + 2)

    def state(self) -> tuple[int, ...]:
        """All that matters for what follows, relative to the last code."""
        times = (
            self.entered, self.codebook_end, self.table_end,
            *self.popped, *self.codebook_free, *self.table_free,
        )  # fmt: skip
        return tuple(max(time - self.taken, -(10**6)) for time in times)

    def shift(self, by: int) -> None:
        """Moves every event to a later time."""
        self.entered += by
        self.taken += by
        self.codebook_end += by
        self.table_end += by
        for times in (self.popped, self.codebook_free, self.table_free):
            shifted = [time + by for time in times]
            times.extend(shifted)


def count_cycles(design: Design, commands: Iterable[Sequence[int]]) -> Timing:
    """The cycles of passes that follow each other.

    Args:
        design: What the accelerator is built for. It has one clock.
        commands: Rows, codebooks and tiles of each pass.

    Raises:
        ValueError: If the design has two clocks: their phases are not known.

    Example:
        >>> from lutra.hardware import Design, count_cycles
        >>> count_cycles(Design(k=16, v=4, tile=16, elements=16), [(256, 18, 1)]).cycles
        4644
    """
    if design.two_clocks:
        raise ValueError("count_cycles: a design with two clocks has no fixed number of cycles")
    model = _Model(design)
    start = lookups = tables = codebooks = 0
    for number, (rows, books, tiles) in enumerate(commands):
        start = max(start + 1, model.taken + 1) if number else 0
        _repeat(model, books, lambda: model.first_tile(start, rows))  # noqa: B023
        _repeat(model, books * (tiles - 1), lambda: model.later_tile(rows))  # noqa: B023
        lookups += rows * books * tiles
        tables += books * tiles
        codebooks += books
    return Timing(
        model.taken + 3,
        lookups,
        tables * design.table_beats,
        0 if design.multiply else codebooks * design.codebook_beats,
    )


def _repeat(model: _Model, count: int, step: Callable[[], None]) -> None:
    """Does a step several times. Once a step leaves everything as the step before did, only
    later, all further ones take as long."""
    before: tuple[int, ...] | None = None
    for done in range(1, count + 1):
        taken = model.taken
        step()
        after = model.state()
        if after == before:
            model.shift((count - done) * (model.taken - taken))
            return
        before = after

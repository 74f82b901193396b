"""The encoder: sub-vectors in, codes out (the CCM of LUT-DLA, arXiv 2501.10658).

Nearest centroid: a chain of distance elements. A sub-vector moves along the chain one element in a
cycle, with the best distance and index so far; an element compares its centroid and replaces them
where its own is strictly better, so that the lowest index wins ties. With fewer elements than
centroids a sub-vector enters the chain several times, and the last stage keeps the best of all
passes::

    x ---> [register] -> [element 0: c 0, 4, 8, ..] -> [element 1: c 1, 5, ..] -> .. -> best -> code

Tree: one comparator for each level. A level reads the threshold of its node, and appends a bit.

Centroids and thresholds have two banks: one is read while the other is loaded. The chain never
stalls: a sub-vector enters only where the FIFO of codes has room for all that are under way.
"""

from __future__ import annotations

from typing import Any

from amaranth import Cat, Const, Module, Mux, ResetSignal, Signal, signed, unsigned
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from lutra.hardware.design import Design

__all__ = ["DistanceEncoder", "TreeEncoder", "codebook_layout", "row_bits"]

#: Bits of the counters of codebooks and tiles.
COUNT_BITS = 16


def row_bits(design: Design) -> int:
    """Bits of a count of rows."""
    return design.rows.bit_length()


def codebook_layout(design: Design) -> Any:
    """The layout of a word of a codebook."""
    if design.encoder == "tree":
        return unsigned(design.codebook_bits)
    members: dict[str, Any] = {"values": data.ArrayLayout(unsigned(design.act_bits), design.v)}
    if design.encoder == "l2":
        members["half"] = unsigned(design.half_bits)
    return data.StructLayout(members)


class _Encoder(wiring.Component):
    """What both encoders share: ports, banks, and the counters in front of the pipeline."""

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "x": In(
                    stream.Signature(data.ArrayLayout(unsigned(design.act_bits), design.width))
                ),
                "codebook": In(stream.Signature(codebook_layout(design))),
                "code": Out(unsigned(design.levels)),
                "code_valid": Out(1),
                "room": In(unsigned(design.fifo.bit_length())),  # free places of the FIFO
                "start": In(1),
                "rows": In(unsigned(row_bits(design))),
                "codebooks": In(COUNT_BITS),
                "busy": Out(1),
            }
        )

    def front(self, m: Module, finished: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Banks, counters and the first register.

        Args:
            m: The module.
            finished: High in the cycle in which the last pass of the last row of a codebook is
                behind all memories of its bank.

        Returns:
            The first stage: valid, sub-vector, bank, pass, and whether it is the last row.
        """
        design, passes = self.design, self.design.passes
        # A bank is full until its last row is behind all memories, and may be entered until its
        # last row has entered.
        full, enterable, load_bank, read_bank = Signal(2), Signal(2), Signal(), Signal()
        free_bank = Signal()
        self.beat = Signal(range(design.codebook_beats))
        self.load_bank = load_bank
        # With two clocks the encoder leaves its reset later than those who feed it.
        awake = ~ResetSignal(allow_reset_less=True)
        m.d.comb += self.codebook.ready.eq(awake & ~full.bit_select(load_bank, 1))
        self.load = Signal()
        m.d.comb += self.load.eq(self.codebook.valid & self.codebook.ready)
        with m.If(self.load):
            m.d.sync += self.beat.eq(self.beat + 1)
            with m.If(self.beat == design.codebook_beats - 1):
                m.d.sync += [
                    self.beat.eq(0),
                    load_bank.eq(~load_bank),
                    full.bit_select(load_bank, 1).eq(1),
                    enterable.bit_select(load_bank, 1).eq(1),
                ]
        with m.If(finished):
            m.d.sync += [full.bit_select(free_bank, 1).eq(0), free_bank.eq(~free_bank)]

        rows, row = Signal(row_bits(design)), Signal(row_bits(design))
        left = Signal(COUNT_BITS)  # codebooks
        under_way = Signal(range(design.fifo + 1))
        phase = Signal(range(max(2, passes)))
        enter, last_row = Signal(), Signal()
        m.d.comb += [
            self.busy.eq(left != 0),
            last_row.eq(row == rows - 1),
            self.x.ready.eq(
                awake
                & self.busy
                & (phase == 0)
                & enterable.bit_select(read_bank, 1)
                & (under_way < self.room)
            ),
            enter.eq(self.x.valid & self.x.ready),
        ]
        with m.If(self.start):
            m.d.sync += [rows.eq(self.rows), row.eq(0), left.eq(self.codebooks)]
        m.d.sync += under_way.eq(under_way + enter - self.code_valid)

        valid, x = Signal(), Signal(self.x.payload.shape())
        bank, last, number = Signal(), Signal(), Signal(range(max(2, passes)))
        stepping = Signal()
        m.d.comb += stepping.eq(enter | (phase != 0))
        m.d.sync += valid.eq(stepping)
        with m.If(stepping):
            m.d.sync += [number.eq(phase), phase.eq(Mux(phase == passes - 1, 0, phase + 1))]
        with m.If(enter):
            m.d.sync += [x.eq(self.x.payload), bank.eq(read_bank), last.eq(last_row)]
            m.d.sync += row.eq(row + 1)
            with m.If(last_row):
                m.d.sync += [
                    row.eq(0),
                    left.eq(left - 1),
                    read_bank.eq(~read_bank),
                    enterable.bit_select(read_bank, 1).eq(0),
                ]
        return valid, x, bank, number, last


class DistanceEncoder(_Encoder):
    """The nearest centroid of each sub-vector."""

    def elaborate(self, platform: Any) -> Module:
        m, design = Module(), self.design
        passes, elements = design.passes, design.elements
        score_shape = signed(design.score_bits) if design.encoder == "l2" else design.score_bits
        finished = Signal()
        valid, x, bank, number, last = self.front(m, finished)
        best: Any = Signal(score_shape)
        which: Any = Const(0, 0)  # the best element so far
        step = elements.bit_length() - 1  # elements are a power of 2, as all divisors of k are
        number_of = Signal(range(max(2, passes)))  # pass and element of the word being loaded
        element_of = Signal(range(max(2, elements)))
        m.d.comb += [
            element_of.eq(self.beat[:step]),
            number_of.eq(self.beat[step:]),
        ]
        for e in range(elements):
            m.submodules[f"centroids_{e}"] = store = memory.Memory(
                shape=codebook_layout(design), depth=2 * passes, init=[]
            )
            write, read = store.write_port(), store.read_port(domain="comb")
            m.d.comb += [
                write.addr.eq(_place(passes, self.load_bank, number_of)),
                write.data.eq(self.codebook.payload),
                write.en.eq(self.load & (element_of == e)),
                read.addr.eq(_place(passes, bank, number)),
            ]
            score = Signal(score_shape, name=f"score_{e}")
            m.d.comb += score.eq(_score(design, x, read.data))
            better = Signal(name=f"better_{e}")
            m.d.comb += better.eq(1 if e == 0 else _better(design, score, best))
            next_valid, next_x = Signal(name=f"valid_{e}"), Signal(x.shape(), name=f"x_{e}")
            next_bank, next_number = Signal(name=f"bank_{e}"), Signal(number.shape())
            next_last = Signal(name=f"last_{e}")
            next_best = Signal(score_shape, name=f"best_{e}")
            next_which = Signal(e.bit_length(), name=f"which_{e}")
            m.d.sync += [
                next_valid.eq(valid),
                next_bank.eq(bank),
                next_number.eq(number),
                next_last.eq(last),
                next_x.eq(x),
                next_best.eq(Mux(better, score, best)),
                next_which.eq(Mux(better, e, which)),
            ]
            valid, x, bank, number, last = next_valid, next_x, next_bank, next_number, next_last
            best, which = next_best, next_which

        done, index = Signal(), Signal(design.levels)
        m.d.comb += index.eq(Cat(which, number) if passes > 1 else which)
        m.d.comb += done.eq(valid & (number == passes - 1))
        if passes == 1:
            m.d.comb += self.code.eq(index)
        else:
            kept, kept_index = Signal(score_shape), Signal(design.levels)
            take = Signal()
            m.d.comb += take.eq((number == 0) | _better(design, best, kept))
            m.d.comb += self.code.eq(Mux(take, index, kept_index))
            with m.If(valid & take):
                m.d.sync += [kept.eq(best), kept_index.eq(index)]
        m.d.comb += [self.code_valid.eq(done), finished.eq(done & last)]
        return m


def _place(passes: int, bank: Any, number: Any) -> Any:
    """The address of a centroid in its element."""
    return Cat(number, bank) if passes > 1 else bank


def _score(design: Design, x: Any, centroid: Any) -> Any:
    """The score of L2, which is higher for a nearer centroid, or the distance."""
    pairs = [(x[i], centroid.values[i]) for i in range(design.v)]
    if design.encoder == "l2":
        return _sum([a * c for a, c in pairs]) - centroid.half
    parts = [Mux(a > c, a - c, c - a)[: design.act_bits] for a, c in pairs]
    if design.encoder == "l1":
        return _sum(parts)
    while len(parts) > 1:  # the largest, by a tree of comparators
        rest = parts[len(parts) // 2 * 2 :]
        parts = [Mux(a > b, a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)] + rest
    return parts[0]


def _sum(parts: list[Any]) -> Any:
    """A sum as a balanced tree of adders."""
    while len(parts) > 1:
        rest = parts[len(parts) // 2 * 2 :]
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + rest
    return parts[0]


def _better(design: Design, score: Any, best: Any) -> Any:
    return score > best if design.encoder == "l2" else score < best


class TreeEncoder(_Encoder):
    """The leaf of each sub-vector: value ``l`` is what level ``l`` of the tree looks at."""

    def elaborate(self, platform: Any) -> Module:
        m, design = Module(), self.design
        finished = Signal()
        valid, x, bank, _, last = self.front(m, finished)
        node: Any = None  # bits so far; the root has none
        for level in range(design.levels):
            m.submodules[f"thresholds_{level}"] = store = memory.Memory(
                shape=unsigned(design.codebook_bits), depth=2 * 2**level, init=[]
            )
            write, read = store.write_port(), store.read_port(domain="comb")
            first = 2**level - 1  # heap index of the leftmost node of the level
            here = self.beat == 0
            if level:
                here = (self.beat >= first) & (self.beat < 2 * first + 1)
            m.d.comb += [
                write.addr.eq(Cat((self.beat - first)[:level], self.load_bank)),
                write.data.eq(self.codebook.payload),
                write.en.eq(self.load & here),
                read.addr.eq(bank if node is None else Cat(node, bank)),
            ]
            right = Signal(name=f"right_{level}")
            m.d.comb += right.eq(x[level] >= read.data)
            next_valid, next_x = Signal(name=f"valid_{level}"), Signal(x.shape(), name=f"x_{level}")
            next_bank, next_last = Signal(name=f"bank_{level}"), Signal(name=f"last_{level}")
            next_node = Signal(level + 1, name=f"node_{level}")
            m.d.sync += [
                next_valid.eq(valid),
                next_bank.eq(bank),
                next_last.eq(last),
                next_x.eq(x),
                next_node.eq(right if node is None else Cat(right, node)),
            ]
            valid, x, bank, last, node = next_valid, next_x, next_bank, next_last, next_node
        m.d.comb += [
            self.code.eq(node),
            self.code_valid.eq(valid),
            finished.eq(valid & last),
        ]
        return m

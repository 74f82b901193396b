"""The accumulator: codes in, sums out (the IMM of LUT-DLA, arXiv 2501.10658).

For one table of a tile all rows stream through, then the next table follows (LUT-stationary): a
table is loaded once for each tile, into one of two banks while the other is read. Three stages::

    A  take a code from the FIFO and keep it (first tile), or fetch a kept one (later tiles)
    B  read the table row of the code, and the partial sums of the row
    C  add; write back, or give the sums with the last table

All three advance together, unless sums wait to be taken. A partial sum that is written in one cycle
can be read in the same one, so that one row after the other and one row alone both work.

With ``multiply`` the codes are sub-vectors and a bank holds ``v`` weights for each output: stage B
multiplies and adds them. Nothing else differs, so that the two can be compared.
"""

from __future__ import annotations

from typing import Any

from amaranth import Array, Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from lutra.hardware.design import Design
from lutra.hardware.encoder import COUNT_BITS, row_bits

__all__ = ["Accumulator", "code_shape", "sums_shape", "table_shape"]


def code_shape(design: Design) -> Any:
    """What comes from the encoder for one row and codebook."""
    if design.multiply:
        return data.ArrayLayout(unsigned(design.act_bits), design.v)
    return unsigned(design.levels)


def table_shape(design: Design) -> Any:
    """A word of a table: neighbouring entries of one of its rows."""
    return data.ArrayLayout(signed(design.table_bits), design.beat)


def sums_shape(design: Design) -> Any:
    """The sums of a row for one tile."""
    return data.ArrayLayout(signed(design.sum_bits), design.tile)


class Accumulator(wiring.Component):
    """Partial sums of one tile, its tables, and the codes for later tiles."""

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "codes": In(stream.Signature(code_shape(design))),
                "tables": In(stream.Signature(table_shape(design))),
                "sums": Out(stream.Signature(sums_shape(design))),
                "start": In(1),
                "rows": In(unsigned(row_bits(design))),
                "codebooks": In(COUNT_BITS),
                "tiles": In(COUNT_BITS),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m, design = Module(), self.design
        advance = Signal()
        full = Signal(2)

        # Where the next code belongs.
        rows, codebooks, tiles = Signal(row_bits(design)), Signal(COUNT_BITS), Signal(COUNT_BITS)
        row, codebook, tile = Signal(row_bits(design)), Signal(COUNT_BITS), Signal(COUNT_BITS)
        bank = Signal()
        place = Signal(range(max(2, design.codes)))
        active, take, fetched = Signal(), Signal(), Signal()
        last_row, last_codebook, last_tile = Signal(), Signal(), Signal()
        m.d.comb += [
            self.busy.eq(active),
            fetched.eq(tile != 0),
            last_row.eq(row == rows - 1),
            last_codebook.eq(codebook == codebooks - 1),
            last_tile.eq(tile == tiles - 1),
            take.eq(advance & active & full.bit_select(bank, 1) & (fetched | self.codes.valid)),
            self.codes.ready.eq(take & ~fetched),
        ]
        with m.If(self.start):
            m.d.sync += [
                rows.eq(self.rows),
                codebooks.eq(self.codebooks),
                tiles.eq(self.tiles),
                active.eq(1),
            ]
        with m.If(take):
            m.d.sync += [row.eq(row + 1), place.eq(place + 1)]
            with m.If(last_row):
                m.d.sync += [row.eq(0), bank.eq(~bank), codebook.eq(codebook + 1)]
                with m.If(last_codebook):
                    m.d.sync += [codebook.eq(0), tile.eq(tile + 1), place.eq(0)]
                    with m.If(last_tile):
                        m.d.sync += [tile.eq(0), active.eq(0)]

        # A
        b_valid, b_first, b_last = Signal(), Signal(), Signal()
        b_last_row, b_bank, b_row = Signal(), Signal(), Signal(row_bits(design))
        b_taken = Signal(code_shape(design))
        with m.If(advance):
            m.d.sync += b_valid.eq(take)
        with m.If(take):
            m.d.sync += [
                b_first.eq(codebook == 0),
                b_last.eq(last_codebook),
                b_last_row.eq(last_row),
                b_bank.eq(bank),
                b_row.eq(row),
                b_taken.eq(self.codes.payload),
            ]
        code: Any = b_taken
        if design.codes:
            b_fetched = Signal()
            m.submodules.kept = kept = memory.Memory(
                shape=code_shape(design), depth=design.codes, init=[]
            )
            keep, fetch = kept.write_port(), kept.read_port()
            m.d.comb += [
                keep.addr.eq(place),
                keep.data.eq(self.codes.payload),
                keep.en.eq(take & ~fetched),
                fetch.addr.eq(place),
                fetch.en.eq(advance),
            ]
            with m.If(take):
                m.d.sync += b_fetched.eq(fetched)
            code = Signal(code_shape(design))
            m.d.comb += code.eq(Mux(b_fetched, fetch.data, b_taken))

        # B
        c_valid, c_first, c_last = Signal(), Signal(), Signal()
        c_row = Signal(row_bits(design))
        with m.If(advance):
            m.d.sync += [
                c_valid.eq(b_valid),
                c_first.eq(b_first),
                c_last.eq(b_last),
                c_row.eq(b_row),
            ]
        with m.If(advance & b_valid & b_last_row):
            m.d.sync += full.bit_select(b_bank, 1).eq(0)
        entries = (self._products if design.multiply else self._entries)(
            m, full, code, b_bank, advance
        )

        # C
        m.submodules.partial = partial = memory.Memory(
            shape=sums_shape(design), depth=design.rows, init=[]
        )
        write = partial.write_port()
        read = partial.read_port(transparent_for=(write,))
        total = Signal(sums_shape(design))
        m.d.comb += [
            read.addr.eq(b_row),
            read.en.eq(advance),
            write.addr.eq(c_row),
            write.data.eq(total),
            write.en.eq(advance & c_valid & ~c_last),
            self.sums.payload.eq(total),
            self.sums.valid.eq(c_valid & c_last),
            advance.eq(~self.sums.valid | self.sums.ready),
        ]
        for n in range(design.tile):
            m.d.comb += total[n].eq(Mux(c_first, 0, read.data[n]) + entries[n])
        return m

    def _loader(self, m: Module, full: Any) -> tuple[Any, Any, Any, Any]:
        """Takes words of tables: when one is taken, and its bank, row and group of outputs."""
        design = self.design
        groups = design.tile // design.beat
        bank, row, group = (
            Signal(),
            Signal(range(max(2, design.table_rows))),
            Signal(range(max(2, groups))),
        )
        load = Signal()
        m.d.comb += [
            self.tables.ready.eq(~full.bit_select(bank, 1)),
            load.eq(self.tables.valid & self.tables.ready),
        ]
        with m.If(load):
            m.d.sync += group.eq(group + 1)
            with m.If(group == groups - 1):
                m.d.sync += [group.eq(0), row.eq(row + 1)]
                with m.If(row == design.table_rows - 1):
                    m.d.sync += [row.eq(0), bank.eq(~bank), full.bit_select(bank, 1).eq(1)]
        return load, bank, row, group

    def _entries(self, m: Module, full: Any, code: Any, read_bank: Any, advance: Any) -> Any:
        """The table entries of a code, in stage C."""
        design = self.design
        groups = design.tile // design.beat
        load, bank, row, group = self._loader(m, full)
        m.submodules.tables = store = memory.Memory(
            shape=data.ArrayLayout(table_shape(design), groups), depth=2 * design.k, init=[]
        )
        write = store.write_port(granularity=1)
        read = store.read_port()
        m.d.comb += [
            write.addr.eq(Cat(row, bank)),
            write.en.eq(Mux(load, 1 << group, 0)),
            read.addr.eq(Cat(code, read_bank)),
            read.en.eq(advance),
        ]
        for g in range(groups):
            m.d.comb += write.data[g].eq(self.tables.payload)
        return [read.data[n // design.beat][n % design.beat] for n in range(design.tile)]

    def _products(self, m: Module, full: Any, code: Any, read_bank: Any, advance: Any) -> Any:
        """The sums of a sub-vector times weights, in stage C."""
        design = self.design
        load, bank, row, group = self._loader(m, full)
        weights = [
            Array(
                Signal(signed(design.table_bits), name=f"weight_{which}_{i}_{n}")
                for which in range(2)
            )
            for i in range(design.v)
            for n in range(design.tile)
        ]
        made = []
        for n in range(design.tile):
            place = n % design.beat
            parts = []
            for i in range(design.v):
                weight = weights[i * design.tile + n]
                with m.If(load & (row == i) & (group == n // design.beat)):
                    m.d.sync += weight[bank].eq(self.tables.payload[place])
                parts.append(code[i] * weight[read_bank])
            product = Signal(signed(design.sum_bits), name=f"product_{n}")
            with m.If(advance):
                m.d.sync += product.eq(sum(parts[1:], parts[0]))
            made.append(product)
        return made

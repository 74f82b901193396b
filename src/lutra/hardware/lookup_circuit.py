"""The circuit of a unit for layers of one response table; see ``lutra.hardware.lookup_unit``."""

from __future__ import annotations

from typing import Any

from amaranth import Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from lutra.hardware.lookup_unit import COUNT_BITS, LookupDesign

__all__ = ["LookupUnit"]


class LookupUnit(wiring.Component):
    """Streams ``command`` (inputs of the layer; rows times tiles), ``table`` (a row of the response
    table in each word), ``x`` (an activation index), ``weights`` (an index for each output of the
    tile); gives ``sums``.

    Args:
        design: What it is built for.
    """

    def __init__(self, design: LookupDesign) -> None:
        self.design = design
        command = data.StructLayout({"depth": COUNT_BITS, "count": COUNT_BITS})
        row = data.ArrayLayout(signed(8), design.weights)
        weights = data.ArrayLayout(unsigned(design.weight_bits), design.tile)
        sums = data.ArrayLayout(signed(design.sum_bits), design.tile)
        super().__init__(
            {
                "command": In(stream.Signature(command)),
                "table": In(stream.Signature(row)),
                "x": In(stream.Signature(unsigned(design.act_bits))),
                "weights": In(stream.Signature(weights)),
                "sums": Out(stream.Signature(sums)),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m, design = Module(), self.design
        m.submodules.responses = store = memory.Memory(
            shape=self.table.payload.shape(), depth=2**design.act_bits, init=[]
        )
        write, read = store.write_port(), store.read_port()
        depth, left, place = Signal(COUNT_BITS), Signal(COUNT_BITS), Signal(COUNT_BITS)
        loading, advance, take = Signal(), Signal(), Signal()
        loaded = Signal(design.act_bits)
        m.d.comb += [
            # The sums of the command before this one must not be mixed up with its table.
            self.command.ready.eq(~loading & (left == 0)),
            self.table.ready.eq(loading),
            write.addr.eq(loaded),
            write.data.eq(self.table.payload),
            write.en.eq(loading & self.table.valid),
            take.eq(advance & ~loading & (left != 0) & self.x.valid & self.weights.valid),
            self.x.ready.eq(take),
            self.weights.ready.eq(take),
            read.addr.eq(self.x.payload),
            read.en.eq(advance),
        ]
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += [
                depth.eq(self.command.payload.depth),
                left.eq(self.command.payload.count),
                loading.eq(1),
            ]
        with m.If(write.en):
            m.d.sync += loaded.eq(loaded + 1)
            with m.If(loaded == 2**design.act_bits - 1):
                m.d.sync += loading.eq(0)
        last = Signal()
        m.d.comb += last.eq(place == depth - 1)
        with m.If(take):
            m.d.sync += place.eq(place + 1)
            with m.If(last):
                m.d.sync += [place.eq(0), left.eq(left - 1)]

        # The row that was read, and the indices that pick from it.
        valid, first, final = Signal(), Signal(), Signal()
        picked = Signal(self.weights.payload.shape())
        with m.If(advance):
            m.d.sync += valid.eq(take)
        with m.If(take):
            m.d.sync += [first.eq(place == 0), final.eq(last), picked.eq(self.weights.payload)]
        entries = Signal(data.ArrayLayout(signed(8), 2**design.weight_bits))
        for w in range(design.weights):
            m.d.comb += entries[w].eq(read.data[w])
        sums = Signal(self.sums.payload.shape())
        done = Signal()
        m.d.comb += [
            self.sums.payload.eq(sums),
            self.sums.valid.eq(done),
            advance.eq(~done | self.sums.ready),
        ]
        with m.If(advance):
            m.d.sync += done.eq(valid & final)
        for n in range(design.tile):
            with m.If(advance & valid):
                m.d.sync += sums[n].eq(Mux(first, 0, sums[n]) + entries[picked[n]])
        return m

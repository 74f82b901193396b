"""The circuit of a unit for products with weights of 1 to 4 bits; see ``lutra.hardware.lmma``."""

from __future__ import annotations

from typing import Any

from amaranth import Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from lutra.hardware.lmma import COUNT_BITS, GROUP, LmmaDesign

__all__ = ["LmmaUnit"]

_HALF = 2 ** (GROUP - 1)
#: Four int8 of any sign add up to at most 512.
_ENTRY_BITS = 11


class LmmaUnit(wiring.Component):
    """Streams ``command`` (groups of four inputs; tiles), ``x`` (four activations of each row),
    ``weights`` (for each output the index of a group in one bit plane, lowest plane first); gives
    ``sums``, row by row.

    Args:
        design: What it is built for.
    """

    def __init__(self, design: LmmaDesign) -> None:
        self.design = design
        command = data.StructLayout({"groups": COUNT_BITS, "tiles": COUNT_BITS})
        x = data.ArrayLayout(data.ArrayLayout(signed(8), GROUP), design.rows)
        weights = data.ArrayLayout(unsigned(GROUP), design.columns)
        sums = data.ArrayLayout(
            data.ArrayLayout(signed(design.sum_bits), design.columns), design.rows
        )
        super().__init__(
            {
                "command": In(stream.Signature(command)),
                "x": In(stream.Signature(x)),
                "weights": In(stream.Signature(weights)),
                "sums": Out(stream.Signature(sums)),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m, design = Module(), self.design
        groups, group, left = Signal(COUNT_BITS), Signal(COUNT_BITS), Signal(COUNT_BITS)
        plane = Signal(range(max(2, design.bits)))
        filled, take, load = Signal(), Signal(), Signal()
        last_plane, last_group, done = Signal(), Signal(), Signal()
        m.d.comb += [
            self.command.ready.eq(left == 0),
            last_plane.eq(plane == design.bits - 1),
            last_group.eq(group == groups - 1),
            take.eq(filled & (left != 0) & self.weights.valid & (~done | self.sums.ready)),
            self.weights.ready.eq(filled & (left != 0) & (~done | self.sums.ready)),
            self.x.ready.eq(~filled | (take & last_plane)),
            load.eq(self.x.valid & self.x.ready),
        ]
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += [
                groups.eq(self.command.payload.groups),
                left.eq(self.command.payload.tiles),
            ]
        with m.If(load):
            m.d.sync += filled.eq(1)
        with m.Elif(take & last_plane):
            m.d.sync += filled.eq(0)
        with m.If(take):
            m.d.sync += plane.eq(plane + 1)
            with m.If(last_plane):
                m.d.sync += [plane.eq(0), group.eq(group + 1)]
                with m.If(last_group):
                    m.d.sync += [group.eq(0), left.eq(left - 1)]
        with m.If(take & last_plane & last_group):
            m.d.sync += done.eq(1)
        with m.Elif(self.sums.ready):
            m.d.sync += done.eq(0)

        halve = int(design.ternary)  # sums of ternary weights are even until they leave
        inner = signed(design.sum_bits + halve)
        total = Signal(data.ArrayLayout(data.ArrayLayout(inner, design.columns), design.rows))
        m.d.comb += self.sums.valid.eq(done)
        for r in range(design.rows):
            for n in range(design.columns):
                m.d.comb += self.sums.payload[r][n].eq(total[r][n] >> halve)
        first = Signal()
        m.d.comb += first.eq((group == 0) & (plane == 0))
        for r in range(design.rows):
            entries = Signal(data.ArrayLayout(signed(_ENTRY_BITS), _HALF), name=f"entries_{r}")
            x = self.x.payload[r]
            for e in range(_HALF):
                parts = [x[i] if e >> i & 1 else -x[i] for i in range(GROUP - 1)]
                with m.If(load):
                    m.d.sync += entries[e].eq(parts[0] + parts[1] + (parts[2] - x[GROUP - 1]))
            for n in range(design.columns):
                index = self.weights.payload[n]
                entry = Signal(signed(_ENTRY_BITS), name=f"entry_{r}_{n}")
                m.d.comb += entry.eq(entries[index[: GROUP - 1]])
                added = Mux(index[GROUP - 1], -entry, entry)
                if design.bits > 1 and not design.ternary:
                    added = added << plane
                with m.If(take):
                    m.d.sync += total[r][n].eq(Mux(first, 0, total[r][n]) + added)
        return m

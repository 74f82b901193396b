"""The accelerator: encoder, FIFO of codes, accumulator.

A pass is the command ``rows, codebooks, tiles``. It then takes, on three streams with valid and
ready, in this order:

* ``codebook``: for each codebook its words: centroids, or the thresholds of a tree in heap order;
* ``x``: for each codebook the sub-vectors of all rows;
* ``tables``: for each tile, for each codebook, the words of its table: for each code the entries
  of all outputs of the tile, ``beat`` of them in a word;

and gives ``sums``: for each tile the sums of all rows. ``code`` and ``code_valid`` show every code
that the encoder makes, in the order of ``x``. Codebooks and tables of the next pass may be given
before this pass ends.
"""

from __future__ import annotations

from typing import Any

from amaranth import ClockDomain, ClockSignal, DomainRenamer, Module, ResetSignal, Signal, unsigned
from amaranth.lib import cdc, data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from lutra.hardware.accumulator import Accumulator, sums_shape, table_shape
from lutra.hardware.design import Design
from lutra.hardware.encoder import (
    COUNT_BITS,
    DistanceEncoder,
    TreeEncoder,
    codebook_layout,
    row_bits,
)

__all__ = ["Accelerator"]


class Accelerator(wiring.Component):
    """A whole accelerator for one design.

    With two clocks the encoder and its streams ``codebook`` and ``x`` belong to the clock
    ``encoder_clk``, everything else to ``clk``. Both sides reset together by ``rst``.

    Args:
        design: Its parameters.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        members: dict[str, Any] = {
            "command": In(
                stream.Signature(
                    data.StructLayout(
                        {
                            "rows": unsigned(row_bits(design)),
                            "codebooks": unsigned(COUNT_BITS),
                            "tiles": unsigned(COUNT_BITS),
                        }
                    )
                )
            ),
            "x": In(stream.Signature(data.ArrayLayout(unsigned(design.act_bits), design.width))),
            "tables": In(stream.Signature(table_shape(design))),
            "sums": Out(stream.Signature(sums_shape(design))),
        }
        if not design.multiply:
            members["codebook"] = In(stream.Signature(codebook_layout(design)))
            members["code"] = Out(unsigned(design.levels))
            members["code_valid"] = Out(1)
        if design.two_clocks:
            members["encoder_clk"] = In(1)
        super().__init__(members)

    def elaborate(self, platform: Any) -> Module:
        m, design = Module(), self.design
        m.submodules.accumulator = accumulator = Accumulator(design)
        command = self.command.payload
        start, encoder_busy = Signal(), Signal()
        m.d.comb += [
            self.command.ready.eq(~accumulator.busy & ~encoder_busy),
            start.eq(self.command.valid & self.command.ready),
            accumulator.start.eq(start),
            accumulator.rows.eq(command.rows),
            accumulator.codebooks.eq(command.codebooks),
            accumulator.tiles.eq(command.tiles),
        ]
        wiring.connect(m, wiring.flipped(self.tables), accumulator.tables)
        wiring.connect(m, accumulator.sums, wiring.flipped(self.sums))
        if design.multiply:
            wiring.connect(m, wiring.flipped(self.x), accumulator.codes)
            return m

        kind = TreeEncoder if design.encoder == "tree" else DistanceEncoder
        encoder: Any = kind(design)
        bits = encoder.code.shape().width
        if design.two_clocks:
            m.domains.encoder = ClockDomain()
            m.d.comb += ClockSignal("encoder").eq(self.encoder_clk)
            m.submodules.reset = cdc.ResetSynchronizer(ResetSignal("sync"), domain="encoder")
            m.submodules.encoder = DomainRenamer("encoder")(encoder)
            m.submodules.fifo = codes = fifo.AsyncFIFO(
                width=bits, depth=design.fifo, r_domain="sync", w_domain="encoder"
            )
            self._cross(m, encoder, start, encoder_busy)
        else:
            m.submodules.encoder = encoder
            m.submodules.fifo = codes = fifo.SyncFIFO(width=bits, depth=design.fifo)
            m.d.comb += [
                encoder.start.eq(start),
                encoder.rows.eq(command.rows),
                encoder.codebooks.eq(command.codebooks),
                encoder_busy.eq(encoder.busy),
            ]
        wiring.connect(m, wiring.flipped(self.codebook), encoder.codebook)
        wiring.connect(m, wiring.flipped(self.x), encoder.x)
        m.d.comb += [
            # With two clocks the level that the encoder sees is late by a cycle.
            encoder.room.eq(design.fifo - int(design.two_clocks) - codes.w_level),
            codes.w_data.eq(encoder.code),
            codes.w_en.eq(encoder.code_valid),
            self.code.eq(encoder.code),
            self.code_valid.eq(encoder.code_valid),
            accumulator.codes.payload.eq(codes.r_data),
            accumulator.codes.valid.eq(codes.r_rdy),
            codes.r_en.eq(accumulator.codes.ready),
        ]
        return m

    def _cross(self, m: Module, encoder: Any, start: Any, busy: Any) -> None:
        """Starts the encoder from the other clock: the command waits in registers that stay as
        they are until the encoder has done its work and said so."""
        rows, codebooks = Signal(row_bits(self.design)), Signal(COUNT_BITS)
        asked, seen, begun, done = Signal(), Signal(), Signal(), Signal()
        with m.If(start):
            m.d.sync += [
                rows.eq(self.command.payload.rows),
                codebooks.eq(self.command.payload.codebooks),
                asked.eq(~asked),
            ]
        m.submodules.ask = cdc.FFSynchronizer(asked, seen, o_domain="encoder")
        finished = Signal()  # follows `begun` when the encoder is idle again
        m.submodules.answer = cdc.FFSynchronizer(finished, done, o_domain="sync")
        m.d.comb += [
            encoder.start.eq((seen != begun) & ~encoder.busy),
            encoder.rows.eq(rows),
            encoder.codebooks.eq(codebooks),
            busy.eq(asked != done),
        ]
        with m.If(encoder.start):
            m.d.encoder += begun.eq(seen)
        with m.Elif(~encoder.busy):
            m.d.encoder += finished.eq(begun)

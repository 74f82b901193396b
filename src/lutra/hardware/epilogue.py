"""The circuit behind the accumulator: sums in, the next layer's integers out; see
``lutra.hardware.fixed_point``."""

from __future__ import annotations

from typing import Any

from amaranth import Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from lutra.hardware.fixed_point import EpilogueDesign

__all__ = ["Epilogue"]

_ROW_BITS = 17


class Epilogue(wiring.Component):
    """Streams ``constants`` (for each tile its multipliers, addends, ends and number of rows) and
    ``x`` (the sums of an accelerator); gives ``sums``: integers of ``act_bits`` bits.

    One register between product and clamp, one behind it; a word of sums in each cycle.

    Args:
        design: What it is built for.
    """

    def __init__(self, design: EpilogueDesign) -> None:
        self.design = design
        constants = data.StructLayout(
            {
                "mul": data.ArrayLayout(signed(design.mul_bits), design.tile),
                "add": data.ArrayLayout(signed(design.add_bits), design.tile),
                "low": unsigned(design.act_bits),
                "high": unsigned(design.act_bits),
                "rows": unsigned(_ROW_BITS),
            }
        )
        sums = data.ArrayLayout(signed(design.sum_bits), design.tile)
        out = data.ArrayLayout(unsigned(design.act_bits), design.tile)
        super().__init__(
            {
                "constants": In(stream.Signature(constants)),
                "x": In(stream.Signature(sums)),
                "sums": Out(stream.Signature(out)),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m, design = Module(), self.design
        kept = Signal(self.constants.payload.shape())
        left = Signal(_ROW_BITS)
        advance, take, multiplied, done = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            advance.eq(~done | self.sums.ready),
            # New constants must not meet a product of the old ones.
            self.constants.ready.eq((left == 0) & ~multiplied),
            take.eq(advance & (left != 0) & self.x.valid),
            self.x.ready.eq(advance & (left != 0)),
            self.sums.valid.eq(done),
        ]
        with m.If(self.constants.valid & self.constants.ready):
            m.d.sync += [kept.eq(self.constants.payload), left.eq(self.constants.payload.rows)]
        with m.If(take):
            m.d.sync += left.eq(left - 1)
        with m.If(advance):
            m.d.sync += [multiplied.eq(take), done.eq(multiplied)]
        for n in range(design.tile):
            product = Signal(signed(design.sum_bits + design.mul_bits), name=f"product_{n}")
            shifted = Signal(signed(design.add_bits + 1 - design.shift), name=f"shifted_{n}")
            m.d.comb += shifted.eq((product + kept.add[n]) >> design.shift)
            with m.If(advance):
                m.d.sync += [
                    product.eq(self.x.payload[n] * kept.mul[n]),
                    self.sums.payload[n].eq(
                        Mux(
                            shifted < kept.low,
                            kept.low,
                            Mux(shifted > kept.high, kept.high, shifted[: design.act_bits]),
                        )
                    ),
                ]
        return m

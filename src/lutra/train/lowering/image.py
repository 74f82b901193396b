"""Operators that give images another size."""

from __future__ import annotations

from lutra.train.lowering.arguments import need_rank
from lutra.train.lowering.core import Lowering, Ref, lowers


@lowers("aten.pixel_shuffle.default")
def _pixel_shuffle(ctx: Lowering, self: Ref, upscale_factor: int) -> Ref:
    need_rank(self, 4)
    return ctx.emit("pixel_shuffle", self, attrs={"factor": upscale_factor})

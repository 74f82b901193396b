"""Functions of one number, each element alike."""

from __future__ import annotations

from lutra.train.exporting.lowering.core import Lowering, Ref, lowers


@lowers("aten.gelu.default", works="each")
def _gelu(ctx: Lowering, self: Ref, approximate: str) -> Ref:
    return ctx.emit("gelu", self, attrs={"approximate": approximate})


@lowers("aten.silu.default", works="each")
def _silu(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("silu", self)


@lowers("aten.tanh.default", works="each")
def _tanh(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("tanh", self)


@lowers("aten.sigmoid.default", works="each")
def _sigmoid(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("sigmoid", self)


@lowers("aten.exp.default", works="each")
def _exp(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("exp", self)


@lowers("aten.erf.default", "aten.special_erf.default", works="each")
def _erf(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("erf", self)


@lowers("aten.sqrt.default", works="each")
def _sqrt(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("sqrt", self)


@lowers("aten.rsqrt.default", works="each")
def _rsqrt(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("rsqrt", self)


@lowers("aten.reciprocal.default", works="each")
def _reciprocal(ctx: Lowering, self: Ref) -> Ref:
    return ctx.emit("reciprocal", self)

"""Function tables: the custom operators of `lutra.train.operators.functions`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import activation
from lutra.train.exporting.lowering.core import Lowering, Ref, UnsupportedUse, View, lowers


@lowers("lutra.piecewise.default", works="each")
def _piecewise(ctx: Lowering, x: Ref, breakpoint: Tensor, slope: Tensor, intercept: Tensor) -> Ref:
    tensors = {"breakpoint": breakpoint, "slope": slope, "intercept": intercept}
    return ctx.emit("piecewise", x, x.shape, tensors=tensors)


@lowers("lutra.table_softmax.default", takes=("x",))
def _table_softmax(
    ctx: Lowering,
    x: Any,
    exp_slope: Tensor,
    exp_intercept: Tensor,
    reciprocal_slope: Tensor,
    reciprocal_intercept: Tensor,
    dim: int,
) -> Ref | View:
    tensors = {
        "exp_slope": exp_slope,
        "exp_intercept": exp_intercept,
        "reciprocal_slope": reciprocal_slope,
        "reciprocal_intercept": reciprocal_intercept,
    }

    def along(ref: Ref, axis: int) -> Ref:
        return ctx.emit("softmax", ref, ref.shape, attrs={"axis": axis}, tensors=tensors)

    given = activation(ctx, x)
    axis = dim % given.rank
    if axis == given.rank - 1:
        return views.on_last(ctx, given, lambda ref: along(ref, ref.rank - 1))
    if axis == 0:
        raise UnsupportedUse("it works over the batch (axis 0); use another axis")
    return along(ctx.realise(given), axis)


@lowers("lutra.table_layer_norm.default", works="last")
def _table_layer_norm(
    ctx: Lowering,
    x: Ref,
    weight: Tensor,
    bias: Tensor,
    rsqrt_slope: Tensor,
    rsqrt_intercept: Tensor,
    eps: float,
) -> Ref:
    tensors = {
        "weight": weight,
        "bias": bias,
        "rsqrt_slope": rsqrt_slope,
        "rsqrt_intercept": rsqrt_intercept,
    }
    return ctx.emit("layer_norm", x, x.shape, attrs={"eps": float(eps)}, tensors=tensors)


@lowers("lutra.table_rms_norm.default", works="last")
def _table_rms_norm(
    ctx: Lowering, x: Ref, weight: Tensor, rsqrt_slope: Tensor, rsqrt_intercept: Tensor, eps: float
) -> Ref:
    tensors = {"weight": weight, "rsqrt_slope": rsqrt_slope, "rsqrt_intercept": rsqrt_intercept}
    return ctx.emit("rms_norm", x, x.shape, attrs={"eps": float(eps)}, tensors=tensors)

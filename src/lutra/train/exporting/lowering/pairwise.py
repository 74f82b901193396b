"""What is computed of every pair of two sets of vectors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import Number, need_constant, text
from lutra.train.exporting.lowering.arithmetic import affine
from lutra.train.exporting.lowering.core import Lowering, Ref, UnsupportedUse, View, lowers
from lutra.train.exporting.lowering.operands import base_of, constant, is_activation, operand
from lutra.train.exporting.lowering.reduce import emit_reduced, emit_sum


@lowers("aten.cdist.default", "aten._cdist_forward.default", takes=("x1", "x2"))
def _cdist(ctx: Lowering, x1: Any, x2: Any, p: Number) -> Ref:
    given = [operand(ctx, x) for x in (x1, x2)]
    like = next((base_of(x) for x in given if is_activation(x)), None)
    if like is None:
        raise UnsupportedUse("it works on what is the same for every input; make that a buffer")
    rank = max(x.rank if is_activation(x) else x.ndim for x in given)
    if rank < 3:
        raise UnsupportedUse(
            "it takes the distances of samples of the batch; give it (N, P, M) and (N, R, M)"
        )
    a, b = (ctx.realise(x) if is_activation(x) else constant(ctx, x, like, rank) for x in given)
    if a.rank != b.rank:
        raise UnsupportedUse(f"it compares {text(a)} with {text(b)}; unsqueeze the smaller one")
    rows = views.emit_reshape(ctx, a, (*a.shape[:-1], 1, a.shape[-1]), "rows")
    columns = views.emit_reshape(ctx, b, (*b.shape[:-2], 1, *b.shape[-2:]), "columns")
    lead = tuple(y if x == 1 else x for x, y in zip(a.shape[:-2], b.shape[:-2], strict=True))
    shape = (*lead, a.shape[-2], b.shape[-2], a.shape[-1])
    apart = ctx.emit("sub", (rows, columns), shape)
    axes = (len(shape) - 1,)
    if p == 2:
        return emit_reduced(ctx, "l2_norm", apart, axes, False)
    sizes = ctx.emit("abs", apart, shape)
    if p == 1:
        return emit_sum(ctx, sizes, axes, False)
    if p == math.inf:
        return emit_reduced(ctx, "max", sizes, axes, False)
    raise UnsupportedUse(f"it takes distances with p={p}; use 1, 2 or infinity")


@lowers("aten.bilinear.default")
def _bilinear(
    ctx: Lowering, input1: Any, input2: Any, weight: Tensor, bias: Tensor | None
) -> Ref | View:
    weight = need_constant(weight, "the weight")
    given = (input1, input2)
    if not all(isinstance(x, Ref) for x in given):
        raise UnsupportedUse("one of its inputs is a constant; multiply the weight with it")
    # y[o] = sum_j (sum_i x1[i] weight[o, i, j]) x2[j]
    outputs, first, second = weight.shape
    rows = weight.permute(0, 2, 1).reshape(outputs * second, first).contiguous()
    tensors = {"weight": rows, "bias": torch.zeros(len(rows))}
    lead = input1.shape[:-1]
    wide = ctx.emit("linear", input1, (*lead, len(rows)), tensors=tensors, suffix="first")
    wide = views.emit_reshape(ctx, wide, (*lead, outputs, second), "apart")
    other = views.emit_reshape(ctx, input2, (*lead, 1, second), "row")
    both = ctx.emit("mul", (wide, other), wide.shape)
    made = emit_sum(ctx, both, (both.rank - 1,), False)
    return made if bias is None else affine(ctx, made, 1.0, need_constant(bias, "the bias"))

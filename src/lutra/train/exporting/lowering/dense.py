"""Convolutions and matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import (
    Number,
    need_activation,
    need_constant,
    need_rank,
    pair,
    single,
)
from lutra.train.exporting.lowering.conv_transpose import conv_transpose1d, conv_transpose2d
from lutra.train.exporting.lowering.core import (
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    lowers,
)
from lutra.train.exporting.lowering.operands import base_of, constant, operand
from lutra.train.exporting.lowering.points import as_image
from lutra.train.exporting.lowering.values import Atom, Sizes


@lowers("aten.conv2d.default")
def _conv2d(
    ctx: Lowering,
    input: Ref,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Ref:
    need_activation(input)
    need_rank(input, 4)
    weight = need_constant(weight, "the kernel")
    return ctx.emit(
        "conv2d",
        input,
        attrs={
            "stride": pair(stride),
            "padding": pair(padding),
            "dilation": pair(dilation),
            "groups": groups,
        },
        tensors={"weight": weight, "bias": _bias(bias, weight.shape[0])},
    )


@lowers("aten.conv2d.padding")
def _conv2d_padding(
    ctx: Lowering,
    input: Ref,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: str,
    dilation: Any,
    groups: int,
) -> Ref:
    need_activation(input)
    need_rank(input, 4)
    weight = need_constant(weight, "the kernel")
    totals = [0, 0]
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(pair(dilation), weight.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        # An even kernel: torch puts the odd row and column behind.
        (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
        shape = (*input.shape[:2], input.shape[2] + totals[0], input.shape[3] + totals[1])
        pads = (0, 0, 0, 0, top, bottom, left, right)
        input = ctx.emit("pad", input, shape, attrs={"pads": pads, "value": 0.0}, suffix="pad")
        totals = [0, 0]
    half = [total // 2 for total in totals]
    return _conv2d(ctx, input, weight, bias, stride, half, dilation, groups)


@lowers("aten.conv1d.default")
def _conv1d(
    ctx: Lowering,
    input: Ref,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Ref:
    need_activation(input)
    need_rank(input, 3)
    weight = need_constant(weight, "the kernel")
    size, step, pad, spread = weight.shape[2], single(stride), single(padding), single(dilation)
    return as_image(
        ctx,
        input,
        "conv2d",
        attrs={
            "stride": (1, step),
            "padding": (0, pad),
            "dilation": (1, spread),
            "groups": groups,
        },
        tensors={
            "weight": weight.reshape(*weight.shape[:2], 1, size),
            "bias": _bias(bias, weight.shape[0]),
        },
    )


@lowers("aten.conv1d.padding")
def _conv1d_padding(
    ctx: Lowering,
    input: Ref,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: str,
    dilation: Any,
    groups: int,
) -> Ref:
    need_activation(input)
    need_rank(input, 3)
    total = single(dilation) * (weight.shape[2] - 1) if padding == "same" else 0
    if total % 2:  # an even kernel: torch puts the odd entry behind
        shape = (*input.shape[:2], input.shape[2] + total)
        pads = (0, 0, 0, 0, total // 2, total - total // 2)
        input = ctx.emit("pad", input, shape, attrs={"pads": pads, "value": 0.0}, suffix="pad")
        total = 0
    return _conv1d(ctx, input, weight, bias, stride, total // 2, dilation, groups)


@lowers("aten.convolution.default")
def _convolution(
    ctx: Lowering,
    input: Ref,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Ref:
    if transposed:
        rows = isinstance(weight, Tensor) and weight.ndim == 3
        make = conv_transpose1d if rows else conv_transpose2d
        return make(ctx, input, weight, bias, stride, padding, output_padding, groups, dilation)
    if isinstance(weight, Tensor) and weight.ndim == 3:
        return _conv1d(ctx, input, weight, bias, stride, padding, dilation, groups)
    return _conv2d(ctx, input, weight, bias, stride, padding, dilation, groups)


@lowers("aten.linear.default", works="last")
def _linear(ctx: Lowering, input: Ref, weight: Tensor, bias: Tensor | None) -> Ref:
    need_activation(input)
    weight = need_constant(weight, "the weight")
    if bias is not None:
        need_constant(bias, "the bias")
    tensors = {"weight": weight, "bias": _bias(bias, weight.shape[0])}
    shape = (*input.shape[:-1], weight.shape[0])
    return ctx.emit("linear", input, shape, tensors=tensors)


@lowers("aten.addmm.default", takes=("mat1",))
def _addmm(
    ctx: Lowering, self: Tensor, mat1: Any, mat2: Tensor, beta: Number, alpha: Number
) -> Ref | View:
    bias, weight = need_constant(self, "the bias"), need_constant(mat2, "the weight")
    need_activation(mat1)
    weight = weight.t() if alpha == 1 else weight.t() * alpha
    bias = (bias if beta == 1 else bias * beta).reshape(-1).expand(weight.shape[0])
    return views.on_last(ctx, mat1, lambda x: _linear(ctx, x, weight, bias))


@lowers("aten.mm.default", "aten.bmm.default", takes=("self", "mat2"))
def _mm(ctx: Lowering, self: Any, mat2: Any) -> Ref | View:
    return _matmul(ctx, self, mat2)


@lowers("aten.matmul.default", takes=("self", "other"))
def _matmul(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    return matmul(ctx, self, other)


def matmul(ctx: Lowering, self: Any, other: Any, sizes: Sizes | None = None) -> Ref | View:
    """The product of two matrices, or of many.

    Args:
        ctx: The walk.
        self: An activation or a constant.
        other: The same.
        sizes: Of the result; those of the torch operator's when left out.
    """
    sizes = ctx.result_sizes if sizes is None else sizes
    a, b = operand(ctx, self), operand(ctx, other)
    if isinstance(b, Tensor):
        need_activation(a)
        if b.ndim == 1:
            row = views.on_last(ctx, a, lambda x: _linear(ctx, x, b[None], None))
            made = views.reshaped(ctx, row, sizes)
            assert made is not None  # a size of 1 is left out
            return made
        if b.ndim > 2:
            weight = constant(ctx, b, base_of(a), a.rank)
            return product(ctx, views.view_of(ctx, a), views.view_of(ctx, weight), sizes)
        return views.on_last(ctx, a, lambda x: _linear(ctx, x, b.t(), None))
    if isinstance(a, Tensor):
        if a.ndim > 2:
            weight = constant(ctx, a, base_of(b), b.rank)
            return product(ctx, views.view_of(ctx, weight), views.view_of(ctx, b), sizes)
        if a.ndim != 2 or b.rank < 3:
            raise UnsupportedUse(f"the first factor has shape {tuple(a.shape)}; make it 2-D")
        last = (*range(b.rank - 2), b.rank - 1, b.rank - 2)
        turned = views.permuted(ctx, b, last)
        made = views.on_last(ctx, turned, lambda x: _linear(ctx, x, a, None))
        return views.permuted(ctx, made, last)
    return product(ctx, views.view_of(ctx, a), views.view_of(ctx, b), sizes)


def product(ctx: Lowering, a: View, b: View, wanted: Sizes) -> Ref | View:
    """The product of two activations (N, ..., M, K) and (N, ..., K, P), of the sizes wanted."""
    leading = [[atom for axis in x.axes[:-2] for atom in axis] for x in (a, b)]
    sizes = [[atom.size for atom in atoms] for atoms in leading]
    if a.rank != b.rank or a.rank < 3 or any(not s or s[0] != ctx.batch for s in sizes):
        raise UnsupportedUse(
            "it multiplies activations whose axis 0 is not the batch in both; keep samples apart"
        )
    if sizes[0] != sizes[1]:  # sizes of 1 are repeated, or axes lie in memory in other ways
        made = _emit_product(ctx, *(_whole(ctx, x) for x in (a, b)))
        result = views.reshaped(ctx, made, wanted)
        assert result is not None  # axes that are put together always fit
        return result
    apart_views = [
        views.simplest(ctx, View(x.base, (*((atom,) for atom in atoms), *x.axes[-2:]), x.node))
        for x, atoms in zip((a, b), leading, strict=True)
    ]
    made = _emit_product(ctx, *apart_views)
    result = views.reshaped(ctx, made, wanted)
    if result is None:
        raise UnsupportedUse("it multiplies activations in an order of axes that lutra has not")
    return result


def _whole(ctx: Lowering, x: View) -> Ref:
    """An operand with its axes as they are, but parts of samples apart from the batch."""
    first, *rest = views.sizes_of(ctx, x)
    parts = first / ctx.batch if first != ctx.batch else None
    if parts is None:
        return ctx.realise(views.simplest(ctx, x))
    count = int(parts) if getattr(parts, "is_Integer", False) else parts
    made = views.reshaped(ctx, x, (ctx.batch, count, *rest))
    assert made is not None  # the batch is the outermost of them
    return ctx.realise(made)


def _emit_product(ctx: Lowering, a: Ref | View, b: Ref | View) -> Ref:
    turned = {}
    operands = []
    for name, x in (("transpose_a", a), ("transpose_b", b)):
        turned[name] = isinstance(x, View) and _is_turned(x)
        order = (*range(x.rank - 2), x.rank - 1, x.rank - 2)
        operands.append(ctx.realise(views.permuted(ctx, x, order) if turned[name] else x))
    first, second = (
        (*x.shape[:-2], x.shape[-1], x.shape[-2]) if flag else x.shape
        for x, flag in zip(operands, turned.values(), strict=True)
    )
    lead = tuple(y if x == 1 else x for x, y in zip(first[:-2], second[:-2], strict=True))
    return ctx.emit("matmul", operands, (*lead, first[-2], second[-1]), attrs=turned)


def _is_turned(x: View) -> bool:
    """Whether neighbours in memory lie along the last axis but one."""
    last, before = x.axes[-1], x.axes[-2]
    return bool(last) and bool(before) and _place(before[-1]) > _place(last[-1])


def _place(atom: Atom) -> tuple[int, int]:
    return atom.axis, -atom.inner


def _bias(bias: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size) if bias is None else bias

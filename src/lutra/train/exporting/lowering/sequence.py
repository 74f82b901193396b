"""Embeddings and pooling of sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import activation, need_constant
from lutra.train.exporting.lowering.core import (
    Deferred,
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    lowers,
)
from lutra.train.exporting.lowering.reduce import emit_reduced, emit_sum
from lutra.train.exporting.lowering.rows import embedded
from lutra.train.exporting.lowering.sources import size_at


@lowers("aten.embedding.default", takes=("indices",))
def _embedding(ctx: Lowering, weight: Tensor, indices: Any) -> Ref | View:
    return _rows(ctx, indices, {"weight": need_constant(weight, "the table")})


@lowers("lutra.int8_embedding.default", takes=("ids",))
def _int8_embedding(ctx: Lowering, ids: Any, weight: Tensor, scale: Tensor) -> Ref | View:
    return _rows(ctx, ids, {"weight": weight, "scale": scale})


def _rows(ctx: Lowering, indices: Any, tensors: dict[str, Tensor]) -> Ref | View:
    ids: Any = _integers(ctx, indices)
    computed = isinstance(indices, (Ref, View)) or (
        isinstance(indices, Deferred) and bool(indices.inputs)
    )
    if ids is None and computed:
        ids = activation(ctx, indices)
    if not isinstance(ids, (Ref, View)):
        raise UnsupportedUse(
            "its indices depend on sizes only, and not as positions that count from 0; compute "
            "them from an input of int64"
        )
    return embedded(ctx, ids, tensors)


@lowers(
    "aten.embedding_bag.padding_idx",
    "aten.embedding_bag.default",
    takes=("indices", "offsets", "per_sample_weights"),
)
def _embedding_bag(
    ctx: Lowering, weight: Tensor, indices: Any, offsets: Any, mode: int, per_sample_weights: Any
) -> tuple[Ref | View, None, None, None]:
    padding = ctx.node.args[8] if len(ctx.node.args) > 8 else ctx.node.kwargs.get("padding_idx")
    if padding not in (None, -1) or per_sample_weights is not None:
        raise UnsupportedUse(
            "its padding_idx or weights leave tokens out; write nn.Embedding, a mask and a sum"
        )
    rows = _rows(ctx, indices, {"weight": need_constant(weight, "the table")})
    bags, width = ctx.result_sizes
    apart = views.reshaped(ctx, rows, (bags, _of_each_bag(ctx, rows, offsets), width))
    if apart is None or bags != ctx.batch:
        raise UnsupportedUse("its bags are no samples of the batch; give it indices (N, T)")
    x = ctx.realise(apart)
    if mode == 0:
        return emit_sum(ctx, x, (1,), False), None, None, None
    return emit_reduced(ctx, "mean" if mode == 1 else "max", x, (1,), False), None, None, None


def _of_each_bag(ctx: Lowering, rows: Ref | View, offsets: Any) -> Any:
    """The tokens of each bag, which begin one after the other.

    Raises:
        UnsupportedUse: Bags of other sizes.
    """
    wanted = UnsupportedUse("its bags differ in size; give it indices (N, T) without offsets")
    if not isinstance(offsets, Deferred) or offsets.inputs:
        raise wanted
    count = views.sizes_of(ctx, rows)[0] / ctx.batch
    for shift, batch in ((0, 2), (1, 3), (4, 1)):
        sizes = ctx.sources.sizes(shift=shift, first=batch)
        starts = ctx.sources.evaluate(offsets.node, sizes, {})
        if not torch.equal(starts, torch.arange(batch) * size_at(count, sizes)):
            raise wanted
    return int(count) if getattr(count, "is_Integer", False) else count


@lowers("lutra.masked_mean.default", takes=("mask",))
def _masked_mean(ctx: Lowering, x: Ref, mask: Any) -> Ref:
    integers = _integers(ctx, mask)
    if integers is None:
        raise UnsupportedUse("its mask must be an input of int64, int32 or bool as it is")
    return ctx.emit("masked_mean", (x, integers))


def _integers(ctx: Lowering, x: Any) -> Ref | None:
    """The input of integers that something is, casts and views that change nothing aside."""
    if not isinstance(x, Deferred):
        return None
    node = x.node
    while node.op == "call_function" and (str(node.target) in _CASTS or _changes_nothing(node)):
        value = node.meta["val"]
        if value.is_floating_point() or value.is_complex() or not node.all_input_nodes:
            return None
        source = node.all_input_nodes[0].meta["val"]
        if value.dtype.itemsize < source.dtype.itemsize and value.dtype.itemsize < 4:
            return None  # such as a cast to bool, which changes numbers
        node = node.all_input_nodes[0]
    return ctx.integer_input(node)


def _changes_nothing(node: fx.Node) -> bool:
    """Whether it is a view of integers in their own shape."""
    source = node.args[0] if node.args else None
    if str(node.target) not in _VIEWS or not isinstance(source, fx.Node):
        return False
    shapes = [
        [size if isinstance(size, int) else size.node.expr for size in each.meta["val"].shape]
        for each in (node, source)
    ]
    return shapes[0] == shapes[1]


_VIEWS = (
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.view_as.default",
    "aten.expand.default",
)
_CASTS = (
    "aten._to_copy.default",
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten.clone.default",
    "aten.contiguous.default",
    "aten.detach.default",
    "aten.alias.default",
    "aten.lift_fresh_copy.default",
)

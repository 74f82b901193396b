"""Embeddings and pooling of sequences."""

from __future__ import annotations

from typing import Any

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


@lowers("aten.embedding.default", takes=("indices",))
def _embedding(ctx: Lowering, weight: Tensor, indices: Any) -> Ref | View:
    return _rows(ctx, indices, {"weight": need_constant(weight, "the table")})


@lowers("lutra.int8_embedding.default", takes=("ids",))
def _int8_embedding(ctx: Lowering, ids: Any, weight: Tensor, scale: Tensor) -> Ref | View:
    return _rows(ctx, ids, {"weight": weight, "scale": scale})


def _rows(ctx: Lowering, indices: Any, tensors: dict[str, Tensor]) -> Ref | View:
    ids: Any = _integers(ctx, indices)
    order: list[int] | None = None  # of axes, where the batch is not in front
    computed = isinstance(indices, (Ref, View)) or (
        isinstance(indices, Deferred) and bool(indices.inputs)
    )
    if ids is None and computed:
        ids = activation(ctx, indices)
        if not views.is_sample(ctx, ids):
            order = views.batch_first(ctx, ids)
            ids = views.permuted(ctx, ids, order)
        ids = ctx.realise(ids)
    if not isinstance(ids, Ref):
        raise UnsupportedUse(
            "its indices depend on sizes only, and not as positions that count from 0; compute "
            "them from an input of int64"
        )
    made = ctx.emit("embedding", ids, (*ids.shape, tensors["weight"].shape[1]), tensors=tensors)
    return made if order is None else views.put_back(ctx, made, [*order, len(order)])


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

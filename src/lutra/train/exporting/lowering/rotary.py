"""Rotary embeddings: found in the torch program before the walk, and lowered as one operator."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import activation
from lutra.train.exporting.lowering.core import (
    Deferred,
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    lowers,
)
from lutra.train.exporting.lowering.deferred import computed, table
from lutra.train.exporting.lowering.program import replace
from lutra.train.exporting.lowering.sources import Sources
from lutra.train.operators import rotary as operators  # noqa: F401  (its operator)

_JOINED = (
    "aten.view.default",
    "aten.reshape.default",
    "aten.reshape_as.default",
    "aten.flatten.using_ints",
)


def combine_rotary(program: ExportedProgram) -> None:
    """Write `x * cos + turned(x) * sin` in a captured program as one operator, in place."""
    sources = Sources(program)
    for node in list(program.graph.nodes):
        if str(node.target) != "aten.add.Tensor" or node.kwargs.get("alpha", 1) != 1:
            continue
        for first, second in (node.args[:2], node.args[1::-1]):
            found = _match(sources, first, second)
            if found is None:
                continue
            with program.graph.inserting_before(node):
                made = program.graph.call_function(torch.ops.lutra.rotary.default, found)
            replace(node, made)
            break


def _match(sources: Sources, plain: Any, turned: Any) -> tuple[Any, ...] | None:
    """x, cos, sin and whether pairs are interleaved; None for other sums."""
    straight, across = _product(sources, plain), _product(sources, turned)
    if straight is None or across is None:
        return None
    (x, cos), (other, sin) = straight, across
    found = _turned(other)
    if found is None or found[0] is not x or _shape(cos) != _shape(sin):
        return None
    shape = _shape(cos)
    if len(shape) < 2 or not isinstance(shape[-1], int) or shape[-1] != _shape(x)[-1]:
        return None
    return x, cos, sin, found[1]


def _product(sources: Sources, node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The activation of a product and what depends on constants and sizes only."""
    if not isinstance(node, fx.Node) or str(node.target) != "aten.mul.Tensor":
        return None
    x, factor = node.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(factor, fx.Node):
        return None
    if not sources.is_activation(x):
        x, factor = factor, x
    if not sources.is_activation(x) or sources.is_activation(factor):
        return None
    deferred = sources.deferred(factor)
    if deferred is not None and deferred.inputs:
        return None
    return x, factor


def _turned(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """x of cat(-x2, x1), or of its interleaved form."""
    interleaved = str(node.target) in _JOINED
    made: Any = node.args[0] if interleaved else node
    wanted = "aten.stack.default" if interleaved else "aten.cat.default"
    if not isinstance(made, fx.Node) or str(made.target) != wanted:
        return None
    parts: Any = made.args[0]
    axis = made.args[1] if len(made.args) > 1 else 0
    if len(parts) != 2 or axis not in (-1, made.meta["val"].ndim - 1):
        return None
    negative, positive = parts
    if str(negative.target) != "aten.neg.default":
        return None
    second, first = _part(negative.args[0], interleaved), _part(positive, interleaved)
    if first is None or second is None or first[0] is not second[0]:
        return None
    return (first[0], interleaved) if (first[1], second[1]) == (0, 1) else None


def _part(node: Any, interleaved: bool) -> tuple[fx.Node, int] | None:
    """x, and 0 or 1 for its first or second half, or for its even or odd entries."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is operator.getitem and not interleaved:
        cut: Any = node.args[0]
        index: Any = node.args[1]
        if str(cut.target) not in ("aten.chunk.default", "aten.split.Tensor"):
            return None
        source, size, axis = (*cut.args, 0)[:3]
        width = _shape(source)[-1]
        halves = size == 2 if "chunk" in str(cut.target) else 2 * size == width
        last = axis in (-1, len(_shape(source)) - 1)
        return (source, index) if halves and last and index in (0, 1) else None
    if str(node.target) != "aten.slice.Tensor":
        return None
    source, axis, start, end, step = _slice(node)
    width = _shape(source)[-1]
    if axis not in (-1, len(_shape(source)) - 1) or not isinstance(width, int) or width % 2:
        return None
    cut_range = range(*slice(start, end, step).indices(width))
    for index in (0, 1):
        half = range(index * width // 2, (index + 1) * width // 2)
        if cut_range == (range(index, width, 2) if interleaved else half):
            return source, index
    return None


def _slice(node: fx.Node) -> tuple[Any, ...]:
    given: Sequence[Any] = node.args
    defaults = (None, 0, None, None, 1)
    return (*given, *defaults[len(given) :])


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


@lowers("lutra.rotary.default", takes=("x", "cos", "sin"))
def _rotary(ctx: Lowering, x: Any, cos: Any, sin: Any, interleaved: bool) -> Ref | View:
    view = views.view_of(ctx, activation(ctx, x))
    given = ctx.node.args[1]
    assert isinstance(given, fx.Node)
    shape = _shape(given)
    # positions are the last axis but one, or the one before that in (N, T, H, d)
    heads_last = len(shape) > 2 and isinstance(shape[-2], int) and shape[-2] == 1
    axis = -3 if heads_last and view.rank == 4 else -2
    tables = {name: _rows(ctx, each, axis) for name, each in (("cos", cos), ("sin", sin))}
    order = {3: (0, 1, 2), 4: (0, 1, 2, 3) if axis == -3 else (0, 2, 1, 3)}.get(view.rank)
    if order is None:
        raise UnsupportedUse("it rotates what has neither the shape (N, T, D) nor heads beside it")
    tokens = views.permuted(ctx, view, order)  # (N, T, H, d)
    sizes = views.sizes_of(ctx, tokens)
    heads = 1 if view.rank == 3 else sizes[2]
    if not isinstance(heads, int) or not isinstance(sizes[-1], int):
        raise UnsupportedUse("its heads or their width are known at run time only")
    flat = views.reshaped(ctx, tokens, (*sizes[:2], heads * sizes[-1]))
    if flat is None:
        flat = views.reshaped(ctx, ctx.realise(tokens), (*sizes[:2], heads * sizes[-1]))
    assert flat is not None  # neighbouring axes of a value
    source = ctx.realise(flat)
    made = ctx.emit(
        "rotary",
        source,
        source.shape,
        attrs={"heads": heads, "interleaved": interleaved},
        tensors=tables,
    )
    apart = views.reshaped(ctx, made, sizes)
    assert apart is not None
    return views.permuted(ctx, apart, order)


def _rows(ctx: Lowering, x: Any, axis: int) -> Tensor:
    """(L, d) of the factors of the positions."""
    rows = table(ctx, x, axis) if isinstance(x, Deferred) else None
    if rows is None:
        whole: Any = computed(ctx, x) if isinstance(x, Deferred) else x
        if not isinstance(whole, Tensor) or whole.numel() != whole.shape[axis] * whole.shape[-1]:
            raise UnsupportedUse("its angles differ between samples or heads")
        rows = whole
    return rows.reshape(-1, rows.shape[-1]).float().contiguous()

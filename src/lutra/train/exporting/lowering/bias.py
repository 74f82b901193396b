"""Attention whose scores get other numbers than a mask: biases of relative positions.

Such an attention is written as its products, sums and softmax. A bias of fixed size is a constant,
however it was gathered from a table; one whose size is known at run time only is a table of
distances.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lutra.errors import UnsupportedModelError
from lutra.train.exporting.capture import node_module
from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import activation
from lutra.train.exporting.lowering.attention import (
    allowed_at,
    find_keys,
    find_mask,
    is_mask,
    keys_of_mask,
    window_of,
)
from lutra.train.exporting.lowering.core import (
    LONGEST,
    Deferred,
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    lowers,
)
from lutra.train.exporting.lowering.emitter import expressions
from lutra.train.exporting.lowering.operands import constant
from lutra.train.exporting.lowering.placed import by_distance, numbers_at
from lutra.train.exporting.lowering.program import caller, replace
from lutra.train.exporting.lowering.sources import Sources, size_at
from lutra.train.operators.scores import LOWEST, MASKED

_aten = torch.ops.aten
_ATTENTION = "aten.scaled_dot_product_attention.default"
_CHANGE_NOTHING = ("aten.clone.default", "aten.contiguous.default", "aten.alias.default")
_PRODUCTS = ("aten.matmul.default", "aten.bmm.default")
#: What is written here, after it was found out where everything comes from.
_WRITTEN = ("lutra.relative_bias.default", "lutra.masked_scores.default")
#: What scores may go through between their product and what is added to them.
_SCALES = (
    "aten.mul.Tensor",
    "aten.mul.Scalar",
    "aten.div.Tensor",
    "aten.div.Scalar",
    "aten.tanh.default",  # scores that are squashed before the mask, as in Gemma 2
    "aten.add.Tensor",
    "aten.view.default",
    "aten._unsafe_view.default",
    *_WRITTEN,
)
_WHERE = ("aten.where.ScalarOther", "aten.where.self")
_ANDS = ("aten.logical_and.default", "aten.bitwise_and.Tensor", "aten.__and__.Tensor")


def combine_biases(program: ExportedProgram, longest: int | None = None) -> None:
    """Write each attention that adds numbers to its scores in its parts, in place.

    Args:
        program: What was captured.
        longest: Of a decoder, the most tokens of a text; None for other models.

    Raises:
        UnsupportedModelError: Tokens of a decoder see fewer tokens than a text may have.
    """
    sources = Sources(program)
    windows: dict[fx.Node, int | None] = {}
    for node in list(program.graph.nodes):
        if str(node.target) == "aten.add.Tensor":
            _rewrite_sum(program.graph, sources, node)
        if str(node.target) != _ATTENTION:
            continue
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if isinstance(mask, fx.Node):
            if mask not in windows:
                windows[mask] = _window(sources, node, mask, longest or LONGEST)
            if longest is not None and windows[mask] is not None:
                raise UnsupportedModelError(
                    f"export_decoder: the attention of {node_module(node)!r} sees the last "
                    f"{windows[mask]} tokens only, and a text may have max_length={longest}; "
                    f"choose {windows[mask]} at most"
                )
            known = "positions" if windows[mask] else _known(sources, node, mask)
            if known == "computed" and _mask_keys(program.graph, sources, node, mask):
                continue
            if known != "mask" or _adds_numbers(sources, mask):
                _take_apart(program.graph, sources, node, mask, known != "mask")


def _rewrite_sum(graph: fx.Graph, sources: Sources, node: fx.Node) -> None:
    """Write a sum of scores and of a bias whose size is known at run time only as one operator."""
    if node.kwargs.get("alpha", 1) != 1 or not all(isinstance(x, fx.Node) for x in node.args[:2]):
        return
    scores: Any
    term: Any
    for scores, term in (node.args[:2], node.args[1::-1]):
        if _are_scores(sources, scores) and not sources.is_activation(term):
            target = _added(sources, scores, term)
            deferred = sources.deferred(term)
            masks = deferred is not None and deferred.inputs and _is_mask(sources, term)
            if masks and scores.meta["val"].ndim == 4:  # heads apart from the batch
                target = torch.ops.lutra.masked_scores.default
            if target is _aten.add.Tensor:
                return
            with graph.inserting_before(node):
                made = graph.call_function(target, (scores, term))
            replace(node, made)
            return


def _are_scores(sources: Sources, node: Any) -> bool:
    """Whether an activation is a product of two, perhaps scaled, squashed or with terms added."""
    while isinstance(node, fx.Node) and _is_activation(sources, node):
        if str(node.target) in _PRODUCTS:
            return True
        if str(node.target) not in _SCALES:
            return False
        first, *others = node.args
        other = others[0] if others else None
        both = isinstance(first, fx.Node) and _is_activation(sources, first)
        node = first if both else other
    return False


def _is_activation(sources: Sources, node: fx.Node) -> bool:
    return sources.is_activation(node) or str(node.target) in _WRITTEN


def _adds_numbers(sources: Sources, mask: fx.Node) -> bool:
    """Whether a mask is more than a mask of constants, sizes and integers."""
    if sources.is_activation(mask):
        return True
    return mask.meta["val"].is_floating_point() and not _is_mask(sources, mask)


_Known = Literal["mask", "positions", "computed"]


def _known(sources: Sources, node: fx.Node, mask: fx.Node) -> _Known:
    """What is known of the mask of an attention.

    Args:
        sources: Of the program.
        node: The attention, whose first two operands are queries and keys.
        mask: The mask, or a part of it.

    Returns:
        "mask" where an attention takes it as it is, or says in words of its own what is wrong with
        it; "positions" where it is a mask of positions other than a causal one, such as a window;
        "computed" where integers of the model decide in another way, such as lengths.
    """
    query, key = (x.meta["val"].shape for x in node.args[:2])  # type: ignore[union-attr]
    sizes, keys = expressions(query), expressions(key)[-2]
    heads: Any = None
    if len(sizes) in (3, 4):
        heads = sizes[1] if len(sizes) == 4 else sizes[0] / sources.batch
    if not isinstance(heads, int) and not getattr(heads, "is_Integer", False):
        return "mask"
    if sources.is_activation(mask):
        return "mask"
    heads = int(heads)
    given: Any = sources.deferred(mask)
    try:
        given = sources.evaluate(mask, {}, {}) if given is None else given
        find_mask(sources, given, sizes, keys, heads)
    except UnsupportedUse:
        try:
            find_keys(sources, given, sizes, keys, heads)
        except UnsupportedUse:
            decides = isinstance(given, Deferred) and bool(given.inputs)
            return "computed" if decides and _is_mask(sources, mask) else "mask"
        return "positions"
    return "mask"


def _is_mask(sources: Sources, mask: fx.Node) -> bool:
    """Whether there is nothing in it but 0 and numbers that leave no weight."""
    sizes = sources.sizes()
    given = sources.random(sizes, 2, torch.Generator().manual_seed(0))
    try:
        return is_mask(sources.evaluate(mask, sizes, given))
    except UnsupportedUse:
        return True  # the attention says in words of its own what is wrong


def _window(sources: Sources, node: fx.Node, mask: fx.Node, longest: int) -> int | None:
    """How many tokens the mask of an attention lets a query see, if that is less than `longest`."""
    query: Any = node.args[0]
    return window_of(sources, sources.deferred(mask), expressions(query.meta["val"].shape), longest)


def _mask_keys(graph: fx.Graph, sources: Sources, node: fx.Node, mask: fx.Node) -> bool:
    """Write an attention whose computed mask drops keys, the same for all heads and queries, and
    perhaps later positions, as one operator; False where the mask does more."""
    query, key, value = node.args[:3]
    causal, dropout = _flags(node)
    shape, shared = mask.meta["val"].shape, node.kwargs.get("enable_gqa", False)
    shapes = [each.meta["val"].shape for each in (query, key, value)]  # type: ignore[union-attr]
    plain = all(len(each) == 4 for each in (*shapes, shape)) and not dropout and not shared
    if not plain or causal or shapes[0][-1] != shapes[2][-1] or shapes[0][1] != shapes[1][1]:
        return False
    sizes = expressions(shapes[0]), expressions(shapes[1])[-2]
    found = keys_of_mask(sources, mask, *sizes)
    parts = [term for term, _ in _terms(sources, node, mask) if _has_inputs(sources, term)]
    if found is None or len(parts) != 1:
        return False
    (part,) = parts
    shape = part.meta["val"].shape
    one_row = len(shape) == 4 and isinstance(shape[2], int) and shape[2] == 1
    if not one_row or keys_of_mask(sources, part, *sizes) != "keys":
        return False
    factor = _factor(node)
    call = caller(graph, node)
    with graph.inserting_before(node):
        kept = call(_aten.select.int, call(_aten.select.int, part, 1, 0), 1, 0)
        if kept.meta["val"].dtype != torch.bool:
            kept = call(_aten.gt.Scalar, kept, MASKED)
        target = torch.ops.lutra.masked_attention.default
        made = call(target, query, key, value, kept, found == "causal", factor)
        made = _in_order(call, sources, node, made)
    replace(node, made)
    return True


def _flags(node: fx.Node) -> tuple[Any, Any]:
    """`is_causal` and `dropout_p` of an attention."""
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return causal, dropout


def _factor(node: fx.Node) -> float:
    """What an attention multiplies its scores by."""
    scale: Any = node.kwargs.get("scale")
    query: Any = node.args[0]
    return 1 / math.sqrt(query.meta["val"].shape[-1]) if scale is None else float(scale)


def _has_inputs(sources: Sources, node: fx.Node) -> bool:
    deferred = sources.deferred(node)
    return deferred is not None and bool(deferred.inputs)


def _in_order(call: Any, sources: Sources, node: fx.Node, made: fx.Node) -> fx.Node:
    """What takes the place of a node, with its order of axes in memory, for views of it."""
    order = _order(sources, node.meta["val"])
    if order == sorted(order):
        return made
    made = call(_aten.permute.default, made, order)
    made = call(_aten.clone.default, made, memory_format=torch.contiguous_format)
    back: fx.Node = call(_aten.permute.default, made, [order.index(i) for i in range(len(order))])
    return back


def _take_apart(
    graph: fx.Graph, sources: Sources, node: fx.Node, mask: fx.Node, closes: bool
) -> None:
    """Write an attention in its parts; `closes`: a query may have no key, which gives 0."""
    query, key, value = node.args[:3]
    causal, dropout = _flags(node)
    if causal or dropout or not all(isinstance(x, fx.Node) for x in (query, key, value)):
        return
    factor = _factor(node)
    call = caller(graph, node)
    with graph.inserting_before(node):
        turned = call(_aten.transpose.int, key, -2, -1)
        scores = call(_aten.matmul.default, query, turned)
        scores = call(_aten.mul.Tensor, scores, factor) if factor != 1 else scores
        for term, keeps in _terms(sources, node, mask):
            target = torch.ops.lutra.masked_scores.default
            computed = keeps and _known(sources, node, term) == "computed"
            if computed and term.meta["val"].dtype != torch.bool:
                term = call(_aten.gt.Scalar, term, MASKED)
            if term.meta["val"].dtype == torch.bool and (computed or not keeps):
                scores = call(_aten.where.ScalarOther, term, scores, LOWEST)
                continue
            scores = call(target if keeps else _added(sources, scores, term), scores, term)
        weights = call(_aten.softmax.int, scores, -1)
        made = call(_aten.matmul.default, weights, value)
        if closes:
            top = call(_aten.amax.default, scores, [-1], True)
            made = call(_aten.mul.Tensor, made, call(_aten.gt.Scalar, top, LOWEST / 2))
        made = _in_order(call, sources, node, made)
    replace(node, made)


def _order(sources: Sources, x: torch.Tensor) -> list[int]:
    """The axes of a tensor, outermost first as they lie in memory."""
    strides = [size_at(stride, sources.sizes()) for stride in x.stride()]
    return sorted(range(x.ndim), key=lambda axis: -strides[axis])


def _terms(sources: Sources, node: fx.Node, mask: Any) -> list[tuple[fx.Node, bool]]:
    """What is added to scores, one after the other, and whether it is a mask of what to keep.

    Sums of which only some terms depend on inputs are taken apart, choices between a bias and a
    number that leaves no weight, and masks that two masks make.
    """
    while str(mask.target) in _CHANGE_NOTHING:
        mask = mask.args[0]
    deferred = sources.deferred(mask)
    if mask.meta["val"].dtype == torch.bool:
        both = str(mask.target) in _ANDS and not sources.is_activation(mask)
        if both and _known(sources, node, mask) == "computed":
            return [term for part in mask.args for term in _terms(sources, node, part)]
        return [(mask, not sources.is_activation(mask))]
    if deferred is None or not deferred.inputs:
        return [(mask, False)]
    target, args = str(mask.target), mask.args
    both = all(isinstance(part, fx.Node) for part in args[:2])
    if target == "aten.add.Tensor" and mask.kwargs.get("alpha", 1) == 1 and both:
        return [term for part in args[:2] for term in _terms(sources, node, part)]
    if target in _WHERE and isinstance(args[1], fx.Node) and _is_masked(sources, args[2]):
        return [*_terms(sources, node, args[1]), (args[0], True)]
    return [(mask, not _adds_numbers(sources, mask))]


def _is_masked(sources: Sources, number: Any) -> bool:
    if isinstance(number, fx.Node):
        if sources.is_activation(number) or sources.deferred(number) is not None:
            return False
        number = sources.evaluate(number, {}, {})
        return number.numel() == 1 and float(number) <= MASKED
    return isinstance(number, (int, float)) and number <= MASKED


def _added(sources: Sources, scores: fx.Node, term: fx.Node) -> Any:
    """The operator that adds a term: one of its own for a bias whose size is not known."""
    deferred, shape = sources.deferred(term), scores.meta["val"].shape
    sizes = term.meta["val"].shape[-2:]
    known = len(sizes) < 2 or any(isinstance(size, int) for size in sizes)
    if deferred is None or deferred.inputs or known or len(shape) != 4:
        return _aten.add.Tensor
    return torch.ops.lutra.relative_bias.default


@lowers("lutra.relative_bias.default", takes=("bias",))
def _relative_bias(ctx: Lowering, x: Ref, bias: Any) -> Ref | View:
    scores = ctx.realise(activation(ctx, x))
    heads = scores.shape[1]
    if not isinstance(heads, int) or not isinstance(bias, Deferred):
        raise UnsupportedUse("its heads are known at run time only")
    symbols = [size for size in scores.shape[2:] if not isinstance(size, int)]
    weight = by_distance(
        ctx,
        symbols,
        lambda length: numbers_at(ctx, bias, symbols, length),
        "it adds numbers to its scores that depend",
    )
    weight = weight.clamp(min=LOWEST).expand(heads, -1).contiguous()
    return ctx.emit("relative_bias", scores, scores.shape, tensors={"weight": weight})


@lowers("lutra.masked_scores.default", takes=("keep",))
def _masked_scores(ctx: Lowering, x: Ref, keep: Any) -> Ref | View:
    scores = ctx.realise(activation(ctx, x))
    if scores.rank != 4 or not isinstance(scores.shape[1], int):
        raise UnsupportedUse("its scores must be (N, heads, T, S), with a fixed number of heads")
    batch, heads, queries, keys = ctx.result_sizes
    sizes = (batch, heads, queries, 1)
    try:
        found = find_mask(ctx.sources, keep, sizes, keys, heads)
        if window_of(ctx.sources, keep, sizes, LONGEST) is not None:
            raise UnsupportedUse("its mask has a window")
    except UnsupportedUse:
        source = find_keys(ctx.sources, keep, sizes, keys, heads)
        scores = _masked_positions(ctx, scores, keep)
    else:
        source = found.keys
        if found.causal:
            later = torch.zeros(heads, 2 * LONGEST - 1)
            later[:, LONGEST:] = LOWEST
            scores = ctx.emit("relative_bias", scores, scores.shape, tensors={"weight": later})
    given = None if source is None else ctx.integer_input(source)
    if given is None:
        return scores
    mask = ctx.emit("cast", given, given.shape, suffix="cast")
    kept = ctx.emit("mul", (mask, mask), given.shape, suffix="kept")
    kept = ctx.emit("clamp", kept, given.shape, attrs={"low": 0.0, "high": 1.0}, suffix="kept")
    attrs = {"scale": -LOWEST, "bias": LOWEST}
    added = ctx.emit("affine_scalar", kept, given.shape, attrs=attrs, suffix="added")
    added = views.emit_reshape(ctx, added, (None, 1, 1, given.shape[1]), "added")
    return ctx.emit("add", (scores, added), scores.shape)


def _masked_positions(ctx: Lowering, scores: Ref, keep: Any) -> Ref:
    """Scores without those that a mask drops at every input."""
    symbols = [size for size in scores.shape[2:] if not isinstance(size, int)]

    def at(length: int) -> Tensor:
        sizes = {**ctx.sources.sizes(first=1), **dict.fromkeys(symbols, length)}
        added = torch.where(allowed_at(ctx.sources, keep, sizes), 0.0, LOWEST)
        while added.ndim > 3:
            added = added[0]  # the same for all samples: of inputs of ones
        return added[None] if added.ndim == 2 else added

    if symbols:
        weight = by_distance(ctx, symbols, at, "its mask depends")
        tensors = {"weight": weight.expand(scores.shape[1], -1).contiguous()}
        return ctx.emit("relative_bias", scores, scores.shape, tensors=tensors)
    term = constant(ctx, at(0), scores, 4)
    return ctx.emit("add", (scores, term), scores.shape)

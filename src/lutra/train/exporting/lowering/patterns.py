"""What a program writes in many operators and the graph in one: attention and masked means.

These are found in the torch program, before the walk, and written there as the one operator that
the walk knows. Their masks are deferred, so nothing has to be known of how they are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lutra.train.exporting.lowering.attention import is_mask
from lutra.train.exporting.lowering.deferred import looks_like
from lutra.train.exporting.lowering.sources import Deferred, Sources, value_of
from lutra.train.operators import masked_mean as pooling  # noqa: F401  (their operators)
from lutra.train.operators.scores import MASKED

_aten = torch.ops.aten
_PRODUCTS = ("aten.matmul.default", "aten.bmm.default")
_SOFTMAX = ("aten.softmax.int", "aten._softmax.default")
_TABLE_SOFTMAX = "lutra.table_softmax.default"
_NOTHING = (
    "aten.clone.default",
    "aten.contiguous.default",
    "aten.detach.default",
    "aten.alias.default",
    "aten._to_copy.default",
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten.type_as.default",
    "aten.expand.default",
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
)


def combine(program: ExportedProgram) -> None:
    """Write attention and masked means in a captured program as one operator each, in place."""
    sources = Sources(program)
    for node in list(program.graph.nodes):
        target = str(node.target)
        if target in _PRODUCTS:
            _combine_attention(program.graph, sources, node)
        elif target == "aten.div.Tensor":
            _combine_mean(program.graph, sources, node)


# ---- attention ----------------------------------------------------------------------------------


def _combine_attention(graph: fx.Graph, sources: Sources, product: fx.Node) -> None:
    """softmax(q @ k^T * scale + mask) @ v"""
    weights = _through(product.args[0])
    if weights is None or str(weights.target) not in (*_SOFTMAX, _TABLE_SOFTMAX):
        return
    with_tables = str(weights.target) == _TABLE_SOFTMAX
    value, rank = product.args[1], value_of(weights).ndim
    if weights.args[5 if with_tables else 1] not in (-1, rank - 1) or value_of(value).ndim != rank:
        return
    found = _Scores(graph, sources, product)
    if not found.read(_through(weights.args[0])):
        return
    with graph.inserting_before(product):
        key = graph.call_function(_aten.transpose.int, (found.key, -2, -1))
        key.meta = {**_place(product), "val": value_of(found.key).transpose(-2, -1)}
        operands = (found.query, key, value, found.mask)
        if with_tables:
            made = graph.call_function(
                torch.ops.lutra.table_attention.default,
                (*operands, *weights.args[1:5], False, found.scale),
            )
        else:
            made = graph.call_function(
                _aten.scaled_dot_product_attention.default,
                (*operands, 0.0, False),
                {"scale": found.scale},
            )
    made.meta = dict(product.meta)
    product.replace_all_uses_with(made)


class _Scores:
    """The parts of the scores of an attention, read from the softmax backwards."""

    def __init__(self, graph: fx.Graph, sources: Sources, product: fx.Node) -> None:
        self._graph, self._sources, self._product = graph, sources, product
        self.scale = 1.0
        self.mask: fx.Node | None = None
        self.query: Any = None
        self.key: Any = None
        self._masks: list[tuple[fx.Node, bool]] = []  # and whether they are true for what to drop

    def read(self, node: fx.Node | None) -> bool:
        """Whether the scores are q @ k^T, scaled and masked at most."""
        while node is not None and node.op == "call_function":
            target = str(node.target)
            if target in _PRODUCTS:
                self.query, self.key = node.args
                break
            node = self._before(node, target)
            node = _through(node)
        if self.query is None:
            return False
        self.query = self._unscaled(self.query)
        if len(self._masks) > 1 and not all(self._only_masks(*mask) for mask in self._masks):
            return False
        with self._graph.inserting_before(self._product):
            kept = [self._kept(*mask) for mask in self._masks]
            while len(kept) > 1:
                kept.append(self._call(_aten.logical_and.default, kept.pop(0), kept.pop(0)))
        self.mask = kept[0] if kept else None
        return True

    def _only_masks(self, mask: fx.Node, drops: bool) -> bool:
        """Whether something adds nothing to scores that keep their weight."""
        if drops or not value_of(mask).is_floating_point():
            return True
        sizes = self._sources.sizes()
        given = self._sources.random(sizes, 2, torch.Generator().manual_seed(0))
        return is_mask(self._sources.evaluate(mask, sizes, given))

    def _kept(self, mask: fx.Node, drops: bool) -> fx.Node:
        """A mask of what to keep, or one that is added where it is the only one."""
        if drops:
            return self._call(_aten.logical_not.default, mask)
        if len(self._masks) > 1 and value_of(mask).is_floating_point():
            return self._call(_aten.gt.Scalar, mask, MASKED)
        return mask

    def _call(self, target: Any, *args: Any) -> fx.Node:
        made = self._graph.call_function(target, args)
        values: Any = fx.map_arg(args, value_of)
        made.meta = {**_place(self._product), "val": target(*values)}
        return made

    def _before(self, node: fx.Node, target: str) -> fx.Node | None:
        """What the scores were before one step; None for a step that is none of attention."""
        first: Any
        others: list[Any]
        first, *others = node.args
        other = others[0] if others else None
        if target in ("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar"):
            if not self._sources.is_activation(first):
                first, other = (other, first) if ".mul" in target else (None, None)
            number = self._sources.number(other)
            if number is None:
                return None
            self.scale = self.scale * number if ".mul" in target else self.scale / number
            return first if isinstance(first, fx.Node) else None
        if target == "aten.add.Tensor":
            if not self._sources.is_activation(first):
                first, other = other, first
            plain = node.kwargs.get("alpha", 1) == 1
            return first if plain and isinstance(first, fx.Node) and self._take(other) else None
        if target == "aten.masked_fill.Scalar" and _masks(others[1]):
            return first if self._take(other, drops=True) else None
        if target in ("aten.where.self", "aten.where.ScalarOther"):
            number = self._sources.number(others[1])
            kept = number is not None and _masks(number) and self._take(first)
            return other if kept and isinstance(other, fx.Node) else None
        return None

    def _unscaled(self, node: Any) -> Any:
        """What queries were before they were multiplied with numbers."""
        while isinstance(node, fx.Node) and ".mul." in str(node.target):
            first, second = node.args[:2]
            if not isinstance(first, fx.Node) or not self._sources.is_activation(first):
                first, second = second, first
            number = self._sources.number(second)
            if number is None:
                break
            self.scale *= number
            node = first
        return node

    def _take(self, mask: Any, drops: bool = False) -> bool:
        """Whether something is a mask."""
        if not isinstance(mask, fx.Node) or self._sources.is_activation(mask):
            return False
        if self._sources.deferred(mask) is None and not drops:
            values = self._sources.evaluate(mask, self._sources.sizes(), {})
            if not is_mask(values):
                return False  # numbers that are learnt, say: added as any others
        self._masks.append((mask, drops))
        return True


def _masks(number: Any) -> bool:
    return isinstance(number, (int, float)) and number <= MASKED


# ---- the mean of the tokens that count ----------------------------------------------------------


def _combine_mean(graph: fx.Graph, sources: Sources, quotient: fx.Node) -> None:
    """(x * mask).sum(1) / mask.sum(1)"""
    total, below = _through(quotient.args[0]), quotient.args[1]
    if total is None or str(total.target) != "aten.sum.dim_IntList":
        return
    keeps = len(total.args) > 2 and bool(total.args[2])
    product, axes = _through(total.args[0]), total.args[1]
    if axes not in ([1], [-2]) or keeps or product is None:
        return
    if value_of(product).ndim != 3 or not isinstance(below, fx.Node):
        return
    x, weight, want = _weighted(sources, product)
    count = sources.deferred(below)
    if x is None or weight is None or count is None:
        return
    for source in sorted(weight.inputs, key=str):
        if value_of(source).ndim == 2 and looks_like(sources, weight, want, source):
            if looks_like(sources, count, _count, source):
                with graph.inserting_before(quotient):
                    made = graph.call_function(torch.ops.lutra.masked_mean.default, (x, source))
                made.meta = dict(quotient.meta)
                quotient.replace_all_uses_with(made)
            return


def _weighted(
    sources: Sources, product: fx.Node
) -> tuple[fx.Node | None, Deferred | None, Callable[[Tensor], Tensor]]:
    """The activation of a product with a mask, the mask, and what it should be."""
    target = str(product.target)
    args: Any = product.args
    if target == "aten.mul.Tensor":
        for x, mask in (args, args[::-1]):
            if isinstance(x, fx.Node) and isinstance(mask, fx.Node) and sources.is_activation(x):
                return x, sources.deferred(mask), _tokens
    if target == "aten.masked_fill.Scalar" and args[2] == 0:
        return args[0], sources.deferred(args[1]), _padding
    if target in ("aten.where.self", "aten.where.ScalarOther") and sources.number(args[2]) == 0:
        return args[1], sources.deferred(args[0]), _tokens
    return None, None, _tokens


def _tokens(mask: Tensor) -> Tensor:
    return (mask != 0).float()[:, :, None]


def _padding(mask: Tensor) -> Tensor:
    return (mask == 0).float()[:, :, None]


def _count(mask: Tensor) -> Tensor:
    """The tokens of each sample; any number where there are none."""
    count = (mask != 0).float().sum(1, keepdim=True)
    return torch.where(count == 0, torch.nan, count)


# ---- helpers ------------------------------------------------------------------------------------


def _through(node: Any) -> fx.Node | None:
    """The node behind those that change nothing."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        target = str(node.target)
        if target in _NOTHING:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            old, new = value_of(source), value_of(node)
            if old.shape != new.shape or old.is_floating_point() != new.is_floating_point():
                return node
            node = source
        elif target == "aten.dropout.default" and not node.args[2]:
            node = node.args[0]
        else:
            return node
    return None


def _place(node: fx.Node) -> dict[str, Any]:
    """What says which module a node belongs to."""
    return {name: node.meta[name] for name in ("nn_module_stack",) if name in node.meta}

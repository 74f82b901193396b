"""Operators of the torch program that are written as several others before anything looks at it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lutra.train.exporting.lowering.sources import Sources
from lutra.train.exporting.lowering.unpool import unpooled

_aten = torch.ops.aten


def rewrite(program: ExportedProgram) -> None:
    """Write operators of activations as others, in place.

    * `baddbmm` as a product, a scale and a sum: so scores of an attention that starts from a bias
      look like any others.
    * `max_unpool2d` with the indices of a pooling as a comparison of each window's entries with the
      largest one: no index is needed.
    """
    sources = Sources(program)
    for node in list(program.graph.nodes):
        if not sources.is_activation(node):
            continue
        if str(node.target) == "aten.baddbmm.default":
            _rewrite_baddbmm(program.graph, node)
        elif str(node.target) == "aten.max_unpool2d.default":
            _rewrite_unpool(program.graph, node)


def caller(graph: fx.Graph, node: fx.Node) -> Any:
    """What adds an operator to the graph, in the place of a node."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        values: Any = fx.map_arg(args, lambda each: each.meta["val"])
        place = {k: node.meta[k] for k in ("nn_module_stack",) if k in node.meta}
        made.meta = {**place, "val": target(*values, **kwargs)}
        return made

    return call


def replace(node: fx.Node, made: fx.Node) -> None:
    """Puts one operator in the place of another, with its value and where it comes from."""
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)


def _rewrite_baddbmm(graph: fx.Graph, node: fx.Node) -> None:
    call = caller(graph, node)
    added, first, second = node.args[:3]
    alpha, beta = (node.kwargs.get(name, 1) for name in ("alpha", "beta"))
    with graph.inserting_before(node):
        made = call(_aten.bmm.default, first, second)
        made = made if alpha == 1 else call(_aten.mul.Tensor, made, alpha)
        if beta != 0:
            added = added if beta == 1 else call(_aten.mul.Tensor, added, beta)
            made = call(_aten.add.Tensor, made, added)
    replace(node, made)


def _rewrite_unpool(graph: fx.Graph, node: fx.Node) -> None:
    """Leaves it as it is where there is no other way to write it."""
    indices = node.args[1]
    with graph.inserting_before(node):
        made = unpooled(node, caller(graph, node))
    if made is None:
        return
    replace(node, made)
    graph.erase_node(node)
    if isinstance(indices, fx.Node) and not indices.users:
        graph.erase_node(indices)

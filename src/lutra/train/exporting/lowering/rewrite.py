"""Operators of the torch program that are written as several others before anything looks at it."""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

from lutra.train.exporting.lowering.picked import choose
from lutra.train.exporting.lowering.program import caller, replace
from lutra.train.exporting.lowering.sources import Sources
from lutra.train.exporting.lowering.unpool import unpooled

_aten = torch.ops.aten


def rewrite(program: ExportedProgram) -> None:
    """Write operators of activations as others, in place.

    * `baddbmm` as a product, a scale and a sum: so scores of an attention that starts from a bias
      look like any others.
    * `max_unpool2d` with the indices of a pooling as a comparison of each window's entries with the
      largest one: no index is needed.
    * `type_as` as a cast: what is cast does not depend on the other tensor's values.
    * `x[mask] = f(x[mask])` as f of all of x, and a choice by the mask.
    """
    for node in list(program.graph.nodes):
        if str(node.target) == "aten.type_as.default":
            _rewrite_type_as(program.graph, node)
    sources = Sources(program)
    for node in list(program.graph.nodes):
        if str(node.target) == "aten.index_put.default" and sources.is_activation(node):
            choose(program.graph, node)
    sources = Sources(program)
    for node in list(program.graph.nodes):
        if not sources.is_activation(node):
            continue
        if str(node.target) == "aten.baddbmm.default":
            _rewrite_baddbmm(program.graph, node)
        elif str(node.target) == "aten.max_unpool2d.default":
            _rewrite_unpool(program.graph, node)


def _rewrite_type_as(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        call = caller(graph, node)
        made = call(_aten._to_copy.default, node.args[0], dtype=node.meta["val"].dtype)
    replace(node, made)
    graph.erase_node(node)


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

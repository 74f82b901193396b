"""Operators of the torch program that are written as several others before anything looks at it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lutra.train.exporting.lowering.sources import Sources

_aten = torch.ops.aten


def rewrite(program: ExportedProgram) -> None:
    """Write `baddbmm` of activations as a product, a scale and a sum, in place.

    So scores of an attention that starts from a bias look like any others.
    """
    sources = Sources(program)
    for node in list(program.graph.nodes):
        if str(node.target) == "aten.baddbmm.default" and sources.is_activation(node):
            _rewrite_baddbmm(program.graph, node)


def _rewrite_baddbmm(graph: fx.Graph, node: fx.Node) -> None:
    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        values: Any = fx.map_arg(args, lambda each: each.meta["val"])
        place = {k: node.meta[k] for k in ("nn_module_stack",) if k in node.meta}
        made.meta = {**place, "val": target(*values)}
        return made

    added, first, second = node.args[:3]
    alpha, beta = (node.kwargs.get(name, 1) for name in ("alpha", "beta"))
    with graph.inserting_before(node):
        made = call(_aten.bmm.default, first, second)
        made = made if alpha == 1 else call(_aten.mul.Tensor, made, alpha)
        if beta != 0:
            added = added if beta == 1 else call(_aten.mul.Tensor, added, beta)
            made = call(_aten.add.Tensor, made, added)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)

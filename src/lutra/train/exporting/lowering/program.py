"""Operators added to a torch program, and put in the place of others."""

from __future__ import annotations

from typing import Any

from torch import fx


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

"""Compact tables for files that should be small: see `lutra.ops.compact_tables`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.graph import Graph
from lutra.node import Array, Node
from lutra.ops.limits import INT8_MAX
from lutra.train.geometry import Grid
from lutra.train.layers.base import FrozenLayer, QuantizedLayer

_TABLES: Final = "tables"
_MOST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class CompactTables:
    """What the tables of a layer are built from: weight int8 (M, D) and factor float32 (M)."""

    weight: Array
    factor: Array


def weights_of(model: nn.Module) -> dict[str, Tensor | str]:
    """The float weights (M, D) of every lookup layer, under each path that leads to it, or the
    reason why its tables cannot be built from weights."""
    found: dict[str, Tensor | str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        weight = module.compact_weight() if isinstance(module, QuantizedLayer) else None
        if weight is not None:
            found[path] = weight.cpu() if isinstance(weight, Tensor) else weight
    return found


@torch.no_grad()
def compact_tables_of(
    model: nn.Module, weights: Mapping[str, Tensor | str]
) -> dict[str, CompactTables | str]:
    """Rounds the weights of frozen layers to int8, each output with a step of its own.

    Args:
        model: The model, its lookup layers frozen and no norm folded into their scales.
        weights: What `weights_of` found before they were frozen.

    Returns:
        Compact tables by the name of the tables that they replace, in the state of the model; or
        the reason why there are none.
    """
    result: dict[str, CompactTables | str] = {}
    for path, weight in weights.items():
        frozen = model.get_submodule(path)
        if not isinstance(frozen, FrozenLayer) or frozen.node.spec.table_role != _TABLES:
            continue
        tables = f"{path}.{_TABLES}" if path else _TABLES
        if isinstance(weight, str):
            result[tables] = weight
            continue
        rows = weight.double().numpy()
        scale = frozen.tensors["scale"].double().cpu().numpy()
        grid = Grid.of_attrs(frozen.node.attrs)
        step = np.maximum(np.abs(rows).max(axis=1), 1e-30) / INT8_MAX
        result[tables] = CompactTables(
            np.rint(rows / step[:, None]).astype(np.int8),
            np.minimum(step * grid.scale / scale, _MOST).astype(np.float32),
        )
    return result


def with_compact_tables(
    graph: Graph, compact: Mapping[str, CompactTables | str]
) -> tuple[Graph, dict[str, Any]]:
    """Puts compact tables in the place of tables, wherever that makes the file smaller.

    Args:
        graph: A valid graph.
        compact: By the name of the tables.

    Returns:
        The graph, and an entry for its metadata: which layers have compact tables, which keep their
        tables and why, the bytes of both forms, and the share of table entries that changed.

    Raises:
        LutraError: There are lookup layers, but no compact tables for any of them.
    """
    lookups = [node for node in graph.nodes if _TABLES in node.tensors]
    if lookups and not any(node.tensors[_TABLES] in compact for node in lookups):
        raise LutraError(
            f"export: tables='compact' needs the weights of the {len(lookups)} lookup layers, and "
            "frozen layers have none; export the model that convert made, or take tables='stored'"
        )
    arrays = dict(graph.tensors)
    roles: dict[str, dict[str, str]] = {}  # of the compact form of some tables
    kept: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        name = node.tensors.get(_TABLES)
        if name is not None:
            found = _usable(graph, node, compact)
            if isinstance(found, str):
                kept[node.name] = found
            else:
                if name not in roles:
                    roles[name] = _store(arrays, name, found)
                others = {role: n for role, n in node.tensors.items() if role != _TABLES}
                node = replace(node, tensors={**others, **roles[name]})
        nodes.append(node)
    used = {name for node in nodes for name in node.tensors.values()}
    made = replace(
        graph,
        nodes=tuple(nodes),
        tensors={name: array for name, array in arrays.items() if name in used},
    )
    layers = [
        _described(node, before, graph, made)
        for before, node in zip(graph.nodes, nodes, strict=True)
        if node is not before
    ]
    return made, {"form": "compact", "layers": layers, "stored": kept}


def _usable(
    graph: Graph, node: Node, compact: Mapping[str, CompactTables | str]
) -> CompactTables | str:
    """The compact tables of a layer, or the reason why it keeps its tables."""
    found = compact.get(node.tensors[_TABLES], "its weights are not known")
    if isinstance(found, str):
        return found
    _, k, v = graph.node_tensors(node)["centroids"].shape
    return f"V={v} is not less than K={k}: its tables are no larger" if v >= k else found


def _store(arrays: dict[str, Array], tables: str, compact: CompactTables) -> dict[str, str]:
    """Adds the tensors under new names, and returns these by role."""
    roles = {}
    for role, array in (("weight", compact.weight), ("factor", compact.factor)):
        name = tables.removesuffix(_TABLES) + role
        while name in arrays:
            name += "_"
        arrays[name] = array
        roles[role] = name
    return roles


def _described(node: Node, before: Node, graph: Graph, made: Graph) -> dict[str, Any]:
    old, new = graph.node_tensors(before)[_TABLES], made.node_tensors(node)[_TABLES]
    size = sum(made.tensors[node.tensors[role]].nbytes for role in ("weight", "factor"))
    return {
        "name": node.name,
        "bytes": size,
        "table_bytes": old.nbytes,
        "changed_entries": float((old != new).mean()),
        "largest_change": int(np.abs(old.astype(np.int16) - new).max()),
    }

"""Compact tables for files that should be small: see `lutra.ops.compact_tables`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.graph import Graph
from lutra.node import Array, Node
from lutra.train.geometry import Grid
from lutra.train.layers.base import FrozenLayer, QuantizedLayer
from lutra.train.layers.pq_compact import factors, round_rows

_TABLES: Final = "tables"


@dataclass(frozen=True)
class CompactTables:
    """What the tables of a layer are built from: weight int8 (M, D), factor float32 (M), and
    centroids uint8 (G, K, V) where the layer has none of its own."""

    weight: Array
    factor: Array
    centroids: Array | None = None

    @property
    def tensors(self) -> dict[str, Array]:
        """By role."""
        arrays = {"weight": self.weight, "factor": self.factor, "centroids": self.centroids}
        return {role: array for role, array in arrays.items() if array is not None}


@dataclass(frozen=True)
class Sources:
    """What the compact tables of a layer are rounded from.

    Attributes:
        weight: float32 (M, D).
        centroids: uint8 (G, K, V) where the frozen layer has none.
    """

    weight: Tensor
    centroids: Tensor | None


def sources_of(model: nn.Module) -> dict[str, Sources | str]:
    """The weights of every lookup layer, under each path that leads to it, or the reason why its
    tables cannot be built from weights."""
    found: dict[str, Sources | str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, QuantizedLayer):
            continue
        weight = module.compact_weight()
        if isinstance(weight, str):
            found[path] = weight
        elif weight is not None:
            centroids = module.compact_centroids()
            found[path] = Sources(weight.cpu(), None if centroids is None else centroids.cpu())
    return found


def compact_tables_of(
    model: nn.Module, sources: Mapping[str, Sources | str]
) -> dict[str, CompactTables | str]:
    """Rounds the weights of frozen layers to int8, each output with a step of its own.

    Args:
        model: The model, its lookup layers frozen and no norm folded into their scales.
        sources: What `sources_of` found before they were frozen.

    Returns:
        Compact tables by the name of the tables that they replace, in the state of the model; or
        the reason why there are none.
    """
    result: dict[str, CompactTables | str] = {}
    for path, source in sources.items():
        frozen = model.get_submodule(path)
        if not isinstance(frozen, FrozenLayer) or frozen.node.spec.table_role != _TABLES:
            continue
        tables = f"{path}.{_TABLES}" if path else _TABLES
        if isinstance(source, str):
            result[tables] = source
            continue
        weight, step = round_rows(source.weight)
        grid = Grid.of_attrs(frozen.node.attrs)
        factor = factors(step, grid.scale, frozen.tensors["scale"].detach().cpu())
        centroids = None if source.centroids is None else source.centroids.numpy()
        result[tables] = CompactTables(weight.numpy(), factor.numpy(), centroids)
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
    own = found.centroids
    _, k, v = (graph.node_tensors(node)["centroids"] if own is None else own).shape
    return f"V={v} is not less than K={k}: its tables are no larger" if v >= k else found


def _store(arrays: dict[str, Array], tables: str, compact: CompactTables) -> dict[str, str]:
    """Adds the tensors under new names, and returns these by role."""
    roles = {}
    for role, array in compact.tensors.items():
        name = tables.removesuffix(_TABLES) + role
        while name in arrays:
            name += "_"
        arrays[name] = array
        roles[role] = name
    return roles


def _described(node: Node, before: Node, graph: Graph, made: Graph) -> dict[str, Any]:
    old, new = graph.node_tensors(before)[_TABLES], made.node_tensors(node)[_TABLES]
    size = sum(
        made.tensors[name].nbytes
        for role, name in node.tensors.items()
        if role not in before.tensors
    )
    return {
        "name": node.name,
        "bytes": size,
        "table_bytes": old.nbytes,
        "changed_entries": float((old != new).mean()),
        "largest_change": int(np.abs(old.astype(np.int16) - new).max()),
    }

"""Tables in the place of functions in a graph, and so in any file, without PyTorch or training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from lutra.errors import InputError
from lutra.functions.fit import Method, fit
from lutra.functions.histogram import Histogram
from lutra.functions.piecewise import Piecewise, check_entries
from lutra.functions.reduced import Reduced, fit_exp, fit_reciprocal, fit_rsqrt
from lutra.functions.scalar import KNOWN
from lutra.graph import Graph
from lutra.node import Array, Node
from lutra.ops.functions import FUNCTIONS, function_name, has_tables
from lutra.reference.compare import difference
from lutra.runtime.session import Session

#: Operators that take tables of reduced range, and which.
_COMPOSITE: Final = {
    "softmax": ("exp", "reciprocal"),
    "attention": ("exp", "reciprocal"),
    "layer_norm": ("rsqrt",),
    "rms_norm": ("rsqrt",),
}
#: Operators without asymptotes: their tables are for the range of calibration data only.
_RANGED: Final = ("exp", "log", "sqrt", "rsqrt", "reciprocal")
#: What is swapped unless the caller names others.
SWAPPED: Final = (*(name for name in FUNCTIONS if name not in _RANGED), *_COMPOSITE)


def swap_functions(
    graph: Graph,
    entries: int = 16,
    *,
    method: Method = "minimax",
    feeds: Iterable[Mapping[str, Array]] | None = None,
    functions: Sequence[str] = SWAPPED,
) -> Graph:
    """Replaces functions of a graph by tables: activations, softmax, attention and norms.

    Args:
        graph: The graph; it stays as it is.
        entries: Lines of each table: 8, 16 or 32.
        method: How tables of one function are fitted, see `lutra.functions.fit`.
        feeds: Batches of inputs, arrays by input name. Each activation is then fitted to what
            flows into it. None fits for all inputs alike.
        functions: Names of operators. "exp", "log", "sqrt", "rsqrt" and "reciprocal" can be among
            them where there are feeds; beyond the range that these give they are constant.

    Returns:
        The graph with tables. Golden outputs, where there are any, are those of the new graph;
        `metadata["functions"]` says what was swapped, and how far the golden outputs moved.

    Raises:
        InputError: A setting that is not known, no node to swap, or feeds that do not fit.
        GraphError: The graph is not valid.
    """
    check_entries(entries)
    known = (*FUNCTIONS, *_COMPOSITE)
    unknown = [name for name in functions if name not in known]
    if unknown:
        raise InputError(f"functions: {unknown} are no operators with tables; known: {list(known)}")
    ranged = [name for name in functions if name in _RANGED]
    if ranged and feeds is None:
        raise InputError(
            f"functions: {', '.join(ranged)} need the range of their inputs; give feeds, or leave "
            "them out"
        )
    chosen = [node for node in graph.nodes if _swaps(graph, node, functions)]
    if not chosen:
        found = ", ".join(sorted({node.op for node in graph.nodes}))
        raise InputError(
            f"functions: no node is one of {', '.join(functions)} without tables; the graph has "
            f"{found}"
        )
    single = [node for node in chosen if node.op not in _COMPOSITE]
    seen = {} if feeds is None else _inputs(graph, single, feeds)
    tensors = dict(graph.tensors)
    stored: dict[tuple[Any, ...], dict[str, str]] = {}
    fitted: dict[tuple[str, int], Piecewise] = {}
    made: dict[str, Node] = {}
    for node in chosen:
        if node.op in _COMPOSITE:
            names: dict[str, str] = {}
            for kind in _COMPOSITE[node.op]:
                if (kind,) not in stored:
                    stored[kind,] = _store(tensors, f"table.{kind}", _reduced(kind, entries))
                names.update(stored[kind,])
            made[node.name] = replace(node, tensors={**node.tensors, **names})
            continue
        function, inputs = function_name(node), seen.get(node.inputs[0])
        key = (function, id(inputs))
        if key not in fitted:
            fitted[key] = fit(function, entries=entries, method=method, histogram=inputs)
            where = f"table.{function}" if inputs is None else f"{node.name}.table"
            stored[key] = _store(tensors, where, fitted[key])
        made[node.name] = replace(node, op="piecewise", attrs={}, tensors=stored[key])
    nodes = tuple(made.get(node.name, node) for node in graph.nodes)
    used = {name for node in nodes for name in node.tensors.values()}
    swapped = replace(
        graph,
        nodes=nodes,
        tensors={name: array for name, array in tensors.items() if name in used},
        golden=None,
    )
    entry: dict[str, Any] = {
        "entries": entries,
        "method": method,
        "calibrated": feeds is not None,
        "nodes": {node.name: function_name(node) for node in chosen},
    }
    golden = None
    if graph.golden is not None:
        inputs_, before = graph.golden
        given = {value.name: x for value, x in zip(graph.inputs, inputs_, strict=True)}
        after = tuple(Session(swapped).run(None, given))
        golden = (inputs_, after)
        entry["largest_output_difference"] = {
            name: difference(new, old)
            for name, new, old in zip(graph.outputs, after, before, strict=True)
        }
    metadata = {**graph.metadata, "functions": entry}
    result = replace(swapped, metadata=metadata, golden=golden)
    result.validate()
    return result


def _swaps(graph: Graph, node: Node, functions: Sequence[str]) -> bool:
    if node.op not in functions:
        return False
    return node.op not in _COMPOSITE or not has_tables(graph.node_tensors(node))


def _reduced(kind: str, entries: int) -> Reduced:
    make = {"exp": fit_exp, "reciprocal": fit_reciprocal, "rsqrt": fit_rsqrt}[kind]
    return make(entries)


def _store(tensors: dict[str, Array], where: str, table: Piecewise | Reduced) -> dict[str, str]:
    """Adds the arrays of a table under new names, and returns these by role."""
    roles = {}
    for role, array in table.tensors.items():
        name = f"{where}.{role}"
        while name in tensors:
            name += "_"
        tensors[name] = array
        roles[role] = name
    return roles


def _inputs(
    graph: Graph, nodes: Sequence[Node], feeds: Iterable[Mapping[str, Array]]
) -> dict[str, Histogram]:
    """What flows into nodes, by the name of the value that they read."""
    wanted = list(dict.fromkeys(node.inputs[0] for node in nodes))
    given = {value.name for value in graph.inputs}
    inner = tuple(name for name in wanted if name not in given)
    seen = {name: Histogram() for name in wanted}
    if not wanted:
        return seen
    session = Session(replace(graph, outputs=inner or graph.outputs, golden=None))
    batches = 0
    for feed in feeds:
        made = dict(zip(inner, session.run(list(inner) or None, feed), strict=False))
        for name, histogram in seen.items():
            histogram.add(made[name] if name in made else feed[name])
        batches += 1
    if not batches:
        raise InputError("functions: feeds is empty; give a few batches of real inputs, or None")
    empty = [name for name, histogram in seen.items() if histogram.empty]
    if empty:
        raise InputError(f"functions: the values {empty} have no finite number in the feeds")
    return seen


assert set(FUNCTIONS) <= set(KNOWN)  # every operator of one number can be fitted

"""``lutra inspect``: what is in a file."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any, Final

from lutra.cli.common import add_file, bytes_text, pairs, plain, print_json, shape_text, table
from lutra.format import VERSION, load_graph
from lutra.graph import Graph

_MAX_SHOWN: Final = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_file(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    graph = load_graph(args.file)
    report = describe(graph, os.path.getsize(args.file))
    if args.json:
        print_json({"file": args.file, **report})
    else:
        print(f"{plain(args.file)}: {_text(report, graph)}")
    return 0


def describe(graph: Graph, file_bytes: int) -> dict[str, Any]:
    """Everything that the command shows; work is per sample.

    Args:
        graph: The content of the file.
        file_bytes: Size of the file.
    """
    values, costs, total = graph.values, graph.cost(), graph.total_cost()
    layers = []
    for node in graph.nodes:
        cost, arrays = costs[node.name], graph.node_tensors(node)
        centroids = arrays.get("centroids")
        codes = arrays["tables"].shape[1] if "tables" in arrays else None
        layers.append(
            {
                "name": node.name,
                "op": node.op,
                "output_shape": list(values[node.output].shape),
                "encoder": node.attrs.get("encoder"),
                "v": None if centroids is None else centroids.shape[2],
                "k": codes,
                "bytes": cost.weight_bytes,
                "lookups": cost.lookups,
                "encode_ops": cost.encode_ops,
                "multiplications": cost.macs,
                "dense_multiplications": cost.dense_macs,
            }
        )
    golden = graph.golden or ((), ())
    return {
        "format_version": VERSION,
        "inputs": [{"name": v.name, "dtype": v.dtype, "shape": v.shape} for v in graph.inputs],
        "outputs": [{"name": n, "shape": values[n].shape} for n in graph.outputs],
        "layers": layers,
        "totals": {
            "nodes": len(graph.nodes),
            "lookup_layers": sum(cost.lookups > 0 for cost in costs.values()),
            "lookups": total.lookups,
            "encode_ops": total.encode_ops,
            "multiplications": total.macs,
            "dense_multiplications": total.dense_macs,
        },
        "sizes": {
            "file_bytes": file_bytes,
            "parameter_bytes": graph.parameter_bytes(),
            "table_bytes": total.table_bytes,
            "golden_bytes": sum(array.nbytes for group in golden for array in group),
        },
        "golden_samples": golden[0][0].shape[0] if golden[0] else 0,
        "metadata": dict(graph.metadata),
    }


def _text(report: dict[str, Any], graph: Graph) -> str:
    totals, sizes = report["totals"], report["sizes"]
    left, dense = totals["multiplications"], totals["dense_multiplications"]
    share = f" ({100 * left / dense:.1f}% of {dense:,})" if dense else ""
    ends = {
        kind: ", ".join(f"{plain(v['name'])} {shape_text(tuple(v['shape']))}" for v in report[kind])
        for kind in ("inputs", "outputs")
    }
    head = pairs(
        {
            "inputs": ends["inputs"],
            "outputs": ends["outputs"],
            "layers": f"{totals['nodes']} nodes, {totals['lookup_layers']} of them lookup layers",
            "multiplications": f"{left:,} left{share}, {totals['encode_ops']:,} to find codes",
            "lookups": f"{totals['lookups']:,}",
            "sizes": f"file {bytes_text(sizes['file_bytes'])}, parameters "
            f"{bytes_text(sizes['parameter_bytes'])}, of which tables "
            f"{bytes_text(sizes['table_bytes'])}; golden data {bytes_text(sizes['golden_bytes'])} "
            f"({report['golden_samples']} samples)",
        }
    )
    parts = [f"lutra file, format version {report['format_version']}", head, "", _layers(report)]
    if report["metadata"]:
        parts += ["", "metadata", pairs(_metadata(report["metadata"]))]
    return "\n".join(parts)


def _layers(report: dict[str, Any]) -> str:
    names = ("layer", "op", "output", "V", "K", "bytes", "lookups", "encode", "multiplications")
    rows: list[tuple[str, ...]] = [names]
    for layer in report["layers"]:
        shape = shape_text(tuple(layer["output_shape"]))
        books = [layer["v"], layer["k"]]
        if layer["encoder"] == "tree":
            books[0] = "tree"  # has no sub-vectors
        books = ["-" if entry is None else str(entry) for entry in books]
        counts = (layer[k] for k in ("bytes", "lookups", "encode_ops", "multiplications"))
        cells = (f"{count:,}" if count else "-" for count in counts)
        rows.append((plain(layer["name"]), layer["op"], shape, *books, *cells))
    totals = report["totals"]
    numbers = (
        report["sizes"]["parameter_bytes"],
        *(totals[key] for key in ("lookups", "encode_ops", "multiplications")),
    )
    rows.append(("total", "", "", "", "", *(f"{number:,}" for number in numbers)))
    return table(rows, left=3)


def _metadata(metadata: dict[str, Any]) -> dict[str, str]:
    """Each entry in one line of ASCII, cut where it is long."""
    entries = {}
    for name, value in metadata.items():
        if isinstance(value, list) and len(value) > 12:
            text = f"{len(value)} entries: {json.dumps(value[:6])[1:-1]}, ..."
        else:
            text = value if isinstance(value, str) else json.dumps(value)
        text = plain(text) if isinstance(value, str) else text
        shown = text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
        entries["  " + plain(name)] = shown
    return entries

"""``lutra inspect``: what is in a file."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from lutra.cli.common import (
    add_file,
    add_shape,
    bytes_text,
    pairs,
    plain,
    print_json,
    read_sizes,
)
from lutra.energy import SOURCES, Energy, EnergyTable, estimate
from lutra.errors import LutraError
from lutra.format import file_version, load_graph
from lutra.formatting import counted, shape_text, table
from lutra.graph import Graph, Sizes
from lutra.node import Array, AttrValue, Node
from lutra.ops.spec import Cost

_MAX_SHOWN: Final = 200
_PRICES: Final = asdict(EnergyTable())
_ENERGY_NAMES: Final = (
    "layer",
    "op",
    "table reads",
    "int adds",
    "int muls",
    "int cmps",
    "float adds",
    "float muls",
)
#: The ways to compute whose energy is compared, and the heads of their columns.
_WAYS: Final = {
    "fp32": "fp32 dense",
    "int8": "int8 dense",
    "sram": "lutra, SRAM",
    "registers": "lutra, registers",
}
_GATE_SETTINGS: Final = ("machine", "isa", "threads", "batch", "against", "margin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_file(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--energy", action="store_true", help="operations and an estimate of the energy, by layer"
    )
    parser.add_argument(
        "--pj",
        type=_price,
        action="append",
        default=[],
        metavar="NAME=PJ",
        help=f"another figure for that estimate, in picojoules; names: {', '.join(_PRICES)}",
    )
    add_shape(parser, "to count the work for")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    graph = load_graph(args.file)
    sizes = read_sizes(args.shape, graph)
    report = describe(graph, os.path.getsize(args.file), sizes, EnergyTable(**dict(args.pj)))
    if args.json:
        print_json({"file": args.file, **report})
    else:
        print(f"{plain(args.file)}: {_text(report, graph, args.energy)}")
    return 0


def describe(
    graph: Graph,
    file_bytes: int,
    sizes: Sizes | None = None,
    prices: EnergyTable | None = None,
) -> dict[str, Any]:
    """Everything that the command shows; work is per sample.

    Args:
        graph: The content of the file.
        file_bytes: Size of the file.
        sizes: Shapes of the inputs by name to count the work for; by default those of the model
            or of its golden data. Without any there is no work to show.
        prices: What the estimate of the energy is made with; the 45 nm figures where it is None.
    """
    prices = prices or EnergyTable()
    values = graph.values if sizes is None else graph.infer(sizes)
    sizes = graph.nominal_sizes() if sizes is None else sizes
    costs = graph.unit_cost() if sizes is None else graph.cost(sizes)
    energy = None if sizes is None else estimate(graph, prices, sizes)
    total = sum(costs.values(), Cost())
    layers = []
    for node in graph.nodes:
        cost, arrays = costs[node.name], graph.node_tensors(node)
        centroids = arrays.get("centroids")
        tables = arrays.get("tables")
        codes = _function_entries(arrays) if tables is None else tables.shape[1]
        table = list(arrays["table"].shape) if "table" in arrays else None
        layers.append(
            {
                "name": node.name,
                "op": node.op,
                "output_shape": list(values[node.output].shape),
                "encoder": node.attrs.get("encoder"),
                "distance": _distance(node),
                "v": None if centroids is None else centroids.shape[2],
                "k": codes,
                "table": table,
                "tables": _form(node, arrays) if cost.table_bytes else None,
                "bytes": cost.weight_bytes,
                **_work(cost, sizes),
                "energy_pj": None if energy is None else asdict(energy[node.name]),
            }
        )
    golden = graph.golden or ((), ())
    return {
        "format_version": file_version(graph),
        "inputs": [{"name": v.name, "dtype": v.dtype, "shape": v.shape} for v in graph.inputs],
        "outputs": [{"name": n, "shape": graph.values[n].shape} for n in graph.outputs],
        "layers": layers,
        "totals": {
            "nodes": len(graph.nodes),
            "lookup_layers": sum(cost.lookups > 0 for cost in costs.values()),
            **_work(total, sizes),
            "energy_pj": None if energy is None else asdict(sum(energy.values(), Energy())),
        },
        "energy_table_pj": asdict(prices),
        "energy_sources": SOURCES,
        "work_for": sizes,
        "sizes": {
            "file_bytes": file_bytes,
            "parameter_bytes": graph.parameter_bytes(),
            "table_bytes": total.table_bytes,
            "golden_bytes": sum(array.nbytes for group in golden for array in group),
        },
        "golden_samples": golden[0][0].shape[0] if golden[0] else 0,
        "metadata": dict(graph.metadata),
    }


def _work(cost: Cost, sizes: Sizes | None) -> dict[str, Any]:
    """The numbers that depend on the sizes of the inputs; None where those are not known."""
    work = {
        "lookups": cost.lookups,
        "functions": cost.functions,
        "table_functions": cost.pieces,
        "encode_ops": cost.encode_ops,
        "multiplications": cost.macs,
        "int8_multiplications": cost.int8_macs,
        "dense_multiplications": cost.dense_macs,
        "operations": {
            "table_reads": cost.table_reads,
            "int_additions": cost.int_additions,
            "int_multiplications": cost.int_multiplications,
            "int_comparisons": cost.comparisons,
            "float_additions": cost.float_additions,
            "float_multiplications": cost.float_multiplications,
        },
    }
    return work if sizes is not None else dict.fromkeys(work)


def _distance(node: Node) -> AttrValue | None:
    """By which distance a layer searches its centroids; None where it searches none."""
    return node.attrs.get("distance") if node.attrs.get("encoder") == "nearest" else None


def _form(node: Node, arrays: Mapping[str, Array]) -> str:
    """How a file holds the tables of a node: those of products, or of a function."""
    if _function_entries(arrays) is not None:
        return "function"
    return "compact" if "factor" in node.tensors else "stored"


def _function_entries(arrays: Mapping[str, Array]) -> int | None:
    """Entries of the function tables of a node; None where it has none."""
    slopes = [array for role, array in arrays.items() if role.endswith("slope")]
    return slopes[0].shape[0] if slopes else None


def _golden_text(report: Mapping[str, Any], graph: Graph) -> str:
    if graph.no_golden:
        return f"no golden data ({plain(graph.no_golden)})"
    size = bytes_text(report["sizes"]["golden_bytes"])
    return f"golden data {size} ({counted(report['golden_samples'], 'sample')})"


def _text(report: dict[str, Any], graph: Graph, by_layer: bool) -> str:
    totals, sizes = report["totals"], report["sizes"]
    compact = sum(layer["tables"] == "compact" for layer in report["layers"])
    built = f" ({counted(compact, 'layer')} built from int8 weights)" if compact else ""
    ends = {
        kind: ", ".join(
            f"{plain(v['name'])} {_dtype(v)}{shape_text(tuple(v['shape']))}" for v in report[kind]
        )
        for kind in ("inputs", "outputs")
    }
    head = pairs(
        {
            "inputs": ends["inputs"],
            "outputs": ends["outputs"],
            "layers": f"{totals['nodes']} nodes, {totals['lookup_layers']} of them lookup layers",
            **_work_text(report, graph, by_layer),
            "sizes": f"file {bytes_text(sizes['file_bytes'])}, parameters "
            f"{bytes_text(sizes['parameter_bytes'])}, tables "
            f"{bytes_text(sizes['table_bytes'])}{built}; {_golden_text(report, graph)}",
        }
    )
    parts = [f"lutra file, format version {report['format_version']}", head, "", _layers(report)]
    if by_layer and report["work_for"] is not None:
        parts += ["", _energy(report)]
    metadata = dict(report["metadata"])
    gate = _speed_gate(metadata.get("speed_gate"))
    if gate:
        del metadata["speed_gate"]
        parts += ["", gate]
    if metadata:
        parts += ["", "metadata", pairs(_metadata(metadata))]
    return "\n".join(parts)


def _dtype(value: dict[str, Any]) -> str:
    """The dtype of an input, where it is not that of almost all."""
    dtype = value.get("dtype", "float32")
    return "" if dtype == "float32" else f"{dtype} "


def _work_text(report: dict[str, Any], graph: Graph, by_layer: bool) -> dict[str, str]:
    """The work of one sample, and of which size where a model takes any."""
    totals = report["totals"]
    if report["work_for"] is None:
        return {"work": "depends on the size of the inputs; give --shape to count it"}
    left, dense = totals["multiplications"], totals["dense_multiplications"]
    share = f" ({100 * left / dense:.1f}% of {dense:,})" if dense else ""
    if totals["int8_multiplications"]:
        share += f", {totals['int8_multiplications']:,} of them in int8"
    work = {
        "multiplications": f"{left:,} left{share}, {totals['encode_ops']:,} to find codes",
        "lookups": f"{totals['lookups']:,}",
        **_functions_text(totals),
        "energy": _energy_line(totals["energy_pj"], by_layer),
    }
    if not graph.is_dynamic:
        return work
    inputs = (
        f"{plain(name)} {shape_text((1, *shape[1:]))}" for name, shape in report["work_for"].items()
    )
    return {"work": f"for each sample of {', '.join(inputs)}; --shape gives others", **work}


def _functions_text(totals: dict[str, Any]) -> dict[str, str]:
    """How many values of functions are computed and how many come from tables, if there are any."""
    computed, read = totals["functions"], totals["table_functions"]
    if not computed + read:
        return {}
    return {"functions": f"{computed:,} values computed, {read:,} read from tables"}


def _layers(report: dict[str, Any]) -> str:
    names = (
        "layer",
        "op",
        "output",
        "V",
        "K",
        "tables",
        "bytes",
        "lookups",
        "encode",
        "multiplications",
    )
    rows: list[tuple[str, ...]] = [names]
    for layer in report["layers"]:
        shape = shape_text(tuple(layer["output_shape"]))
        codebooks = [layer["v"], layer["k"]]
        if layer["encoder"] == "tree":
            codebooks[0] = "tree"  # has no sub-vectors
        if layer["distance"] not in (None, "l2"):
            codebooks[0] = f"{layer['v']} {layer['distance']}"
        if layer["table"]:
            codebooks[1] = "x".join(map(str, layer["table"]))
        codebooks = ["-" if entry is None else str(entry) for entry in codebooks]
        counts = (layer[k] for k in ("bytes", "lookups", "encode_ops", "multiplications"))
        work = map(_number, counts)
        form = layer["tables"] or "-"
        rows.append((plain(layer["name"]), layer["op"], shape, *codebooks, form, *work))
    totals = report["totals"]
    numbers = (
        report["sizes"]["parameter_bytes"],
        *(totals[key] for key in ("lookups", "encode_ops", "multiplications")),
    )
    cells = ("?" if number is None else f"{number:,}" for number in numbers)
    rows.append(("total", "", "", "", "", "", *cells))
    return table(rows, left=3)


def _energy_line(energy: dict[str, float], by_layer: bool) -> str:
    return (
        f"{_joules(energy['sram'])} per sample with tables in SRAM, "
        f"{_joules(energy['registers'])} with small ones in registers; dense network "
        f"{_joules(energy['fp32'])} in float32, {_joules(energy['int8'])} in int8 (estimate"
        + (")" if by_layer else ", see --energy)")
    )


def _energy(report: dict[str, Any]) -> str:
    """Operations and energy of each layer that computes, and what the numbers mean."""
    rows: list[tuple[str, ...]] = [(*_ENERGY_NAMES, *_WAYS.values())]
    for layer in [*report["layers"], {"name": "total", "op": "", **report["totals"]}]:
        work, energy = layer["operations"], layer["energy_pj"]
        if any(work.values()):
            counts = (f"{count:,}" if count else "-" for count in work.values())
            costs = (f"{energy[way] / 1000:,.2f}" for way in _WAYS)
            rows.append((plain(layer["name"]), layer["op"], *counts, *costs))
    prices = report["energy_table_pj"]
    entry, changed = prices["sram_8k"] / 8, [n for n in _PRICES if prices[n] != _PRICES[n]]
    origin = f" but for {', '.join(changed)}" if changed else ""
    lines = [
        f"operations and energy in nJ for one sample: 45 nm (Horowitz, ISSCC 2014){origin}",
        table(rows, left=2),
        "pJ: " + ", ".join(f"{name} {price:g}" for name, price in prices.items()),
        "sram is a read of 64 bits, register_read one of a byte (no measurement: an assumption, "
        "see docs/numbers.md)",
        "Arithmetic and table reads only: activations, weights and indices cost nothing here.",
    ]
    if report["totals"]["lookups"] and entry > prices["int8_mul"]:
        lines.append(
            f"A table entry read from memory ({entry:g} pJ from 8 kB) costs more than the int8 "
            f"multiplication in whose place it stands ({prices['int8_mul']:g} pJ)."
        )
    return "\n".join(lines)


def _joules(picojoules: float) -> str:
    """An energy for people."""
    for limit, unit in ((1e3, "pJ"), (1e6, "nJ"), (1e9, "uJ")):
        if picojoules < limit:
            return f"{picojoules / limit * 1e3:.3g} {unit}"
    return f"{picojoules / 1e9:.4g} mJ"


def _price(text: str) -> tuple[str, float]:
    """The argparse type of NAME=PJ."""
    name, _, value = text.partition("=")
    try:
        price = float(value)
        EnergyTable(**{name: price})
    except (TypeError, ValueError, LutraError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=PJ, a name of {', '.join(_PRICES)} and a finite number of at "
            "least 0"
        ) from error
    return name, price


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}" if count else "-"


def _speed_gate(record: Any) -> str | None:
    """The times for which layers became lookups or stayed dense; None if it is no such record."""
    try:
        times = sorted(name for name in record["layers"][0] if name.endswith("_ms"))
        times.sort(key=lambda name: name != "lookup_ms")
        rows: list[tuple[str, ...]] = [
            ("layer", "decision", "input", *(plain(name).replace("_", " ") for name in times))
        ]
        for layer in record["layers"]:
            texts = (plain(layer[key]) for key in ("name", "decision"))
            shape = shape_text(tuple(map(int, layer["input_shape"])))
            rows.append((*texts, shape, *(f"{layer[name]:.4f}" for name in times)))
        settings = ", ".join(f"{key} {plain(record[key])}" for key in _GATE_SETTINGS)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, OverflowError):
        return None  # somebody else's entry of that name
    return f"speed gate when it was converted: {settings}\n{table(rows, left=3)}"


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

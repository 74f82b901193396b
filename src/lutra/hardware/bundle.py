"""A layer as a folder that hardware people can take: circuit, memory images, answers, testbench."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from lutra.atomic import write_whole
from lutra.graph import Graph
from lutra.hardware.cycles import count_cycles
from lutra.hardware.design import Design, HardwareError
from lutra.hardware.layer import find_node, layer_rows, node_input, node_layer
from lutra.hardware.lmma import COUNT_BITS as LMMA_COUNT_BITS
from lutra.hardware.lmma import GROUP as LMMA_GROUP
from lutra.hardware.lmma import LmmaDesign, lmma_cycles, lmma_levels, lmma_words
from lutra.hardware.lookup_unit import LookupDesign, lookup_cycles, lookup_words
from lutra.hardware.synthesis import GENERIC
from lutra.hardware.testbench import Bench, testbench
from lutra.hardware.verilog import need_amaranth, to_verilog
from lutra.hardware.words import Words, layer_words
from lutra.node import Array, Node
from lutra.ops.lookup import unpack_weights
from lutra.ops.lowbit import load_rows
from lutra.ops.rows import row_length
from lutra.ops.spec import integer
from lutra.reference.lookup import responses
from lutra.reference.lowbit import lowbit_levels, lowbit_sums
from lutra.runtime.profile import random_inputs

__all__ = ["Bundle", "accelerator_bench", "make_bundle"]

_MAKEFILE: Final = """\
# Verilator and Icarus Verilog are packages of Debian and Ubuntu:
#   apt-get install verilator iverilog yosys
# BUBBLES=+bubbles lets every stream wait in half of all cycles.
BUBBLES ?=

.PHONY: verilator icarus lint synth clean

verilator: build/Vtestbench
	./build/Vtestbench $(BUBBLES)

build/Vtestbench: accelerator.v testbench.v
	verilator --binary --timing -Wno-fatal -O3 -CFLAGS -O1 --Mdir build \\
		--top-module testbench testbench.v accelerator.v

icarus:
	mkdir -p build
	iverilog -g2012 -o build/testbench.vvp testbench.v accelerator.v
	vvp build/testbench.vvp $(BUBBLES)

lint:
	verilator --lint-only -Wall --top-module accelerator accelerator.v

# Cells and flip-flops of the logic; memories stay whole.
synth:
	yosys -p "read_verilog accelerator.v; {script}"

clean:
	rm -rf build
"""


@dataclass(frozen=True)
class Bundle:
    """A layer, its circuit, and what must come out.

    Attributes:
        circuit: Makes the component.
        bench: What goes in and must come out.
        arrays: Rows, codebooks, tables and answers by file name.
        facts: What ``layer.json`` says.
    """

    circuit: Callable[[], Any]
    bench: Bench
    arrays: Mapping[str, Array]
    facts: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Writes the folder; files in it with the same names are replaced.

        Raises:
            OSError: If one cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, bytes] = {
            "accelerator.v": to_verilog(self.circuit()).encode(),
            "testbench.v": testbench(self.bench).encode(),
            "Makefile": _MAKEFILE.replace("{script}", GENERIC).encode(),
            "README.md": _readme(self.facts, self.bench).encode(),
            "layer.json": (json.dumps(self.facts, indent=1) + "\n").encode(),
        }
        files |= {name: text.encode() for name, text in self.bench.images().items()}
        for name, array in self.arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            files[f"{name}.npy"] = buffer.getvalue()
        for name, content in files.items():
            write_whole(folder / name, content)


def make_bundle(
    graph: Graph, name: str, *, rows: int = 64, seed: int = 0, **parameters: Any
) -> Bundle:
    """Builds a layer of a model for hardware, with rows of its golden inputs.

    Args:
        graph: The model.
        name: The node: ``pq_conv2d``, ``pq_linear``, ``lookup_conv2d``, ``lookup_linear`` or
            ``lowbit_linear``.
        rows: Rows to feed.
        seed: Of the random inputs of a model that holds no golden data.
        **parameters: Of the ``Design``, ``LookupDesign`` or ``LmmaDesign`` (whose columns are the
            ``tile``), where they differ from what the layer asks for.

    Raises:
        HardwareError: If there is no such layer, or a parameter does not fit it.
    """
    need_amaranth()
    node = find_node(graph, name)
    if graph.golden is not None:
        inputs = {v.name: a for v, a in zip(graph.inputs, graph.golden[0], strict=True)}
    else:
        inputs = random_inputs(graph, 1, np.random.default_rng(seed))
    made = layer_rows(node, node_input(graph, node, inputs), rows)
    build = {"lookup": _lookup, "lowbit": _lowbit}.get(node.op.split("_")[0], _table)
    return build(node, graph.node_tensors(node), made, parameters)


def accelerator_bench(design: Design, words: Words) -> Bench:
    """What a testbench of the accelerator does with the words of a layer."""
    widths = {
        "command": design.rows.bit_length() + 32,
        "codebook": design.codebook_bits,
        "x": design.width * design.act_bits,
        "tables": design.beat * design.table_bits,
    }
    return Bench(
        {name: (widths[name], given) for name, given in words.inputs.items()},
        (design.tile * design.sum_bits, words.sums),
        (design.levels, words.code),
        None if design.two_clocks else count_cycles(design, words.commands).cycles,
        ("codebook", "x") if design.two_clocks else (),
    )


def _table(
    node: Node, tensors: Mapping[str, Array], rows: Array, parameters: Mapping[str, Any]
) -> Bundle:
    """A layer of product quantisation."""
    from lutra.hardware.accelerator import Accelerator

    layer = node_layer(node, tensors, rows)
    design = layer.design(**parameters)
    if design.multiply:
        raise HardwareError("multiply=True makes an array of multipliers; layers of tables need 0")
    words = layer_words(layer, design)
    b, k, m = layer.shape
    bench = accelerator_bench(design, words)
    cycles = bench.cycles
    books = "thresholds" if layer.encoder == "tree" else "centroids"
    arrays = {
        "rows": rows, "subvectors": layer.subvectors, books: layer.codebooks,
        "tables": layer.tables, "codes": layer.codes.astype(np.uint8), "sums": layer.sums,
        "scale": tensors["scale"], "bias": tensors["bias"],
    }  # fmt: skip
    facts = {
        "layer": node.name, "op": node.op, "encoder": layer.encoder, "rows": layer.rows,
        "inputs": row_length(node), "codebooks": b, "k": k, "outputs": m, "cycles": cycles,
        "design": asdict(design),
    }  # fmt: skip
    return Bundle(partial(Accelerator, design), bench, arrays, facts)


def _of_unit(node: Node, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a unit that is no accelerator of tables: tile and bits of a sum."""
    unknown = sorted(parameters.keys() - {"tile", "sum_bits"})
    if unknown:
        raise HardwareError(
            f"a unit for the layer {node.name!r} ({node.op}) has no parameter {unknown[0]!r}; "
            "leave it out"
        )
    return dict(parameters)


def _lowbit(
    node: Node, tensors: Mapping[str, Array], rows: Array, parameters: Mapping[str, Any]
) -> Bundle:
    """A layer of low-bit weights."""
    from lutra.hardware.lmma_circuit import LmmaUnit

    given = _of_unit(node, parameters)
    levels, depth, group = (integer(node, name) for name in ("levels", "in_features", "group"))
    codes = load_rows(tensors["weight"], levels, depth)
    design = LmmaDesign(
        bits=2 if levels == 3 else levels.bit_length() - 1, ternary=levels == 3,
        columns=given.get("tile", min(64, len(codes))), sum_bits=32,
    )  # fmt: skip
    most = 128 * int(np.abs(lmma_levels(codes, design)).reshape(-1, group).sum(axis=1).max())
    design = replace(design, sum_bits=given.get("sum_bits", max(12, 1 + most.bit_length())))
    words = lmma_words(rows, codes, design, group)
    expected = words.pop("sums")
    cycles = lmma_cycles(design, len(rows), depth, len(codes), group)
    widths = {
        "command": 2 * LMMA_COUNT_BITS, "x": 8 * LMMA_GROUP * design.rows,
        "weights": LMMA_GROUP * design.columns,
    }  # fmt: skip
    bench = Bench(
        {name: (widths[name], stream) for name, stream in words.items()},
        (design.rows * design.columns * design.sum_bits, expected), None, cycles,
    )  # fmt: skip
    arrays = {
        "rows": rows, "weight_codes": codes,
        "sums": lowbit_sums(lowbit_levels(codes, levels), rows, group),
        "scale": tensors["scale"], "bias": tensors["bias"],
        **({"zero": tensors["zero"]} if "zero" in tensors else {}),
    }  # fmt: skip
    facts = {
        "layer": node.name, "op": node.op, "levels": levels, "group": group, "rows": len(rows),
        "inputs": depth, "outputs": len(codes), "cycles": cycles, "design": asdict(design),
    }  # fmt: skip
    return Bundle(partial(LmmaUnit, design), bench, arrays, facts)


def _lookup(
    node: Node, tensors: Mapping[str, Array], rows: Array, parameters: Mapping[str, Any]
) -> Bundle:
    """A layer of one response table."""
    from lutra.hardware.lookup_circuit import LookupUnit

    table, depth = tensors["table"], row_length(node)
    weight = unpack_weights(tensors["weight"], integer(node, "weight_bits"), depth)
    given = _of_unit(node, parameters)
    design = LookupDesign(
        act_bits=integer(node, "act_bits"), weights=table.shape[1],
        **{"tile": min(16, len(weight)), **given},
    )  # fmt: skip
    words = lookup_words(rows, weight, table, design)
    sums = words.pop("sums")
    cycles = lookup_cycles(design, depth, len(rows), len(weight))
    widths = {
        "command": 48, "table": 8 * design.weights, "x": design.act_bits,
        "weights": design.tile * design.weight_bits,
    }  # fmt: skip
    bench = Bench(
        {name: (widths[name], given) for name, given in words.items()},
        (design.tile * design.sum_bits, sums), None, cycles,
    )  # fmt: skip
    arrays = {
        "rows": rows, "table": table, "weight": weight,
        "sums": responses(rows, weight, table).astype(np.int32),
        "scale": tensors["scale"], "bias": tensors["bias"],
    }  # fmt: skip
    facts = {
        "layer": node.name, "op": node.op, "rows": len(rows), "inputs": depth,
        "outputs": len(weight), "cycles": cycles, "design": asdict(design),
    }  # fmt: skip
    return Bundle(partial(LookupUnit, design), bench, arrays, facts)


def _readme(facts: Mapping[str, Any], bench: Bench) -> str:
    """What is in the folder, and in what order words come."""
    streams = "\n".join(
        f"| `{name}` | {bits} | {len(words):,} | `{name}.mem` |"
        for name, (bits, words) in bench.inputs.items()
    )
    family = facts["op"].split("_")[0]
    order = {
        "pq": """\
* `codebook`: for each codebook its centroids (values from the lowest bits on, then half the square
  of an L2 centroid), or the thresholds of its tree in heap order;
* `x`: for each codebook the sub-vectors of all rows;
* `tables`: for each tile of outputs, for each codebook, for each code the entries of the tile;
* `sums`: for each tile the sums of all rows.

More rows than the scratchpad holds run in passes, each with a command and all words of its own.""",
        "lookup": """\
* `table`: the rows of the response table, the first column in the lowest bits;
* `x`: for each tile of outputs, for each row, the activation indices;
* `weights`: a word for each activation: the weight index of each output of the tile;
* `sums`: for each tile the sums of all rows.""",
        "lowbit": """\
* `x`: for each group of inputs that share a scale, for each tile of rows, once for each tile of
  outputs: four int8 of each row of the tile in a word;
* `weights`: for each of these words, for each bit plane, a word: of each output of the tile the
  index of four weights, the sign in its highest bit;
* `sums`: for each group, each tile of rows and each tile of outputs a word, row by row.

`sums.npy` is (rows, groups, outputs), `weight_codes.npy` the codes of the
weights (outputs, inputs).""",
    }[family]
    output = (
        "`float32(sum - zero * sum of x) * scale`, added over the groups, times the step of the\n"
        "row, plus `bias`; all of it as `lutra.ops.lowbit` says"
        if family == "lowbit"
        else "`float32(sum) * scale + bias`, two roundings"
    )
    compared = "every code and " if family == "pq" else ""
    cycles = "not fixed, because of two clocks" if bench.cycles is None else f"{bench.cycles:,}"
    bits, words = bench.sums
    return f"""\
# {facts["layer"]}: {facts["op"]}, {facts["inputs"]} inputs, {facts["outputs"]} outputs

Made by `lutra hardware`. `accelerator.v` is the circuit. `testbench.v` feeds it {facts["rows"]}
rows and compares {compared}every sum with the answers of lutra's reference,
which the engine gives too. Cycles from the first command to the last sum: {cycles}.

    make verilator      # apt-get install verilator
    make icarus         # apt-get install iverilog
    make verilator BUBBLES=+bubbles
    make lint
    make synth          # apt-get install yosys

| stream | bits | words | file |
|---|---|---|---|
{streams}
| `sums` (out) | {bits} | {len(words):,} | `sums.mem` |

Every stream has `payload`, `valid` and `ready`: a word moves in a cycle in which both are high, and
a word that was offered stays until it is taken. `rst` is synchronous; hold it for three periods of
the slowest clock. Order of words:

{order}

`layer.json` has the parameters. The `.npy` files hold the same numbers as arrays. The layer's
output is {output}.
"""

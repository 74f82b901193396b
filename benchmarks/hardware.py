"""Gates, memory bits and cycles of layers of the zoo as circuits, beside int8 multipliers.

    python -m benchmarks.hardware [--json FILE]

Gates and cells of FPGAs that are not known yet are counted by Yosys and kept in
``src/lutra/hardware/gates.json``. What takes it longer than ``--limit`` seconds is left out.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from amaranth.hdl import UnusedElaboratable

from lutra import load_graph
from lutra.formatting import table
from lutra.hardware import Design, HardwareError, TableLayer, count_cycles, graph_layer
from lutra.hardware.accelerator import Accelerator
from lutra.hardware.cycles import pass_commands
from lutra.hardware.lmma import LmmaDesign
from lutra.hardware.lmma_circuit import LmmaUnit
from lutra.hardware.lookup_circuit import LookupUnit
from lutra.hardware.lookup_unit import LookupDesign
from lutra.hardware.synthesis import FPGA, FpgaCells, Gates, fpga_of, gates_of

ZOO = Path(__file__).parent.parent / "zoo"
#: File, layer, and inputs of a row that one code stands for, which the multipliers take in a cycle.
LAYERS = (
    ("resnet20_cifar10_nearest", "layer1.0.conv1", 9),
    ("resnet20_cifar10_fast", "layer2.1.conv1", 9),
    ("dscnn_speech_commands", "blocks.0.pointwise", 2),
    ("resnet_speech_commands", "blocks.2.conv2", 2),
)
TILE = 16
T = TypeVar("T")


@dataclass
class Row:
    """One circuit for one layer."""

    layer: str
    circuit: str
    cycles: int
    gates: Gates | None
    fpga: dict[str, FpgaCells | None]

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        numbers = [None] * 3 if self.gates is None else list(vars(self.gates).values())
        for cells in self.fpga.values():
            found = (None, None) if cells is None else (cells.luts, cells.block_memories)
            numbers += found
        texts = ("-" if n is None else f"{n:,}" for n in (*numbers, self.cycles))
        return (self.layer, self.circuit, *texts)


def of_layer(file: str, name: str, v: int, limit: float) -> list[Row]:
    """A layer with an element for each centroid, with a quarter of them, and with multipliers."""
    graph = load_graph(ZOO / f"{file}.lutra")
    assert graph.golden is not None
    inputs = {
        value.name: array[:1] for value, array in zip(graph.inputs, graph.golden[0], strict=True)
    }
    layer = graph_layer(graph, name, inputs, limit=4096)
    b, k, m = layer.shape
    rows = min(256, layer.rows)
    found = []
    for elements in (k,) if layer.encoder == "tree" else (k, k // 4):
        design = layer.design(tile=TILE, rows=rows, elements=elements)
        title = "tree" if layer.encoder == "tree" else f"L2, {elements} elements"
        found.append(row(f"{file} {name}", title, design, layer, limit))
    if v > 4 and layer.encoder == "l2":  # where products take most of the encoder
        for encoder, title in (("l1", "L1"), ("chebyshev", "Chebyshev")):
            design = replace(layer.design(tile=TILE, rows=rows, elements=k), encoder=encoder)
            title = f"{title}, {k} elements"
            found.append(row(f"{file} {name}", title, design, layer, limit))
    multiply = Design(
        multiply=True, v=v, tile=TILE, rows=rows, fifo=2, act_bits=layer.act_bits,
        sum_bits=dense_bits(v * b, layer.act_bits), codes=found_codes(rows, b, m),
    )  # fmt: skip
    found.append(row(f"{file} {name}", f"{v * TILE} multipliers", multiply, layer, limit))
    return found


def found_codes(rows: int, b: int, m: int) -> int:
    """Sub-vectors to keep for later tiles."""
    return 0 if m <= TILE else rows * b


def dense_bits(depth: int, act_bits: int) -> int:
    """Bits that hold a sum of products of int8 weights."""
    bits: int = 1 + (depth * 128 * (2**act_bits - 1)).bit_length()
    return bits


def row(name: str, title: str, design: Design, layer: TableLayer, limit: float) -> Row:
    """Counts one circuit."""
    b, _, m = layer.shape
    cycles = count_cycles(design, pass_commands(design, layer.rows, b, m)).cycles
    circuit = Accelerator(design)
    gates = within(lambda: gates_of(circuit, limit=limit))
    fpga = {
        family: within(lambda family=family: fpga_of(circuit, family, limit=limit))  # type: ignore[misc]
        for family in FPGA
    }
    return Row(name, title, cycles, gates, fpga)


def within(count: Callable[[], T]) -> T | None:
    """What a count gives, or None where Yosys takes too long."""
    try:
        return count()
    except HardwareError as error:
        if "did not end within" not in str(error):
            raise
        print(error, flush=True)
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", default="", help="only layers with this text in their name")
    parser.add_argument(
        "--limit", type=float, default=600, help="seconds that Yosys may take (default: 600)"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # A design whose counts are known is described for its name only.
    warnings.simplefilter("ignore", UnusedElaboratable)
    rows = [
        found
        for file, name, v in LAYERS
        if options.layer in f"{file} {name}"
        for found in of_layer(file, name, v, options.limit)
    ]
    units: dict[str, Callable[[], Any]] = {
        "LookupUnit, 16 x 15 table, tile 16": lambda: LookupUnit(LookupDesign()),
        "LmmaUnit 2 x 64 x 4, 1 bit": lambda: LmmaUnit(LmmaDesign(bits=1)),
        "LmmaUnit 2 x 64 x 4, ternary": lambda: LmmaUnit(LmmaDesign(ternary=True)),
        "LmmaUnit 2 x 64 x 4, 2 bits": lambda: LmmaUnit(LmmaDesign()),
    }
    heads = ["layer", "circuit", "cells", "flip-flops", "memory bits"]
    for family in FPGA:
        heads += [f"{family} LUTs", f"{family} blocks"]
    print(table([(*heads, "cycles"), *(each.cells() for each in rows)], left=2), flush=True)
    others = {
        name: within(lambda make=make: gates_of(make(), limit=options.limit))  # type: ignore[misc]
        for name, make in units.items()
        if options.layer in name
    }
    for name, gates in others.items():
        print(f"{name}: {gates}")
    if options.json:
        counted = {name: gates and asdict(gates) for name, gates in others.items()}
        found = {"layers": [asdict(each) for each in rows], "units": counted}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The network of digits.py in one generated accelerator, layer after layer, in simulation.

Every code and every sum is compared with the reference, the cycles with the model, and the answers
with those of the engine.

    python examples/digits.py --output digits.lutra
    python examples/digits_hardware.py digits.lutra [--images 20] [--simulator verilator]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import lutra
from lutra.hardware.cost import memory_bits
from lutra.hardware.network import common_design, in_amaranth, in_tool, run_network
from lutra.hardware.tools import SIMULATORS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--simulator", choices=(*SIMULATORS, "amaranth"), default="verilator")
    parser.add_argument("--tile", type=int, default=16, help="outputs that are added in one cycle")
    parser.add_argument("--elements", type=int, default=4, help="distance elements")
    options = parser.parse_args()
    graph = lutra.load_graph(options.file)
    images, labels = load_digits(return_X_y=True)
    x = (images[-options.images :].reshape(-1, 1, 8, 8) / 16.0).astype(np.float32)
    design = common_design(graph, tile=options.tile, elements=options.elements)
    runner = in_amaranth if options.simulator == "amaranth" else in_tool(options.simulator)
    run = run_network(graph, {graph.inputs[0].name: x}, design, runner)
    for layer in run.layers:
        print(f"{layer.name}: {layer.rows} rows in {layer.cycles:,} cycles")
    total = sum(layer.cycles for layer in run.layers)
    print(f"{total / len(x):,.0f} cycles for an image, {sum(memory_bits(design).values()):,} bits")
    (answers,) = run.outputs.values()
    expected = lutra.Session(graph)(x)
    if not np.array_equal(answers, expected):
        raise SystemExit(f"answers differ from the engine's by {np.abs(answers - expected).max()}")
    right = int((answers.argmax(1) == labels[-options.images :]).sum())
    print(f"{len(x)} answers equal to the engine's, bit for bit; {right} of them are right")


if __name__ == "__main__":
    main()

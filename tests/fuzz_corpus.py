"""Writes small compiled models that together hold every operator: what fuzzing starts from."""

from __future__ import annotations

import sys
from pathlib import Path

from graphs import every_op_graph, tiny_graph
from random_graphs import random_graph
from sequences import (
    every_decoder_graph,
    every_pointwise_op_graph,
    every_selection_graph,
    every_sequence_op_graph,
)

from lutra import compile_plan
from lutra.graph import Graph
from lutra.ops import OPS

#: Larger ones are tried too seldom.
LARGEST = 60_000


def corpus() -> dict[str, bytes]:
    """The files by name."""
    graphs: dict[str, Graph] = {
        "tiny": tiny_graph(),
        "every": every_op_graph(),
        "sequence": every_sequence_op_graph(),
        "pointwise": every_pointwise_op_graph(),
        "selection": every_selection_graph(),
        "decoder": every_decoder_graph(),
    }
    graphs |= {f"random{seed}": random_graph(seed)[0] for seed in range(150)}
    missing = set(OPS) - {node.op for graph in graphs.values() for node in graph.nodes}
    if missing:
        raise SystemExit(f"no graph of the corpus has {', '.join(sorted(missing))}")
    files = {name: compile_plan(graph) for name, graph in graphs.items()}
    return {name: data for name, data in files.items() if len(data) <= LARGEST}


def write(folder: Path) -> int:
    """Writes the files into a folder, which is made, and returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    files = corpus()
    for name, data in files.items():
        (folder / f"{name}.lutrac").write_bytes(data)
    return len(files)


if __name__ == "__main__":
    print(write(Path(sys.argv[1])), "files")

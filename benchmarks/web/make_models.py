"""Writes the models of the benchmark of browsers: compiled ones, and those of ONNX Runtime Web.

    python -m benchmarks.web.make_models FOLDER

The files of the zoo are trained; the other networks have random weights, on which their speed does
not depend. ``models.json`` says what is beside what.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

from benchmarks.graphs import lutra_graph
from benchmarks.lookups import Method, Multiplied, encoders
from benchmarks.networks import Network, dscnn, resnet18, resnet20
from benchmarks.peers import write_models
from lutra import load_graph, save_compiled

_ZOO: Final = Path(__file__).parents[2] / "zoo"
#: Networks, and the files of the zoo that are these networks.
_CASES: Final[tuple[tuple[str, Network, tuple[str, ...]], ...]] = (
    (
        "resnet20",
        resnet20(),
        ("resnet20_cifar10", "resnet20_cifar10_fast", "resnet20_cifar10_nearest"),
    ),
    ("resnet18_32", resnet18(32), ()),
    ("dscnn", dscnn(), ("dscnn_speech_commands",)),
)


def _methods(network: Network) -> dict[str, tuple[Method, str]]:
    """Methods with random weights by the name of the file; what stays multiplied is in int8."""
    nearest, tree = encoders()
    pixel, row = encoders(4, group="pixel")[1], encoders(3, group="row")[1]
    methods: dict[str, tuple[Method, str]] = {
        "int8": (Multiplied(), "int8"),
        "nearest_patch": (nearest, "int8"),
        "tree_patch": (tree, "int8"),
    }
    if network.name != dscnn().name:  # whose lookups are of pixels already
        methods |= {"tree_row": (row, "int8"), "tree_pixel": (pixel, "int8")}
    return methods


def make(folder: Path) -> None:
    """Writes all models and ``models.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    listed: list[dict[str, Any]] = []
    for name, network, zoo in _CASES:
        ours: dict[str, str] = {}
        for file in zoo:
            save_compiled(load_graph(_ZOO / f"{file}.lutra"), folder / f"{file}.lutrac")
            ours[f"zoo/{file}.lutra"] = f"{file}.lutrac"
        for method, (settings, dense) in _methods(network).items():
            file = f"{name}_{method}.lutrac"
            save_compiled(lutra_graph(network, settings, dense), folder / file)
            ours[f"{method}, random weights"] = file
        place = folder / name
        place.mkdir(exist_ok=True)
        failed = write_models(network, 1, place)
        onnx = {
            precision: f"{name}/{precision}.onnx"
            for precision in ("fp32", "int8")
            if f"{precision}.onnx" not in failed
        }
        for file, why in failed.items():
            print(f"{name}: no {file}: {why}")
        listed.append(
            {"name": network.name, "shape": [1, *network.shape], "lutra": ours, "onnx": onnx}
        )
    (folder / "models.json").write_text(json.dumps(listed, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)

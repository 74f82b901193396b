"""``lutra hardware``: folders whose circuits give every code and every sum of the reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import capture, refuse
from graphs import Builder

import lutra
from lutra.reference import run_node
from lutra.reference.lowbit import quantise_rows
from lutra.reference.pq import row_codes

__all__ = ["capture", "refuse"]

pytest.importorskip("amaranth")
from lutra.hardware.bundle import make_bundle
from lutra.hardware.layer import find_node, node_input

ZOO = Path(__file__).parent.parent / "zoo"
CASES = {
    "resnet20_cifar10_nearest": "layer1.0.conv1",
    "resnet20_cifar10_fast": "layer2.0.conv1",
    "resnet20_cifar10_rows": "layer1.0.conv1",
    "resnet20_cifar10_lookup4": "layer1.0.conv1",
    "dscnn_speech_commands": "blocks.0.pointwise",
    "shakespeare_ternary": "model.layers.0.self_attn.k_proj",
}


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}: apt-get install verilator iverilog yosys")


def golden_input(graph: lutra.Graph, name: str) -> tuple[Any, Any, Any]:
    node = find_node(graph, name)
    assert graph.golden is not None
    inputs = {v.name: a for v, a in zip(graph.inputs, graph.golden[0], strict=True)}
    return node, node_input(graph, node, inputs), graph.node_tensors(node)


def lowbit_output(node: lutra.Node, x: Any, bundle: Any) -> Any:
    """What comes of the sums of a layer of low-bit weights without zeros, for its rows x."""
    arrays = bundle.arrays
    rows, step = quantise_rows(x)
    assert np.array_equal(rows, arrays["rows"])
    y = arrays["sums"][:, 0].astype(np.float32) * arrays["scale"][:, 0]
    for g in range(1, arrays["scale"].shape[1]):
        y = y + arrays["sums"][:, g].astype(np.float32) * arrays["scale"][:, g]
    return y * step[:, None] + arrays["bias"]


@pytest.mark.parametrize("file", CASES)
def test_answers_are_those_of_the_model(file: str) -> None:
    """Codes are those of the reference, and sums give the output of the node, to the bit."""
    graph = lutra.load_graph(ZOO / f"{file}.lutra")
    node, x, tensors = golden_input(graph, CASES[file])
    bundle = make_bundle(graph, CASES[file], rows=40)
    rows, sums = bundle.arrays["rows"], bundle.arrays["sums"]
    if "codes" in bundle.arrays:
        assert np.array_equal(bundle.arrays["codes"], row_codes(node, rows, tensors))
    out = run_node(node, [x[:1]], tensors)[0]
    if node.op == "lowbit_linear":
        assert np.array_equal(
            lowbit_output(node, x[:1].reshape(-1, x.shape[-1])[:40], bundle), out[:40]
        )
        return
    made = sums.astype(np.float32) * tensors["scale"] + tensors["bias"]
    expected = out.reshape(len(out), -1).T[:40] if out.ndim == 3 else out[None]
    assert np.array_equal(made, expected)


def test_folder(tmp_path: Path, capture: Any) -> None:
    """What is in the folder, simulated without other tools."""
    code, text, _ = capture(
        "hardware", str(ZOO / "resnet20_cifar10_nearest.lutra"), "--layer", "layer1.0.conv1", "-o",
        str(tmp_path / "out"), "--rows", "4", "--tile", "4", "--elements", "4", "--simulate",
        "--simulator", "amaranth", "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(text)
    assert report["simulation"]["codes"] == 4 * 16
    assert report["simulation"]["cycles"] == report["cycles"]
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {
        "accelerator.v", "testbench.v", "Makefile", "README.md", "layer.json", "x.mem",
        "codebook.mem", "tables.mem", "command.mem", "code.mem", "sums.mem", "codes.npy",
        "sums.npy", "tables.npy", "centroids.npy",
    }  # fmt: skip
    codes = [int(line, 16) for line in (tmp_path / "out/code.mem").read_text().split()]
    assert codes == np.load(tmp_path / "out/codes.npy").T.ravel().tolist()


@pytest.mark.parametrize("distance", ["l1", "chebyshev"])
def test_the_distance_is_that_of_the_file(distance: str, tmp_path: Path, capture: Any) -> None:
    b = Builder(("x", (None, 2, 4, 3)), seed=7)
    name = b.pq_conv2d("x", 2, 3, (2, 2), width=3, distance=distance)
    graph = b.graph(name)
    lutra.save_graph(graph, tmp_path / "apart.lutra")
    code, text, _ = capture(
        "hardware", str(tmp_path / "apart.lutra"), "--layer", graph.nodes[0].name, "-o",
        str(tmp_path / "out"), "--rows", "5", "--elements", "4", "--simulate",
        "--simulator", "amaranth", "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(text)
    assert report["encoder"] == report["design"]["encoder"] == distance
    assert report["simulation"]["codes"] == 5 * 3
    assert report["simulation"]["wrong"] == 0
    rows, codes = (np.load(tmp_path / f"out/{name}.npy") for name in ("rows", "codes"))
    node, tensors = graph.nodes[0], graph.node_tensors(graph.nodes[0])
    assert np.array_equal(codes, row_codes(node, rows, tensors))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "conv9"], "no layer 'conv9' to build hardware for; the model has: layer1.0"),
        (["--layer", "layer1.0.conv1", "--elements", "5"], "elements=5 does not divide 16"),
        (["--layer", "layer1.0.conv1", "--simulator", "icarus"], "--simulator is for --simulate"),
    ],
)
def test_mistakes(tmp_path: Path, refuse: Any, arguments: list[str], message: str) -> None:
    file = str(ZOO / "resnet20_cifar10_nearest.lutra")
    refuse("hardware", file, *arguments, "-o", str(tmp_path / "out"), match=message)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("simulator", ["verilator", "icarus"])
@pytest.mark.parametrize("file", CASES)
def test_verilog(tmp_path: Path, file: str, simulator: str) -> None:
    """The Verilog in other simulators: every code, every sum, the cycles; also with waiting."""
    from lutra.hardware.tools import lint, run_verilog

    needs("verilator")
    needs("iverilog")
    bundle = make_bundle(lutra.load_graph(ZOO / f"{file}.lutra"), CASES[file], rows=40)
    bundle.write(tmp_path)
    lint(tmp_path)
    outcome = run_verilog(tmp_path, simulator)
    assert outcome.passed
    assert outcome.wrong == 0
    assert outcome.cycles == outcome.model == bundle.facts["cycles"]
    assert outcome.codes == bundle.arrays.get("codes", np.zeros(0)).size
    assert run_verilog(tmp_path, simulator, bubbles=True).passed


@pytest.mark.slow
def test_the_widest_layer_of_the_keyword_network(tmp_path: Path) -> None:
    """All rows of a sample through 288 tables of 64 outputs, four tiles, in Verilator."""
    from lutra.hardware.layer import graph_shapes
    from lutra.hardware.tools import run_verilog

    needs("verilator")
    graph = lutra.load_graph(ZOO / "resnet_speech_commands.lutra")
    name, rows, tables, outputs = max(graph_shapes(graph), key=lambda shape: shape[2] * shape[3])
    assert (name, rows, tables, outputs) == ("blocks.2.conv2", 35, 288, 64)
    bundle = make_bundle(graph, name, rows=rows, elements=4)
    bundle.write(tmp_path)
    outcome = run_verilog(tmp_path, "verilator")
    assert outcome.passed
    assert (outcome.codes, outcome.sums, outcome.wrong) == (rows * tables, 4 * rows, 0)
    assert outcome.cycles == outcome.model == bundle.facts["cycles"]


@pytest.mark.slow
def test_verilog_with_two_clocks(tmp_path: Path) -> None:
    from lutra.hardware.tools import lint, run_verilog

    needs("iverilog")
    needs("verilator")
    graph = lutra.load_graph(ZOO / "resnet20_cifar10_nearest.lutra")
    make_bundle(graph, "layer1.0.conv1", rows=20, two_clocks=True).write(tmp_path)
    lint(tmp_path)
    assert run_verilog(tmp_path, "icarus").passed
    assert run_verilog(tmp_path, "icarus", bubbles=True).passed


@pytest.mark.slow
def test_a_wrong_answer_is_found(tmp_path: Path) -> None:
    """A bit of one sum, and of one code, that is changed."""
    from lutra.hardware.tools import run_verilog

    needs("iverilog")
    graph = lutra.load_graph(ZOO / "resnet20_cifar10_nearest.lutra")
    make_bundle(graph, "layer1.0.conv1", rows=8).write(tmp_path)
    for file in ("sums.mem", "code.mem"):
        text = (tmp_path / file).read_text()
        lines = text.split()
        lines[3] = f"{int(lines[3], 16) ^ 1:x}"
        (tmp_path / file).write_text("\n".join(lines) + "\n")
        outcome = run_verilog(tmp_path, "icarus")
        assert not outcome.passed
        assert outcome.wrong == 1
        (tmp_path / file).write_text(text)

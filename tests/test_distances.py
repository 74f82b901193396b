"""Distances without products: the specification, the engine, the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Builder, pq_tensors
from layers import random_layer, run_native, same_bits
from sweeps import sweep

from lutra import GraphError, Session, _engine, run_reference
from lutra.cli import main
from lutra.format import file_version, graph_to_bytes, load_graph, save_graph
from lutra.graph import Graph
from lutra.reference.pq import encode

Array = np.ndarray[Any, Any]
ISAS = _engine.runnable_isas()
DISTANCES = ["l1", "chebyshev"]


def by_definition(rows: Array, centroids: Array, distance: str) -> Array:
    """One code at a time, in Python's integers."""
    codebooks, _, width = centroids.shape
    codes = np.zeros((len(rows), codebooks), np.int64)
    for r, row in enumerate(rows.tolist()):
        padded = row + [0] * (codebooks * width - len(row))
        for b in range(codebooks):
            mine = padded[b * width : (b + 1) * width]
            far = []
            for centroid in centroids[b].tolist():
                apart = [abs(x - c) for x, c in zip(mine, centroid, strict=True)]
                far.append(sum(apart) if distance == "l1" else max(apart))
            codes[r, b] = far.index(min(far))
    return codes


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("top", [2, 127])
def test_the_specification(distance: str, top: int) -> None:
    """Few values: most distances occur several times, and the lowest code wins."""
    rng = np.random.default_rng(top)
    rows = rng.integers(0, top + 1, (40, 14), dtype=np.uint8)
    centroids = rng.integers(0, top + 1, (4, 16, 4), dtype=np.uint8)
    centroids[-1, :, 2:] = 0
    codes = encode(rows, centroids, distance)
    np.testing.assert_array_equal(codes, by_definition(rows, centroids, distance))
    assert (codes != encode(rows, centroids)).any()  # another encoder than that of squares


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("distance", DISTANCES)
@sweep("count", [8, 16, 32, 64])
@sweep("width", [1, 2, 3, 4, 5, 9, 12, 16, 27, 64])
@sweep(
    "settings",
    [
        {},
        {"size": (3, 7, 6), "channels": 3, "kernel": (3, 3), "padding": (1, 1), "act_zero": 64},
        {"size": (1, 9, 9), "channels": 7, "kernel": (3, 3), "stride": (2, 2), "act_bits": 4},
        {"size": (70, 1, 1), "channels": 40, "act_bits": 6, "act_zero": 5},
    ],
)
def test_the_engine_gives_the_bits_of_the_reference(
    isa: str, distance: str, count: int, width: int, settings: dict[str, Any]
) -> None:
    layer = random_layer(width, count=count, width=width, distance=distance, **settings)
    y, codes = run_native(layer, isa)
    np.testing.assert_array_equal(codes, layer.reference_codes())
    assert same_bits(y, layer.reference())


def residual_graph(distance: str, group: str = "patch") -> Graph:
    """A block in which two layers have equal codebooks, and a third has another distance."""
    b = Builder(("x", (None, 6, 9, 7)), seed=5)
    attrs: dict[str, Any] = {
        "act_scale": 0.05, "act_zero": 3, "act_bits": 6, "distance": distance, "group": group,
        "in_channels": 6, "kernel": (3, 3), "padding": (1, 1),
    }  # fmt: skip
    parts = {"patch": 1, "row": 3, "pixel": 9}[group]
    first = pq_tensors(b.rng, 54 // parts, 6, width=3, bits=6)
    codebooks, k, m = first["tables"].shape
    tables = b.rng.integers(-128, 128, (3, codebooks * parts, k, m)).astype(np.int8)
    other = {**attrs, "distance": "l2"}
    y = b.add("pq_conv2d", "x", tensors={**first, "tables": tables[0]}, **attrs)
    z = b.add("pq_conv2d", "x", tensors={**first, "tables": tables[1]}, **attrs)
    w = b.add("pq_conv2d", "x", tensors={**first, "tables": tables[2]}, **other)
    return b.graph(b.add("add", b.add("add", b.add("relu", y), b.add("relu", z)), b.add("relu", w)))


@pytest.mark.parametrize("group", ["patch", "row", "pixel"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_file_runs_like_its_graph_everywhere(
    distance: str, group: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = residual_graph(distance, group)
    x = 3 * np.random.default_rng(0).standard_normal((5, 6, 9, 7), np.float32)
    want = run_reference(graph, [x])[graph.outputs[0]]
    path = tmp_path / "apart.lutra"
    save_graph(replace(graph, golden=((x,), (want,))), path)
    assert load_graph(path).nodes == graph.nodes
    assert file_version(graph) == 3
    for isa in ISAS:
        for threads in (1, 2):
            session = Session(path, isa=isa, threads=threads)
            assert same_bits(session(x), want)
        methods = [step.method or "" for step in session.profile(x).steps]
        # two layers share a step, the one with the other distance does not
        assert sum(f"nearest by {distance}" in method for method in methods) == 1
        assert sum(method.startswith("nearest,") for method in methods) == 1
    assert main(["verify", str(path), "--isa", "all"]) == 0, capsys.readouterr().out
    capsys.readouterr()
    assert main(["inspect", str(path), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    found = [layer["distance"] for layer in layers if layer["op"] == "pq_conv2d"]
    assert found == [distance, distance, "l2"]
    operations = [layer["operations"] for layer in layers if layer["op"] == "pq_conv2d"]
    assert operations[0]["int_multiplications"] == operations[1]["int_multiplications"] == 0
    # a difference, and a sum or a maximum, in the place of a multiply-add
    assert operations[0]["int_comparisons"] == 2 * operations[2]["int_multiplications"] > 0
    assert main(["inspect", str(path)]) == 0
    assert f"3 {distance}" in capsys.readouterr().out


def test_files_of_squares_are_what_they_were() -> None:
    b = Builder(("x", (None, 4, 7, 6)), seed=4)
    graph = b.graph(b.pq_conv2d("x", 4, 3, (1, 1), width=4))
    assert graph.nodes[0].attrs["distance"] == "l2"
    assert file_version(graph) == 1
    assert b'"distance' not in graph_to_bytes(graph)


def test_what_does_not_fit() -> None:
    graph = residual_graph("l1")
    node = graph.nodes[0]
    wrong = replace(node, attrs={**node.attrs, "distance": "cosine"})
    with pytest.raises(GraphError, match="distance='cosine'; it must be one of l2, l1, chebyshev"):
        replace(graph, nodes=(wrong, *graph.nodes[1:])).validate()
    tensors = graph.node_tensors(node)
    with pytest.raises(ValueError, match="distance must be l2, l1 or chebyshev, not cosine"):
        _engine.Layer(node.op, ISAS[0], wrong.attrs, tensors)
    splits = np.zeros((18, 4), np.int32)
    tree = {"splits": splits, "thresholds": np.zeros((18, 15), np.uint8)}
    rest = {role: array for role, array in tensors.items() if role != "centroids"}
    attrs = {**node.attrs, "encoder": "tree"}
    roles = {role: role for role in (*tree, *rest)}
    planted = replace(node, attrs=attrs, tensors=roles)
    with pytest.raises(GraphError, match="distance='l1' with encoder 'tree'; it measures none"):
        Graph(graph.inputs, (node.output,), (planted,), {**tree, **rest}).validate()
    with pytest.raises(ValueError, match="a tree measures no distance; give it l2, not l1"):
        _engine.Layer(node.op, ISAS[0], attrs, {**tree, **rest})

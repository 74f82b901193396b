"""Tables built from int8 weights: exact, the same everywhere, and honest about the difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder, random_inputs, with_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import same_bits

from lutra.errors import FormatError, GraphError
from lutra.format import graph_from_bytes, graph_to_bytes, save_graph
from lutra.graph import Graph, Node
from lutra.ops.compact_tables import build_tables, expand
from lutra.reference import run_reference
from lutra.runtime.session import Session

pytest_plugins = ["cli_support"]


def slow_tables(centroids: Array, zero: int, weight: Array, factor: Array) -> Array:
    """The definition, entry by entry."""
    (codebooks, count, width), (outputs, length) = centroids.shape, weight.shape
    tables = np.zeros((codebooks, count, outputs), np.int8)
    for b, k, m in np.ndindex(tables.shape):
        acc = 0
        for v in range(width):
            if b * width + v < length:
                acc += (int(centroids[b, k, v]) - zero) * int(weight[m, b * width + v])
        scaled = np.float32(acc) * factor[m]
        tables[b, k, m] = np.clip(np.rint(scaled), -127, 127)
    return tables


def pq_compact(rng: np.random.Generator, length: int, outputs: int, width: int) -> dict[str, Array]:
    codebooks = -(-length // width)
    centroids = rng.integers(0, 128, (codebooks, 16, width), dtype=np.uint8)
    centroids[-1, :, length - (codebooks - 1) * width :] = 0
    return {
        "centroids": centroids,
        "weight": rng.integers(-128, 128, (outputs, length)).astype(np.int8),
        "factor": rng.uniform(0.0005, 0.01, outputs).astype(np.float32),
        "scale": rng.uniform(0.001, 0.01, outputs).astype(np.float32),
        "bias": rng.normal(size=outputs).astype(np.float32),
    }


def factor_graph(seed: int = 0) -> Graph:
    """(N, 3, 6, 6) -> (N, 5): a convolution and a linear layer from factors, and tables between."""
    b = Builder(("x", (None, 3, 6, 6)), seed=seed)
    grid = {"act_scale": 0.05, "act_zero": 64, "act_bits": 7}
    conv = pq_compact(b.rng, 27, 4, 9)
    x = b.add("pq_conv2d", "x", tensors=conv, in_channels=3, kernel=(3, 3), name="conv", **grid)
    x = b.pq_conv2d(b.add("relu", x), 4, 4, padding=(1, 1))
    x = b.add("flatten", x)
    b.add("pq_linear", x, tensors=pq_compact(b.rng, 64, 5, 6), in_features=64, name="fc", **grid)
    return b.graph()


def as_tables(graph: Graph) -> Graph:
    """The same graph with its tables written out."""
    tensors = dict(graph.tensors)
    nodes = []
    for node in graph.nodes:
        if "factor" in node.tensors:
            tensors[f"{node.name}.tables"] = graph.node_tensors(node)["tables"]
            for role in ("weight", "factor"):
                del tensors[node.tensors[role]]
            roles = {r: n for r, n in node.tensors.items() if r not in ("weight", "factor")}
            node = replace(node, tensors={**roles, "tables": f"{node.name}.tables"})
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes), tensors=tensors)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 64),
    st.sampled_from([0, 1, 64, 127]),
    st.floats(-6, 2),
)
def test_tables_are_those_of_the_definition(
    seed: int, length: int, outputs: int, width: int, zero: int, size: float
) -> None:
    rng = np.random.default_rng(seed)
    centroids = rng.integers(0, 128, (-(-length // width), 8, width), dtype=np.uint8)
    weight = rng.integers(-128, 128, (outputs, length)).astype(np.int8)
    factor = (10.0**size * rng.uniform(-1, 1, outputs)).astype(np.float32)
    got = build_tables(centroids, zero, weight, factor)
    np.testing.assert_array_equal(got, slow_tables(centroids, zero, weight, factor))


def test_rounding_and_limits() -> None:
    """Halves go to the even neighbour, and nothing leaves -127..127, whatever overflows."""
    centroids = np.zeros((1, 8, 1), np.uint8)
    centroids[0, :, 0] = [0, 1, 2, 3, 4, 5, 6, 127]
    weight = np.array([[1], [-1], [127]], np.int8)
    factor = np.array([0.5, 0.5, 3e38], np.float32)
    tables = build_tables(centroids, 2, weight, factor)[0].T
    assert tables[0].tolist() == [-1, 0, 0, 0, 1, 2, 2, 62]
    assert tables[1].tolist() == [1, 0, 0, 0, -1, -2, -2, -62]
    assert tables[2].tolist() == [-127, -127, 0, 127, 127, 127, 127, 127]
    assert not tables.flags.writeable


def test_large_sums_are_exact() -> None:
    centroids = np.full((1, 8, 64), 127, np.uint8)
    weight = np.full((1, 64), -128, np.int8)
    weight[0, 0] = -127
    exact = -127 * (63 * 128 + 127)
    for target in (0.5, 1.5, -2.5):
        factor = np.array([target / exact], np.float32)
        want = np.clip(np.rint(np.float32(exact) * factor[0]), -127, 127)
        assert (build_tables(centroids, 0, weight, factor) == want).all()


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    parts = pq_compact(rng, 100, 3, 4)
    args = (parts["centroids"], 64, parts["weight"], parts["factor"])
    want = build_tables(*args)
    monkeypatch.setattr("lutra.ops.compact_tables._BLOCK", 1)
    np.testing.assert_array_equal(build_tables(*args), want)


# Graphs and files


def test_a_graph_of_factors_computes_what_its_tables_do() -> None:
    graph = factor_graph()
    feeds = random_inputs(graph, 3)
    want = run_reference(as_tables(graph), feeds)[graph.outputs[0]]
    assert same_bits(run_reference(graph, feeds)[graph.outputs[0]], want)
    assert same_bits(
        Session(graph).run(None, feeds)[0], Session(as_tables(graph)).run(None, feeds)[0]
    )
    conv = graph.nodes[0]
    tensors = graph.node_tensors(conv)
    assert set(tensors) == {"centroids", "tables", "scale", "bias"}
    assert graph.node_tensors(conv)["tables"] is tensors["tables"]  # built once


def test_files_keep_the_factors(tmp_path: Path) -> None:
    graph = with_golden(factor_graph())
    data = graph_to_bytes(graph)
    loaded = graph_from_bytes(data)
    assert loaded.nodes == graph.nodes
    assert set(loaded.tensors) == set(graph.tensors)
    assert "tables" not in loaded.nodes[0].tensors
    assert graph_to_bytes(loaded) == data
    assert len(data) < len(graph_to_bytes(with_golden(as_tables(factor_graph()))))


def test_bytes_are_those_of_the_file() -> None:
    graph, stored = factor_graph(), as_tables(factor_graph())
    ours, theirs = graph.cost()["conv"], stored.cost()["conv"]
    assert ours.table_bytes == theirs.table_bytes == 3 * 16 * 4
    assert theirs.weight_bytes - ours.weight_bytes == 3 * 16 * 4 - 4 * 27 - 4 * 4
    assert ours.lookups == theirs.lookups
    assert graph.total_cost().weight_bytes == graph.parameter_bytes()


def test_trees_take_centroids_for_their_factors_only() -> None:
    parts = pq_compact(np.random.default_rng(0), 12, 3, 4)
    splits = np.zeros((3, 4), np.int32)
    node = Node("pq_linear", "fc", ("x",), "y", {"act_zero": 64, "encoder": "tree"})
    tensors = expand(node, {**parts, "splits": splits}, 12)
    assert set(tensors) == {"splits", "tables", "scale", "bias"}
    want = build_tables(parts["centroids"], 64, parts["weight"], parts["factor"])
    np.testing.assert_array_equal(tensors["tables"], want)


def changed(**tensors: Any) -> Graph:
    """The graph with other tensors for ``conv``; None takes one away."""
    graph = factor_graph()
    roles, arrays = dict(graph.nodes[0].tensors), dict(graph.tensors)
    for role, array in tensors.items():
        name = roles.pop(role, f"conv.{role}")
        arrays.pop(name, None)
        if array is not None:
            roles[role], arrays[name] = name, array
    nodes = (replace(graph.nodes[0], tensors=roles), *graph.nodes[1:])
    return replace(graph, nodes=nodes, tensors=arrays)


WRONG: Mapping[str, tuple[dict[str, Any], str]] = {
    "no factor": ({"factor": None}, "lacks the tensor 'factor'; tables are built from it and"),
    "no weight": ({"weight": None}, "lacks the tensor 'weight'"),
    "no centroids": ({"centroids": None}, "lacks the tensor 'centroids'"),
    "both": ({"tables": np.zeros((3, 16, 4), np.int8)}, "has tables and compact tables"),
    "neither": ({"weight": None, "factor": None}, "lacks the tensor 'tables'"),
    "dtype": ({"weight": np.zeros((4, 27), np.uint8)}, "weight of dtype uint8"),
    "axes": (
        {"weight": np.zeros((4, 3, 9), np.int8)},
        r"weight of dtype int8 and shape \(4, 3, 9\)",
    ),
    "row": ({"weight": np.zeros((4, 26), np.int8)}, r"need \(outputs, 27\)"),
    "factor": ({"factor": np.zeros(5, np.float32)}, r"factor of shape \(5,\)"),
    "codebooks": ({"centroids": np.zeros((2, 16, 9), np.uint8)}, "has 2 codebooks .* it needs 3"),
    "width": ({"centroids": np.zeros((1, 16, 65), np.uint8)}, "at most 64"),
    "centroid": ({"centroids": np.full((3, 16, 9), 128, np.uint8)}, "centroid value of 128"),
    "outputs": (
        {"weight": np.zeros((5, 27), np.int8), "factor": np.zeros(5, np.float32)},
        r"scale of shape \(4,\)",
    ),
    "infinite": ({"factor": np.full(4, np.inf, np.float32)}, "NaN or infinite"),
    "unknown": ({"weights": np.zeros(1, np.int8)}, "unknown tensor 'weights'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_factors_that_make_no_tables_are_refused(case: str) -> None:
    tensors, message = WRONG[case]
    with pytest.raises(GraphError, match=message):
        changed(**tensors).validate()


def test_attributes_are_checked_before_they_are_used() -> None:
    graph = factor_graph()
    for name, value in (("act_zero", "64"), ("act_zero", 500), ("in_channels", None)):
        attrs: dict[str, Any] = {**graph.nodes[0].attrs, name: value}
        if value is None:
            del attrs[name]
        nodes = (replace(graph.nodes[0], attrs=attrs), *graph.nodes[1:])
        with pytest.raises(GraphError, match=name):
            replace(graph, nodes=nodes).validate()


def test_files_of_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Graph, "validate", lambda self: {})
        data = graph_to_bytes(changed(factor=None))
    with pytest.raises(FormatError, match="lacks the tensor 'factor'"):
        graph_from_bytes(data)


def test_commands(capture: Any, folder: Path) -> None:
    save_graph(with_golden(factor_graph()), "m.lutra")
    code, out, err = capture("inspect", "m.lutra")
    assert (code, err) == (0, "")
    assert "(2 layers built from int8 weights)" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if " pq_" in line}
    assert "compact" in rows["conv"]
    assert "compact" in rows["fc"]
    assert "stored" in rows["pq_conv2d_2"]
    assert capture("verify", "m.lutra")[0] == 0
    assert capture("bench", "m.lutra", "--profile", "--runs", "1")[0] == 0

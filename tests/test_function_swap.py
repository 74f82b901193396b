"""Function tables in graphs and files: the swap, and the command for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from graphs import Builder
from sequences import every_sequence_op_graph

from lutra import Session, load_graph, run_reference, runnable_isas, save_graph
from lutra.errors import InputError
from lutra.functions import KNOWN, Histogram, fit, swap_functions
from lutra.graph import Graph

pytest_plugins = ["cli_support"]

#: What the graph has that is swapped.
FUNCTIONS = ("layer_norm", "attention", "rms_norm", "gelu", "silu", "softmax", "tanh", "sigmoid")


def feeds(batches: int = 2) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "ids": rng.integers(0, 40, (3, 7)).astype(np.int32),
            "mask": (np.arange(7) < np.array([[7], [4], [1]])).astype(np.int32),
            "x": rng.normal(size=(3, 4, 6)).astype(np.float32),
        }
        for _ in range(batches)
    ]


@pytest.fixture(scope="module")
def graph() -> Graph:
    made = every_sequence_op_graph()
    (feed, *_) = feeds()
    outputs = Session(made).run(None, feed)
    return replace(made, golden=(tuple(feed[v.name] for v in made.inputs), tuple(outputs)))


@pytest.mark.parametrize("entries", [8, 16, 32])
def test_every_function(graph: Graph, entries: int) -> None:
    swapped = swap_functions(graph, entries)
    before, after = (Counter(node.op for node in g.nodes) for g in (graph, swapped))
    assert after["piecewise"] == before["piecewise"] + sum(
        before[name] for name in ("gelu", "silu", "tanh", "sigmoid", "erf")
    )
    for node in swapped.nodes:
        if node.op in ("softmax", "attention"):
            assert swapped.node_tensors(node)["exp_slope"].shape == (entries,)
        if node.op in ("layer_norm", "rms_norm"):
            assert swapped.node_tensors(node)["rsqrt_slope"].shape == (entries,)
    (feed, *_) = feeds()
    exact = Session(graph).run(None, feed)[0]
    bits = [Session(swapped, isa=isa).run(None, feed)[0] for isa in runnable_isas()]
    assert all(np.array_equal(bits[0], other) for other in bits)
    wanted = run_reference(swapped, feed)[swapped.outputs[0]]
    np.testing.assert_allclose(bits[0], wanted, atol=1e-4 * np.abs(wanted).max())
    moved = np.abs(bits[0] - exact).max() / np.abs(exact).max()
    assert 0 < moved < {8: 0.2, 16: 0.1, 32: 0.05}[entries]
    entry = swapped.metadata["functions"]
    assert set(FUNCTIONS) <= set(entry["nodes"].values())
    (output,) = swapped.outputs
    assert entry["largest_output_difference"][output] == pytest.approx(moved)
    assert graph.golden is not None
    assert np.array_equal(swapped.golden[1][0], Session(swapped).run(None, feed)[0])


def test_the_graph_stays_as_it_is(graph: Graph) -> None:
    nodes, tensors = graph.nodes, dict(graph.tensors)
    swap_functions(graph)
    assert graph.nodes is nodes
    assert graph.tensors == tensors


def test_some_functions(graph: Graph) -> None:
    swapped = swap_functions(graph, functions=("gelu", "softmax"))
    changed = {
        old.op for old, new in zip(graph.nodes, swapped.nodes, strict=True) if old is not new
    }
    assert changed == {"gelu", "softmax"}


def test_tables_are_stored_once(graph: Graph) -> None:
    swapped = swap_functions(graph)
    names = [name for name in swapped.tensors if name.startswith("table.")]
    assert sum(name.endswith("rsqrt_slope") for name in names) == 1
    assert sum(name.endswith("exp_slope") for name in names) == 1


def test_calibrated() -> None:
    """Each table is that of what flows into its node, from inputs of the graph and from nodes."""
    b = Builder(("x", (None, 8)))
    first = b.add("gelu", "x")
    graph = b.graph(b.add("gelu", b.add("affine_scalar", first, scale=4.0, bias=-2.0)))
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(size=(500, 8)).astype(np.float32)} for _ in range(3)]
    swapped = swap_functions(graph, method="dp", feeds=batches)
    seen = Histogram()
    for batch in batches:
        seen.add(batch["x"])
    table = fit("gelu", method="dp", histogram=seen)
    for role, array in table.tensors.items():
        assert np.array_equal(swapped.node_tensors(swapped.nodes[0])[role], array)
    second = swapped.node_tensors(swapped.nodes[2])
    assert not np.array_equal(second["breakpoint"], table.breakpoint)
    plain = swap_functions(graph, method="dp")
    exact = Session(graph)(batches[0]["x"])
    error = [np.square(Session(g)(batches[0]["x"]) - exact).mean() for g in (swapped, plain)]
    assert error[0] < error[1]
    assert swapped.metadata["functions"]["calibrated"]


def test_functions_of_a_range() -> None:
    b = Builder(("x", (None, 8)))
    graph = b.graph(b.add("exp", b.add("sqrt", "x")))
    rng = np.random.default_rng(0)
    feed = {"x": rng.uniform(0.0, 4.0, (100, 8)).astype(np.float32)}
    both = ("exp", "sqrt")
    swapped = swap_functions(graph, feeds=[feed], functions=both)
    got, want = Session(swapped)(feed["x"]), Session(graph)(feed["x"])
    assert np.abs(got - want).max() < 0.2
    far = Session(swapped)(np.full((1, 8), 1e30, np.float32))
    assert np.abs(far - KNOWN["exp"](2.0)).max() < 0.2
    with pytest.raises(InputError, match="exp, sqrt need the range"):
        swap_functions(graph, functions=both)
    with pytest.raises(InputError, match="no node is one of"):
        swap_functions(graph)


def test_bad_settings(graph: Graph) -> None:
    with pytest.raises(InputError, match=r"relu.* are no operators with tables"):
        swap_functions(graph, functions=("relu",))
    with pytest.raises(InputError, match="12 entries"):
        swap_functions(graph, 12)
    with pytest.raises(InputError, match="feeds is empty"):
        swap_functions(graph, feeds=[])
    swapped = swap_functions(graph)
    with pytest.raises(InputError, match="no node is one of"):
        swap_functions(swapped)


def test_command(folder: Any, capture: Any, refuse: Any, graph: Graph) -> None:
    save_graph(graph, "exact.lutra")
    code, out, _ = capture("convert", "exact.lutra", "--functions", "16", "-o", "tables.lutra")
    assert code == 0
    assert "nodes with tables of 16 lines" in out
    assert "moved by up to" in out
    made = load_graph("tables.lutra")
    assert any("exp_slope" in node.tensors for node in made.nodes)
    code, _, _ = capture("verify", "tables.lutra")
    assert code == 0
    arrays = {name: np.concatenate([f[name] for f in feeds(3)]) for name in feeds()[0]}
    np.savez("d.npz", **arrays)
    words = ["convert", "exact.lutra", "--functions", "8", "--data", "d.npz", "-o", "c.lutra"]
    code, _, _ = capture(*words)
    assert code == 0
    assert load_graph("c.lutra").metadata["functions"]["calibrated"]
    refuse("convert", "exact.lutra", "-o", "o.lutra", match="converted already")
    refuse("convert", "net.py:build", "-o", "o.lutra", match="needs calibration inputs")

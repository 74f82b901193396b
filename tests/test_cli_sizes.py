"""The command line on models that take images of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import PREPROCESS, save
from graphs import Array, Builder

from lutra import Session
from lutra.format import save_graph
from lutra.graph import Graph

pytest_plugins = ["cli_support"]


def any_size(**metadata: Any) -> Graph:
    """A small classifier (N, 3, H, W) -> (N, 10)."""
    b = Builder(("x", (None, 3, None, None)))
    x = b.add("relu", b.conv2d("x", 3, 8, (5, 5)))
    b.pq_linear(b.add("mean", b.pq_conv2d(x, 8, 16), axes=(2, 3)), 16, 10)
    return b.graph(metadata=metadata)


def normal(*shape: int) -> Array:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.fixture
def bare(folder: Path) -> str:
    """Without golden data."""
    save_graph(any_size(preprocess=PREPROCESS), "bare.lutra")
    return "bare.lutra"


@pytest.fixture
def golden(folder: Path) -> str:
    """With golden data of 9 by 12 pixels."""
    graph, x = any_size(), normal(2, 3, 9, 12)
    whole = Graph(
        graph.inputs,
        graph.outputs,
        graph.nodes,
        graph.tensors,
        golden=((x,), (Session(graph)(x),)),
    )
    save_graph(whole, "golden.lutra")
    return "golden.lutra"


def test_run_takes_any_size(capture: Any, refuse: Any, bare: str) -> None:
    for height, width in ((9, 12), (7, 30)):
        x = normal(2, 3, height, width)
        assert capture("run", bare, "-i", save("x.npy", x), "-o", "y.npy") == (0, "", "")
        np.testing.assert_array_equal(np.load("y.npy"), Session(bare)(x))
    pixels = np.zeros((2, 8, 20, 3), np.uint8)
    assert capture("run", bare, "-i", save("x.npy", pixels), "-o", "y.npy")[0] == 0
    words = ("run", bare, "-i", save("x.npy", normal(1, 3, 6, 9)), "-o", "z.npy")
    refuse(*words, match=r"node 'pq_conv2d_2' .* shape \(1, 8, 2, 5\)")


def test_eval_takes_any_size(capture: Any, bare: str) -> None:
    save("x.npy", np.zeros((3, 9, 11, 3), np.uint8))
    save("y.npy", np.zeros(3, np.int64))
    code, out, _ = capture("eval", bare, "--images", "x.npy", "--labels", "y.npy", "--json")
    assert code == 0
    assert json.loads(out)["images"] == 3


def test_inspect_counts_work_for_a_size(capture: Any, refuse: Any, bare: str, golden: str) -> None:
    out = capture("inspect", bare)[1]
    assert "x (N, 3, ?, ?)" in out
    assert "depends on the size of the inputs; give --shape" in out
    assert "2 of them lookup layers" in out
    report = json.loads(capture("inspect", bare, "--json")[1])
    assert report["work_for"] is None
    assert report["totals"]["lookups"] is None
    assert report["totals"]["lookup_layers"] == 2
    assert report["layers"][0]["bytes"] > 0
    out = capture("inspect", bare, "--shape", "1,3,20,30")[1]
    assert "for each sample of x (1, 3, 20, 30)" in out
    assert "(1, 8, 16, 26)" in out
    report = json.loads(capture("inspect", bare, "--shape", "x=2,3,20,30", "--json")[1])
    macs = any_size().total_cost({"x": (1, 3, 20, 30)}).macs
    assert report["totals"]["multiplications"] == macs
    assert "for each sample of x (1, 3, 9, 12)" in capture("inspect", golden)[1]
    for shape, match in (
        ("1,3,20", r"takes \(N, 3, \?, \?\) and not \(1, 3, 20\)"),
        ("1,4,20,20", "takes"),
        ("1,3,4,20", "node 'conv2d_0'"),
        ("1,3,x,20", "is no shape"),
        ("0,3,9,9", "is no shape"),
    ):
        refuse("inspect", bare, "--shape", shape, match=match)


def test_verify_needs_a_size(capture: Any, refuse: Any, bare: str, golden: str) -> None:
    refuse("verify", bare, match="takes inputs of any size.*give --shape")
    words = ("--isa", "scalar", "--samples", "2")
    for call in ((bare, "--shape", "1,3,8,11"), (golden,), (golden, "--shape", "3,3,7,7")):
        code, out, _ = capture("verify", *call, *words)
        assert code == 0, out
        assert "2 random samples" in out


def test_bench_needs_a_size(capture: Any, refuse: Any, bare: str, golden: str) -> None:
    refuse("bench", bare, match="takes inputs of any size.*give --shape")
    words = ("--runs", "1", "--warmup", "0", "--json", "-")
    for call, batch in (
        ((bare, "--shape", "2,3,9,9"), 2),
        ((bare, "--shape", "2,3,9,9", "--batch", "3"), 3),
        ((golden,), 1),
        ((golden, "--batch", "4"), 4),
    ):
        report = json.loads(capture("bench", *call, *words)[1])
        assert [result["batch"] for result in report["results"]] == [batch]
    report = json.loads(capture("bench", bare, "--profile", "--shape", "1,3,9,9", *words)[1])
    assert report["profiles"][0]["batch"] == 1
    refuse("bench", bare, "--shape", "1,3,2,2", match="--shape: node 'conv2d_0'")

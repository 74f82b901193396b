"""The commands on a model of lookup layers with one table each."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import Broken, floats, save
from graphs import Builder, with_golden

import lutra
from lutra.cli import doctor, verify
from lutra.format import save_graph
from lutra.graph import Graph

pytest_plugins = ["cli_support"]

CONV, LINEAR = "lookup_conv2d_2", "lookup_linear_8"


def lookup_graph() -> Graph:
    """A small classifier (N, 3, 8, 8) -> (N, 10): int8 stem, a residual block, a classifier."""
    b = Builder(("x", (None, 3, 8, 8)))
    stem = b.add("relu", b.int8_conv2d("x", 3, 8, padding=(1, 1), act_zero=64))
    x = b.add("relu", b.lookup_conv2d(stem, 8, 8, padding=(1, 1), act_scale=0.4))
    x = b.lookup_conv2d(x, 8, 8, padding=(1, 1), act_bits=2, weights=3, act_scale=0.8)
    x = b.add("relu", b.add("add", x, stem))
    x = b.add("mean", x, axes=(2, 3))
    assert b.lookup_linear(x, 8, 10, act_bits=6, weights=33, act_scale=0.1) == f"{LINEAR}.out"
    return b.graph()


@pytest.fixture
def lookup_model(folder: Path) -> str:
    save_graph(with_golden(lookup_graph()), "m.lutra")
    return "m.lutra"


def test_run(capture: Any, lookup_model: str) -> None:
    save("x.npy", floats())
    code, _, err = capture("run", lookup_model, "--input", "x.npy", "--output", "y.npy")
    assert (code, err) == (0, "")
    (want,) = lutra.run_reference(lookup_graph(), [floats()]).values()
    assert np.array_equal(np.load("y.npy"), want)


def test_verify(capture: Any, lookup_model: str) -> None:
    code, out, err = capture("verify", lookup_model)
    assert (code, err) == (0, "")
    assert "9 nodes, 3 of them lookup layers; 2 golden and 4 random samples" in out
    for isa in lutra.runnable_isas():
        assert re.search(rf"^{isa} +ok +equal +equal +0$", out, re.MULTILINE)


@pytest.mark.parametrize(("name", "op"), [(CONV, "lookup_conv2d"), (LINEAR, "lookup_linear")])
def test_verify_finds_a_wrong_bit(
    capture: Any, lookup_model: str, monkeypatch: pytest.MonkeyPatch, name: str, op: str
) -> None:
    monkeypatch.setattr(Broken, "victim", f"{name}.out")
    monkeypatch.setattr(verify, "new_session", lambda graph, isa: Broken(graph, isa=isa))
    code, out, _ = capture("verify", lookup_model)
    assert code == 1
    assert re.search(rf"integer layer '{name}' \({op}\) gives [12] of \d+ values", out), out


def test_verify_finds_another_table(capture: Any, folder: Path) -> None:
    """Golden data of one table, and a file with another."""
    graph = with_golden(lookup_graph())
    table = graph.tensors[f"{CONV}.table"].copy()
    table[3] = -table[3]
    save_graph(replace(graph, tensors={**graph.tensors, f"{CONV}.table": table}), "m.lutra")
    code, out, _ = capture("verify", "m.lutra")
    assert code == 1
    assert "differs from the golden data in the file" in out


def test_bench(capture: Any, lookup_model: str) -> None:
    words = ["--runs", "3", "--threads", "1,2", "--batch", "1,3", "--json", "b.json"]
    code, _, err = capture("bench", lookup_model, *words)
    assert (code, err) == (0, "")
    settings = [
        (r["threads"], r["batch"]) for r in json.loads(Path("b.json").read_text())["results"]
    ]
    assert settings == [(1, 1), (1, 3), (2, 1), (2, 3)]


@pytest.mark.parametrize("isa", lutra.runnable_isas())
def test_bench_profile(capture: Any, lookup_model: str, isa: str) -> None:
    words = ["--profile", "--runs", "3", "--threads", "1", "--isa", isa, "--json", "-"]
    code, out, err = capture("bench", lookup_model, *words)
    assert (code, err) == (0, "")
    (profile,) = json.loads(out)["profiles"]
    steps = {step["name"]: step for step in profile["steps"] if step["op"] != "quantize"}
    assert steps[CONV]["op"] == "lookup_conv2d"
    assert steps[LINEAR]["op"] == "lookup_linear"
    for name in (CONV, LINEAR):
        assert steps[name]["isa"] == isa
        assert steps[name]["method"] not in ("", "float32", "int8")
        assert steps[name]["dense_gmacs"] > 0
        assert steps[name]["bytes"] > 0


def test_doctor_tests_lookup_layers(capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert capture("doctor")[0] == 0
    ops = {node.op for node in doctor._small_graph().nodes}
    assert {"pq_conv2d", "pq_linear", "lookup_conv2d", "lookup_linear"} <= ops
    monkeypatch.setattr(doctor, "new_session", lambda graph, **_: Broken(graph, isa="scalar"))
    assert capture("doctor")[0] == 1


def test_the_values_of_the_self_test_differ() -> None:
    """A self test whose values all sit on one end of a grid would find nothing."""
    graph = doctor._small_graph()
    x = np.random.default_rng(1).standard_normal((3, 5, 9, 9), np.float32)
    values = lutra.run_reference(graph, [x], intermediates=True)
    for node in graph.nodes:
        if "act_scale" in node.attrs:
            read = values[node.inputs[0]]
            steps = np.unique(np.rint(read / np.float32(node.attrs["act_scale"])))
            assert len(steps) > 6, node.name
            assert len(np.unique(values[node.output])) > 10, node.name


def test_sessions_say_that_they_look_up(lookup_model: str) -> None:
    assert "3 lookup layers" in repr(lutra.Session(lookup_model))

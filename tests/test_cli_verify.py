"""``lutra verify`` passes what is right and finds one wrong bit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import Broken, image_graph, two_graph
from graphs import Builder, with_golden

import lutra
from lutra.cli import verify
from lutra.format import save_graph
from lutra.graph import Graph

pytest_plugins = ["cli_support"]


def test_verify(capture: Any, model: str) -> None:
    code, out, err = capture("verify", model)
    assert (code, err) == (0, "")
    for isa in lutra.runnable_isas():
        assert re.search(rf"^{isa} +ok", out, re.MULTILINE)
    assert "2 golden and 4 random samples" in out
    code, out, _ = capture("verify", model, "--json", "--isa", "scalar", "--samples", "0")
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    assert [result["isa"] for result in report["results"]] == ["scalar"]


def test_verify_without_golden_data(capture: Any, refuse: Any, folder: Path) -> None:
    save_graph(image_graph(), "m.lutra")
    code, out, _ = capture("verify", "m.lutra")
    assert code == 0
    assert "holds no golden data" in out
    refuse("verify", "m.lutra", "--samples", "0", match="give --samples above 0")


def test_verify_a_fixed_batch_and_several_ends(capture: Any, folder: Path) -> None:
    for graph in (image_graph(batch=3), two_graph()):
        save_graph(with_golden(graph), "m.lutra")
        assert capture("verify", "m.lutra")[0] == 0


def test_verify_finds_wrong_golden_data(capture: Any, folder: Path) -> None:
    graph = with_golden(image_graph())
    assert graph.golden is not None
    inputs, (output,) = graph.golden
    save_graph(replace(graph, golden=(inputs, (output * np.float32(1.2),))), "m.lutra")
    code, out, _ = capture("verify", "m.lutra")
    assert code == 1
    assert "differs from the golden data in the file by 0.17" in out
    assert out.splitlines()[-1] == "FAILED"
    output.flat[3] = np.nextafter(output.flat[3], np.float32(np.inf))  # one last bit
    save_graph(replace(graph, golden=(inputs, (output,))), "m.lutra")
    code, out, _ = capture("verify", "m.lutra", "--samples", "0")
    assert code == 1
    assert "differs from the golden data" in out


@pytest.mark.parametrize(
    ("error", "status", "producer", "by"),
    [
        (1e-6, 0, "lutra 0.0.9", "written by lutra 0.0.9"),
        (1e-6, 0, None, "the file does not say what wrote it"),
        (1e-3, 1, None, ""),
        (1e-5, 1, None, ""),
    ],
)
def test_verify_allows_for_another_exponential(
    capture: Any, folder: Path, error: float, status: int, producer: str | None, by: str
) -> None:
    b = Builder(("x", (None, 5)))
    b.add("softmax", b.pq_linear("x", 5, 4), axis=1)
    graph = with_golden(b.graph(metadata={} if producer is None else {"producer": producer}))
    assert graph.golden is not None
    inputs, (output,) = graph.golden
    save_graph(replace(graph, golden=(inputs, (output * np.float32(1 + error),))), "m.lutra")
    code, out, _ = capture("verify", "m.lutra")
    assert code == status
    result = json.loads(capture("verify", "m.lutra", "--json")[1])["results"][0]
    assert bool(result["notes"]) == (status == 0)
    if status == 0:
        note = "differs from the golden output in the last bits"
        line = f"^note: the output 'softmax_1.out' {note}, by .*e-0[67] of the largest value; {by}$"
        assert re.search(line, out, re.MULTILINE), out
        assert result["problems"] == []
        assert 0 < result["golden_difference"] < 2e-6
        assert out.count(note) == 1  # once, although all kernels give it


def softmax_graph() -> Graph:
    b = Builder(("x", (None, 7, 5)))
    b.add("softmax", b.add("affine_scalar", "x", scale=3.0, bias=0.0), axis=1)
    return b.graph()


def test_verify_compares_softmax_to_the_bit(
    capture: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_graph(with_golden(softmax_graph()), "m.lutra")
    code, out, _ = capture("verify", "m.lutra", "--samples", "50")
    assert code == 0
    assert re.search(r"^scalar +ok +equal +equal +0", out, re.MULTILINE), out
    monkeypatch.setattr(Broken, "victim", "softmax_1.out")
    monkeypatch.setattr(verify, "new_session", Broken)
    code, out, _ = capture("verify", "m.lutra")
    assert code == 1
    assert "the node 'softmax_1' (softmax) gives" in out
    assert "that are not those of the reference for the same input" in out


@pytest.mark.parametrize(
    ("victim", "isa", "message"),
    [
        ("pq_conv2d_2.out", "scalar", r"integer layer 'pq_conv2d_2' \(pq_conv2d\) gives 2 of"),
        ("pq_linear_9.out", "scalar", "integer layer 'pq_linear_9'"),
        ("mean_8.out", "last", "'mean_8' .* gives other bits than with scalar"),
        ("pq_linear_9.out", "fused", "whole network differs from the same value fetched node by"),
    ],
)
def test_verify_finds_a_wrong_bit(
    capture: Any,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    victim: str,
    isa: str,
    message: str,
) -> None:
    isas = lutra.runnable_isas()
    if isa == "last" and len(isas) == 1:
        pytest.skip("needs two sets of kernels")

    def new_session(graph: Graph, isa: str) -> lutra.Session:
        fused = len(graph.outputs) == 1
        wrong = {"scalar": isa == "scalar", "last": isa == isas[-1], "fused": fused}[chosen]
        return (Broken if wrong else lutra.Session)(graph, isa=isa)

    chosen = isa
    monkeypatch.setattr(Broken, "victim", victim)
    monkeypatch.setattr(verify, "new_session", new_session)
    code, out, _ = capture("verify", model)
    assert code == 1
    assert re.search(message, out), out
    code, out, _ = capture("verify", model, "--json")
    assert code == 1
    assert json.loads(out)["ok"] is False


def test_verify_explains_moved_codes(
    capture: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The dense layer gives 0.25, the border between two steps of the grid, and a reference that
    # rounds its bias up goes to the step above: another code, and an output that differs a lot.
    centroids = (60 + np.arange(16, dtype=np.uint8)).reshape(1, 16, 1).repeat(4, axis=0)
    tables = np.arange(-64, 64, dtype=np.int8).reshape(4, 16, 2)
    b = Builder(("x", (None, 4)))
    zeros, ones = np.zeros((4, 4), np.float32), np.ones(2, np.float32)
    y = b.add("linear", "x", tensors={"weight": zeros, "bias": np.full(4, 0.25, np.float32)})
    roles = {"centroids": centroids, "tables": tables, "scale": ones, "bias": ones}
    b.add("pq_linear", y, tensors=roles, in_features=4, act_scale=0.5, act_zero=64, act_bits=7)
    graph = b.graph()
    original = verify.run_reference
    save_graph(with_golden(graph), "m.lutra")

    def rounds_up(graph: Graph, feeds: Any, **options: Any) -> Any:
        bias = np.full(4, 0.25 + 1e-7, np.float32)
        return original(
            replace(graph, tensors={**graph.tensors, "linear_0.bias": bias}), feeds, **options
        )

    monkeypatch.setattr(verify, "run_reference", rounds_up)
    code, out, _ = capture("verify", "m.lutra")
    assert code == 0
    assert "note: moved codes" in out
    result = json.loads(capture("verify", "m.lutra", "--json")[1])["results"][0]
    assert result["moved"] > 0
    assert result["reference_difference"] > 0.01
    assert result["golden_difference"] == 0

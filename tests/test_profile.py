"""Profiles: what the times of steps are made into; never how large they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from cli_support import image_graph, two_graph
from graphs import random_inputs

import lutra.runtime.session
from lutra import InputError, Profile, Session, runnable_isas, save_graph
from lutra.runtime.profile import _short, input_pool, summarise
from lutra.runtime.shared_codes import SHARED_LABEL

pytest_plugins = ["cli_support"]

DESCRIBED = [
    ("conv2d_0", "float32", 1000),
    ("pq_conv2d_2", "nearest", 2000),
    ("relu_5", "float32", 4000),
    ("relu_5", "quantize", 500),
]


def example() -> Profile:
    """Three runs; medians are 1, 2, 4, 0, 1 and 2 us, and 11 us of whole runs."""
    seconds = [
        [1e-6, 2e-6, 4e-6, 0.0, 1e-6, 2e-6],
        [2e-6, 2e-6, 9e-6, 0.0, 1e-6, 2e-6],
        [1e-6, 3e-6, 4e-6, 0.0, 1e-6, 2e-6],
    ]
    return summarise(image_graph(), DESCRIBED, seconds, isa="avx2", threads=2, batch=3)


def test_numbers() -> None:
    profile = example()
    assert (profile.isa, profile.threads, profile.batch, profile.runs) == ("avx2", 2, 3, 3)
    assert profile.input_ms == pytest.approx(1e-3)
    assert profile.output_ms == pytest.approx(2e-3)
    assert profile.total_ms == pytest.approx(11e-3)  # of 10, 16 and 11
    stem, lookup, relu, quantize = profile.steps
    assert [step.op for step in profile.steps] == ["conv2d", "pq_conv2d", "relu", "quantize"]
    assert stem.milliseconds == pytest.approx(2e-3)
    assert stem.share == pytest.approx(2 / 11)
    assert lookup.dense_gmacs == pytest.approx(8 * 64 * 72 * 3 / 4e-6 / 1e9)
    assert lookup.gbytes == pytest.approx(2000 / 4e-6 / 1e9)
    assert (relu.dense_gmacs, relu.gbytes) == (None, None)  # no time was measured
    assert quantize.dense_gmacs is None


def test_text_and_json() -> None:
    profile = example()
    head, *rows = str(profile).splitlines()
    assert head == "avx2, 2 threads, batch 3, medians of 3 runs"
    assert [row.split()[0] for row in rows] == [
        "step", "copy", "conv2d_0", "pq_conv2d_2", "relu_5", "relu_5", "copy", "whole",
    ]  # fmt: skip
    assert "27.6" in rows[3]  # GMAC/s
    again = json.loads(json.dumps(profile.to_json(), allow_nan=False))
    assert again["steps"][1]["method"] == "nearest"
    assert again["total_ms"] == profile.total_ms
    assert {field.name for field in dataclasses.fields(Profile)} == set(again)


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize("threads", [1, 2])
def test_a_session_profiles_itself(isa: str, threads: int) -> None:
    session = Session(image_graph(), isa=isa, threads=threads)
    profile = session.profile(batch=2, runs=4, warmup=1)
    assert (profile.isa, profile.threads, profile.batch, profile.runs) == (isa, threads, 2, 4)
    nodes = {node.name: node.op for node in session.graph.nodes}
    for step in profile.steps:
        first = step.name.split(SHARED_LABEL)[0]  # others are fused with it
        assert step.op == ("quantize" if step.method == "quantize" else nodes[first])
        assert step.milliseconds >= 0.0
        assert step.bytes > 0
    lookups = [step for step in profile.steps if step.op.startswith("pq_")]
    assert len(lookups) == 3
    assert all(step.dense_gmacs for step in lookups)
    assert profile.total_ms > 0.0


def test_inputs_of_every_form() -> None:
    graph = image_graph()
    session = Session(graph, threads=1)
    x = random_inputs(graph, 5)["x"]
    assert session.profile(x, runs=1).batch == 5
    assert session.profile({"x": x}, runs=1, warmup=0).batch == 5
    assert Session(image_graph(batch=4), threads=1).profile(runs=1).batch == 4
    two = Session(two_graph(), threads=1)
    assert two.profile(runs=2).batch == 1
    assert two.profile(random_inputs(two.graph, 2), runs=1).batch == 2


def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(image_graph(), threads=1)
    x = random_inputs(session.graph, 4)["x"]
    for settings, match in (
        ({"batch": 0}, "batch=0 is less than 1"),
        ({"runs": 0}, "runs=0 is less than 1"),
        ({"warmup": -1}, "warmup=-1 is less than 0"),
    ):
        with pytest.raises(InputError, match=match):
            session.profile(**settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dtype complex128"):
        session.profile(x.astype(complex))
    with pytest.raises(InputError, match="has 2 inputs; give a dict"):
        Session(two_graph(), threads=1).profile(x)
    monkeypatch.setattr(lutra.runtime.session, "_ARENA_LIMIT", 1)
    with pytest.raises(InputError, match="a batch of 4 runs in pieces of 1"):
        Session(image_graph(), threads=1).profile(x)


def test_random_inputs_take_turns() -> None:
    pool = input_pool(image_graph(), 2)
    assert len({feeds["x"].tobytes() for feeds in pool}) == len(pool) == 8
    assert pool[0]["x"].shape == (2, 3, 8, 8)


def test_bench_profile(capture: Any, refuse: Any, model: str) -> None:
    words = ["bench", model, "--profile", "--runs", "3", "--threads", "1,2", "--batch", "1,3"]
    code, out, err = capture(*words, "--json", "p.json")
    assert (code, err) == (0, "")
    assert out.count("whole run") == 4
    report = json.loads(Path("p.json").read_text())
    assert "results" not in report
    settings = [(p["threads"], p["batch"], p["runs"]) for p in report["profiles"]]
    assert settings == [(1, 1, 3), (1, 3, 3), (2, 1, 3), (2, 3, 3)]
    code, out, _ = capture("bench", model, "--profile", "--json", "-")
    assert json.loads(out)["profiles"][0]["runs"] == 20
    refuse("bench", model, "--profile", "--seconds", "1", match="give --runs N")


def test_bench_profile_keeps_the_terminal_safe(capture: Any, folder: Path) -> None:
    graph = image_graph()
    nodes = (dataclasses.replace(graph.nodes[0], name="stém"), *graph.nodes[1:])
    save_graph(dataclasses.replace(graph, nodes=nodes), "m.lutra")
    code, out, _ = capture("bench", "m.lutra", "--profile", "--runs", "1")
    assert code == 0
    assert out.isascii()
    assert "st\\xe9m" in out


def test_nodes_of_one_step_are_shown_without_their_common_path() -> None:
    short = _short("block.0.self.query + block.0.self.key + block.0.gelu + head")
    assert short == "block.0.self.query + key + gelu + head"
    assert _short("a.b") == "a.b"

"""A whole sentence encoder with random tensors: every instruction set, length and mask."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Array

from lutra import InputError, Session, run_reference, runnable_isas
from lutra.cli.inspect import describe
from lutra.cli.verify import verify
from lutra.format import graph_from_bytes, graph_to_bytes
from lutra.runtime.profile import random_inputs

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.lookups import Pq
from benchmarks.networks_text import Encoder, encoder_graph

SMALL = Encoder("small", layers=2, hidden=48, heads=4, inner=96, vocabulary=100, positions=512)
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"dense": "int8"},
    "float32, tables": {"entries": 16},
    "pq": {"method": Pq(v=16)},
    "pq, tables": {"method": Pq(v=4), "entries": 16},
    "trees, tables": {"method": Pq("tree", v=8), "entries": 32},
    "pq, nothing shared": {"method": Pq(v=8), "shared": False},
}
SIZES = [(1, 1), (3, 9), (1, 512), (17, 33)]


def feeds(batch: int, length: int, seed: int = 0) -> dict[str, Array]:
    sizes = {"ids": (batch, length), "mask": (batch, length)}
    return random_inputs(encoder_graph(SMALL), batch, np.random.default_rng(seed), sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_all_instruction_sets_and_lengths(kind: str) -> None:
    graph = encoder_graph(SMALL, **KINDS[kind])
    sessions = [Session(graph, isa=isa, threads=n) for isa in runnable_isas() for n in (1, 3)]
    for batch, length in SIZES:
        given = feeds(batch, length)
        first, *others = (session.run(None, given)[0] for session in sessions)
        for got in others:
            np.testing.assert_array_equal(got.view(np.int32), first.view(np.int32))
        np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
        want = run_reference(graph, given)["embedding"]
        # a code that rounding moves changes much, and seldom does
        near = np.abs(first - want).max(axis=1) < 1e-5
        assert near.mean() > 0.75, (batch, length, near)


@pytest.mark.parametrize("kind", KINDS)
def test_verify(kind: str) -> None:
    graph = graph_from_bytes(graph_to_bytes(encoder_graph(SMALL, **KINDS[kind])))
    sizes = {"ids": (2, 21), "mask": (2, 21)}
    for result in verify(graph, runnable_isas(), samples=2, sizes=sizes):
        assert not result.problems, (result.isa, result.problems)


@pytest.mark.parametrize("kind", ["float32", "pq, tables"])
def test_padding_changes_nothing(kind: str) -> None:
    graph = encoder_graph(SMALL, **KINDS[kind])
    session = Session(graph)
    given = feeds(4, 12)
    given["mask"][:] = 1
    (want,) = session.run(None, given)
    rng = np.random.default_rng(1)
    padded = {
        "ids": np.concatenate([given["ids"], rng.integers(0, 100, (4, 25), dtype=np.int32)], 1),
        "mask": np.pad(given["mask"], ((0, 0), (0, 25))),
    }
    (got,) = session.run(None, padded)
    np.testing.assert_allclose(got, want, atol=1e-6)
    (each,) = session.run(None, {name: x[2:3] for name, x in padded.items()})
    np.testing.assert_allclose(each, want[2:3], atol=1e-6)


def test_a_text_without_tokens_gives_zeros() -> None:
    given = feeds(2, 5)
    given["mask"][1] = 0
    for kind in ("float32", "pq, tables"):
        (got,) = Session(encoder_graph(SMALL, **KINDS[kind])).run(None, given)
        assert np.isfinite(got).all()
        assert got[0].any()
        assert not got[1].any()


def test_texts_that_are_too_long() -> None:
    session = Session(encoder_graph(SMALL))
    with pytest.raises(InputError, match=r"'positions' .*513 tokens.*512 positions"):
        session.run(None, feeds(1, 513))


def test_sharing_codes_changes_no_bit() -> None:
    """Queries, keys and values with the same codebooks, as one step and as three."""
    given = feeds(3, 20)
    graph = encoder_graph(SMALL, Pq(v=8))
    (want,) = Session(graph).run(None, given)
    names = {node.output for node in graph.nodes}
    apart = {node.name for node in graph.nodes if node.name.endswith(".key")}
    # what is also an output of the graph is copied out of the step
    outputs = (*graph.outputs, *sorted(apart & names))
    shown = type(graph)(graph.inputs, outputs, graph.nodes, graph.tensors)
    np.testing.assert_array_equal(Session(shown).run(["embedding"], given)[0], want)


def test_the_report_of_an_encoder() -> None:
    graph = encoder_graph(SMALL, Pq(v=8), entries=16)
    sizes = {"ids": (1, 16), "mask": (1, 16)}
    report = describe(graph, 0, sizes)
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert report["totals"]["lookup_layers"] == 2 * 6
    assert layers["layer.0.gelu"]["table_functions"] == 16 * 96
    assert layers["layer.0.attention.query"]["encode_ops"] > 0
    assert layers["layer.0.attention.key"]["encode_ops"] == 0
    assert layers["layer.1.attention"]["multiplications"] == 2 * 16 * 16 * 48
    assert [layers["layer.1.norm"][key] for key in ("k", "tables")] == [16, "function"]
    exact = describe(encoder_graph(SMALL, Pq(v=8)), 0, sizes)["totals"]
    assert exact["functions"] > report["totals"]["functions"] == 49  # at the end
    assert exact["table_functions"] == 0

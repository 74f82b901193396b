"""Lookup layers that share their codes are one step, and give the bits that they gave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder, pq_tensors, random_inputs, tree_tensors

from lutra import Session, run_reference, runnable_isas
from lutra.graph import Graph
from lutra.runtime.fuse import fuse
from lutra.runtime.shared_codes import share_codes

F = np.float32
GRID = {"act_scale": 0.05, "act_zero": 64, "act_bits": 7}


def outputs_of(rng: np.random.Generator, tensors: dict[str, Array], outputs: int) -> dict[str, Any]:
    """The tensors of another layer with the same codes."""
    codebooks, count, _ = tensors["tables"].shape
    return {
        **tensors,
        "tables": rng.integers(-128, 128, (codebooks, count, outputs)).astype(np.int8),
        "scale": rng.uniform(0.001, 0.01, outputs).astype(F),
        "bias": rng.normal(size=outputs).astype(F),
    }


def linears(
    b: Builder, x: str, features: int, sizes: tuple[int, ...], *, tree: bool = False, **attrs: Any
) -> list[str]:
    """Layers of ``sizes`` outputs with equal codebooks, each with arrays of its own."""
    first = tree_tensors(b.rng, features, 1) if tree else pq_tensors(b.rng, features, 1, width=4)
    if tree:
        attrs["encoder"] = "tree"
    return [
        b.add(
            "pq_linear",
            x,
            tensors={role: t.copy() for role, t in outputs_of(b.rng, first, size).items()},
            in_features=features,
            **{**GRID, **attrs},
        )
        for size in sizes
    ]


def groups(graph: Graph) -> list[list[str]]:
    """The nodes of every step of siblings."""
    steps = share_codes(graph, fuse(graph))
    return [[m.node.name for m in step.members] for step in steps if len(step.members) > 1]


def check(graph: Graph, batch: int = 3) -> None:
    """The engine gives the reference's bits, with every instruction set."""
    feeds = random_inputs(graph, batch)
    want = run_reference(graph, feeds)
    for isa in runnable_isas():
        for threads in (1, 3):
            got = Session(graph, isa=isa, threads=threads).run(None, feeds)
            for name, y in zip(graph.outputs, got, strict=True):
                np.testing.assert_array_equal(y, want[name], f"{name}, {isa}, {threads} threads")


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("shape", [(None, 20), (None, 7, 20), (None, 2, 3, 20)])
def test_layers_of_one_value_encode_it_once(shape: tuple[int | None, ...], tree: bool) -> None:
    b = Builder(("x", shape))
    names = linears(b, "x", 20, (8, 24, 5), tree=tree)
    graph = b.graph(*names)
    assert groups(graph) == [[n.removesuffix(".out") for n in names]]
    check(graph)


def test_convolutions_of_one_value_encode_it_once() -> None:
    b = Builder(("x", (None, 3, 9, 8)))
    first = pq_tensors(b.rng, 27, 1)
    names = [
        b.add(
            "pq_conv2d",
            "x",
            tensors=outputs_of(b.rng, first, size),
            in_channels=3,
            kernel=(3, 3),
            padding=(1, 1),
            **GRID,
        )
        for size in (6, 17)
    ]
    graph = b.graph(b.add("concat", *names, axis=1), names[1])
    assert len(groups(graph)) == 1
    check(graph)


@pytest.mark.parametrize("role", ["centroids", "act_scale", "act_zero", "input", "clamp", "add"])
def test_what_differs_stays_alone(role: str) -> None:
    b = Builder(("x", (None, 20)))
    tensors = pq_tensors(b.rng, 20, 20, width=4)
    other = outputs_of(b.rng, tensors, 20)
    attrs: dict[str, Any] = {**GRID, "in_features": 20}
    source = "x"
    changed = dict(attrs)
    if role == "centroids":
        other["centroids"] = tensors["centroids"].copy()
        other["centroids"][0, 0, 0] ^= 1
    elif role == "input":
        source = b.add("relu", "x")
    elif role in attrs:
        changed[role] = attrs[role] * 2 if role == "act_scale" else 63
    y = b.add("pq_linear", "x", tensors=tensors, **attrs)
    z = b.add("pq_linear", source, tensors=other, **changed)
    if role == "clamp":
        z = b.add("relu", z)
    elif role == "add":
        z = b.add("add", z, "x")
    graph = b.graph(y, z)
    assert groups(graph) == []
    check(graph)


def test_siblings_with_the_same_clamp() -> None:
    b = Builder(("x", (None, 6, 20)))
    y, z = (b.add("relu", name) for name in linears(b, "x", 20, (20, 20)))
    graph = b.graph(b.add("add", y, z), y)
    assert len(groups(graph)) == 1
    check(graph)


def test_readers_on_grids_copy_integers() -> None:
    b = Builder(("x", (None, 6, 20)))
    y, z = linears(b, "x", 20, (20, 12))
    out = b.pq_linear(y, 20, 9), b.pq_linear(z, 12, 9)
    graph = b.graph(*out)
    assert groups(graph) == [["pq_linear_0", "pq_linear_1"]]
    check(graph)
    rows = Session(graph, threads=1).profile(random_inputs(graph), runs=1, warmup=0).steps
    copies = [step for step in rows if step.name.endswith(", copied")]
    assert [step.method for step in copies] == ["uint8", "uint8"]
    (shared,) = [step for step in rows if step.name == "pq_linear_0 + pq_linear_1"]
    assert shared.op == "pq_linear"
    assert shared.dense_gmacs


def test_a_part_is_copied_once() -> None:
    b = Builder(("x", (None, 6, 20)))
    y, z = linears(b, "x", 20, (20, 20))
    one, two = b.add("relu", y), b.add("clamp", y, low=-1.0, high=1.0)
    graph = b.graph(b.add("add", one, two), y, z)
    check(graph)
    rows = Session(graph, threads=1).profile(random_inputs(graph), runs=1, warmup=0).steps
    assert len([step for step in rows if step.name.endswith(", copied")]) == 2


def attention_graph(*, shared: bool = True, reader: bool = False) -> Graph:
    """(N, T, 24) to itself: attention of three layers; ``reader`` also takes the keys away."""
    b = Builder(("x", (None, None, 24)), seed=3)
    if shared:
        q, k, v = linears(b, "x", 24, (24, 24, 24))
    else:
        q, k, v = (b.pq_linear("x", 24, 24) for _ in range(3))
    a = b.add("attention", q, k, v, heads=3, scale=0.35)
    return b.graph(b.add("relu", k), a) if reader else b.graph(a)


def run_on(graph: Graph, x: Array, isa: str, threads: int) -> list[Array]:
    return Session(graph, isa=isa, threads=threads).run(None, {"x": x})


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 512), (2, 7), (5, 64), (3, 33)])
@pytest.mark.parametrize("reader", [False, True])
def test_attention_reads_its_part_in_place(batch: int, length: int, reader: bool) -> None:
    graph = attention_graph(reader=reader)
    x = np.random.default_rng(0).normal(size=(batch, length, 24)).astype(F)
    want = list(run_reference(graph, {"x": x}).values())
    first = run_on(graph, x, "scalar", 1)
    for got, y in zip(first, want, strict=True):
        np.testing.assert_allclose(got, y, rtol=0, atol=2e-6 * max(1.0, float(np.abs(y).max())))
    for isa in runnable_isas():
        for threads in (1, 3):
            for got, y in zip(run_on(graph, x, isa, threads), first, strict=True):
                np.testing.assert_array_equal(got, y)


def test_attention_needs_no_copies() -> None:
    x = np.ones((2, 7, 24), F)
    for reader in (False, True):
        session = Session(attention_graph(reader=reader), threads=1)
        names = [step.name for step in session.profile({"x": x}, runs=1, warmup=0).steps]
        copies = ["pq_linear_1, copied"] if reader else []
        shared = "pq_linear_0 + pq_linear_1 + pq_linear_2"
        assert names == ["input", shared, "attention_3"] + [*copies, "relu_4"] * reader


def test_batches_of_sequences_run_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = attention_graph(shared=False)
    x = np.random.default_rng(0).normal(size=(37, 20, 24)).astype(F)
    want = Session(graph, threads=1).run(None, {"x": x})[0]
    monkeypatch.setattr("lutra.runtime.session._SEQUENCE_ARENA", 2**16)
    session = Session(graph, threads=1)
    sizes: list[int] = []
    plan = session._plan

    class Watched:
        def run(self, arrays: list[Array], *cache: Any) -> list[Array]:
            sizes.append(len(arrays[0]))
            return plan.run(arrays, *cache)

        def __getattr__(self, name: str) -> Any:
            return getattr(plan, name)

    session._plan = Watched()
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], want)
    assert sum(sizes) == 37
    assert 1 < len(sizes) < 37

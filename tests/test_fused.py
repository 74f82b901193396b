"""Whole chains of integer layers: whoever quantises, and however, the bits are the reference's."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder, int8_tensors, lookup_tensors, pq_tensors
from layers import same_bits

from lutra import Session, run_reference, runnable_isas
from lutra.graph import Graph
from lutra.ops.lookup import bits_for

CLAMPS = (None, "relu", "relu6")


def tree_tensors(
    rng: np.random.Generator, length: int, outputs: int, count: int, bits: int
) -> dict[str, Array]:
    """Random splits, thresholds and tables of as many codebooks as V = 9 would need."""
    codebooks = -(-length // 9)
    tensors = pq_tensors(rng, length, outputs, count=count, bits=bits)
    del tensors["centroids"]
    levels = count.bit_length() - 1
    tensors["splits"] = rng.integers(0, length, (codebooks, levels), dtype=np.int32)
    tensors["thresholds"] = rng.integers(0, 2**bits + 1, (codebooks, count - 1)).astype(np.uint8)
    return tensors


def random_layer(b: Builder, x: str, channels: int, outputs: int, **attrs: Any) -> str:
    """A lookup or int8 convolution with a grid of its own; keeps height and width."""
    rng = b.rng
    bits = int(rng.integers(3, 8))
    size = int(rng.choice([1, 3]))
    grid = {
        "act_scale": float(np.float32(rng.uniform(0.01, 0.2))),
        "act_zero": int(rng.choice([0, 2 ** (bits - 1)])),
        "act_bits": bits,
        "padding": (size // 2, size // 2),
        **attrs,
    }
    kind = rng.choice(["nearest", "tree", "int8", "lookup"])
    length = channels * size * size
    if kind == "lookup":
        return random_lookup(b, x, channels, outputs, size, attrs)
    if kind == "int8":
        return b.add(
            "int8_conv2d", x, tensors=int8_tensors(rng, (outputs, channels, size, size)), **grid
        )
    if kind == "nearest":
        tensors = pq_tensors(rng, length, outputs, bits=bits)
    else:
        tensors = tree_tensors(rng, length, outputs, int(rng.choice([8, 16])), bits)
    # of either sign, and small enough for every value of the next grid to occur
    tensors["scale"] *= rng.choice([-0.4, 0.4], outputs).astype(np.float32)
    return b.add(
        "pq_conv2d",
        x,
        tensors=tensors,
        in_channels=channels,
        kernel=(size, size),
        encoder=str(kind),
        **grid,
    )


def random_lookup(
    b: Builder, x: str, channels: int, outputs: int, size: int, attrs: dict[str, Any]
) -> str:
    """A convolution of a table of any shape that there is."""
    rng = b.rng
    bits, weights = int(rng.integers(2, 7)), int(rng.choice([3, 7, 9, 15, 17, 33]))
    zero = int(rng.choice([0, 2 ** (bits - 1)]))
    tensors = lookup_tensors(
        rng, channels * size * size, outputs, bits=bits, weights=weights, zero=zero
    )
    tensors["scale"] *= rng.choice([-1.0, 1.0], outputs).astype(np.float32)
    return b.add(
        "lookup_conv2d",
        x,
        tensors=tensors,
        in_channels=channels,
        kernel=(size, size),
        act_scale=float(np.float32(rng.uniform(0.3, 3.0) / 2**bits)),
        act_zero=zero,
        act_bits=bits,
        weight_bits=bits_for(weights),
        **{"padding": (size // 2, size // 2), **attrs},
    )


def clamped(b: Builder, x: str) -> str:
    clamp = CLAMPS[int(b.rng.integers(3))]
    return x if clamp is None else b.add(clamp, x)


def random_chain(seed: int) -> Graph:
    """Layers behind each other, with poolings, residual sums and values of several readers."""
    b = Builder(("x", (None, 5, 9, 7)), seed=seed)
    value, channels = "x", 5
    for _ in range(5):
        outputs = int(b.rng.integers(1, 40))
        made = clamped(b, random_layer(b, value, channels, outputs))
        shape = b.rng.integers(5)
        if shape == 0:  # quantised before the pooling instead of after it
            made = b.add("max_pool2d", made, kernel=(3, 3), stride=(1, 1), padding=(1, 1))
        elif shape == 1:  # several readers, on several grids
            parts = [random_layer(b, made, outputs, outputs) for _ in range(3)]
            made = clamped(b, b.add("add", b.add("add", parts[0], parts[1]), parts[2]))
        elif shape == 2:  # a residual block: read on a grid and as floats
            inner = clamped(b, random_layer(b, made, outputs, outputs))
            made = clamped(b, b.add("add", random_layer(b, inner, outputs, outputs), made))
        value, channels = made, outputs
    return b.graph()


@pytest.mark.parametrize("seed", range(30))
def test_chains_give_the_bits_of_the_reference(seed: int) -> None:
    graph = random_chain(seed)
    for batch in (1, 3):
        x = np.random.default_rng(seed).normal(size=(batch, 5, 9, 7)).astype(np.float32)
        (want,) = run_reference(graph, {"x": x}).values()
        for isa in runnable_isas():
            for threads in (1, 2):
                got = Session(graph, isa=isa, threads=threads)(x)
                assert same_bits(got, want), (isa, threads, batch)


@pytest.mark.parametrize("act_scale", [1e-30, 1e-3, 0.1, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("act_zero", [0, 32])
def test_extreme_grids_between_layers(act_scale: float, act_zero: int) -> None:
    b = Builder(("x", (None, 9)), seed=3)
    tensors = pq_tensors(b.rng, 9, 24, bits=6)
    tensors["scale"] *= np.float32(act_scale)
    tensors["bias"] *= np.float32(act_scale)
    grid = {"act_zero": act_zero, "act_bits": 6}
    y = b.add("pq_linear", "x", tensors=tensors, in_features=9, act_scale=0.05, **grid)
    b.add(
        "pq_linear",
        b.add("relu", y),
        tensors=pq_tensors(b.rng, 24, 7, bits=6),
        in_features=24,
        act_scale=float(np.float32(act_scale)),
        **grid,
    )
    graph = b.graph()
    x = b.rng.normal(size=(70, 9)).astype(np.float32)
    (want,) = run_reference(graph, {"x": x}).values()
    for isa in runnable_isas():
        assert same_bits(Session(graph, isa=isa, threads=1)(x), want), isa


def test_sessions_of_different_isas_run_at_the_same_time() -> None:
    graph = random_chain(7)
    x = np.random.default_rng(7).normal(size=(2, 5, 9, 7)).astype(np.float32)
    (want,) = run_reference(graph, {"x": x}).values()
    sessions = [
        Session(graph, isa=isa, threads=threads) for isa in runnable_isas() for threads in (1, 2, 3)
    ]
    wrong: list[str] = []

    def run(session: Session) -> None:
        for _ in range(20):
            if not same_bits(session(x), want):
                wrong.append(f"{session.isa}, {session.threads} threads")

    threads = [threading.Thread(target=run, args=(s,)) for s in sessions for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("size", [4, 8, 13])
def test_few_tiles_are_shared_out(size: int) -> None:
    """Fewer tiles than threads: codebooks and outputs are divided between them."""
    b = Builder(("x", (None, 64, size, size)), seed=size)
    grid = {"act_scale": 0.05, "act_zero": 0, "act_bits": 6, "padding": (1, 1)}
    y = b.add("relu", b.pq_conv2d("x", 64, 96, **grid))
    z = b.add("relu", b.add("add", b.pq_conv2d(y, 96, 96, **grid), y))
    z = b.lookup_conv2d(z, 96, 70, padding=(1, 1), act_bits=5, weights=33)
    b.add("int8_conv2d", z, tensors=int8_tensors(b.rng, (70, 70, 3, 3)), **grid)
    graph = b.graph()
    x = b.rng.normal(size=(1, 64, size, size)).astype(np.float32)
    (want,) = run_reference(graph, {"x": x}).values()
    for isa in runnable_isas():
        for threads in (2, 3, 5):
            session = Session(graph, isa=isa, threads=threads)
            for _ in range(5):
                assert same_bits(session(x), want), (isa, threads)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("kind", ["pq_linear", "int8_linear", "lookup_linear"])
def test_rows_of_one_output_on_more_axes(kind: str, outputs: int) -> None:
    """Rows of one value are consecutive, those of two are not: run and workspace must agree."""
    b = Builder(("x", (None, 50, 900)), seed=outputs)
    getattr(b, kind)("x", 900, outputs)
    graph = b.graph()
    x = b.rng.normal(size=(9, 50, 900)).astype(np.float32)
    (want,) = run_reference(graph, {"x": x}).values()
    for isa in runnable_isas():
        for threads in (1, 2):
            assert same_bits(Session(graph, isa=isa, threads=threads)(x), want), (isa, threads)

"""Softmax of the reference has the bits of the engine."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import Array
from layers import same_bits
from sequences import reduced_table, single

from lutra import Session, _engine, run_reference, runnable_isas
from lutra.graph import Graph
from lutra.reference.functions import exp_of_score


def softmax_graph(shape: tuple[int | None, ...], axis: int, entries: int) -> Graph:
    tensors = {}
    if entries:
        tensors = {**reduced_table("exp", entries), **reduced_table("reciprocal", entries)}
    return single("softmax", ("x", shape), tensors=tensors or None, axis=axis)


def reference(graph: Graph, x: Array) -> Array:
    return run_reference(graph, [x])[graph.outputs[0]]


def scores() -> Array:
    """Float32 values of at most 0, of all sizes, and where exp_of_score changes its ways."""
    rng = np.random.default_rng(5)
    lowest = int(np.float32(-87.0).view(np.uint32))
    steps = np.arange(0x80000000, lowest, 1009, dtype=np.int64)  # over all floats of -87..0
    edges = np.arange(lowest - 1000, lowest + 1000, dtype=np.int64)
    bits = np.concatenate([steps, edges]).astype(np.uint32)
    halves = -(np.arange(0, 126) + 0.5) / np.log2(np.e)  # where n, the power of 2, changes
    near = (halves[:, None] * (1 + rng.normal(size=1000) * 1e-7)).astype(np.float32).ravel()
    special = np.array([0.0, -0.0, -1e-45, -1e-38, -88.0, -104.0, -3.4e38, -np.inf, np.nan])
    return np.concatenate([bits.view(np.float32), near, special.astype(np.float32)])


def test_the_exponential_has_the_bits_of_the_engine() -> None:
    x = scores()
    got, want = exp_of_score(x), _engine.function("scalar", "exp", x)
    want[x < -87] = 0
    assert same_bits(got[:-1], want[:-1])
    assert got[x == 0].tolist() == [1.0] * int((x == 0).sum())
    assert np.isnan([got[-1], want[-1]]).all()  # of whatever bits


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize(("shape", "axis"), [((400, 7), 1), ((2, 33, 70), 1), ((3, 5, 8), 2)])
def test_softmax_has_the_bits_of_the_engine(isa: str, shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(6)
    for entries in (0, 16):
        graph = softmax_graph((None, *shape[1:]), axis, entries)
        session = Session(graph, isa=isa, check_finite=False)
        for width in (0.1, 3.0, 60.0):
            x = (rng.normal(size=shape) * width).astype(np.float32)
            assert same_bits(session(x), reference(graph, x))
        x = rng.choice(np.array([0, 1, 90, np.inf, -np.inf, np.nan], np.float32), shape)
        np.testing.assert_array_equal(session(x), reference(graph, x))  # NaN has any bits


def test_softmax_of_two_shows_every_bit_of_the_exponential() -> None:
    """exp(x) / (1 + exp(x)) of every float of the test, as the second of two values."""
    second = scores()[:-1]  # all but NaN
    x = np.stack([np.zeros_like(second), second], axis=1)
    graph = softmax_graph((None, 2), 1, 0)
    got = Session(graph, isa="scalar", check_finite=False)(x)
    assert same_bits(got, reference(graph, x))

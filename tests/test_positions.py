"""Rotary embeddings and biases of relative positions: engine, reference, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import Array
from sequences import check, single

from lutra import Session
from lutra.errors import GraphError, InputError
from lutra.graph import Graph

F = np.float32


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


def rotary(heads: int, width: int, interleaved: bool, length: int = 20) -> Graph:
    tensors = {"cos": normal(length, width, seed=1), "sin": normal(length, width, seed=2)}
    return single(
        "rotary", ("x", (None, None, heads * width)),
        tensors=tensors, heads=heads, interleaved=interleaved,
    )  # fmt: skip


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 8), (2, 6)])
def test_rotary(interleaved: bool, heads: int, width: int) -> None:
    graph = rotary(heads, width, interleaved)
    for batch, tokens in ((1, 1), (3, 7), (2, 20)):
        check(graph, normal(batch, tokens, heads * width), tolerance=0)
    with pytest.raises(InputError, match="its table has 20 positions"):
        Session(graph).run(None, {"x": normal(1, 21, heads * width)})


def test_rotary_turns_by_an_angle() -> None:
    angle = np.arange(5, dtype=F)[:, None] * np.ones((1, 2), F)
    tensors = {"cos": np.cos(angle), "sin": np.sin(angle)}
    graph = single("rotary", ("x", (None, 5, 2)), tensors=tensors, heads=1)
    x = normal(2, 5, 2)
    got = check(graph, x, tolerance=0)
    turned = (x[..., 0] + 1j * x[..., 1]) * np.exp(1j * np.arange(5))
    np.testing.assert_allclose(got, np.stack([turned.real, turned.imag], -1), atol=1e-6)


def test_relative_bias() -> None:
    weight = normal(3, 19)
    graph = single("relative_bias", ("x", (None, 3, None, None)), tensors={"weight": weight})
    for batch, queries, keys in ((1, 1, 1), (2, 10, 10), (3, 4, 9), (2, 9, 2)):
        x = normal(batch, 3, queries, keys)
        got = check(graph, x, tolerance=0)
        assert got[0, 2, 0, keys - 1] == x[0, 2, 0, keys - 1] + weight[2, keys - 1 + 9]
    with pytest.raises(InputError, match="its table has 10 positions"):
        Session(graph).run(None, {"x": normal(1, 3, 4, 11)})


def test_what_does_not_fit_is_refused() -> None:
    odd = {"cos": normal(4, 3), "sin": normal(4, 3)}
    with pytest.raises(GraphError, match="with an even number of columns"):
        single("rotary", ("x", (None, 4, 3)), tensors=odd, heads=1).validate()
    pair = {"cos": normal(4, 2), "sin": normal(4, 2)}
    with pytest.raises(GraphError, match="give it an input whose last axis has 4 values"):
        single("rotary", ("x", (None, 4, 6)), tensors=pair, heads=2).validate()
    with pytest.raises(GraphError, match="its table has 4 positions: cut the sequence"):
        single("rotary", ("x", (None, 5, 2)), tensors=pair, heads=1).validate()
    with pytest.raises(GraphError, match="needs an odd number of columns"):
        single("relative_bias", ("x", (None, 1, 2, 2)), tensors={"weight": normal(1, 4)}).validate()
    with pytest.raises(GraphError, match="give it scores of 2 heads on axis 1"):
        single("relative_bias", ("x", (None, 1, 2, 2)), tensors={"weight": normal(2, 5)}).validate()

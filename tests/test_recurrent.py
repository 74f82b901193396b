"""LSTM and GRU: the engine, the reference, and what their rules refuse."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import Array
from recurrences import recurrent, weights
from sequences import check, single

from lutra import Session, runnable_isas
from lutra.errors import GraphError, InputError
from lutra.reference import run_reference

F = np.float32
OPS = ["lstm", "gru"]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "features", "hidden"),
    [(1, 1, 1, 1), (1, 9, 5, 7), (3, 4, 16, 16), (7, 5, 3, 33), (9, 3, 40, 17), (70, 6, 6, 20)],
)
def test_engine_and_reference_agree(
    op: str, reverse: bool, batch: int, length: int, features: int, hidden: int
) -> None:
    graph = recurrent(op, features, hidden, reverse=reverse)
    check(graph, normal(batch, length, features), tolerance=1e-5)
    states = [normal(batch, hidden, seed=k) for k in range(1, 3 if op == "lstm" else 2)]
    graph = recurrent(op, features, hidden, states=True, reverse=reverse)
    check(graph, normal(batch, length, features), *states, tolerance=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_steps_are_the_equations(op: str) -> None:
    """One step by hand."""
    x, h, c = normal(2, 1, 3), normal(2, 4, seed=1), normal(2, 4, seed=2)
    w = weights(op, 3, 4)
    a, b = x[:, 0] @ w["weight_ih"].T + w["bias_ih"], h @ w["weight_hh"].T + w["bias_hh"]

    def sigmoid(v: Array) -> Array:
        return 1 / (1 + np.exp(-v))

    if op == "lstm":
        i, f, g, o = np.split(a + b, 4, axis=1)
        c_next = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        want = np.concatenate([sigmoid(o) * np.tanh(c_next), c_next], axis=1)
        graph = recurrent(op, 3, 4, states=True, cells=True)
        (got,) = run_reference(graph, [x, h, c]).values()
    else:
        (ar, az, an), (br, bz, bn) = np.split(a, 3, axis=1), np.split(b, 3, axis=1)
        z = sigmoid(az + bz)
        want = (1 - z) * np.tanh(an + sigmoid(ar + br) * bn) + z * h
        (got,) = run_reference(recurrent(op, 3, 4, states=True), [x, h]).values()
    np.testing.assert_allclose(got[:, 0], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_cells_stand_beside_the_hidden_values(reverse: bool) -> None:
    x = normal(5, 6, 3)
    both = check(recurrent("lstm", 3, 10, cells=True, reverse=reverse), x, tolerance=1e-5)
    (hidden,) = run_reference(recurrent("lstm", 3, 10, reverse=reverse), [x]).values()
    np.testing.assert_array_equal(both[..., :10], hidden)
    assert both.shape == (5, 6, 20)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch", [1, 12])
def test_a_stream_gives_the_bits_of_the_whole(op: str, batch: int) -> None:
    """Parts of a sequence, each from the state that the part before it left."""
    x, hidden = normal(batch, 11, 6), 9
    cells = {"cells": True} if op == "lstm" else {}
    whole = Session(recurrent(op, 6, hidden, **cells), threads=2).run(None, {"x": x})[0]
    session = Session(recurrent(op, 6, hidden, states=True, **cells), threads=1)
    names = ["h", "c"] if op == "lstm" else ["h"]
    states = {name: np.zeros((batch, hidden), F) for name in names}
    parts = []
    for first, last in ((0, 1), (1, 5), (5, 11)):
        (made,) = session.run(None, {"x": x[:, first:last], **states})
        parts.append(made)
        ends = np.split(made[:, -1], len(names), axis=1)
        states = {n: np.ascontiguousarray(e) for n, e in zip(names, ends, strict=True)}
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("op", OPS)
def test_large_numbers_and_nan(op: str) -> None:
    x = normal(2, 4, 3)
    x[0] *= 1e4
    x[1, 2, 0] = np.nan
    graph = recurrent(op, 3, 5)
    (want,) = run_reference(graph, [x]).values()
    assert np.isnan(want[1, 2:]).all()
    assert np.isfinite(want[0]).all()
    for isa in runnable_isas():
        (got,) = Session(graph, isa=isa, check_finite=False).run(None, {"x": x})
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_what_does_not_fit_is_refused(op: str) -> None:
    gates = 4 if op == "lstm" else 3
    with pytest.raises(GraphError, match=r"whose last axis has 3 values"):
        single(op, ("x", (None, 5, 4)), tensors=weights(op, 3, 2)).validate()
    with pytest.raises(GraphError, match="must have 3 axes"):
        single(op, ("x", (None, 3)), tensors=weights(op, 3, 2)).validate()
    wrong = {**weights(op, 3, 2), "bias_hh": np.zeros(5, F)}
    with pytest.raises(GraphError, match=rf"must have {2 * gates} rows, 2 for each of {gates}"):
        single(op, ("x", (None, 5, 3)), tensors=wrong).validate()
    names = [("h", (None, 4))] + ([("c", (None, 2))] if op == "lstm" else [])
    with pytest.raises(GraphError, match=r"reads the state 'h' of shape \(N, 4\)"):
        single(op, ("x", (None, 5, 3)), *names, tensors=weights(op, 3, 2)).validate()
    with pytest.raises(InputError):
        Session(recurrent(op, 3, 2)).run(None, {"x": normal(2, 4, 5)})


def test_an_lstm_takes_both_states() -> None:
    graph = single("lstm", ("x", (None, 5, 3)), ("h", (None, 2)), tensors=weights("lstm", 3, 2))
    with pytest.raises(GraphError, match="give it 1, or h and c beside it"):
        graph.validate()

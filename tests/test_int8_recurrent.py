"""LSTM and GRU with matrices in int8: reference, rules, and the bits of every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import Array, Builder
from layers import same_bits
from recurrences import grids, int8_weights

from lutra import GraphError, Session, run_reference, runnable_isas
from lutra.graph import Graph
from lutra.reference.functions import EXACT, engine_sigmoid, engine_tanh

F = np.float32
OPS = ("int8_gru", "int8_lstm")


def graph(op: str, features: int, hidden: int, *, states: bool = False, **attrs: bool) -> Graph:
    names = (["h", "c"] if op == "int8_lstm" else ["h"]) if states else []
    b = Builder(("x", (None, None, features)), *((name, (None, hidden)) for name in names))
    tensors = int8_weights(op, features, hidden)
    b.add(op, "x", *names, name="node", tensors=tensors, **grids(b.rng), **attrs)
    return b.graph()


def feeds(g: Graph, batch: int, tokens: int) -> dict[str, Array]:
    rng = np.random.default_rng(batch)
    sizes = {"x": (batch, tokens, g.inputs[0].shape[2])}
    given = {value.name: sizes.get(value.name, (batch, value.shape[1])) for value in g.inputs}
    return {name: rng.normal(size=size).astype(F) for name, size in given.items()}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("features", "hidden"), [(1, 1), (7, 5), (40, 64), (65, 33)])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_every_instruction_set_has_the_bits_of_the_reference(
    op: str, features: int, hidden: int, states: bool, reverse: bool
) -> None:
    cells = {"cells": True} if op == "int8_lstm" and reverse else {}
    g = graph(op, features, hidden, states=states, reverse=reverse, **cells)
    for batch, tokens in ((1, 6), (3, 4), (20, 2)):
        x = feeds(g, batch, tokens)
        (want,) = run_reference(g, x).values()
        for isa in runnable_isas():
            for threads in (1, 2):
                session = Session(g, isa=isa, threads=threads)
                assert same_bits(session.run(None, x)[0], want), (isa, threads, batch)


@pytest.mark.parametrize("op", OPS)
def test_a_sequence_in_parts_is_the_sequence(op: str) -> None:
    """The state after a part goes into the next one: the bits are those of the whole."""
    whole = graph(op, 9, 12, states=True, **({"cells": True} if op == "int8_lstm" else {}))
    x = feeds(whole, 2, 10)
    (want,) = Session(whole).run(None, x)
    session, made = Session(whole), []
    names = [value.name for value in whole.inputs[1:]]
    states = {name: x[name] for name in names}
    for t in range(10):
        (y,) = session.run(None, {"x": x["x"][:, t : t + 1], **states})
        states = dict(zip(names, np.split(y[:, 0], len(names), axis=1), strict=True))
        made.append(y)
    assert same_bits(np.concatenate(made, axis=1), want)


def test_the_functions_are_those_of_the_engine() -> None:
    x = np.concatenate(
        [
            np.linspace(-120, 120, 20001, dtype=F),
            np.random.default_rng(0).normal(size=5000).astype(F),
            np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38], F),
        ]
    )
    for name, made in (("sigmoid", engine_sigmoid(x)), ("tanh", engine_tanh(x))):
        b = Builder(("x", (len(x),)))
        session = Session(b.graph(b.add(name, "x")), isa="scalar", check_finite=False)
        got = session(x)
        assert np.array_equal(got[~np.isnan(x)].view(np.int32), made[~np.isnan(x)].view(np.int32))
        assert np.isnan(made[np.isnan(x)]).all()
        np.testing.assert_allclose(made, EXACT[name](x.astype(np.float64)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"weight_hh": np.zeros((9, 4), np.int8)}, "for 4 hidden values"),
        ({"weight_ih": np.full((9, 5), -128, np.int8)}, "-127..127"),
        ({"state_zero": 200}, "must be at most 127"),
        ({"state_bits": 3, "state_zero": 9}, "it must be in 0..7"),
        ({"act_scale": 0.0}, "act_scale=0.0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], what: str) -> None:
    b = Builder(("x", (None, 4, 5)))
    tensors = int8_weights("int8_gru", 5, 3)
    attrs: dict[str, object] = {**grids(b.rng), "state_bits": 7, "state_zero": 64}
    for name, value in change.items():
        (tensors if name in tensors else attrs)[name] = value  # type: ignore[index]
    b.add("int8_gru", "x", tensors=tensors, **attrs)
    with pytest.raises(GraphError, match=what):
        b.graph().validate()

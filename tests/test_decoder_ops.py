"""Attention over a cache, tokens that are picked, rotary embeddings from any token on."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder
from sequences import check, reduced_table, single

from lutra import Session, run_reference, runnable_isas
from lutra.errors import EngineError, GraphError, InputError
from lutra.graph import Graph

F = np.float32
LENGTH = 90


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


def ints(*values: int) -> Array:
    return np.array(values, np.int32)


def attention(
    heads: int, groups: int, width: int, tables: dict[str, Array] | None = None, **attrs: Any
) -> Graph:
    own = {"heads": heads, "kv_heads": groups, "scale": 0.4, "length": LENGTH, **attrs}
    return single(
        "cached_attention",
        ("q", (None, None, heads * width)),
        ("k", (None, None, groups * width)),
        ("v", (None, None, groups * width)),
        ("start", (None,), "int32"),
        tensors=tables,
        **own,
    )


def feeds(
    graph: Graph, batch: int, tokens: int, start: Array | None = None, seed: int = 0
) -> dict[str, Array]:
    made = {
        value.name: normal(batch, tokens, value.shape[2] or 0, seed=seed + index)
        for index, value in enumerate(graph.inputs[:3])
    }
    return {**made, "start": np.zeros(batch, np.int32) if start is None else start}


def part(given: dict[str, Array], first: int, last: int) -> dict[str, Array]:
    """The tokens first..last - 1 as a run that continues."""
    start = np.full(len(given["start"]), first, np.int32)
    return {**{n: x[:, first:last] for n, x in given.items() if n != "start"}, "start": start}


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 8), (3, 1, 5), (2, 2, 17)])
def test_a_run_alone_is_causal_attention(heads: int, groups: int, width: int) -> None:
    graph = attention(heads, groups, width)
    given = feeds(graph, 2, 21)
    got = check(graph, *given.values())
    q, k, v = (given[n].astype(np.float64).reshape(2, 21, -1, width) for n in "qkv")
    for head in range(heads):
        group = head // (heads // groups)
        scores = 0.4 * q[:, :, head] @ k[:, :, group].transpose(0, 2, 1)
        scores[:, np.triu(np.ones((21, 21), bool), 1)] = -np.inf
        powers = np.exp(scores)
        want = powers @ v[:, :, group] / powers.sum(-1, keepdims=True)
        np.testing.assert_allclose(got[..., head * width : (head + 1) * width], want, atol=1e-5)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "width"), [(1, 1, 1), (4, 2, 8), (3, 1, 5), (2, 2, 33), (2, 1, 64)]
)
def test_any_cut_gives_the_same_bits(heads: int, groups: int, width: int, table: bool) -> None:
    tables = reduced_table("exp") | reduced_table("reciprocal") if table else None
    graph = attention(heads, groups, width, tables)
    given = feeds(graph, 2, 75)
    whole = None
    for isa in runnable_isas():
        for threads in (1, 3):
            session = Session(graph, isa=isa, threads=threads)
            alone = session.run(None, given)[0]
            whole = alone if whole is None else whole
            np.testing.assert_array_equal(alone.view(np.int32), whole.view(np.int32))
            for cuts in ([0, 75], list(range(76)), [0, 3, 40, 41, 43, 75], [0, 70, 74, 75]):
                cache = session.new_cache(2)
                got = [
                    session.run(None, part(given, a, b), cache=cache)[0]
                    for a, b in itertools.pairwise(cuts)
                ]
                made = np.concatenate(got, axis=1)
                np.testing.assert_array_equal(made.view(np.int32), whole.view(np.int32), isa)


def test_the_reference_remembers_too() -> None:
    graph = attention(4, 2, 8)
    given = feeds(graph, 2, 20)
    (whole,) = run_reference(graph, given).values()
    cache: dict[str, Any] = {}
    cuts = [0, 1, 7, 8, 20]
    parts = [
        next(iter(run_reference(graph, part(given, a, b), cache=cache).values()))
        for a, b in itertools.pairwise(cuts)
    ]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-6)
    with pytest.raises(InputError, match="starts at token 21, but 20 tokens of it are known"):
        run_reference(graph, part(feeds(graph, 2, 30), 21, 22), cache=cache)
    with pytest.raises(InputError, match="may have 90 at most"):
        run_reference(graph, feeds(graph, 2, 71, ints(20, 20)), cache=cache)


def test_sequences_of_unequal_length() -> None:
    """What fills up a short sequence is never seen, and is written over."""
    graph = attention(2, 1, 8)
    session = Session(graph)
    lengths = ints(9, 4, 1)
    given = feeds(graph, 3, 12)
    cache = session.new_cache(3)
    session.run(None, {n: x if n == "start" else x[:, :9] for n, x in given.items()}, cache=cache)
    more = feeds(graph, 3, 5, lengths, seed=7)
    (got,) = session.run(None, more, cache=cache)
    for n, length in enumerate(lengths):
        joined = {
            name: np.concatenate([given[name][n : n + 1, :length], more[name][n : n + 1]], axis=1)
            for name in "qkv"
        }
        (want,) = session.run(None, {**joined, "start": ints(0)})
        np.testing.assert_array_equal(got[n], want[0, length:])


def test_rows_of_a_cache() -> None:
    graph = attention(2, 1, 8)
    session = Session(graph)
    given = feeds(graph, 3, 70)
    cache = session.new_cache(3)
    assert cache.nbytes == 0
    session.run(None, given, cache=cache)
    assert cache.nbytes == 3 * 70 * 2 * 8 * 4
    cache.select([2, 0, 2, 2])
    assert cache.sequences == 4
    more = feeds(graph, 4, 2, ints(70, 70, 70, 70), seed=5)
    (got,) = session.run(None, more, cache=cache)
    for n, row in enumerate([2, 0, 2, 2]):
        joined = {
            x: np.concatenate([given[x][row : row + 1], more[x][n : n + 1]], axis=1) for x in "qkv"
        }
        (want,) = session.run(None, {**joined, "start": ints(0)})
        np.testing.assert_array_equal(got[n], want[0, 70:])
    with pytest.raises(ValueError, match="there is no sequence 4; the cache holds 4"):
        cache.select([4])


def test_batches_in_pieces_keep_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from lutra.runtime import session as module

    graph = attention(2, 1, 64)
    given = feeds(graph, 40, 30)
    (want,) = Session(graph, threads=1).run(None, given)
    monkeypatch.setattr(module, "_SEQUENCE_ARENA", 2**16)
    session = Session(graph, threads=1)
    cache = session.new_cache(40)
    made = [session.run(None, part(given, a, a + 10), cache=cache)[0] for a in (0, 10, 20)]
    np.testing.assert_array_equal(np.concatenate(made, axis=1), want)


def test_picked_tokens() -> None:
    graph = single("pick_tokens", ("x", (None, None, 6)), ("index", (None, None), "int32"))
    x = normal(3, 7, 6)
    index = np.array([[0, 6, 6, 2], [1, 1, 0, 5], [4, 3, 2, 1]], np.int32)
    got = check(graph, x, index, tolerance=0)
    np.testing.assert_array_equal(got[1], x[1, [1, 1, 0, 5]])
    for wrong in (7, -1):
        with pytest.raises(EngineError, match=r"is picked, and the run has the tokens 0\.\.6"):
            Session(graph).run(None, {"x": x, "index": np.full((3, 1), wrong, np.int32)})
        with pytest.raises(InputError, match=r"the run has the tokens 0\.\.6"):
            run_reference(graph, [x, np.full((3, 1), wrong, np.int32)])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_from_any_token_on(interleaved: bool) -> None:
    tables = {"cos": normal(20, 4, seed=1), "sin": normal(20, 4, seed=2)}
    start = ("start", (None,), "int32")
    graph = single(
        "rotary", ("x", (None, None, 8)), start, tensors=tables, heads=2, interleaved=interleaved
    )
    plain = single(
        "rotary", ("x", (None, None, 8)), tensors=tables, heads=2, interleaved=interleaved
    )
    x = normal(1, 20, 8)
    whole = check(plain, x, tolerance=0)
    cut = np.concatenate([x[:, 3:8], x[:, 15:]])
    got = check(graph, cut, ints(3, 15), tolerance=0)
    np.testing.assert_array_equal(got, np.concatenate([whole[:, 3:8], whole[:, 15:]]))
    with pytest.raises(EngineError, match="starts at token 16 and gets 5 more, but the table has"):
        Session(graph).run(None, {"x": cut, "start": ints(3, 16)})
    with pytest.raises(InputError, match="its table has 20"):
        run_reference(graph, [cut, ints(3, 16)])


def test_learned_positions_from_any_token_on() -> None:
    tables = {"weight": normal(20, 8, seed=1)}
    graph = single(
        "position_embedding", ("x", (None, None, 8)), ("start", (None,), "int32"), tensors=tables
    )
    x = normal(2, 5, 8)
    got = check(graph, x, ints(3, 15), tolerance=0)
    np.testing.assert_array_equal(got[0], x[0] + tables["weight"][3:8])
    np.testing.assert_array_equal(got[1], x[1] + tables["weight"][15:])
    check(graph, x[:, :1], ints(19, 0), tolerance=0)
    for start in (ints(3, 16), ints(-1, 0), ints(0, 2**31 - 1)):
        with pytest.raises(EngineError, match="and gets 5 more, but the table has 20 positions"):
            Session(graph).run(None, {"x": x, "start": start})
        with pytest.raises(InputError, match="its table has 20"):
            run_reference(graph, [x, start])
    with pytest.raises(GraphError, match="give it one start for each sequence"):
        single(
            "position_embedding", ("x", (2, 5, 8)), ("start", (3,), "int32"), tensors=tables
        ).validate()


def test_what_does_not_fit_is_refused() -> None:
    graph = attention(4, 2, 8)
    session = Session(graph)
    with pytest.raises(EngineError, match="sequence 1 starts at token 3, but the run has no cache"):
        session.run(None, feeds(graph, 2, 5, ints(0, 3)))
    cache = session.new_cache(2)
    session.run(None, feeds(graph, 2, 5), cache=cache)
    with pytest.raises(EngineError, match="starts at token 6, but the cache holds 5 tokens of it"):
        session.run(None, feeds(graph, 2, 1, ints(5, 6)), cache=cache)
    with pytest.raises(EngineError, match="gets 86 more, but may have 90 at most"):
        session.run(None, feeds(graph, 2, 86, ints(5, 5)), cache=cache)
    with pytest.raises(InputError, match="its sequences have 90 at most: cut them"):
        session.run(None, feeds(graph, 2, 91))
    with pytest.raises(InputError, match="holds 2 sequences and the inputs have a batch of 1"):
        session.run(None, feeds(graph, 1, 1, ints(5)), cache=cache)
    with pytest.raises(EngineError, match="the cache is of another session"):
        Session(graph).run(None, feeds(graph, 2, 1, ints(5, 5)), cache=cache)
    with pytest.raises(InputError, match="sequences=0 is not a whole number"):
        session.new_cache(0)
    b = Builder(("x", (None, 4)))
    b.add("relu", "x")
    with pytest.raises(InputError, match="the model remembers nothing"):
        Session(b.graph()).new_cache()
    with pytest.raises(GraphError, match="the second must divide the first"):
        attention(3, 2, 8).validate()
    with pytest.raises(GraphError, match=r"must be \(N, T, 4 d\) and twice \(N, T, 2 d\)"):
        single(
            "cached_attention", ("q", (None, None, 32)), ("k", (None, None, 16)),
            ("v", (None, None, 32)), ("start", (None,), "int32"),
            heads=4, kv_heads=2, scale=1.0, length=9,
        ).validate()  # fmt: skip

"""topk, take_along and from_end: the engine, the reference, and what their rules refuse."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import Array
from sequences import check, every_selection_graph, single

from lutra import Session
from lutra.errors import GraphError, InputError, LutraError
from lutra.reference import run_reference

F = np.float32


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("indices", [True, False])
@pytest.mark.parametrize(
    ("shape", "axis", "k"),
    [((7,), 1, 3), ((5, 4), 1, 5), ((5, 4), 2, 1), ((3, 6, 5), 2, 4), ((3, 6, 5), 3, 2)],
)
def test_topk(shape: tuple[int, ...], axis: int, k: int, largest: bool, indices: bool) -> None:
    graph = single("topk", ("x", (None, *shape)), k=k, axis=axis, largest=largest, indices=indices)
    for batch in (1, 3):
        x = normal(batch, *shape)
        got = check(graph, x, tolerance=0)
        ordered = np.sort(-x if largest else x, axis=axis).take(range(k), axis=axis)
        picked = np.take_along_axis(x, got.astype(int), axis) if indices else got
        np.testing.assert_array_equal(picked, -ordered if largest else ordered)


def test_topk_of_equal_numbers_and_nan() -> None:
    x = np.array([[1, 3, 3, np.nan, 3, -np.inf, np.inf, np.nan]], F)
    for largest, want in ((True, [3, 7, 6, 1, 2, 4, 0, 5]), (False, [5, 0, 1, 2, 4, 6, 3, 7])):
        graph = single("topk", ("x", (None, 8)), k=8, axis=1, largest=largest, indices=True)
        assert check(graph, x, finite=False, tolerance=0)[0].tolist() == want


@pytest.mark.parametrize(
    ("shape", "index", "axis"),
    [
        ((7,), (3,), 1),
        ((5, 4), (9, 4), 1),
        ((5, 4), (2, 1), 1),
        ((5, 4), (5, 3), 2),
        ((3, 6, 5), (3, 2, 5), 2),
        ((3, 6, 5), (1, 1, 7), 3),
    ],
)
def test_take_along(shape: tuple[int, ...], index: tuple[int, ...], axis: int) -> None:
    graph = single("take_along", ("x", (None, *shape)), ("i", (None, *index)), axis=axis)
    for batch in (1, 3):
        x = normal(batch, *shape)
        places = np.random.default_rng(2).integers(0, shape[axis - 1], (batch, *index))
        check(graph, x, places.astype(F), tolerance=0)


@pytest.mark.parametrize("wrong", [-1, 5, np.nan])
def test_an_index_outside_is_refused(wrong: float) -> None:
    graph = single("take_along", ("x", (None, 5)), ("i", (None, 2)), axis=1)
    index = np.array([[0, wrong]], F)
    with pytest.raises(InputError, match="axis 1 has 5 entries"):
        run_reference(graph, [normal(1, 5), index])
    with pytest.raises(LutraError, match=r"outside axis 1 of \(1, 5\)"):
        Session(graph, check_finite=False).run(None, {"x": normal(1, 5), "i": index})


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_from_end(axis: int) -> None:
    graph = single("from_end", ("x", (None, None, None, None)), axis=axis, back=2)
    for shape in ((1, 2, 3, 4), (3, 5, 2, 6)):
        x = normal(*shape)
        np.testing.assert_array_equal(check(graph, x, tolerance=0), x.take(-2, axis=axis))
    with pytest.raises(InputError, match=r"it must be in 1\.\.1"):
        Session(graph).run(None, {"x": normal(1, *(1 if a == axis else 4 for a in (1, 2, 3)))})
    last = single("from_end", ("x", (None, None, 5)), axis=1, back=1)
    assert check(last, normal(2, 7, 5), tolerance=0).shape == (2, 5)


def test_a_graph_of_all_of_them() -> None:
    graph = every_selection_graph()
    for batch in (1, 3):
        check(graph, normal(batch, 4, 6, 6), tolerance=2e-5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(GraphError, match="it has 3: use a smaller k"):
        single("topk", ("x", (None, 3)), k=4, axis=1).validate()
    with pytest.raises(GraphError, match=r"it must be in 1\.\.1"):
        single("topk", ("x", (None, 3)), k=1, axis=2).validate()
    with pytest.raises(GraphError, match="indices are exact up to 16777216"):
        single("topk", ("x", (None, 2**24 + 1)), k=1, axis=1).validate()
    for index in ((None, 3, 2), (None, 3), (2, 3, 5)):
        with pytest.raises(GraphError, match="must be equal, or 1 for the indices"):
            single("take_along", ("x", (None, 4, 5)), ("i", index), axis=1).validate()


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("known", [True, False])
def test_flip_and_trim(axis: int, known: bool) -> None:
    shape = (4, 5, 6)
    value = ("x", (None, *(shape if known else (None,) * 3)))
    x = normal(2, *shape)
    np.testing.assert_array_equal(
        check(single("flip", value, axis=axis), x, tolerance=0), np.flip(x, axis)
    )
    got = check(single("trim", value, axis=axis, first=1, last=1, step=2), x, tolerance=0)
    np.testing.assert_array_equal(got, x.take(range(1, shape[axis - 1] - 1, 2), axis))


def test_nothing_is_left() -> None:
    with pytest.raises(GraphError, match="an entry must be left"):
        single("trim", ("x", (None, 4)), axis=1, first=2, last=2).validate()
    graph = single("trim", ("x", (None, None)), axis=1, first=2, last=2)
    check(graph, normal(2, 5), tolerance=0)
    with pytest.raises(LutraError, match="an entry must be left"):
        run_reference(graph, [normal(2, 4)])
    with pytest.raises(LutraError, match="an entry must be left"):
        Session(graph)(normal(2, 4))


def test_regroup() -> None:
    graph = single("regroup", ("x", (None, 6, None, None)), sizes=(2, 3, -3, -2))
    for shape in ((2, 6, 4, 5), (1, 6, 7, 1)):
        x = normal(*shape)
        want = x.reshape(shape[0], 2, 3, shape[3], shape[2])
        np.testing.assert_array_equal(check(graph, x, tolerance=0), want)
    with pytest.raises(GraphError, match="6 elements before and 4 after"):
        single("regroup", ("x", (None, 6)), sizes=(2, 2)).validate()
    with pytest.raises(GraphError, match="at least 1"):
        single("regroup", ("x", (None, 6)), sizes=(0, 6)).validate()
    odd = single("regroup", ("x", (None, None)), sizes=(-1, 2))
    with pytest.raises(LutraError, match="4 elements before and 8 after"):
        run_reference(odd, [normal(2, 4)])
    with pytest.raises(LutraError, match="4 elements before and 8 after"):
        Session(odd)(normal(2, 4))

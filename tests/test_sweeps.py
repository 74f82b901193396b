"""A sweep is one test of all its cases, and its failures name them."""

from __future__ import annotations

import pytest
from sweeps import quick_cover, sweep

seen: list[tuple[str, int, int, int]] = []


@pytest.mark.parametrize("word", ["a", "b"])
@sweep("x", range(3))
@sweep(("y", "z"), [(4, 5), (6, 7)])
def test_all_combinations_run(word: str, x: int, y: int, z: int) -> None:
    seen.append((word, x, y, z))
    if (x, y) == (2, 6):
        assert [case for case in seen if case[0] == word] == [
            (word, i, *pair) for i in range(3) for pair in ((4, 5), (6, 7))
        ]


def test_failures_name_their_case() -> None:
    calls = []

    @sweep("x", [1, 2, 3])
    @sweep(("y", "z"), [(4, 5), (6, 7)])
    def test(x: int, y: int, z: int) -> None:
        calls.append((x, y, z))
        assert (x, y) != (2, 6), "too bad"

    with pytest.raises(AssertionError, match="with x=2: with y=6, z=7: too bad"):
        test()
    assert calls == [(1, 4, 5), (1, 6, 7), (2, 4, 5), (2, 6, 7)]


def test_arguments_that_a_test_lacks_are_refused() -> None:
    with pytest.raises(AssertionError, match="lacks a"):
        sweep("a", [1])(lambda b: None)


def test_a_quick_cover_has_every_operator() -> None:
    a, b, c, d, e = quick_cover({"a": ["x"], "b": ["x", "x"], "c": None, "d": ["x", "y"], "e": []})
    assert [a, c, d] == ["a", "c", "d"]
    assert (b.values, e.values) == (("b",), ("e",))
    assert b.marks[0].name == e.marks[0].name == "slow"

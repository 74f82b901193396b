"""A sweep is one test of all its cases, and its failures name them."""

from __future__ import annotations

import pytest
from sweeps import sweep

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

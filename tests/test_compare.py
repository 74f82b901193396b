"""The one measure of how far two arrays are apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from lutra.reference.compare import difference, same_bits

Array = np.ndarray[Any, Any]

SPECIAL = st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 3.4e38, 1e-45])
FLOATS = SPECIAL | st.floats(width=32)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Array, Array]:
    """Two arrays of one shape; half of the values are the same in both."""
    shape = draw(array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    a = draw(arrays(np.float32, shape, elements=FLOATS))
    b = draw(arrays(np.float32, shape, elements=FLOATS))
    return a, np.where(draw(arrays(np.bool_, shape)), a, b)


def by_hand(got: Array, want: Array) -> float:
    """The same, value by value."""
    worst = 0.0
    for a, b in zip(map(float, got.ravel()), map(float, want.ravel()), strict=True):
        if math.isnan(a) or math.isnan(b):
            worst = max(worst, 0.0 if math.isnan(a) and math.isnan(b) else math.inf)
        elif a != b:  # equal infinities have no difference
            worst = max(worst, abs(a - b))
    known = [abs(float(b)) for b in want.ravel() if math.isfinite(b)]
    return worst / (max(known, default=0.0) or 1.0)


@given(pairs())
def test_the_difference_is_the_largest_one(pair: tuple[Array, Array]) -> None:
    got, want = pair
    amount = difference(got, want)
    assert amount == by_hand(got, want)
    assert amount >= 0
    assert difference(want, want) == 0
    assert (amount == 0) == np.array_equal(got, want, equal_nan=True)
    # an infinity or a NaN in one place only makes it infinite, and nothing else does
    special = ~np.isfinite(got) | ~np.isfinite(want)
    fine = np.array_equal(got[special], want[special], equal_nan=True)
    assert math.isinf(amount) == (not fine)
    if same_bits(got, want):
        assert amount == 0


@given(pairs())
def test_the_order_of_values_does_not_matter(pair: tuple[Array, Array]) -> None:
    got, want = (array.ravel() for array in pair)
    assert difference(got[::-1], want[::-1]) == difference(got, want)


@pytest.mark.parametrize(
    ("got", "want", "amount"),
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0], math.inf),  # shapes
        ([[1.0, 2.0]], [1.0, 2.0], math.inf),
        ([math.nan, 1.0], [1.0, 1.0], math.inf),
        ([1.0, 1.0], [1.0, math.nan], math.inf),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([math.nan, 1.0], [math.nan, 2.0], 0.5),
        ([math.inf, 3.0], [math.inf, 4.0], 0.25),  # as a share of the largest finite value
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
        ([3.4e38, 1.0], [math.inf, 1.0], math.inf),
        ([0.0], [-0.0], 0.0),
        ([0.25], [0.0], 0.25),  # nothing to be a share of
        ([], [], 0.0),
    ],
)
def test_cases(got: list[float], want: list[float], amount: float) -> None:
    assert difference(np.array(got, np.float32), np.array(want, np.float32)) == amount


def test_same_bits() -> None:
    zero, nan = np.zeros(1, np.float32), np.array([math.nan], np.float32)
    assert same_bits(nan, nan.copy())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, np.zeros((1, 1), np.float32))

"""Function tables: fitting, asymptotes, range reduction and NN-LUT's network."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lutra.errors import InputError
from lutra.functions import (
    ENTRIES,
    KNOWN,
    Histogram,
    Piecewise,
    fit,
    fit_exp,
    fit_reciprocal,
    fit_rsqrt,
    from_relu_net,
    scalar,
    to_relu_net,
)

#: Largest absolute error over all floats with 16 entries: 1.1 times what was measured.
BOUNDS = {
    "gelu": 0.0024,
    "gelu_tanh": 0.0024,
    "quick_gelu": 0.0024,
    "silu": 0.0041,
    "mish": 0.0036,
    "softplus": 0.0031,
    "elu": 0.0013,
    "sigmoid": 0.0019,
    "tanh": 0.0038,
    "erf": 0.0031,
}


def every_float(stride: int) -> np.ndarray:
    """Float32 numbers of all sizes and signs, infinities and subnormals among them; no NaN."""
    bits = np.arange(0, 1 << 32, stride, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    extremes = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45], np.float32)
    return np.concatenate([x[~np.isnan(x)], extremes])


@pytest.mark.parametrize("name", BOUNDS)
def test_error_over_all_floats(name: str) -> None:
    table, exact = fit(name), KNOWN[name]
    x = every_float(65537)
    x = x[np.isfinite(x)]
    error = table.errors(exact, np.concatenate([x, table.probes()]))
    assert error.largest <= BOUNDS[name]
    # Where the function is its asymptote in float32: not a small error, none.
    far = x[np.abs(x) > 120]
    assert np.array_equal(table(far), exact(far).astype(np.float32))


@pytest.mark.parametrize("name", BOUNDS)
def test_infinity_and_nan(name: str) -> None:
    table, exact = fit(name, entries=8), KNOWN[name]
    left, right = table([-np.inf, np.inf])
    assert left == exact.left[1]
    assert right == (np.inf if exact.right[0] else exact.right[1])
    assert np.isnan(table([np.nan]))[0]


@pytest.mark.parametrize("method", ["minimax", "dp", "uniform", "exponential"])
@pytest.mark.parametrize("entries", ENTRIES)
def test_methods(method: str, entries: int) -> None:
    table = fit("gelu", entries=entries, method=method)
    assert table.entries == entries
    assert table.slope.dtype == np.float32
    assert table.slope[0] == 0
    assert table.intercept[0] == 0
    assert table.slope[-1] == 1
    assert table.intercept[-1] == 0
    best = fit("gelu", entries=entries)
    x = best.probes()
    assert best.errors(KNOWN["gelu"], x).largest <= table.errors(KNOWN["gelu"], x).largest


def test_minimax_is_balanced() -> None:
    """All entries have the same largest error: no other breakpoints can be better."""
    table, exact = fit("tanh"), KNOWN["tanh"]
    x = np.linspace(-4, 4, 400_001).astype(np.float32)
    error, entry = np.abs(table(x) - exact(x)), table.index(x)
    largest = [error[entry == i].max() for i in range(table.entries)]
    # All but the last of the greedy ones, which has what is left.
    assert sorted(largest)[1] > 0.95 * max(largest)


def test_dp_has_the_smallest_mean_square() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(-0.3, 1.0, 200_000).astype(np.float32)
    seen = Histogram.of(x)
    square = {
        (method, histogram is not None): float(
            np.square(fit("gelu", method=method, histogram=histogram)(x) - KNOWN["gelu"](x)).mean()
        )
        for method in ("minimax", "dp")
        for histogram in (None, seen)
    }
    assert min(square, key=square.__getitem__) == ("dp", True)
    assert square["minimax", True] < square["minimax", False]


@pytest.mark.parametrize("method", ["minimax", "dp"])
def test_calibration_keeps_the_error_bounded(method: str) -> None:
    """Inputs of a narrow range were seen: far outside it the table still is the function."""
    seen = Histogram.of(np.random.default_rng(0).normal(0, 0.5, 100_000))
    for name in ("gelu", "silu", "tanh"):
        table, free = fit(name, method=method, histogram=seen), fit(name)
        error = table.errors(KNOWN[name], table.probes()).largest
        assert error < 4 * free.errors(KNOWN[name], free.probes()).largest


def test_own_function() -> None:
    def swish(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-2 * x))

    table = fit(swish, -3.0, 3.0)
    assert (table.slope[[0, -1]] == [0, 1]).all()
    assert (table.intercept[[0, -1]] == 0).all()
    assert table(np.float32(1e30)) == np.float32(1e30)

    def parabola(x: np.ndarray) -> np.ndarray:
        return x * x

    flat = fit(parabola, -3.0, 5.0)
    assert flat([-1e6, 1e6]).tolist() == [9.0, 25.0]
    tangent = fit(parabola, -3.0, 5.0, left="linear", right=(2.0, 15.0))
    assert tangent(np.float32(-10)) == pytest.approx(9 + 6 * 7, rel=1e-4)
    assert tangent(np.float32(100)) == 215.0
    assert flat.errors(scalar(parabola), np.linspace(-3, 5, 10_001)).largest < 0.05
    with pytest.raises(InputError, match="parabola tends to no line"):
        fit(parabola)


def test_constant_input() -> None:
    table = fit("sqrt", histogram=Histogram.of(np.zeros(10)))
    assert np.isfinite(table([-1, 0, 1, 1e9])).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"fn": "relu9"}, "there is no function 'relu9'"),
        ({"fn": "gelu", "entries": 12}, "12 entries"),
        ({"fn": "gelu", "method": "best"}, "method='best'"),
        ({"fn": "gelu", "method": "dp", "loss": "max"}, "leave out loss='max'"),
        ({"fn": "gelu", "low": 2.0, "high": 1.0}, "is empty"),
        ({"fn": np.log, "low": -1.0, "high": 1.0}, "not finite at"),
        ({"fn": np.sum, "low": 0.0, "high": 1.0}, "treats every element alike"),
        ({"fn": "sqrt", "left": "flat"}, "left='flat'"),
    ],
)
def test_bad_settings(arguments: dict, said: str) -> None:
    with np.errstate(all="ignore"), pytest.raises(InputError, match=said):
        fit(**arguments)


@pytest.mark.parametrize("entries", ENTRIES)
def test_reduced_tables(entries: int) -> None:
    """The relative error is the same for floats of every size."""
    x = every_float(65537)
    positive = x[(x > 0) & np.isfinite(x) & (x >= np.finfo(np.float32).tiny)]
    bound = {8: (4.8e-4, 1.8e-3, 2.4e-3), 16: (1.3e-4, 4.8e-4, 6.8e-4), 32: (4e-5, 1.3e-4, 1.8e-4)}
    exp, reciprocal, root = bound[entries]
    low = x[(x <= 0) & (x >= -86)]
    assert np.abs(fit_exp(entries)(low) / np.exp(low.astype(np.float64)) - 1).max() < exp
    inside = positive[(positive < 2.0**120) & (positive > 2.0**-120)].astype(np.float64)
    assert np.abs(fit_reciprocal(entries)(inside) * inside - 1).max() < reciprocal
    assert np.abs(fit_rsqrt(entries)(inside) * np.sqrt(inside) - 1).max() < root


def test_reduced_extremes() -> None:
    exp = fit_exp()([-np.inf, -1e30, -87.5, 0.0, -1e-10, 89.0, np.nan])
    assert exp[:3].tolist() == [0, 0, 0]
    assert exp[3:5] == pytest.approx(1, rel=2e-4)
    assert exp[5] == pytest.approx(math.exp(88), rel=2e-4)
    assert np.isnan(exp[6])
    reciprocal = fit_reciprocal()([0.0, 1e-42, np.inf, np.nan])
    assert (reciprocal[:2] > 1e38).all()
    assert reciprocal[2] == 0
    assert np.isnan(reciprocal[3])
    root = fit_rsqrt()([0.0, 1e-42, np.nan, -1.0])
    assert (root[:2] > 1e18).all()
    assert np.isnan(root[2:]).all()


def test_softmax_row_error() -> None:
    rng = np.random.default_rng(0)
    exp, reciprocal = fit_exp(), fit_reciprocal()
    for spread in (0.1, 1.0, 5.0, 50.0):
        for size in (1, 2, 16, 512):
            z = (rng.normal(size=(200, size)) * spread).astype(np.float32)
            shifted = z - z.max(1, keepdims=True)
            p = exp(shifted)
            got = p * reciprocal(p.sum(1, keepdims=True))
            want = np.exp(shifted.astype(np.float64))
            assert np.abs(got - want / want.sum(1, keepdims=True)).max() < 0.002


def test_network_to_table() -> None:
    rng = np.random.default_rng(0)
    m, n, b = rng.normal(size=(3, 15))
    table = from_relu_net(m, n, b)
    assert table.entries == 16
    x = np.concatenate([np.linspace(-50, 50, 100_001), table.breakpoint]).astype(np.float32)
    want = np.maximum(x[:, None].astype(np.float64) * n + b, 0) @ m
    size = np.abs(x[:, None].astype(np.float64) * n * m).sum(1) + np.abs(m * b).sum()
    assert (np.abs(table(x) - want) <= 4e-7 * size).all()


def test_network_of_odd_neurons() -> None:
    """Constants, equal breakpoints, dead neurons and fewer neurons than entries."""
    m, n, b = [2.0, 3.0, -1.0, 5.0], [0.0, 1.0, -1.0, 0.0], [0.5, 1.0, -1.0, -3.0]
    table = from_relu_net(m, n, b)
    assert table.entries == 8
    assert (np.diff(table.breakpoint) > 0).all()
    x = np.linspace(-5, 5, 1001).astype(np.float32)
    want = np.maximum(np.outer(x, n) + b, 0) @ m
    assert np.allclose(table(x), want, atol=1e-6)
    with pytest.raises(InputError, match="33 entries"):
        from_relu_net(np.ones(32), np.ones(32), np.arange(32))


@pytest.mark.parametrize("name", ["gelu", "tanh", "sigmoid", "elu"])
def test_table_to_network_and_back(name: str) -> None:
    table = fit(name, continuous=True)
    m, n, b = to_relu_net(table)
    assert len(m) <= table.entries - 1 + 2
    back = from_relu_net(m, n, b)
    x = np.linspace(-20, 20, 100_001).astype(np.float32)
    assert np.abs(back(x) - table(x)).max() < 2e-6
    net = np.maximum(x[:, None].astype(np.float64) * n + b, 0) @ m
    assert np.abs(net - table(x)).max() < 2e-6


def test_a_jump_is_no_network() -> None:
    edges = np.arange(7, dtype=np.float32)
    steps = Piecewise(edges, np.zeros(8), np.arange(8), "steps")
    with pytest.raises(InputError, match="steps jumps by 1 at its breakpoint"):
        to_relu_net(steps)


def test_bad_tables() -> None:
    edges = np.arange(7, dtype=np.float32)
    with pytest.raises(InputError, match="do not ascend"):
        Piecewise(edges[::-1], np.zeros(8), np.zeros(8))
    with pytest.raises(InputError, match="give E, E and E - 1"):
        Piecewise(edges, np.zeros(8), np.zeros(16))
    with pytest.raises(InputError, match="finite"):
        Piecewise(edges, np.full(8, math.nan), np.zeros(8))


def test_histogram() -> None:
    rng = np.random.default_rng(0)
    histogram = Histogram()
    for _ in range(10):
        histogram.add(rng.normal(size=(100, 100)).astype(np.float32))
    histogram.add([np.nan, np.inf])
    x = np.linspace(-3, 3, 61)
    want = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    assert np.abs(histogram.density(x) - want).max() < 0.02
    assert -6 < histogram.low < -3 < 3 < histogram.high < 6
    with pytest.raises(InputError, match="histogram is empty"):
        Histogram().density(x)

"""Functions, tables, norms, softmax and attention of every instruction set, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from layers import Array, same_bits

from lutra import _engine, runnable_isas

ISAS = runnable_isas()
each_isa = pytest.mark.parametrize("isa", ISAS)
entries = pytest.mark.parametrize("count", [8, 16, 32])

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


def _gelu_tanh(x: Array) -> Array:
    return x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


#: What each computes, in float64, and how far it may be off: units in the last place, or absolute
#: where those are smaller.
FUNCTIONS: dict[str, tuple[Callable[[Array], Array], float, float]] = {
    "gelu": (lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))), 4, 2e-7),
    "gelu_tanh": (_gelu_tanh, 4, 1e-7),
    "silu": (lambda x: x * _sigmoid(x), 4, 1e-36),
    "tanh": (np.tanh, 6, 0.0),
    "sigmoid": (_sigmoid, 4, 1e-36),
    "exp": (np.exp, 1, 0.0),
    "erf": (_erf, 4, 0.0),
    "sqrt": (np.sqrt, 0.5, 0.0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 1.5, 0.0),
    "reciprocal": (lambda x: 1 / x, 0.5, 0.0),
}
LIMITS = {  # at -inf, -0, 0, inf
    "gelu": (0.0, 0.0, 0.0, np.inf),
    "gelu_tanh": (0.0, 0.0, 0.0, np.inf),
    "silu": (0.0, 0.0, 0.0, np.inf),
    "tanh": (-1.0, 0.0, 0.0, 1.0),
    "sigmoid": (0.0, 0.5, 0.5, 1.0),
    "exp": (0.0, 1.0, 1.0, np.inf),
    "erf": (-1.0, 0.0, 0.0, 1.0),
    "sqrt": (np.nan, 0.0, 0.0, np.inf),
    "rsqrt": (np.nan, -np.inf, np.inf, 0.0),
    "reciprocal": (0.0, -np.inf, np.inf, 0.0),
}


def numbers() -> Array:
    """Many floats of every size, and those where functions change their ways."""
    rng = np.random.default_rng(7)
    any_bits = rng.integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    edges = [0.9, 9.0, 10.0, 88.7, 88.8, -87.3, -87.4, -103.9, -104.1, 1e-45, 1e-38, 3.4e38]
    return np.concatenate(
        [
            np.array([*edges, *(-e for e in edges), 0.0, -0.0], np.float32),
            *((rng.normal(size=20_000) * s).astype(np.float32) for s in (0.01, 1.0, 4.0, 40.0)),
            any_bits[np.isfinite(any_bits)],
        ]
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_accurate(name: str) -> None:
    exact, ulps, absolute = FUNCTIONS[name]
    x = numbers()
    y = _engine.function("scalar", name, x)
    with np.errstate(all="ignore"):
        wanted = exact(x.astype(np.float64))
        rounded = wanted.astype(np.float32)
        usual = np.isfinite(rounded)
        error = np.abs(y - wanted)[usual]
        allowed = np.maximum(ulps * np.spacing(np.abs(rounded[usual])).astype(np.float64), absolute)
    worst = int(np.argmax(error - allowed))
    assert error[worst] <= allowed[worst], (x[usual][worst], y[usual][worst], wanted[usual][worst])
    np.testing.assert_array_equal(y[~usual], rounded[~usual])


@each_isa
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_all_isas_are_equal_and_have_limits(isa: str, name: str) -> None:
    x = numbers()
    assert same_bits(_engine.function(isa, name, x), _engine.function("scalar", name, x))
    special = np.array([-np.inf, -0.0, 0.0, np.inf, np.nan], np.float32)
    y = _engine.function(isa, name, special)
    np.testing.assert_allclose(y, [*LIMITS[name], np.nan], atol=1e-20)


@each_isa
def test_functions_keep_shapes_and_tails(isa: str) -> None:
    x = np.random.default_rng(1).normal(size=(5, 67)).astype(np.float32)
    whole = _engine.function(isa, "gelu", x)
    assert whole.shape == x.shape
    for n in range(68):
        assert same_bits(_engine.function(isa, "gelu", x[0, :n].copy()), whole[0, :n])
    assert _engine.function(isa, "exp", np.zeros((2, 0, 3), np.float32)).shape == (2, 0, 3)


def test_unknown_names_and_bad_tables_are_errors() -> None:
    x, line = np.zeros(3, np.float32), np.zeros(8, np.float32)
    with pytest.raises(ValueError, match=r"no function 'cosh'.*gelu, gelu_tanh, silu"):
        _engine.function("scalar", "cosh", x)
    with pytest.raises(ValueError, match="8 entries need 7 breakpoints, not 8"):
        _engine.piecewise("scalar", x, line, line, line)
    with pytest.raises(ValueError, match="8, 16 or 32 slopes and as many intercepts, not 7 and 7"):
        _engine.table_exp("scalar", x, line[:7], line[:7])
    with pytest.raises(ValueError, match="must ascend, and entry 2 does not"):
        _engine.piecewise("scalar", x, np.array([0, 2, 1, 3, 4, 5, 6], np.float32), line, line)


def piecewise_table(count: int, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    breakpoint = np.sort(rng.normal(size=count - 1)).astype(np.float32)
    slope, intercept = rng.normal(size=(2, count)).astype(np.float32)
    return breakpoint, slope, intercept


@each_isa
@entries
def test_piecewise(isa: str, count: int) -> None:
    breakpoint, slope, intercept = piecewise_table(count)
    breakpoint[1] = breakpoint[2]  # an entry that nobody meets
    x = np.concatenate([numbers(), breakpoint, np.nextafter(breakpoint, np.float32(-np.inf))])
    y = _engine.piecewise(isa, x, breakpoint, slope, intercept)
    assert same_bits(y, _engine.piecewise("scalar", x, breakpoint, slope, intercept))
    i = np.searchsorted(breakpoint, x, side="right")
    with np.errstate(over="ignore"):
        wanted = (slope[i].astype(np.float64) * x + intercept[i]).astype(np.float32)
    np.testing.assert_allclose(y, wanted, rtol=2e-7)


@each_isa
@entries
def test_piecewise_limits(isa: str, count: int) -> None:
    breakpoint, slope, intercept = piecewise_table(count)
    x = np.array([-np.inf, np.inf, np.nan], np.float32)
    slope[0], slope[-1] = 0.0, 1.0
    y = _engine.piecewise(isa, x, breakpoint, slope, intercept)
    np.testing.assert_array_equal(y, [intercept[0], np.inf, np.nan])
    slope[0], slope[-1] = -2.0, 0.0
    y = _engine.piecewise(isa, x, breakpoint, slope, intercept)
    np.testing.assert_array_equal(y, [np.inf, intercept[-1], np.nan])


def lines(f: Callable[[Array], Array], edges: Array) -> tuple[Array, Array]:
    """Slope and intercept of the chords of f between the edges."""
    y = f(edges)
    slope = np.diff(y) / np.diff(edges)
    return slope.astype(np.float32), (y[:-1] - slope * edges[:-1]).astype(np.float32)


def exp_lines(count: int) -> tuple[Array, Array]:
    return lines(np.exp2, np.linspace(0, 1, count + 1))


def reciprocal_lines(count: int) -> tuple[Array, Array]:
    return lines(lambda m: 1 / m, np.linspace(1, 2, count + 1))


def rsqrt_lines(count: int) -> tuple[Array, Array]:
    edges = np.concatenate(
        [np.linspace(1, 2, count // 2 + 1)[:-1], np.linspace(2, 4, count // 2 + 1)]
    )
    return lines(lambda m: 1 / np.sqrt(m), edges)


def chord_error(count: int) -> float:
    """Largest relative error of the chords of these functions: f'' h^2 / 8 f."""
    return 2.0 * (1.0 / count) ** 2 / 8 * 2.2


@each_isa
@entries
def test_table_exp(isa: str, count: int) -> None:
    slope, intercept = exp_lines(count)
    x = numbers()
    y = _engine.table_exp(isa, x, slope, intercept)
    assert same_bits(y, _engine.table_exp("scalar", x, slope, intercept))
    inside = (x >= -87) & (x <= 88)
    wanted = np.exp(x[inside].astype(np.float64))
    np.testing.assert_allclose(y[inside], wanted, rtol=chord_error(count))
    assert (y[x < -87] == 0).all()
    special = np.array([-np.inf, np.inf, np.nan, 0.0, -1e-10], np.float32)
    y = _engine.table_exp(isa, special, slope, intercept)
    assert y[0] == 0
    assert y[1] == _engine.table_exp(isa, np.float32([88]), slope, intercept)[0]
    assert np.isnan(y[2])
    np.testing.assert_allclose(y[3:], 1.0, rtol=1e-6)


@each_isa
@entries
def test_table_reciprocal(isa: str, count: int) -> None:
    slope, intercept = reciprocal_lines(count)
    x = numbers()
    y = _engine.table_reciprocal(isa, x, slope, intercept)
    assert same_bits(y, _engine.table_reciprocal("scalar", x, slope, intercept))
    inside = (np.abs(x) >= 2.0**-126) & (np.abs(x) < 2.0**125)
    np.testing.assert_allclose(y[inside] * x[inside].astype(np.float64), 1, atol=chord_error(count))
    special = np.array([-np.inf, np.inf, np.nan, 0.0, 1e-45], np.float32)
    y = _engine.table_reciprocal(isa, special, slope, intercept)
    np.testing.assert_array_equal(y[:3], [0, 0, np.nan])
    assert np.isfinite(y[3:]).all()
    assert (y[3:] > 1e38).all()


@each_isa
@entries
def test_table_rsqrt(isa: str, count: int) -> None:
    slope, intercept = rsqrt_lines(count)
    x = numbers()
    y = _engine.table_rsqrt(isa, x, slope, intercept)
    assert same_bits(y, _engine.table_rsqrt("scalar", x, slope, intercept))
    inside = x >= 2.0**-126
    wanted = 1 / np.sqrt(x[inside].astype(np.float64))
    np.testing.assert_allclose(y[inside], wanted, rtol=4 * chord_error(count))
    special = np.array([-np.inf, -1.0, np.nan, 0.0, 1e-45, np.inf], np.float32)
    y = _engine.table_rsqrt(isa, special, slope, intercept)
    assert np.isnan(y[:3]).all()
    assert np.isfinite(y[3:5]).all()
    assert (y[3:5] > 1e19).all()
    assert 0 <= y[5] < 1e-19

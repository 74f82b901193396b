"""Functions, exact and from tables: rules, the reference against float64, the engine against it."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder
from sequences import check, gelu_table, reduced_table, single
from sweeps import sweep

from lutra import GraphError, Session, _engine, run_reference, runnable_isas
from lutra.graph import Graph
from lutra.ops.functions import FUNCTIONS
from lutra.ops.limits import FUNCTION_ENTRIES
from lutra.reference.functions import exp_table, fma, reciprocal_table, rsqrt_table

F = np.float32
D = np.float64


def _erf(x: Array) -> Array:
    return np.array([math.erf(v) for v in x.ravel()]).reshape(x.shape)


#: In float64, and the range that each is tried on.
FORMULAS: dict[str, tuple[Callable[[Array], Array], float, float]] = {
    "gelu": (lambda x: x * 0.5 * (1 + _erf(x / 2**0.5)), -12, 12),
    "gelu_tanh": (
        lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
        -12,
        12,
    ),
    "silu": (lambda x: x / (1 + np.exp(-x)), -30, 30),
    "tanh": (np.tanh, -12, 12),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), -30, 30),
    "exp": (np.exp, -80, 80),
    "erf": (_erf, -5, 5),
    "sqrt": (np.sqrt, 1e-6, 1e6),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 1e-6, 1e6),
    "reciprocal": (lambda x: 1 / x, 1e-6, 1e6),
    "log": (np.log, 1e-6, 1e6),
    "elu": (lambda x: np.where(x < 0, np.expm1(np.minimum(x, 0)), x), -30, 30),
    "softplus": (lambda x: np.logaddexp(0, x), -30, 30),
    "mish": (lambda x: x * np.tanh(np.logaddexp(0, x)), -30, 30),
}


def function_graph(name: str, shape: tuple[int | None, ...] = (None, None)) -> Graph:
    if name == "gelu_tanh":
        return single("gelu", ("x", shape), approximate="tanh")
    return single(name, ("x", shape))


def points(low: float, high: float, count: int = 4001) -> Array:
    even = np.linspace(low, high, count)
    if low > 0:
        even = np.exp(np.linspace(math.log(low), math.log(high), count))
    return even.astype(F)[None]


def test_every_function_has_a_formula() -> None:
    assert {name.removesuffix("_tanh") for name in FORMULAS} == set(FUNCTIONS)


@pytest.mark.parametrize("name", FORMULAS)
def test_functions(name: str) -> None:
    formula, low, high = FORMULAS[name]
    x = points(low, high)
    graph = function_graph(name)
    got = check(graph, x)
    want = formula(x.astype(D))
    np.testing.assert_allclose(got, want, rtol=2e-7, atol=1e-38)
    # relative to each value, where it is not the difference of larger ones
    (engine,) = Session(graph).run(None, {"x": x})
    if name in ("exp", "sqrt", "rsqrt", "reciprocal", "sigmoid"):
        np.testing.assert_allclose(engine, want, rtol=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
@sweep("shape", [(3, 1), (2, 5, 7), (1, 3, 4, 5), (2, 1, 513)])
def test_functions_of_any_shape(name: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).uniform(0.1, 3, shape).astype(F)
    check(function_graph(name, (None, *shape[1:])), x)
    check(function_graph(name, (None,) * len(shape)), x)


LIMITS = {
    "gelu": (0.0, math.inf),
    "gelu_tanh": (0.0, math.inf),
    "silu": (0.0, math.inf),
    "tanh": (-1.0, 1.0),
    "sigmoid": (0.0, 1.0),
    "exp": (0.0, math.inf),
    "erf": (-1.0, 1.0),
    "sqrt": (math.nan, math.inf),
    "rsqrt": (math.nan, 0.0),
    "reciprocal": (-0.0, 0.0),
    "log": (math.nan, math.inf),
    "elu": (-1.0, math.inf),
    "softplus": (0.0, math.inf),
    "mish": (0.0, math.inf),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_and_nan(name: str) -> None:
    graph = function_graph(name)
    x = np.array([[-np.inf, np.inf, np.nan, 3e38, 1.0]], F)
    low, high = LIMITS[name]
    got = [run_reference(graph, [x])["node.out"], Session(graph, check_finite=False)(x)]
    for y in got:
        np.testing.assert_allclose(y[0, :2], [low, high], atol=1e-20)
        assert np.isnan(y[0, 2])
        assert not np.isnan(y[0, 3:]).any()
    zero = np.zeros((1, 1), F)
    wanted = {"sigmoid": 0.5, "exp": 1.0, "rsqrt": math.inf, "reciprocal": math.inf}
    wanted |= {"log": -math.inf, "softplus": float(F(math.log(2)))}
    for y in (run_reference(graph, [zero])["node.out"], Session(graph)(zero)):
        assert y[0, 0] == wanted.get(name, 0.0)


# ---- tables with breakpoints --------------------------------------------------------------------


def piecewise_graph(table: dict[str, Array], shape: tuple[int | None, ...] = (None, None)) -> Graph:
    return single("piecewise", ("x", shape), tensors=table)


def random_table(entries: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "breakpoint": np.sort(rng.normal(size=entries - 1)).astype(F),
        "slope": rng.normal(size=entries).astype(F),
        "intercept": rng.normal(size=entries).astype(F),
    }


@pytest.mark.parametrize("entries", FUNCTION_ENTRIES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1000), (3, 7, 5), (2, 3, 4, 5)])
def test_piecewise_gives_the_same_bits(entries: int, shape: tuple[int, ...]) -> None:
    table = random_table(entries)
    table["breakpoint"][3] = table["breakpoint"][4]  # an entry that nothing falls into
    x = np.random.default_rng(1).normal(size=shape).astype(F)
    flat = x.reshape(-1)
    flat[: min(entries - 1, flat.size)] = table["breakpoint"][: flat.size]
    graph = piecewise_graph(table, (None, *shape[1:]))
    got = check(graph, x, tolerance=0)
    for value, y in zip(flat[:200], got.reshape(-1), strict=False):
        i = sum(value >= point for point in table["breakpoint"])  # <= x, counted one by one
        want = D(table["slope"][i]) * D(value) + D(table["intercept"][i])
        assert abs(y - want) <= 1e-7 * abs(want) + 1e-12


@pytest.mark.parametrize("entries", FUNCTION_ENTRIES)
def test_a_table_of_gelu(entries: int) -> None:
    x = points(-100, 100)
    got = check(piecewise_graph(gelu_table(entries)), x, tolerance=0)
    want = FORMULAS["gelu"][0](x.astype(D))
    assert np.abs(got - want).max() < {8: 0.2, 16: 0.05, 32: 0.01}[entries]


def test_asymptotes_at_infinity() -> None:
    graph = piecewise_graph(gelu_table())
    x = np.array([[-np.inf, np.inf, np.nan, -3e38, 3e38, -0.0]], F)
    got = check(graph, x, tolerance=0, finite=False)[0]
    assert got[0] == 0
    assert got[1] == np.inf
    assert np.isnan(got[2])
    assert got[3] == 0
    assert got[4] == F(3e38)
    flat = {**random_table(16), "slope": np.zeros(16, F)}
    got = check(piecewise_graph(flat), x[:, :2], tolerance=0, finite=False)[0]
    assert got.tolist() == [flat["intercept"][0], flat["intercept"][-1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slope": np.ones(15, F)}, "8 or 16 or 32 entries"),
        ({"slope": np.ones(12, F), "intercept": np.ones(12, F)}, "8 or 16 or 32 entries"),
        ({"slope": np.ones(64, F), "intercept": np.ones(64, F)}, "8 or 16 or 32 entries"),
        ({"breakpoint": np.arange(16, dtype=F)}, "16 entries need 15 breakpoints"),
        ({"breakpoint": -np.arange(15, dtype=F)}, "finite and ascending"),
        ({"breakpoint": np.full(15, np.nan, F)}, "NaN or infinite"),
        ({"slope": np.full(16, np.inf, F)}, "NaN or infinite"),
        ({"slope": np.ones(16, np.float64)}, "float64|<f8"),
    ],
)
def test_rules_of_tables(change: dict[str, Array], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        piecewise_graph({**random_table(16), **change}).validate()


# ---- tables indexed by bits ---------------------------------------------------------------------

TABLES: dict[str, tuple[Callable[..., Array], Callable[[Array], Array]]] = {
    "exp": (exp_table, np.exp),
    "reciprocal": (reciprocal_table, lambda x: 1 / x),
    "rsqrt": (rsqrt_table, lambda x: 1 / np.sqrt(x)),
}
#: Chords are off by about so much of the value, with 8, 16 and 32 entries.
ERRORS = {"exp": 2e-3, "reciprocal": 4e-3, "rsqrt": 6e-3}


@pytest.mark.parametrize("entries", FUNCTION_ENTRIES)
@pytest.mark.parametrize("name", TABLES)
def test_reduced_tables(name: str, entries: int) -> None:
    table, formula = TABLES[name]
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(-85, 85, 20000)).astype(F)
    if name == "exp":
        x = rng.uniform(-87, 10, 20000).astype(F)
    got = table(x, *reduced_table(name, entries).values())
    assert got.dtype == F
    error = np.abs(got / formula(x.astype(D)) - 1).max()
    assert ERRORS[name] * (8 / entries) ** 2 / 3 < error < ERRORS[name] * (8 / entries) ** 2


@pytest.mark.parametrize("name", TABLES)
def test_reduced_tables_at_the_ends_of_their_pieces(name: str) -> None:
    """Chords meet the function there, so a wrong index would show."""
    table, formula = TABLES[name]
    tensors = reduced_table(name).values()
    powers = 2.0 ** np.arange(-20, 21)
    steps = np.arange(16) / 16
    x = (powers[:, None] * (1 + steps)).ravel().astype(F)
    if name == "exp":
        x = (-math.log(2) * (np.arange(40)[:, None] + steps)).ravel().astype(F)
    if name == "rsqrt":
        x = x[::2]
    np.testing.assert_allclose(table(x, *tensors), formula(x.astype(D)), rtol=2e-6)


def test_what_reduced_tables_give_outside() -> None:
    x = np.array([-np.inf, -87.5, -1e-10, 0, 1e-42, 88, 1e30, np.inf, np.nan, -1], F)
    exp, reciprocal, rsqrt = (
        table(x, *reduced_table(name).values()) for name, (table, _) in TABLES.items()
    )
    np.testing.assert_array_equal(exp[:4], F([0, 0, 1, 1]))
    assert np.isfinite(exp[5:8]).all()
    assert exp[5] == exp[6] == exp[7]
    assert (reciprocal[3:5] > 1e38).all()
    assert np.isfinite(reciprocal[3:5]).all()
    assert reciprocal[7] == 0
    assert reciprocal[9] == -reciprocal_table(F([1]), *reduced_table("reciprocal").values())[0]
    assert (rsqrt[3:5] > 1e19).all()
    assert np.isfinite(rsqrt[3:5]).all()
    assert 0 < rsqrt[7] < 1e-19
    assert np.isnan(rsqrt[[0, 1, 2, 9]]).all()
    for made in (exp, reciprocal, rsqrt):
        assert np.isnan(made[8])


@pytest.mark.parametrize("entries", FUNCTION_ENTRIES)
@pytest.mark.parametrize("name", TABLES)
def test_reduced_tables_have_the_bits_of_the_engine(name: str, entries: int) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    x = bits.view(F)
    x[:8] = 0, -0.0, np.inf, -np.inf, np.nan, -87, 88, 1
    x[8:30_000] = -np.abs(np.random.default_rng(1).normal(size=30_000 - 8) * 20)
    slope, intercept = reduced_table(name, entries).values()
    want = TABLES[name][0](x, slope, intercept)
    for isa in runnable_isas():
        got = getattr(_engine, f"table_{name}")(isa, x, slope, intercept)
        np.testing.assert_array_equal(got, want, isa)


def test_fma_rounds_once() -> None:
    one = F(1)
    # 1 + 2^-23 squared is 1 + 2^-22 + 2^-46: what two roundings lose shows after 1 is taken away.
    a = F([1 + 2**-23])
    assert fma(a, a, -a)[0] == F(D(a[0]) * D(a[0]) - D(a[0]))
    # halfway between two float32 but for a bit far below float64's reach
    product, tiny = F([2.0**-24]), F([2.0**-80])
    exact = fma(F([2.0**-12]), F([2.0**-12]), one + 0 * product)
    assert exact[0] == 1  # a tie goes to even
    above = fma(F([2.0**-12]) * (one + 2**-22), F([2.0**-12]) * (one + 2**-23), one)
    assert above[0] == 1 + F(2**-23)
    assert fma(tiny, tiny, one + 0 * tiny)[0] == 1
    rng = np.random.default_rng(0)
    x, y, z = (rng.normal(size=5000).astype(F) for _ in range(3))
    for p, q, r, made in zip(x, y, z, fma(x, y, z), strict=True):
        sure = Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r))
        near = [made, np.nextafter(made, F(np.inf)), np.nextafter(made, F(-np.inf))]
        errors = [abs(Fraction(float(v)) - sure) for v in near]
        assert errors[0] == min(errors)


# ---- softmax by tables --------------------------------------------------------------------------


def softmax_graph(shape: tuple[int | None, ...], axis: int, entries: int) -> Graph:
    tensors = {}
    if entries:
        tensors = {**reduced_table("exp", entries), **reduced_table("reciprocal", entries)}
    return single("softmax", ("x", shape), tensors=tensors or None, axis=axis)


@pytest.mark.parametrize("entries", [0, *FUNCTION_ENTRIES])
@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 7), 1), ((2, 5, 64), 2), ((2, 5, 9), 1), ((1, 2, 3, 130), 3)]
)
def test_softmax(shape: tuple[int, ...], axis: int, entries: int) -> None:
    x = 5 * np.random.default_rng(0).normal(size=shape).astype(F)
    got = check(softmax_graph((None, *shape[1:]), axis, entries), x, tolerance=1e-5)
    powers = np.exp(x.astype(D) - x.max(axis=axis, keepdims=True))
    want = powers / powers.sum(axis=axis, keepdims=True)
    error = np.abs(got - want).max()
    assert error < {0: 1e-6, 8: 6e-3, 16: 2e-3, 32: 5e-4}[entries]


@pytest.mark.parametrize("entries", [0, 16])
def test_softmax_of_extremes(entries: int) -> None:
    graph = softmax_graph((None, 4), 1, entries)
    x = np.array([[0, 0, 0, 0], [1e4, -1e4, 0, 1e4], [-3e38, -3e38, 3e38, 0], [7, -80, -90, -100]])
    got = check(graph, x.astype(F), tolerance=1e-6)
    np.testing.assert_allclose(got.sum(axis=1), 1, atol=0.004)
    np.testing.assert_allclose(got[1], [0.5, 0, 0, 0.5], atol=0.002)
    np.testing.assert_allclose(got[2], [0, 0, 1, 0], atol=0.002)


def test_softmax_tables_come_together() -> None:
    with pytest.raises(GraphError, match="lacks reciprocal_slope, reciprocal_intercept"):
        single("softmax", ("x", (None, 4)), tensors=reduced_table("exp"), axis=1).validate()


# ---- between layers, costs ----------------------------------------------------------------------

MIDDLES: dict[str, dict[str, Any]] = {
    "gelu": {},
    "silu": {},
    "sigmoid": {},
    "piecewise": {"tensors": gelu_table()},
}


@pytest.mark.parametrize("op", MIDDLES)
@pytest.mark.parametrize("shape", [(5, 24), (2, 37, 24)])
def test_functions_between_lookup_layers(op: str, shape: tuple[int, ...]) -> None:
    """The function writes the grid of the layer behind it."""
    b = Builder(("x", (None,) * (len(shape) - 1) + (24,)), seed=2)
    y = b.pq_linear("x", 24, 40)
    y = b.add(op, y, name="middle", **MIDDLES[op])
    first = b.pq_linear(y, 40, 16, act_bits=6, act_zero=9)
    second = b.int8_linear(y, 40, 16)
    b.add("add", first, second)
    x = np.random.default_rng(0).normal(size=shape).astype(F)
    graph = b.graph()
    check(graph, x, tolerance=0.02)  # codes may move where exact functions round differently
    # node by node, as a network that shows all its values computes, it gives the same bits
    shown = Builder(("x", graph.inputs[0].shape))
    shown.nodes, shown.tensors = b.nodes, b.tensors
    whole = shown.graph(*(node.output for node in b.nodes))
    for threads in (1, 3):
        (want,) = Session(graph, threads=threads).run(None, {"x": x})
        got = Session(whole, threads=threads).run([graph.outputs[0]], {"x": x})[0]
        np.testing.assert_array_equal(got, want)


def test_costs_of_functions() -> None:
    cost = function_graph("gelu", (None, 6, 5)).total_cost()
    assert (cost.functions, cost.pieces) == (30, 0)
    assert cost.float_multiplications == cost.float_additions == 30 * FUNCTIONS["gelu"]
    cost = piecewise_graph(gelu_table(), (None, 6, 5)).total_cost()
    assert (cost.functions, cost.pieces, cost.lookups, cost.table_reads) == (0, 30, 0, 60)
    assert cost.table_bytes == 4 * (15 + 16 + 16)
    assert cost.float_multiplications == cost.float_additions == 30
    exact, read = (softmax_graph((None, 3, 8), 2, entries).total_cost() for entries in (0, 16))
    assert (exact.functions, exact.pieces) == (24 + 3, 0)
    assert (read.functions, read.pieces) == (0, 24 + 3)

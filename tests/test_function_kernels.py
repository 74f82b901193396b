"""Functions, tables, norms, softmax and attention of every instruction set, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from layers import Array, same_bits
from plans import add, function, function_tables, piecewise
from sweeps import sweep

from lutra import _engine, runnable_isas

ISAS = runnable_isas()
each_isa = pytest.mark.parametrize("isa", ISAS)
entries = pytest.mark.parametrize("count", [8, 16, 32])

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


def _gelu_tanh(x: Array) -> Array:
    return x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


TINY = float(np.finfo(np.float32).tiny)

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
    "log": (lambda x: np.log(np.where((x > 0) & (x < TINY), TINY, x)), 2, 0.0),
    "elu": (lambda x: np.where(x < 0, np.expm1(np.minimum(x, 0)), x), 4, 0.0),
    "softplus": (lambda x: np.logaddexp(0.0, x), 4, 1e-37),
    "mish": (lambda x: x * np.tanh(np.logaddexp(0.0, x)), 6, 1e-36),
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
    "log": (np.nan, -np.inf, -np.inf, np.inf),
    "elu": (-1.0, 0.0, 0.0, np.inf),
    "softplus": (0.0, float(np.float32(np.log(2))), float(np.float32(np.log(2))), np.inf),
    "mish": (0.0, 0.0, 0.0, np.inf),
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
@sweep("name", FUNCTIONS)
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


# --- steps of plans -------------------------------------------------------------------------------


def run_plan(isa: str, build: Callable[[_engine.Plan, list[int]], int], *x: Array) -> Array:
    """The output of one step; the inputs are float32 or int32."""
    plan = _engine.Plan(isa, 1)
    made = build(plan, [plan.input(str(a.dtype)) for a in x])
    plan.finish([made])
    result: Array = plan.run([np.ascontiguousarray(a) for a in x])[0]
    return result


def check_isas(
    build: Callable[[_engine.Plan, list[int]], int], *x: Array, threads: int = 3
) -> Array:
    """The scalar output; that of all others, and of several threads, has the same bits."""
    wanted = run_plan("scalar", build, *x)
    for isa in ISAS:
        assert same_bits(run_plan(isa, build, *x), wanted), isa
        plan = _engine.Plan(isa, threads)
        made = build(plan, [plan.input(str(a.dtype)) for a in x])
        plan.finish([made])
        assert same_bits(plan.run([np.ascontiguousarray(a) for a in x])[0], wanted), isa
    return wanted


def layer_norm(
    plan: _engine.Plan, x: int, weight: Array, bias: Array, eps: float, **tables: Any
) -> int:
    tensors = {"weight": weight, "bias": bias, **function_tables(**tables)}
    return add(plan, "layer_norm", x, tensors=tensors, eps=eps)


def rms_norm(plan: _engine.Plan, x: int, weight: Array, eps: float) -> int:
    return add(plan, "rms_norm", x, tensors={"weight": weight}, eps=eps)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_steps(name: str) -> None:
    x = normal(3, 700, 5) ** 2 + np.float32(0.1)
    y = check_isas(lambda plan, ids: function(plan, ids[0], name), x)
    assert same_bits(y, _engine.function("scalar", name, x))


@entries
def test_piecewise_steps(count: int) -> None:
    table = piecewise_table(count)
    x = normal(2, 9, 300)
    y = check_isas(lambda plan, ids: piecewise(plan, ids[0], *table), x)
    assert same_bits(y, _engine.piecewise("scalar", x, *table))


NORM_SHAPES = [
    (1, 5),
    (70, 33),
    (1, 1, 8),
    (2, 67, 12),
    (1, 128, 384),
    (2, 3, 5, 16),
    (1, 2, 1, 70, 9),
]


@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_norms(shape: tuple[int, ...]) -> None:
    x = normal(*shape) * 3 + 1
    weight, bias = normal(2, shape[-1], seed=1)
    eps = 1e-5
    y = check_isas(lambda plan, ids: layer_norm(plan, ids[0], weight, bias, eps), x)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias
    np.testing.assert_allclose(y, wanted, rtol=2e-6, atol=3e-6)
    y = check_isas(lambda plan, ids: rms_norm(plan, ids[0], weight, eps), x)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * weight
    np.testing.assert_allclose(y, wanted, rtol=2e-6, atol=3e-6)


def test_norm_without_variance() -> None:
    x = np.full((2, 40, 24), 3.25, np.float32)
    weight, bias = normal(2, 24)
    y = check_isas(lambda plan, ids: layer_norm(plan, ids[0], weight, bias, 1e-5), x)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))


@entries
def test_norm_by_table(count: int) -> None:
    x, table = normal(2, 50, 40), rsqrt_lines(count)
    weight, bias = normal(2, 40, seed=1)
    y = check_isas(lambda plan, ids: layer_norm(plan, ids[0], weight, bias, 1e-5, rsqrt=table), x)
    exact = run_plan("scalar", lambda plan, ids: layer_norm(plan, ids[0], weight, bias, 1e-5), x)
    assert 0 < np.abs(y - exact).max() <= 4 * chord_error(count) * np.abs(exact - bias).max()


def test_norm_errors() -> None:
    with pytest.raises(ValueError, match=r"layer_norm over 4 features got \(2, 3, 5\)"):
        run_plan(
            "scalar",
            lambda plan, ids: layer_norm(plan, ids[0], *normal(2, 4), 1e-5),
            normal(2, 3, 5),
        )


SOFTMAX_CASES = [
    ((1, 10), 1), ((40, 10), 1), ((2, 3, 70), 2), ((2, 70, 3), 1), ((2, 4, 5, 67), 3),
    ((2, 9, 5, 7), 1), ((2, 9, 5, 7), 2), ((3, 2, 6, 3), 2), ((1, 2, 3, 4, 130), 3),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "axis"), SOFTMAX_CASES)
def test_softmax(shape: tuple[int, ...], axis: int) -> None:
    x = normal(*shape) * 8
    y = check_isas(lambda plan, ids: add(plan, "softmax", ids[0], axis=axis), x)
    wide = np.exp(x.astype(np.float64) - x.max(axis, keepdims=True))
    np.testing.assert_allclose(y, wide / wide.sum(axis, keepdims=True), rtol=9e-6, atol=1e-37)
    tables = function_tables(exp=exp_lines(32), reciprocal=reciprocal_lines(32))
    table = check_isas(lambda plan, ids: add(plan, "softmax", ids[0], tensors=tables, axis=axis), x)
    np.testing.assert_allclose(table, y, rtol=3 * chord_error(32), atol=1e-37)


@each_isa
def test_softmax_of_infinities(isa: str) -> None:
    x = np.array([[0, -np.inf, 1], [-np.inf, -np.inf, -np.inf], [np.nan, 0, 0]], np.float32)
    y = run_plan(isa, lambda plan, ids: add(plan, "softmax", ids[0], axis=1), x)
    np.testing.assert_allclose(y[0], [0.26894143, 0, 0.7310586], rtol=1e-6)
    assert np.isnan(y[1:]).all()


def attention(
    q: Array, k: Array, v: Array, heads: int, scale: float, mask: Array | None, causal: bool
) -> Array:
    """In float64, head by head."""
    samples, queries, width = q.shape
    d = width // heads
    out = np.zeros(q.shape)
    for n in range(samples):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            scores = q[n, :, part].astype(np.float64) @ k[n, :, part].astype(np.float64).T * scale
            seen = np.ones(scores.shape, bool)
            if mask is not None:
                seen &= mask[n] != 0
            if causal:
                seen &= np.arange(k.shape[1]) <= np.arange(queries)[:, None]
            for i in range(queries):
                if seen[i].any():
                    s = scores[i, seen[i]]
                    p = np.exp(s - s.max())
                    out[n, i, part] = p @ v[n, seen[i], part] / p.sum()
    return out


ATTENTION_CASES = [  # samples, queries, keys, heads, features of a head
    (1, 1, 1, 1, 1), (2, 1, 9, 3, 8), (1, 33, 33, 2, 32), (2, 67, 20, 1, 12), (3, 16, 64, 4, 7),
    (1, 40, 512, 2, 64),
]  # fmt: skip


@pytest.mark.parametrize("case", ATTENTION_CASES)
@sweep("causal", [False, True])
@sweep("masked", ["no", "prefix", "any", "none"])
def test_attention(case: tuple[int, ...], causal: bool, masked: str) -> None:
    samples, queries, keys, heads, d = case
    q, k, v = (normal(samples, n, heads * d, seed=i) for i, n in enumerate((queries, keys, keys)))
    rng = np.random.default_rng(5)
    mask = None
    if masked == "prefix":
        lengths = rng.integers(1, keys + 1, (samples, 1))
        mask = (np.arange(keys) < lengths).astype(np.int32)
    elif masked != "no":
        mask = rng.integers(0, 3 if masked == "any" else 1, (samples, keys)).astype(np.int32)
    scale = d**-0.5
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    settings = {"heads": heads, "scale": scale, "causal": causal}
    y = check_isas(lambda plan, ids: add(plan, "attention", *ids, **settings), *inputs)
    if mask is not None:
        inputs[3] = 0.25 * mask.astype(np.float32)  # any number but 0 keeps a key
        computed = check_isas(
            lambda plan, ids: add(plan, "masked_attention", *ids, **settings), *inputs
        )
        assert same_bits(computed, y)
    wanted = attention(q, k, v, heads, scale, mask, causal)
    np.testing.assert_allclose(y, wanted, atol=3e-6)
    assert (y[wanted == 0] == 0).all()


def test_hidden_keys_do_nothing() -> None:
    q, k, v = (normal(2, 20, 16, seed=i) for i in range(3))
    mask = np.ones((2, 20), np.int32)
    mask[:, 5] = mask[1, 17:] = 0
    settings = {"heads": 2, "scale": 0.3, "causal": False}
    y = check_isas(lambda plan, ids: add(plan, "attention", *ids, **settings), q, k, v, mask)
    k[:, 5] = v[:, 5] = np.nan
    k[1, 17:] = v[1, 17:] = np.inf
    again = check_isas(lambda plan, ids: add(plan, "attention", *ids, **settings), q, k, v, mask)
    assert same_bits(y, again)


def test_attention_reads_planes_of_a_wider_value() -> None:
    qkv = normal(2, 37, 3 * 24)
    settings = {"heads": 3, "scale": 0.4, "causal": True}
    y = check_isas(
        lambda plan, ids: add(
            plan,
            "attention",
            *(ids * 3),
            shapes=[(-1, -1, 24)] * 3,
            planes=(24, 48, 0),
            **settings,
        ),
        qkv,
    )
    parts = [np.ascontiguousarray(qkv[:, :, i : i + 24]) for i in (24, 48, 0)]
    alone = run_plan("scalar", lambda plan, ids: add(plan, "attention", *ids, **settings), *parts)
    assert same_bits(y, alone)


@entries
def test_attention_by_table(count: int) -> None:
    q, k, v = (normal(2, 40, 32, seed=i) for i in range(3))
    tables = function_tables(exp=exp_lines(count), reciprocal=reciprocal_lines(count))
    settings = {"heads": 4, "scale": 0.35, "causal": True}
    y = check_isas(
        lambda plan, ids: add(plan, "attention", *ids, tensors=tables, **settings), q, k, v
    )
    exact = run_plan("scalar", lambda plan, ids: add(plan, "attention", *ids, **settings), q, k, v)
    assert 0 < np.abs(y - exact).max() <= 3 * chord_error(count) * np.abs(v).max()


def test_attention_errors() -> None:
    def message(*shapes: tuple[int, ...], heads: int = 2) -> str:
        with pytest.raises(ValueError, match="attention got q") as error:
            run_plan(
                "scalar",
                lambda plan, ids: add(
                    plan, "attention", *ids, heads=heads, scale=1.0, causal=False
                ),
                *(np.zeros(s, np.int32 if len(s) == 2 else np.float32) for s in shapes),
            )
        return str(error.value)

    x = (1, 4, 8)
    assert "8 features are not a multiple of 3 heads" in message(x, x, x, heads=3)
    assert "tokens of k and v, differ" in message(x, x, (1, 5, 8))
    assert "do not exist" in message(x, x, (1, 4, 6))
    assert "a mask (1, 5), which is not (N, tokens of k)" in message(x, x, x, (1, 5))


def test_steps_write_bytes_for_lookup_layers() -> None:
    """A quantised reader gets the same bytes from these steps as from its own quantiser."""
    weight = np.random.default_rng(0).integers(-127, 128, (6, 24)).astype(np.int8)
    dense = {"weight": weight, "scale": np.ones(6, np.float32), "bias": np.zeros(6, np.float32)}

    def int8(plan: _engine.Plan, value: int, grid: tuple[float, int, int]) -> int:
        names = ("act_scale", "act_zero", "act_bits")
        attrs: dict[str, Any] = dict(zip(names, grid, strict=True))
        return add(plan, "int8_linear", value, tensors=dense, **attrs)

    x = normal(2, 70, 24)
    scale, bias = normal(2, 24, seed=3)
    makers: dict[str, Callable[[_engine.Plan, int], int]] = {
        "function": lambda plan, a: function(plan, a, "gelu"),
        "piecewise": lambda plan, a: piecewise(plan, a, *piecewise_table(16)),
        "layer_norm": lambda plan, a: layer_norm(plan, a, scale, bias, 1e-5),
        "rms_norm": lambda plan, a: rms_norm(plan, a, scale, 1e-5),
        "attention": lambda plan, a: add(
            plan, "attention", a, a, a, heads=2, scale=0.3, causal=False
        ),
    }
    grids = ((0.05, 64, 7), (0.3, 8, 4))
    for name, make in makers.items():
        for isa in ISAS:
            for floats in (False, True):
                plan = _engine.Plan(isa, 1)
                value = make(plan, plan.input())
                outputs = [int8(plan, value, grid) for grid in grids]
                plan.finish([*outputs, value] if floats else outputs)
                labels = plan.profile([x], 1)[0]
                assert len(labels) == 3, (name, labels)  # nobody quantises in between
                made = plan.run([x])
                alone = run_plan(isa, lambda plan, ids, make=make: make(plan, ids[0]), x)
                if floats:
                    assert same_bits(made[2], alone)
                for y, grid in zip(made, grids, strict=False):
                    wanted = run_plan(
                        isa,
                        lambda plan, ids, grid=grid: int8(plan, ids[0], grid),
                        alone,
                    )
                    assert same_bits(y, wanted), (name, isa)

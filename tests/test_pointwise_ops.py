"""Choices, comparisons, constants, cumulative sums and computed ids: rules, reference, engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder
from sequences import check, every_pointwise_op_graph, single
from sweeps import sweep

from lutra import GraphError, Session, run_reference, runnable_isas
from lutra.errors import EngineError, InputError
from lutra.format import file_version, graph_from_bytes, graph_to_bytes
from lutra.graph import Graph
from lutra.ops.pointwise import BENDS, CHOICES

F = np.float32
SPECIAL = np.array([-np.inf, -3.5, -2.5, -0.5, -0.0, 0.0, 0.5, 1.5, 3.0, np.inf, np.nan], F)


def bits_of_all(graph: Graph, *inputs: Array) -> Array:
    """What the reference gives, to the bit what the engine gives everywhere."""
    (want,) = run_reference(graph, inputs).values()
    feeds = {value.name: x for value, x in zip(graph.inputs, inputs, strict=True)}
    for isa in runnable_isas():
        for threads in (1, 3):
            session = Session(graph, isa=isa, threads=threads, check_finite=False)
            (got,) = session.run(None, feeds)
            np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
            known = ~np.isnan(want)
            np.testing.assert_array_equal(got[known], want[known], isa)
            np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(want[known]), isa)
    return want


def numbers(*shape: int, seed: int = 0) -> Array:
    x = np.random.default_rng(seed).normal(size=shape).astype(F) * F(3)
    flat = x.reshape(-1)
    flat[: len(SPECIAL)] = SPECIAL[: flat.size]
    return x


@pytest.mark.parametrize("op", CHOICES)
@sweep(
    ("a", "b"),
    [
        ((2, 13), (2, 13)),
        ((2, 3, 7), (2, 1, 7)),
        ((2, 1, 7), (2, 5, 1)),
        ((3, 4, 5, 9), (3, 4, 1, 1)),
        ((2, 40, 70), (2, 40, 70)),
    ],
)
def test_choices(op: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    graph = single(op, ("a", (None, *a[1:])), ("b", (None, *b[1:])))
    x, y = numbers(*a), numbers(*b, seed=1)[..., ::-1].copy()
    got = bits_of_all(graph, x, y)
    with np.errstate(invalid="ignore"):
        wanted = {
            "maximum": np.maximum,
            "minimum": np.minimum,
            "greater": np.greater,
            "greater_equal": np.greater_equal,
            "equal": np.equal,
        }[op](x, y)
    np.testing.assert_array_equal(got, wanted.astype(F))


@pytest.mark.parametrize("op", [*BENDS, "leaky_relu"])
@sweep("shape", [(3, 11), (2, 5, 7), (1, 3, 4, 50)])
def test_functions_of_one_value(op: str, shape: tuple[int, ...]) -> None:
    attrs = {"slope": 0.3} if op == "leaky_relu" else {}
    bits_of_all(single(op, ("x", (None, *shape[1:])), **attrs), numbers(*shape))


def test_what_becomes_of_special_values() -> None:
    x = SPECIAL[None]
    wanted: dict[str, list[float]] = {
        "abs": [np.inf, 3.5, 2.5, 0.5, 0, 0, 0.5, 1.5, 3, np.inf, np.nan],
        "sign": [-1, -1, -1, -1, 0, 0, 1, 1, 1, 1, 0],
        "round": [-np.inf, -4, -2, 0, 0, 0, 0, 2, 3, np.inf, np.nan],
        "floor": [-np.inf, -4, -3, -1, 0, 0, 0, 1, 3, np.inf, np.nan],
        "ceil": [-np.inf, -3, -2, 0, 0, 0, 1, 2, 3, np.inf, np.nan],
    }
    for op, values in wanted.items():
        got = Session(single(op, ("x", (None, 11))), check_finite=False)(x)
        np.testing.assert_array_equal(got[0], values, op)


def test_sines_of_any_size() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=500) * size for size in (1, 30, 1e3, 1e5)]).astype(F)
    far = np.array([1e9, -3e20, 3e38, np.inf, -np.inf, np.nan], F)
    for op, want in (("sin", np.sin), ("cos", np.cos)):
        got = bits_of_all(single(op, ("x", (None, len(x)))), x[None])[0]
        np.testing.assert_allclose(got, want(x.astype(np.float64)), atol=1e-7)
        got = bits_of_all(single(op, ("x", (None, len(far)))), far[None])[0]
        assert bool((np.abs(got[:3]) <= 1).all())
        assert bool(np.isnan(got[3:]).all())


@sweep(
    ("condition", "a", "b"),
    [
        ((2, 13), (2, 13), (2, 13)),
        ((2, 1, 7), (2, 4, 7), (2, 4, 1)),
        ((2, 4, 1), (2, 1, 1), (2, 4, 7)),
        ((2, 3, 5, 6), (2, 1, 5, 6), (2, 3, 1, 1)),
        ((1, 30, 100), (1, 30, 100), (1, 1, 1)),
    ],
)
def test_where(condition: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> None:
    shapes = [("c", condition), ("a", a), ("b", b)]
    graph = single("where", *((name, (None, *shape[1:])) for name, shape in shapes))
    c = (np.random.default_rng(3).normal(size=condition) > 0).astype(F)
    x, y = numbers(*a), numbers(*b, seed=2)
    np.testing.assert_array_equal(bits_of_all(graph, c, x, y), np.where(c != 0, x, y))


@sweep("shape", [(), (5,), (2, 3), (2, 3, 4), (3, 1, 2, 2)])
def test_constants(shape: tuple[int, ...]) -> None:
    value = np.arange(int(np.prod(shape)), dtype=F) - 1
    graph = single("constant", ("x", (None, 4)), tensors={"value": value}, shape=shape)
    got = bits_of_all(graph, np.zeros((3, 4), F))
    np.testing.assert_array_equal(got, np.broadcast_to(value.reshape(shape), (3, *shape)))


@sweep(("shape", "axis"), [((2, 9), 1), ((2, 3, 70), 1), ((2, 3, 70), 2), ((2, 3, 4, 5), 3)])
def test_cumulative_sums(shape: tuple[int, ...], axis: int) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(F)
    for known in (shape[1:], (None,) * (len(shape) - 1)):
        got = bits_of_all(single("cumsum", ("x", (None, *known)), axis=axis), x)
        np.testing.assert_allclose(got, np.cumsum(x, axis), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "shapes", "attrs", "message"),
    [
        ("maximum", [(3, 4), (3, 5)], {}, "compares 'x0' of shape .* the same, or 1"),
        ("greater", [(3,), (3, 1)], {}, "the same, or 1"),
        ("where", [(3, 4), (3, 5), (3, 4)], {}, "chooses by values of the shapes"),
        ("where", [(3,), (3,)], {}, "has 2 inputs; give it 3"),
        ("constant", [(3,)], {"shape": (2, 3), "value": np.ones(5, F)}, "5 numbers and shape"),
        ("constant", [(3,)], {"shape": (0,), "value": np.ones(1, F)}, "at least 1"),
        ("cumsum", [(3,)], {"axis": 2}, "must be in 1..1"),
        ("leaky_relu", [(3,)], {"slope": 1e39}, "must be a float32 number"),
        ("abs", [(3,), (3,)], {}, "has 2 inputs"),
    ],
)
def test_errors(op: str, shapes: list[Any], attrs: dict[str, Any], message: str) -> None:
    tensors = {"value": attrs.pop("value")} if "value" in attrs else None
    inputs = [(f"x{i}", (None, *shape)) for i, shape in enumerate(shapes)]
    with pytest.raises(GraphError, match=message):
        single(op, *inputs, tensors=tensors, **attrs).validate()


def test_sizes_that_differ_in_a_run_only() -> None:
    graph = single("where", *((name, (None, None)) for name in "cab"))
    x, y = np.ones((2, 3), F), np.ones((2, 1), F)
    bits_of_all(graph, x, x, x)
    for feeds in ((y, x, x), (x, y, x), (x, x, y)):
        with pytest.raises((InputError, GraphError), match="the same, or 1"):
            Session(graph).run(None, dict(zip("cab", feeds, strict=True)))


def test_the_graph_of_all_in_a_file() -> None:
    graph = every_pointwise_op_graph()
    assert file_version(graph) == 3
    again = graph_from_bytes(graph_to_bytes(graph))
    check(again, np.random.default_rng(0).normal(size=(3, 5, 6)).astype(F))


@pytest.mark.parametrize("op", ["leaky_relu", "hardswish", "abs", "elu", "softplus", "mish"])
def test_behind_layers(op: str) -> None:
    b = Builder(("x", (None, 4, 9, 8)))
    y = b.add(op, b.pq_conv2d("x", 4, 7, (3, 3), padding=(1, 1)))
    y = b.add(op, b.int8_conv2d(y, 7, 6))
    graph = b.graph(b.add("mean", y, axes=(2, 3)))
    check(graph, np.random.default_rng(0).normal(size=(3, 4, 9, 8)).astype(F), tolerance=2e-5)


# ---- computed ids -------------------------------------------------------------------------------


def embedded(dtype: Any = F) -> Graph:
    b = Builder(("ids", (None, None), "int32"))
    weight = b.rng.normal(size=(9, 4)).astype(F)
    tensors = {"weight": weight}
    if dtype == np.int8:
        tensors = {"weight": (weight * 30).astype(np.int8), "scale": np.full(9, 0.1, F)}
    moved = b.add("affine_scalar", b.add("cast", "ids"), scale=1.0, bias=2.0)
    return b.graph(b.add("embedding", moved, tensors=tensors))


@pytest.mark.parametrize("dtype", [F, np.int8])
def test_embeddings_of_computed_ids(dtype: Any) -> None:
    graph = embedded(dtype)
    assert file_version(graph) == 3
    ids = np.random.default_rng(0).integers(-2, 7, (3, 20)).astype(np.int32)
    weight = graph.tensors[graph.nodes[-1].tensors["weight"]].astype(F)
    scale = F(0.1) if dtype == np.int8 else F(1)
    np.testing.assert_array_equal(bits_of_all(graph, ids), weight[ids + 2] * scale)


@pytest.mark.parametrize("number", [-1.0, 9.0, 3e9, np.nan, np.inf, -np.inf])
def test_computed_ids_outside_the_table(number: float) -> None:
    weight = {"weight": np.ones((9, 4), F)}
    graph = single("embedding", ("x", (None, 2)), tensors=weight)
    x = np.array([[1.0, number]], F)
    with pytest.raises((InputError, EngineError), match=r"the id .* 9\s?rows"):
        Session(graph, check_finite=False)(x)
    with pytest.raises(InputError, match="9 rows"):
        run_reference(graph, [x])

"""Layers on rows of any rank, and functions in their steps, on plans built by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder, int8_tensors, lookup_tensors, pq_tensors
from plans import (
    ISAS,
    SEQUENCES,
    F,
    Steps,
    add,
    function,
    int8,
    normal,
    piecewise,
    plan,
    run,
    steps_of,
)
from sweeps import sweep

from lutra import Session, _engine

# ---- layers on rows of any rank -----------------------------------------------------------------


def _tensors(kind: str, features: int, outputs: int) -> dict[str, Array]:
    rng = np.random.default_rng(7)
    if kind == "pq":
        return pq_tensors(rng, features, outputs, width=4)
    if kind == "int8":
        return int8_tensors(rng, (outputs, features))
    if kind == "lookup":
        return lookup_tensors(rng, features, outputs, zero=8)
    weight = rng.normal(size=(outputs, features)) / np.sqrt(features)
    return {"weight": weight.astype(F), "bias": rng.normal(size=outputs).astype(F)}


def _layer(p: _engine.Plan, kind: str, x: int, t: dict[str, Array], **more: Any) -> int:
    grid: dict[str, Any] = {"act_scale": 0.05, "act_zero": 64, "act_bits": 7}
    if kind == "pq":
        width = t["centroids"].shape[0] * t["centroids"].shape[2]
        return add(p, "pq_linear", x, tensors=t, **grid, in_features=width, **more)
    if kind == "int8":
        return add(p, "int8_linear", x, tensors=t, **grid, **more)
    if kind == "lookup":
        grid = {"act_scale": 0.25, "act_zero": 8, "act_bits": 4, "weight_bits": 4}
        width = 2 * t["weight"].shape[1]
        return add(p, "lookup_linear", x, tensors=t, **grid, in_features=width, **more)
    return add(p, "linear", x, tensors=t, **more)


@pytest.mark.parametrize("kind", ["pq", "int8", "lookup", "linear"])
@sweep("shape", [(1, 1), (1, 3), (1, 512), (2, 7), (3, 64), (5, 33), (2, 3, 5), (2, 3, 5, 2)])
@sweep("residual", [False, True])
def test_layers_treat_every_row_alike(kind: str, shape: tuple[int, ...], residual: bool) -> None:
    features, outputs = 20, 37
    tensors = _tensors(kind, features, outputs)
    x, r = normal(*shape, features), normal(*shape, outputs, seed=1)

    def steps(p: _engine.Plan, v: list[int]) -> int:
        more: dict[str, Any] = {"residual": v[1]} if residual else {}
        return _layer(p, kind, v[0], tensors, clamp=(-0.9, 1.1), **more)

    inputs = (x, r) if residual else (x,)
    got = run(steps, *inputs)
    rows = [np.ascontiguousarray(a.reshape(-1, a.shape[-1])) for a in inputs]
    want = run(steps, *rows, threads=(1,))
    np.testing.assert_array_equal(got, want.reshape(*shape, outputs))
    one = run(steps, *(a[:1] for a in rows), threads=(1,))
    np.testing.assert_array_equal(one, want[:1])


@pytest.mark.parametrize("shape", [(3,), (1, 1), (2, 70), (2, 3, 5)])
def test_dense_layers_write_grids_for_their_readers(shape: tuple[int, ...]) -> None:
    dense, after = _tensors("linear", 20, 24), int8_tensors(np.random.default_rng(0), (9, 24))
    x = normal(*shape, 20)
    made = run(lambda p, v: _layer(p, "linear", v[0], dense, clamp=(-1.0, 2.0)), x)
    want = run(lambda p, v: int8(p, v[0], after), made)
    got = run(lambda p, v: int8(p, _layer(p, "linear", v[0], dense, clamp=(-1.0, 2.0)), after), x)
    np.testing.assert_array_equal(got, want)


def test_one_plan_runs_every_length() -> None:
    weight, tensors = normal(50, 20), _tensors("pq", 20, 20)
    positions = normal(512, 20, seed=2)

    def steps(p: _engine.Plan, v: list[int]) -> int:
        x = add(p, "embedding", v[0], tensors={"weight": weight})
        x = add(p, "position_embedding", x, tensors={"weight": positions})
        return add(p, "masked_mean", _layer(p, "pq", x, tensors, residual=x), v[1])

    rng = np.random.default_rng(0)
    made = plan(ISAS[-1], 3, ["int32", "int32"], steps)
    for batch, length in (*SEQUENCES, *SEQUENCES[::-1]):
        ids = rng.integers(0, 50, (batch, length), dtype=np.int32)
        mask = np.ones((batch, length), np.int32)
        mask[:, length // 2 + 1 :] = 0
        (got,) = made.run([ids, mask])
        for n in range(batch):  # samples do not depend on each other, nor on what is masked
            cut = np.ascontiguousarray(ids[n : n + 1, : length // 2 + 1])
            want = plan("scalar", 1, ["int32", "int32"], steps).run([cut, np.ones_like(cut)])[0]
            np.testing.assert_array_equal(got[n : n + 1], want)


# ---- functions in the steps of layers -----------------------------------------------------------

FUNCTIONS: dict[str, Callable[[_engine.Plan, int], int]] = {
    "gelu": lambda p, x: function(p, x, "gelu"),
    "piecewise": lambda p, x: piecewise(
        p, x, np.linspace(-3, 3, 15).astype(F), normal(16), normal(16, seed=1)
    ),
    "affine_scalar": lambda p, x: add(p, "affine_scalar", x, scale=-2.0, bias=0.5),
}


@pytest.mark.parametrize("kind", ["pq", "int8", "lookup"])
@pytest.mark.parametrize("name", FUNCTIONS)
@sweep("shape", [(2,), (1, 1), (1, 16), (2, 70), (5, 64), (2, 3, 5)])
@sweep("residual", [False, True])
def test_layers_take_functions_over(
    kind: str, name: str, shape: tuple[int, ...], residual: bool
) -> None:
    features, outputs = 20, 37
    tensors = _tensors(kind, features, outputs)
    after = [int8_tensors(np.random.default_rng(i), (9, outputs)) for i in range(3)]
    x, r = normal(*shape, features), normal(*shape, outputs, seed=1)
    inputs = [x, r] if residual else [x]

    def layer(p: _engine.Plan, v: list[int]) -> int:
        p.label("layer")
        more: dict[str, Any] = {"residual": v[1]} if residual else {}
        y = _layer(p, kind, v[0], tensors, clamp=(-0.9, 1.1), **more)
        p.label("function")
        return y

    def apart(p: _engine.Plan, v: list[int]) -> list[int]:
        y = layer(p, v)
        return [FUNCTIONS[name](p, y), y]

    def floats(p: _engine.Plan, v: list[int]) -> int:
        return FUNCTIONS[name](p, layer(p, v))

    def grids(count: int, and_floats: bool) -> Steps:
        def steps(p: _engine.Plan, v: list[int]) -> list[int]:
            y = floats(p, v)
            made = [int8(p, y, after[i], 0.02 * (i + 1)) for i in range(count)]
            return [*made, y] if and_floats else made

        return steps

    want = run(apart, *inputs)
    np.testing.assert_array_equal(run(floats, *inputs), want)
    dtypes = ["float32"] * len(inputs)
    assert steps_of(plan("scalar", 1, dtypes, floats), inputs)[-1] == "layer + function"
    assert steps_of(plan("scalar", 1, dtypes, apart), inputs)[-2:] == ["layer", "function"]
    read = [run(lambda p, v, i=i: int8(p, v[0], after[i], 0.02 * (i + 1)), want) for i in range(3)]
    for count, and_floats in ((1, False), (2, True), (3, False)):
        for isa in ISAS:
            for threads in (1, 3):
                got = plan(isa, threads, dtypes, grids(count, and_floats)).run(inputs)
                for a, b in zip(got, [*read[:count], want], strict=False):
                    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("op", ["pq_conv2d", "int8_conv2d", "lookup_conv2d"])
@pytest.mark.parametrize("batch", [1, 3])
def test_convolutions_take_functions_over(op: str, batch: int) -> None:
    b = Builder(("x", (None, 6, 9, 7)), seed=1)
    groups = {"groups": 3} if op == "int8_conv2d" else {}
    y = getattr(b, op)("x", 6, 21, padding=(1, 1), **groups)
    z = b.add("gelu", y)
    feeds = {"x": normal(batch, 6, 9, 7)}
    want = None
    for isa in ISAS:
        for threads in (1, 3):
            apart = Session(b.graph(z, y), isa=isa, threads=threads).run(None, feeds)[0]
            fused = Session(b.graph(z), isa=isa, threads=threads).run(None, feeds)[0]
            want = apart if want is None else want
            np.testing.assert_array_equal(apart, want)
            np.testing.assert_array_equal(fused, want)


def test_a_chain_of_functions_is_taken_over() -> None:
    tensors = _tensors("pq", 20, 12)

    def steps(p: _engine.Plan, v: list[int]) -> int:
        p.label("layer")
        y = _layer(p, "pq", v[0], tensors)
        p.label("one")
        y = add(p, "affine_scalar", y, scale=2.0, bias=0.0)
        p.label("two")
        return add(p, "affine_scalar", y, scale=1.0, bias=-1.0)

    x = normal(2, 7, 20)
    want = run(lambda p, v: _layer(p, "pq", v[0], tensors), x) * F(2) - F(1)
    np.testing.assert_array_equal(run(steps, x), want)
    assert steps_of(plan("scalar", 1, ["float32"], steps), [x]) == ["input", "layer + one + two"]

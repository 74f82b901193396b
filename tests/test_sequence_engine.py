"""Engine steps of sequences and of broadcasting, on plans built by hand, against NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder, int8_tensors, lookup_tensors, pq_tensors

from lutra import Session, _engine, runnable_isas

F = np.float32
ISAS = runnable_isas()
Steps = Callable[[_engine.Plan, list[int]], "int | Sequence[int]"]


def plan(isa: str, threads: int, dtypes: Sequence[str], steps: Steps) -> _engine.Plan:
    """A plan with an input of each dtype and the outputs that ``steps`` names."""
    made = _engine.Plan(isa, threads)
    outputs = steps(made, [made.input(dtype) for dtype in dtypes])
    made.finish([outputs] if isinstance(outputs, int) else list(outputs))
    return made


def run(steps: Steps, *inputs: Array, threads: Sequence[int] = (1, 3)) -> Array:
    """The first output, whose bits all instruction sets and numbers of threads must agree on."""
    dtypes = [str(x.dtype) for x in inputs]
    arrays = [np.ascontiguousarray(x) for x in inputs]
    results = [plan(isa, count, dtypes, steps).run(arrays) for isa in ISAS for count in threads]
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))
    return results[0][0]


def steps_of(made: _engine.Plan, arrays: list[Array]) -> list[str]:
    """What the steps are called."""
    return [label for label, _, _ in made.profile(arrays, 1)[0]]


def close(got: Array, want: Array) -> None:
    """Equal to float32 rounding of sums, relative to the largest value."""
    assert got.dtype == F
    assert got.shape == want.shape
    top = np.abs(want).max() if want.size else 0.0
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(float(top), 1e-3))


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


SEQUENCES = [(1, 1), (1, 512), (2, 7), (5, 33), (3, 64)]


# ---- int32 inputs -------------------------------------------------------------------------------


def test_integers_are_inputs_of_steps_that_read_them() -> None:
    made = _engine.Plan("scalar", 1)
    ids, x = made.input("int32"), made.input()
    with pytest.raises(ValueError, match="input 0 is int32, and the step reads float32"):
        made.clamp(ids, 0.0, 1.0)
    with pytest.raises(ValueError, match="input 1 is float32, and the step reads int32"):
        made.masked_mean(x, x)
    with pytest.raises(ValueError, match="an input of int32"):
        made.finish([ids])
    with pytest.raises(ValueError, match="int64"):
        made.input("int64")


def test_arrays_have_the_dtype_of_the_input() -> None:
    made = plan("scalar", 1, ["int32"], lambda p, v: p.cast(v[0]))
    with pytest.raises(ValueError, match="input 0 must be int32"):
        made.run([np.zeros((2, 3), F)])
    with pytest.raises(ValueError, match="wrong number of inputs"):
        made.run([])
    made = plan("scalar", 1, ["float32"], lambda p, v: p.affine_scalar(v[0], 1.0, 0.0))
    for dtype in (np.int32, np.float64):
        with pytest.raises(ValueError, match="input 0 must be float32"):
            made.run([np.zeros((2, 3), dtype)])
    read_only = np.zeros((2, 3), F)
    read_only.flags.writeable = False
    assert made.run([read_only])[0].shape == (2, 3)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4), (2, 3, 4, 5)])
def test_cast(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(-(2**31), 2**31, shape, dtype=np.int32)
    np.testing.assert_array_equal(run(lambda p, v: p.cast(v[0]), x), x.astype(F))


# ---- embeddings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), *SEQUENCES, (2, 3, 5), (2, 3, 2, 2)])
@pytest.mark.parametrize("features", [1, 7, 64])
def test_embedding(shape: tuple[int, ...], features: int) -> None:
    weight = normal(50, features)
    ids = np.random.default_rng(1).integers(0, 50, shape, dtype=np.int32)
    ids.flat[0], ids.flat[-1] = 0, 49
    got = run(lambda p, v: p.embedding(v[0], weight), ids)
    np.testing.assert_array_equal(got, weight[ids])
    table = np.random.default_rng(2).integers(-127, 128, weight.shape).astype(np.int8)
    scale = np.random.default_rng(3).uniform(0.001, 0.1, 50).astype(F)
    got = run(lambda p, v: p.embedding(v[0], table, scale), ids)
    np.testing.assert_array_equal(got, table[ids].astype(F) * scale[ids][..., None])


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_id_outside_the_table(bad: int, threads: int) -> None:
    def steps(p: _engine.Plan, v: list[int]) -> int:
        p.label("words")
        return p.embedding(v[0], normal(50, 4))

    made = plan("scalar", threads, ["int32"], steps)
    ids = np.zeros((3, 200), np.int32)
    ids[2, 150] = bad
    with pytest.raises(ValueError, match=rf"words: the id {bad} is outside its table of 50 rows"):
        made.run([ids])
    ids[2, 150] = 49
    assert made.run([ids])[0].shape == (3, 200, 4)  # the plan still runs


def test_embedding_tables_fit() -> None:
    made = _engine.Plan("scalar", 1)
    ids = made.input("int32")
    table = np.zeros((5, 3), np.int8)
    with pytest.raises(ValueError, match="needs a scale for each of its rows"):
        made.embedding(ids, table)
    with pytest.raises(ValueError, match="needs a scale for each of its rows"):
        made.embedding(ids, table, np.ones(4, F))
    with pytest.raises(ValueError, match="takes no scale"):
        made.embedding(ids, table.astype(F), np.ones(5, F))
    with pytest.raises(ValueError, match="float32 or int8"):
        made.embedding(ids, table.astype(np.int16))


@pytest.mark.parametrize(("batch", "length"), SEQUENCES)
def test_position_embedding(batch: int, length: int) -> None:
    x, weight = normal(batch, length, 12), normal(512, 12, seed=1)
    got = run(lambda p, v: p.position_embedding(v[0], weight), x)
    np.testing.assert_array_equal(got, x + weight[:length])


@pytest.mark.parametrize(("batch", "length"), SEQUENCES)
def test_embeddings_take_positions_over(batch: int, length: int) -> None:
    weight, positions = normal(50, 12), normal(512, 12, seed=1)
    ids = np.random.default_rng(1).integers(0, 50, (batch, length), dtype=np.int32)

    def steps(p: _engine.Plan, v: list[int]) -> int:
        p.label("words")
        x = p.embedding(v[0], weight)
        p.label("positions")
        return p.position_embedding(x, positions)

    np.testing.assert_array_equal(run(steps, ids), weight[ids] + positions[:length])
    made = plan("scalar", 1, ["int32"], steps)
    assert steps_of(made, [ids]) == ["words + positions"]
    with pytest.raises(ValueError, match=r"words \+ positions: sequences of 513 .* is 512"):
        made.run([np.zeros((1, 513), np.int32)])


def test_a_sequence_longer_than_the_positions() -> None:
    def steps(p: _engine.Plan, v: list[int]) -> int:
        p.label("positions")
        return p.position_embedding(v[0], normal(16, 4))

    made = plan("scalar", 1, ["float32"], steps)
    with pytest.raises(ValueError, match=r"positions: sequences of 17 .* is 16"):
        made.run([normal(1, 17, 4)])
    with pytest.raises(ValueError, match="takes \\(N, T, 4\\)"):
        made.run([normal(1, 16, 5)])


# ---- pooling and picking ------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "length"), SEQUENCES)
@pytest.mark.parametrize("features", [1, 4, 13])
def test_masked_mean(batch: int, length: int, features: int) -> None:
    x = normal(batch, length, features)
    mask = np.random.default_rng(1).integers(0, 2, (batch, length), dtype=np.int32)
    mask[0] = 0  # an empty text
    got = run(lambda p, v: p.masked_mean(*v), x, mask)
    summed = (x.astype(np.float64) * mask[..., None]).sum(1)
    close(got, (summed / np.maximum(mask.sum(1, keepdims=True), 1e-9)).astype(F))
    assert not got[0].any()


def test_masks_of_other_numbers_and_shapes() -> None:
    x, mask = normal(2, 3, 4), np.array([[2, 0, -1], [3, 3, 3]], np.int32)
    got = run(lambda p, v: p.masked_mean(*v), x, mask)
    close(got[:1], ((2.0 * x[:1, 0] - x[:1, 2]) / 1.0).astype(F))
    made = plan("scalar", 1, ["float32", "int32"], lambda p, v: p.masked_mean(*v))
    with pytest.raises(ValueError, match=r"got a mask \(2, 4\)"):
        made.run([x, np.ones((2, 4), np.int32)])


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 5), 1), ((2, 5, 4), 1), ((2, 4, 5), 2), ((2, 5, 3, 4), 1), ((2, 3, 4, 5), 3)],
)
def test_gather(shape: tuple[int, ...], axis: int) -> None:
    x = normal(*shape)
    for index in ([0], [4, 0, 0, 2], list(range(5))):
        picked = np.array(index, np.int32)
        got = run(lambda p, v, i=picked: p.gather(v[0], i, axis), x)
        np.testing.assert_array_equal(got, np.take(x, picked, axis))
    for bad in (-1, 5):
        made = plan(
            "scalar", 1, ["float32"], lambda p, v, b=bad: p.gather(v[0], np.array([b], "i4"), axis)
        )
        with pytest.raises(ValueError, match=f"the index {bad} is outside axis {axis}"):
            made.run([x])


# ---- arithmetic ---------------------------------------------------------------------------------

PAIRS = [
    ((3, 5), (3, 5)),
    ((3, 5), (1, 5)),
    ((3, 1), (3, 5)),
    ((2, 7, 5), (2, 7, 5)),
    ((2, 7, 5), (2, 1, 5)),
    ((2, 7, 5), (2, 7, 1)),
    ((2, 1, 5), (2, 7, 1)),
    ((1, 7, 5), (4, 7, 5)),
    ((1, 1, 1), (4, 7, 5)),
    ((2, 3, 4, 5), (2, 3, 4, 5)),
    ((2, 3, 1, 5), (2, 1, 4, 1)),
    ((2, 3, 4, 5), (1, 3, 1, 1)),
    ((2, 3, 2, 2, 3), (2, 1, 2, 2, 1)),
    ((1, 1), (1, 1)),
    ((3, 70, 65), (3, 70, 1)),
]
OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


@pytest.mark.parametrize(("a", "b"), PAIRS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_pair(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    x, y = normal(*a), normal(*b, seed=1)
    for left, right in ((x, y), (y, x)):
        got = run(lambda p, v: p.pair(name, *v), left, right)
        np.testing.assert_array_equal(got, OPERATIONS[name](left, right))


def test_pairs_that_do_not_fit() -> None:
    made = plan("scalar", 1, ["float32"] * 2, lambda p, v: p.pair("add", *v))
    for a, b in (((2, 3), (2, 4)), ((2, 3), (2, 3, 1)), ((2, 3), (3, 3))):
        with pytest.raises(ValueError, match="add: the shapes"):
            made.run([normal(*a), normal(*b)])
    with pytest.raises(ValueError, match="there are add, sub, mul and div"):
        _engine.Plan("scalar", 1).pair("pow", 0, 0)


def test_affine_scalar() -> None:
    x = normal(3, 70, 65)
    got = run(lambda p, v: p.affine_scalar(v[0], -1.5, 0.25), x)
    np.testing.assert_array_equal(got, x * F(-1.5) + F(0.25))


def int8(p: _engine.Plan, x: int, tensors: dict[str, Array], grid: float = 0.05) -> int:
    return p.int8_linear(
        x,
        tensors["weight"],
        tensors["scale"],
        tensors["bias"],
        act_scale=grid,
        act_zero=64,
        act_bits=7,
    )


@pytest.mark.parametrize("shape", [(3, 20), (3, 70, 20), (2, 3, 4, 20)])
@pytest.mark.parametrize("floats", [False, True])
def test_arithmetic_writes_grids_for_its_readers(shape: tuple[int, ...], floats: bool) -> None:
    tensors = int8_tensors(np.random.default_rng(0), (9, 20))

    def fused(p: _engine.Plan, v: list[int]) -> list[int]:
        made = p.affine_scalar(p.pair("mul", *v), 2.0, 0.5)
        outputs = [int8(p, made, tensors, scale) for scale in (0.05, 0.08, 0.02)]
        return [*outputs, made] if floats else outputs

    def apart(p: _engine.Plan, v: list[int]) -> list[int]:
        return [int8(p, v[0], tensors, scale) for scale in (0.05, 0.08, 0.02)]

    x, y = normal(*shape), normal(*shape, seed=1)
    made = (x * y) * F(2) + F(0.5)
    for isa in ISAS:
        for threads in (1, 3):
            got = plan(isa, threads, ["float32"] * 2, fused).run([x, y])
            want = plan(isa, threads, ["float32"], apart).run([made])
            for a, b in zip(got[:3], want, strict=True):
                np.testing.assert_array_equal(a, b)


# ---- matmul -------------------------------------------------------------------------------------

PRODUCTS = [  # batch axes of a and of b, M, K, P
    ((1,), (1,), 1, 1, 1),
    ((2,), (2,), 7, 5, 3),
    ((1,), (5,), 33, 17, 65),
    ((2,), (2,), 128, 64, 130),
    ((2, 3), (2, 3), 7, 5, 9),
    ((2, 3), (2, 1), 65, 32, 66),
    ((1, 3), (2, 3), 1, 8, 1),
    ((2, 1, 3), (2, 2, 3), 5, 4, 6),
    ((1, 12), (1, 12), 512, 32, 20),
]


@pytest.mark.parametrize(("a", "b", "m", "k", "p"), PRODUCTS)
@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)])
def test_matmul(
    a: tuple[int, ...], b: tuple[int, ...], m: int, k: int, p: int, turned: tuple[bool, bool]
) -> None:
    x, y = normal(*a, m, k), normal(*b, k, p, seed=1)
    want = (x.astype(np.float64) @ y.astype(np.float64)).astype(F)
    left = x.swapaxes(-1, -2) if turned[0] else x
    right = y.swapaxes(-1, -2) if turned[1] else y
    close(run(lambda q, v: q.matmul(*v, *turned), left, right), want)


def test_matmuls_that_do_not_fit() -> None:
    made = plan("scalar", 1, ["float32"] * 2, lambda p, v: p.matmul(*v, False, False))
    for a, b, what in (
        ((2, 3, 4), (2, 3, 4), "inner sizes"),
        ((2, 3, 4), (3, 4, 5), "neither equal nor 1"),
        ((2, 3), (3, 4), "rank of at least 3"),
        ((2, 3, 4), (2, 2, 4, 5), "same rank"),
    ):
        with pytest.raises(ValueError, match=what):
            made.run([normal(*a), normal(*b)])


# ---- moving values ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 4), (0, 1)),
        ((2, 5, 7), (0, 2, 1)),
        ((2, 5, 3, 7), (0, 2, 1, 3)),
        ((2, 3, 5, 7), (0, 3, 1, 2)),
        ((2, 3, 5, 7), (0, 2, 3, 1)),
        ((2, 3, 5, 4, 6), (0, 4, 2, 3, 1)),
        ((1, 40, 70), (0, 2, 1)),
    ],
)
def test_transpose(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    x = normal(*shape)
    got = run(lambda p, v: p.transpose(v[0], axes), x)
    np.testing.assert_array_equal(got, x.transpose(axes))


@pytest.mark.parametrize("axes", [(1, 0), (0, 0), (0, 2)])
def test_transposes_keep_the_batch(axes: tuple[int, ...]) -> None:
    made = _engine.Plan("scalar", 1)
    with pytest.raises(ValueError, match="transpose"):
        made.transpose(made.input(), axes)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((2, 1), (5,)), ((2, 1, 3), (4, 0)), ((2, 3, 1), (3, 5)), ((2, 1, 3, 1), (2, 0, 4))],
)
def test_expand(shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    x = normal(*shape)
    want = (
        shape[0],
        *(old if new == 0 else new for old, new in zip(shape[1:], sizes, strict=True)),
    )
    got = run(lambda p, v: p.expand(v[0], sizes), x)
    np.testing.assert_array_equal(got, np.broadcast_to(x, want))


def test_only_axes_of_one_expand() -> None:
    made = plan("scalar", 1, ["float32"], lambda p, v: p.expand(v[0], (4, 0)))
    with pytest.raises(ValueError, match=r"axis 1 of .* cannot become 4"):
        made.run([normal(2, 3, 5)])


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((3, 9), (1,)), ((2, 5, 7), (2,)), ((2, 5, 7), (1,)), ((2, 3, 4, 5), (1, 3))],
)
@pytest.mark.parametrize("keepdims", [False, True])
def test_l2_norm(shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool) -> None:
    x = normal(*shape)
    want = np.sqrt((x.astype(np.float64) ** 2).sum(axes, keepdims=keepdims)).astype(F)
    close(run(lambda p, v: p.l2_norm(v[0], axes, keepdims), x), want)


# ---- values of three axes in the steps that were there before -----------------------------------


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 6, 4), (3, 1, 8), (3, 8, 1)])
def test_steps_on_three_axes(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    scale, bias = normal(shape[1]), normal(shape[1], seed=1)
    got = run(lambda p, v: p.affine(v[0], scale, bias), x)
    np.testing.assert_array_equal(got, x * scale[:, None] + bias[:, None])
    for axis in (1, 2):
        e = np.exp(x - x.max(axis, keepdims=True))
        close(run(lambda p, v, a=axis: p.softmax(v[0], a), x), e / e.sum(axis, keepdims=True))
        got = run(lambda p, v, a=axis: p.concat([v[0], v[0]], a), x)
        np.testing.assert_array_equal(got, np.concatenate([x, x], axis))
        stop = shape[axis]
        got = run(lambda p, v, a=axis, s=stop: p.slice(v[0], a, 0, s, 2), x)
        np.testing.assert_array_equal(got, x[:, ::2] if axis == 1 else x[:, :, ::2])
    got = run(lambda p, v: p.pad(v[0], (0, 1, 2), (0, 3, 0), 0.5), x)
    np.testing.assert_array_equal(got, np.pad(x, ((0, 0), (1, 3), (2, 0)), constant_values=0.5))
    for axes in ((1,), (2,), (1, 2)):
        for keep in (False, True):
            got = run(lambda p, v, a=axes, k=keep: p.mean(v[0], a, k), x)
            close(got, x.astype(np.float64).mean(axes, keepdims=keep).astype(F))
            got = run(lambda p, v, a=axes, k=keep: p.max(v[0], a, k), x)
            np.testing.assert_array_equal(got, x.max(axes, keepdims=keep))


RESHAPES = [
    ((2, 6, 12), (6, 3, 4)),
    ((2, 6, 3, 4), (6, 12)),
    ((2, 6, 12), (72,)),
    ((2, 72), (6, 12)),
    ((2, 6, 12), (12, 6)),
    ((2, 4, 6), (8, 3)),
    ((2, 4, 9), (6, 6)),  # the axes of neither divide those of the other
    ((2, 4, 9), (6, 2, 3)),
    ((2, 2, 3, 6), (9, 4)),
    ((2, 1, 12), (3, 1, 4)),
    ((2, 2, 2, 2, 9), (8, 9)),
    ((2, 3, 8), (3, 2, 2, 2)),
    ((1, 6, 12), (72, 1)),
]


@pytest.mark.parametrize(("shape", "sizes"), RESHAPES)
def test_reshape(shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    x = normal(*shape)
    got = run(lambda p, v: p.reshape(v[0], sizes), x)
    np.testing.assert_array_equal(got, x.reshape(shape[0], *sizes))
    # and of integers on a grid, which only move
    tensors = int8_tensors(np.random.default_rng(0), (3, sizes[-1]))
    got = run(lambda p, v: int8(p, p.reshape(v[0], sizes), tensors), x)
    want = run(lambda p, v: int8(p, v[0], tensors), x.reshape(shape[0], *sizes))
    np.testing.assert_array_equal(got, want)


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
    grid = {"act_scale": 0.05, "act_zero": 64, "act_bits": 7}
    if kind == "pq":
        width = t["centroids"].shape[0] * t["centroids"].shape[2]
        return p.pq_linear(
            x,
            t["tables"],
            t["scale"],
            t["bias"],
            **grid,
            features=width,
            centroids=t["centroids"],
            **more,
        )
    if kind == "int8":
        return p.int8_linear(x, t["weight"], t["scale"], t["bias"], **grid, **more)
    if kind == "lookup":
        index = (t["weight"][:, :, None] >> np.array([0, 4], np.uint8)) & 15
        index = np.ascontiguousarray(index.reshape(len(index), -1))
        grid = {"act_scale": 0.25, "act_zero": 8, "act_bits": 4}
        return p.lookup_linear(x, index, t["table"], t["scale"], t["bias"], **grid, **more)
    return p.linear(x, t["weight"], t["bias"], **more)


@pytest.mark.parametrize("kind", ["pq", "int8", "lookup", "linear"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 3), (1, 512), (2, 7), (3, 64), (5, 33), (2, 3, 5), (2, 3, 5, 2)]
)
@pytest.mark.parametrize("residual", [False, True])
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
        x = p.position_embedding(p.embedding(v[0], weight), positions)
        return p.masked_mean(_layer(p, "pq", x, tensors, residual=x), v[1])

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
    "gelu": lambda p, x: p.function(x, "gelu"),
    "piecewise": lambda p, x: p.piecewise(
        x, np.linspace(-3, 3, 15).astype(F), normal(16), normal(16, seed=1)
    ),
    "affine_scalar": lambda p, x: p.affine_scalar(x, -2.0, 0.5),
}


@pytest.mark.parametrize("kind", ["pq", "int8", "lookup"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(2,), (1, 1), (1, 16), (2, 70), (5, 64), (2, 3, 5)])
@pytest.mark.parametrize("residual", [False, True])
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


def test_only_the_first_function_is_taken_over() -> None:
    tensors = _tensors("pq", 20, 12)

    def steps(p: _engine.Plan, v: list[int]) -> int:
        p.label("layer")
        y = _layer(p, "pq", v[0], tensors)
        p.label("one")
        y = p.affine_scalar(y, 2.0, 0.0)
        p.label("two")
        return p.affine_scalar(y, 1.0, -1.0)

    x = normal(2, 7, 20)
    want = run(lambda p, v: _layer(p, "pq", v[0], tensors), x) * F(2) - F(1)
    np.testing.assert_array_equal(run(steps, x), want)
    assert steps_of(plan("scalar", 1, ["float32"], steps), [x]) == ["input", "layer + one", "two"]

"""Engine steps of sequences and of broadcasting, on plans built by hand, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import int8_tensors
from plans import ISAS, SEQUENCES, F, add, close, int8, normal, plan, run, steps_of
from sweeps import sweep

from lutra import _engine

# ---- int32 inputs -------------------------------------------------------------------------------


def test_integers_are_inputs_of_steps_that_read_them() -> None:
    made = _engine.Plan("scalar", 1)
    ids, x = made.input("int32"), made.input()
    with pytest.raises(ValueError, match="input 0 is int32, and the step reads float32"):
        add(made, "clamp", ids, low=0.0, high=1.0)
    with pytest.raises(ValueError, match="input 1 is float32, and the step reads int32"):
        add(made, "masked_mean", x, x)
    with pytest.raises(ValueError, match="an input of int32"):
        made.finish([ids])
    with pytest.raises(ValueError, match="int64"):
        made.input("int64")


def test_arrays_have_the_dtype_of_the_input() -> None:
    made = plan("scalar", 1, ["int32"], lambda p, v: add(p, "cast", v[0]))
    with pytest.raises(ValueError, match="input 0 must be int32"):
        made.run([np.zeros((2, 3), F)])
    with pytest.raises(ValueError, match="wrong number of inputs"):
        made.run([])
    made = plan(
        "scalar", 1, ["float32"], lambda p, v: add(p, "affine_scalar", v[0], scale=1.0, bias=0.0)
    )
    for dtype in (np.int32, np.float64):
        with pytest.raises(ValueError, match="input 0 must be float32"):
            made.run([np.zeros((2, 3), dtype)])
    read_only = np.zeros((2, 3), F)
    read_only.flags.writeable = False
    assert made.run([read_only])[0].shape == (2, 3)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4), (2, 3, 4, 5)])
def test_cast(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(-(2**31), 2**31, shape, dtype=np.int32)
    np.testing.assert_array_equal(run(lambda p, v: add(p, "cast", v[0]), x), x.astype(F))


# ---- embeddings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [1, 7, 64])
@sweep("shape", [(4,), *SEQUENCES, (2, 3, 5), (2, 3, 2, 2)])
def test_embedding(shape: tuple[int, ...], features: int) -> None:
    weight = normal(50, features)
    ids = np.random.default_rng(1).integers(0, 50, shape, dtype=np.int32)
    ids.flat[0], ids.flat[-1] = 0, 49
    got = run(lambda p, v: add(p, "embedding", v[0], tensors={"weight": weight}), ids)
    np.testing.assert_array_equal(got, weight[ids])
    table = np.random.default_rng(2).integers(-127, 128, weight.shape).astype(np.int8)
    scale = np.random.default_rng(3).uniform(0.001, 0.1, 50).astype(F)
    got = run(
        lambda p, v: add(p, "embedding", v[0], tensors={"weight": table, "scale": scale}), ids
    )
    np.testing.assert_array_equal(got, table[ids].astype(F) * scale[ids][..., None])


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_id_outside_the_table(bad: int, threads: int) -> None:
    def steps(p: _engine.Plan, v: list[int]) -> int:
        p.label("words")
        return add(p, "embedding", v[0], tensors={"weight": normal(50, 4)})

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
        add(made, "embedding", ids, tensors={"weight": table})
    with pytest.raises(ValueError, match="needs a scale for each of its rows"):
        add(made, "embedding", ids, tensors={"weight": table, "scale": np.ones(4, F)})
    tensors = {"weight": table.astype(F), "scale": np.ones(5, F)}
    with pytest.raises(ValueError, match="takes no scale"):
        add(made, "embedding", ids, tensors=tensors)
    with pytest.raises(ValueError, match="float32 or int8"):
        add(made, "embedding", ids, tensors={"weight": table.astype(np.int16)})


@pytest.mark.parametrize(("batch", "length"), SEQUENCES)
def test_position_embedding(batch: int, length: int) -> None:
    x, weight = normal(batch, length, 12), normal(512, 12, seed=1)
    got = run(lambda p, v: add(p, "position_embedding", v[0], tensors={"weight": weight}), x)
    np.testing.assert_array_equal(got, x + weight[:length])


@pytest.mark.parametrize(("batch", "length"), SEQUENCES)
def test_embeddings_take_positions_over(batch: int, length: int) -> None:
    weight, positions = normal(50, 12), normal(512, 12, seed=1)
    ids = np.random.default_rng(1).integers(0, 50, (batch, length), dtype=np.int32)

    def steps(p: _engine.Plan, v: list[int]) -> int:
        p.label("words")
        x = add(p, "embedding", v[0], tensors={"weight": weight})
        p.label("positions")
        return add(p, "position_embedding", x, tensors={"weight": positions})

    np.testing.assert_array_equal(run(steps, ids), weight[ids] + positions[:length])
    made = plan("scalar", 1, ["int32"], steps)
    assert steps_of(made, [ids]) == ["words + positions"]
    with pytest.raises(ValueError, match=r"words \+ positions: sequences of 513 .* is 512"):
        made.run([np.zeros((1, 513), np.int32)])


def test_a_sequence_longer_than_the_positions() -> None:
    def steps(p: _engine.Plan, v: list[int]) -> int:
        p.label("positions")
        return add(p, "position_embedding", v[0], tensors={"weight": normal(16, 4)})

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
    got = run(lambda p, v: add(p, "masked_mean", *v), x, mask)
    summed = (x.astype(np.float64) * mask[..., None]).sum(1)
    close(got, (summed / np.maximum(mask.sum(1, keepdims=True), 1e-9)).astype(F))
    assert not got[0].any()


def test_masks_of_other_numbers_and_shapes() -> None:
    x, mask = normal(2, 3, 4), np.array([[2, 0, -1], [3, 3, 3]], np.int32)
    got = run(lambda p, v: add(p, "masked_mean", *v), x, mask)
    close(got[:1], ((2.0 * x[:1, 0] - x[:1, 2]) / 1.0).astype(F))
    made = plan("scalar", 1, ["float32", "int32"], lambda p, v: add(p, "masked_mean", *v))
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
        got = run(lambda p, v, i=picked: add(p, "gather", v[0], tensors={"index": i}, axis=axis), x)
        np.testing.assert_array_equal(got, np.take(x, picked, axis))
    for bad in (-1, 5):
        index = {"index": np.array([bad], np.int32)}
        made = plan(
            "scalar",
            1,
            ["float32"],
            lambda p, v, t=index: add(p, "gather", v[0], tensors=t, axis=axis),
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


@pytest.mark.parametrize("name", OPERATIONS)
@sweep(("a", "b"), PAIRS)
def test_pair(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    x, y = normal(*a), normal(*b, seed=1)
    for left, right in ((x, y), (y, x)):
        shapes = [left.shape, right.shape]
        got = run(lambda p, v, s=shapes: add(p, name, *v, shapes=s), left, right)
        np.testing.assert_array_equal(got, OPERATIONS[name](left, right))


def test_pairs_that_do_not_fit() -> None:
    made = plan(
        "scalar", 1, ["float32"] * 2, lambda p, v: add(p, "add", *v, shapes=[(-1, 1), (-1, 3)])
    )
    for a, b in (((2, 3), (2, 4)), ((2, 3), (2, 3, 1)), ((2, 3), (3, 3))):
        with pytest.raises(ValueError, match="add: the shapes"):
            made.run([normal(*a), normal(*b)])
    with pytest.raises(ValueError, match="'pow' is not an operator of the engine"):
        add(_engine.Plan("scalar", 1), "pow", 0, 0)


def test_affine_scalar() -> None:
    x = normal(3, 70, 65)
    got = run(lambda p, v: add(p, "affine_scalar", v[0], scale=-1.5, bias=0.25), x)
    np.testing.assert_array_equal(got, x * F(-1.5) + F(0.25))


@pytest.mark.parametrize("shape", [(3, 20), (3, 70, 20), (2, 3, 4, 20)])
@pytest.mark.parametrize("floats", [False, True])
def test_arithmetic_writes_grids_for_its_readers(shape: tuple[int, ...], floats: bool) -> None:
    tensors = int8_tensors(np.random.default_rng(0), (9, 20))

    def fused(p: _engine.Plan, v: list[int]) -> list[int]:
        made = add(p, "affine_scalar", add(p, "mul", *v), scale=2.0, bias=0.5)
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


def matmul(p: _engine.Plan, v: list[int], transpose_a: bool, transpose_b: bool) -> int:
    return add(p, "matmul", *v, transpose_a=transpose_a, transpose_b=transpose_b)


@sweep(("a", "b", "m", "k", "p"), PRODUCTS)
@sweep("turned", [(False, False), (False, True), (True, False), (True, True)])
def test_matmul(
    a: tuple[int, ...], b: tuple[int, ...], m: int, k: int, p: int, turned: tuple[bool, bool]
) -> None:
    x, y = normal(*a, m, k), normal(*b, k, p, seed=1)
    want = (x.astype(np.float64) @ y.astype(np.float64)).astype(F)
    left = x.swapaxes(-1, -2) if turned[0] else x
    right = y.swapaxes(-1, -2) if turned[1] else y
    close(run(lambda q, v: matmul(q, v, *turned), left, right), want)


def test_matmuls_that_do_not_fit() -> None:
    made = plan("scalar", 1, ["float32"] * 2, lambda p, v: matmul(p, v, False, False))
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
    got = run(lambda p, v: add(p, "transpose", v[0], axes=axes), x)
    np.testing.assert_array_equal(got, x.transpose(axes))


@pytest.mark.parametrize("axes", [(1, 0), (0, 0), (0, 2)])
def test_transposes_keep_the_batch(axes: tuple[int, ...]) -> None:
    made = _engine.Plan("scalar", 1)
    with pytest.raises(ValueError, match="transpose"):
        add(made, "transpose", made.input(), axes=axes)


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
    got = run(lambda p, v: add(p, "expand", v[0], shape=sizes), x)
    np.testing.assert_array_equal(got, np.broadcast_to(x, want))


def test_only_axes_of_one_expand() -> None:
    made = plan("scalar", 1, ["float32"], lambda p, v: add(p, "expand", v[0], shape=(4, 0)))
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
    close(run(lambda p, v: add(p, "l2_norm", v[0], axes=axes, keepdims=keepdims), x), want)


# ---- values of three axes in the steps that were there before -----------------------------------


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 6, 4), (3, 1, 8), (3, 8, 1)])
def test_steps_on_three_axes(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    scale, bias = normal(shape[1]), normal(shape[1], seed=1)
    got = run(lambda p, v: add(p, "affine", v[0], tensors={"scale": scale, "bias": bias}), x)
    np.testing.assert_array_equal(got, x * scale[:, None] + bias[:, None])
    for axis in (1, 2):
        e = np.exp(x - x.max(axis, keepdims=True))
        close(
            run(lambda p, v, a=axis: add(p, "softmax", v[0], axis=a), x),
            e / e.sum(axis, keepdims=True),
        )
        got = run(lambda p, v, a=axis: add(p, "concat", v[0], v[0], axis=a), x)
        np.testing.assert_array_equal(got, np.concatenate([x, x], axis))
        cut = {"axis": axis, "start": 0, "stop": shape[axis], "step": 2}
        got = run(lambda p, v, c=cut: add(p, "slice", v[0], **c), x)
        np.testing.assert_array_equal(got, x[:, ::2] if axis == 1 else x[:, :, ::2])
    got = run(lambda p, v: add(p, "pad", v[0], pads=(0, 0, 1, 3, 2, 0), value=0.5), x)
    np.testing.assert_array_equal(got, np.pad(x, ((0, 0), (1, 3), (2, 0)), constant_values=0.5))
    for axes in ((1,), (2,), (1, 2)):
        for keep in (False, True):
            got = run(lambda p, v, a=axes, k=keep: add(p, "mean", v[0], axes=a, keepdims=k), x)
            close(got, x.astype(np.float64).mean(axes, keepdims=keep).astype(F))
            got = run(lambda p, v, a=axes, k=keep: add(p, "max", v[0], axes=a, keepdims=k), x)
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


def reshape(p: _engine.Plan, x: int, sizes: tuple[int, ...]) -> int:
    return add(p, "reshape", x, output=(-1, *sizes))


@pytest.mark.parametrize(("shape", "sizes"), RESHAPES)
def test_reshape(shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    x = normal(*shape)
    got = run(lambda p, v: reshape(p, v[0], sizes), x)
    np.testing.assert_array_equal(got, x.reshape(shape[0], *sizes))
    # and of integers on a grid, which only move
    tensors = int8_tensors(np.random.default_rng(0), (3, sizes[-1]))
    got = run(lambda p, v: int8(p, reshape(p, v[0], sizes), tensors), x)
    want = run(lambda p, v: int8(p, v[0], tensors), x.reshape(shape[0], *sizes))
    np.testing.assert_array_equal(got, want)

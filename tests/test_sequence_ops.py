"""Operators on sequences: rules, the reference against plain NumPy, the engine against it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder
from sequences import check, every_sequence_op_graph, norm_tensors, reduced_table, single
from sweeps import sweep

from lutra import GraphError, InputError, Session, run_reference
from lutra.graph import Graph, Shape
from lutra.ops.spec import Cost

F = np.float32
TOKENS = (None, None)
LENGTHS = [(1, 1), (1, 512), (2, 7), (5, 33)]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


def ints(low: int, high: int, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.int32)


def output_shape(graph: Graph) -> Shape:
    return graph.values[graph.outputs[0]].shape


# ---- embeddings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "length"), LENGTHS)
@pytest.mark.parametrize("quantised", [False, True])
def test_embedding(batch: int, length: int, quantised: bool) -> None:
    weight: Array = normal(50, 24)
    tensors = {"weight": weight}
    if quantised:
        scale = np.linspace(0.01, 0.02, 50).astype(F)
        tensors = {"weight": ints(-127, 128, 50, 24).astype(np.int8), "scale": scale}
        weight = tensors["weight"] * scale[:, None]
    graph = single("embedding", ("ids", TOKENS, "int32"), tensors=tensors)
    assert output_shape(graph) == (None, None, 24)
    ids = ints(0, 50, batch, length)
    np.testing.assert_array_equal(check(graph, ids, tolerance=0), weight[ids])


def test_embeddings_of_single_ids_and_of_images_of_ids() -> None:
    weight = normal(9, 4)
    for shape in ((3,), (2, 3, 4)):
        form = (None, *shape[1:])
        graph = single("embedding", ("ids", form, "int32"), tensors={"weight": weight})
        assert output_shape(graph) == (*form, 4)
        ids = ints(0, 9, *shape)
        np.testing.assert_array_equal(check(graph, ids), weight[ids])


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1, -(2**31)])
def test_an_id_without_a_row(bad: int) -> None:
    tensors = {"weight": normal(50, 8)}
    graph = single("embedding", ("ids", TOKENS, "int32"), tensors=tensors)
    ids = ints(0, 50, 2, 5)
    ids[1, 3] = bad
    message = rf"'node' \(embedding\) is given the id {bad}, but its table has 50 rows.* 0\.\.49"
    with pytest.raises(InputError, match=message):
        run_reference(graph, [ids])
    session = Session(graph)
    with pytest.raises(InputError, match=message):
        session(ids)
    ids[1, 3] = 49
    assert session(ids).shape == (2, 5, 8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": np.ones((5, 2), np.int8)}, "dtype int8 and no scale"),
        ({"weight": np.ones((5, 2), F), "scale": np.ones(5, F)}, "float32 and a scale"),
        ({"weight": np.ones((5, 2), np.int8), "scale": np.ones(2, F)}, r"must be \(5,\)"),
        ({"weight": np.ones((5, 2), np.uint8)}, "float32 or int8 with 2 axes"),
    ],
)
def test_tables_of_embeddings(tensors: dict[str, Array], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        single("embedding", ("ids", TOKENS, "int32"), tensors=tensors).validate()


@pytest.mark.parametrize(("batch", "length"), [*LENGTHS[:-1], (3, 20)])
def test_position_embedding(batch: int, length: int) -> None:
    weight = normal(512, 12)
    graph = single("position_embedding", ("x", (None, None, 12)), tensors={"weight": weight})
    x = normal(batch, length, 12, seed=1)
    np.testing.assert_array_equal(check(graph, x, tolerance=0), x + weight[:length])


def test_texts_that_are_too_long_say_how_long_they_may_be() -> None:
    tensors = {"weight": normal(16, 4)}
    graph = single("position_embedding", ("x", (None, None, 4)), tensors=tensors)
    session = Session(graph)
    assert session(normal(1, 16, 4)).shape == (1, 16, 4)
    message = r"is given 17 tokens.*16 positions at most"
    with pytest.raises(InputError, match=message):
        session(normal(1, 17, 4))
    with pytest.raises(InputError, match=message):
        run_reference(graph, [normal(1, 17, 4)])
    with pytest.raises(GraphError, match=message):
        single("position_embedding", ("x", (None, 17, 4)), tensors=tensors).validate()
    with pytest.raises(GraphError, match="last axis has 4 values"):
        single("position_embedding", ("x", (None, 7, 5)), tensors=tensors).validate()


# ---- the mean over tokens ------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "length"), LENGTHS)
def test_masked_mean(batch: int, length: int) -> None:
    graph = single("masked_mean", ("x", (None, None, 20)), ("mask", TOKENS, "int32"))
    assert output_shape(graph) == (None, 20)
    x, mask = normal(batch, length, 20), ints(0, 2, batch, length)
    mask[0] = 0  # a text without any token: 0
    got = check(graph, x, mask)
    want = [row[seen != 0].mean(axis=0) if seen.any() else np.zeros(20) for row, seen in
            zip(x.astype(np.float64), mask, strict=True)]  # fmt: skip
    np.testing.assert_allclose(got, np.array(want), rtol=1e-5, atol=1e-6)
    assert not got[0].any()


def test_tokens_and_mask_must_have_one_length() -> None:
    graph = single("masked_mean", ("x", (None, None, 4)), ("mask", TOKENS, "int32"))
    message = r"'x' of shape \(2, 5, 4\) and 'mask' of shape \(2, 6\).*same number of tokens"
    x, mask = normal(2, 5, 4), ints(0, 2, 2, 6)
    with pytest.raises(InputError, match=message):
        Session(graph).run(None, {"x": x, "mask": mask})
    with pytest.raises(InputError, match=message):
        run_reference(graph, [x, mask])


# ---- attention ----------------------------------------------------------------------------------


def attention_graph(width: int, *, mask: bool = True, tables: bool = False, **attrs: Any) -> Graph:
    tensors = {**reduced_table("exp", 32), **reduced_table("reciprocal", 32)} if tables else None
    values = [(name, (None, None, width)) for name in "qkv"]
    masks = [("mask", TOKENS, "int32")] if mask else []
    return single("attention", *values, *masks, tensors=tensors, **attrs)


def plain_attention(q: Array, k: Array, v: Array, seen: Array, heads: int, scale: float) -> Array:
    """Head by head and token by token, in float64; ``seen`` is bool (N, T, S)."""
    result = np.zeros(q.shape)
    size = q.shape[2] // heads
    for n in range(q.shape[0]):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for t in range(q.shape[1]):
                keys = np.flatnonzero(seen[n, t])
                if not len(keys):
                    continue
                s = scale * k[n, keys, part].astype(np.float64) @ q[n, t, part]
                p = np.exp(s - s.max())
                result[n, t, part] = p @ v[n, keys, part] / p.sum()
    return result


SHAPES = [(1, 1, 1), (2, 7, 7), (1, 3, 70), (3, 33, 5), (1, 200, 200)]


@pytest.mark.parametrize(("heads", "size"), [(1, 8), (3, 4), (2, 32)])
@sweep(("batch", "tokens", "keys"), SHAPES)
@sweep("causal", [False, True])
@sweep("masked", [False, True])
def test_attention(
    batch: int, tokens: int, keys: int, causal: bool, masked: bool, heads: int, size: int
) -> None:
    width, scale = heads * size, size**-0.5
    graph = attention_graph(width, mask=masked, heads=heads, scale=scale, causal=causal)
    q = normal(batch, tokens, width)
    k, v = normal(batch, keys, width, seed=1), normal(batch, keys, width, seed=2)
    seen = np.ones((batch, tokens, keys), np.bool_)
    mask = ints(0, 2, batch, keys)
    if masked:
        mask[0] *= 3  # all that is not 0 is seen
        seen &= (mask != 0)[:, None]
    if causal:
        seen &= np.tri(tokens, keys, dtype=np.bool_)
    got = check(graph, q, k, v, *([mask] if masked else []), tolerance=4e-6)
    want = plain_attention(q, k, v, seen, heads, scale)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_attention_of_512_tokens() -> None:
    graph = attention_graph(24, heads=2, scale=0.3)
    q, k, v = (normal(1, 512, 24, seed=seed) for seed in range(3))
    mask = (np.arange(512) < 301).astype(np.int32)[None]
    got = check(graph, q, k, v, mask, tolerance=4e-6)
    short = run_reference(graph, [q, k[:, :301], v[:, :301], mask[:, :301]])["node.out"]
    np.testing.assert_allclose(got, short, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tables", [False, True])
def test_masked_keys_count_nothing_whatever_they_are(tables: bool) -> None:
    graph = attention_graph(8, heads=2, scale=1.0, tables=tables)
    q, k, v = (normal(2, 6, 8, seed=seed) for seed in range(3))
    mask = np.array([[1, 1, 0, 1, 0, 0], [0] * 6], np.int32)
    want = check(graph, q, k, v, mask, tolerance=1e-5)
    k[:, 2], v[:, 4] = 1e30, -1e30
    k[1], v[1] = 1e30, 1e30
    got = check(graph, q, k, v, mask, tolerance=1e-5)
    np.testing.assert_array_equal(got, want)
    assert not got[1].any()


def test_attention_of_large_scores() -> None:
    graph = attention_graph(4, mask=False, heads=1, scale=100.0)
    q, k, v = (10 * normal(1, 9, 4, seed=seed) for seed in range(3))
    got = check(graph, q, k, v, tolerance=1e-4)
    seen = np.ones((1, 9, 9), np.bool_)
    np.testing.assert_allclose(got, plain_attention(q, k, v, seen, 1, 100.0), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_tables(causal: bool) -> None:
    settings: dict[str, Any] = {"heads": 4, "scale": 0.5, "causal": causal}
    exact = attention_graph(32, **settings)
    graph = attention_graph(32, tables=True, **settings)
    q, k, v = (normal(2, 40, 32, seed=seed) for seed in range(3))
    mask = ints(0, 2, 2, 40)
    got = check(graph, q, k, v, mask, tolerance=1e-5)
    (want,) = run_reference(exact, [q, k, v, mask]).values()
    assert 0 < np.abs(got - want).max() < 2e-3


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (lambda: attention_graph(8, heads=3, scale=1.0), "heads must divide"),
        (lambda: attention_graph(8, heads=0, scale=1.0), "heads=0"),
        (lambda: attention_graph(8, heads=2, scale=math.inf), "finite"),
        (
            lambda: single("attention", *((n, (None, 3, 4 + 4 * (n == "v"))) for n in "qkv"),
                           heads=1, scale=1.0),
            "last axes must have the same size",
        ),
        (
            lambda: single("attention", ("q", (None, 2, 4)), ("k", (None, 3, 4)),
                           ("v", (None, 5, 4)), heads=1, scale=1.0),
            "same number of tokens",
        ),
        (
            lambda: single("attention", *((n, (None, 3, 4)) for n in "qkv"), heads=1, scale=1.0,
                           tensors=reduced_table("exp")),
            "has the table exp_slope, exp_intercept but lacks reciprocal_slope",
        ),
        (
            lambda: single("attention", *((n, (None, 3, 4)) for n in "qkv"), ("m", (None, 3)),
                           heads=1, scale=1.0),
            "'m' of dtype float32 as its input 3; it must be int32",
        ),
        (
            lambda: single("attention", *((n, (None, None, None)) for n in "qkv"), heads=1,
                           scale=1.0),
            "needs the size of axis 2",
        ),
    ],
)  # fmt: skip
def test_rules_of_attention(graph: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        graph().validate()


# ---- norms --------------------------------------------------------------------------------------

NORM_SHAPES = [(1, 1, 6), (3, 384), (2, 77, 48), (1, 512, 33), (2, 3, 5, 16)]


@pytest.mark.parametrize("shape", NORM_SHAPES)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("table", [False, True])
def test_norms(op: str, shape: tuple[int, ...], table: bool) -> None:
    rng = np.random.default_rng(0)
    tensors = norm_tensors(rng, shape[-1], bias=op == "layer_norm")
    eps = 1e-5
    rsqrt = reduced_table("rsqrt", 32) if table else {}
    form = (None, *shape[1:])
    graph = single(op, ("x", form), tensors={**tensors, **rsqrt}, eps=eps)
    x = (3 * rng.normal(size=shape) + 1).astype(F)
    x[0] *= 100
    got = check(graph, x, tolerance=1e-5 if table else 3e-6)
    y = x.astype(np.float64)
    if op == "layer_norm":
        y = y - y.mean(axis=-1, keepdims=True)
    y = y / np.sqrt(np.square(y).mean(axis=-1, keepdims=True) + eps)
    want = y * tensors["weight"] + tensors.get("bias", 0)
    np.testing.assert_allclose(got, want, rtol=2e-3 if table else 1e-5, atol=2e-3 if table else
                               1e-5)  # fmt: skip


def test_norms_of_rows_without_spread() -> None:
    tensors = norm_tensors(np.random.default_rng(0), 8)
    graph = single("layer_norm", ("x", (None, None, 8)), tensors=tensors, eps=1e-12)
    x = np.full((2, 3, 8), 7.0, F)
    np.testing.assert_allclose(check(graph, x), np.broadcast_to(tensors["bias"], (2, 3, 8)))
    x[0, 1, 2] = np.nan
    got = check(graph, x, finite=False)
    assert np.isnan(got[0, 1]).all()
    assert np.isfinite(got[0, 0]).all()
    with pytest.raises(InputError, match="1 values of 48 that are NaN"):
        Session(graph)(x)


@pytest.mark.parametrize(
    ("op", "tensors", "attrs", "message"),
    [
        ("layer_norm", {"weight": 4, "bias": 4}, {"eps": 0.0}, "must be above 0"),
        ("layer_norm", {"weight": 4, "bias": 3}, {"eps": 1e-5}, "make them the same"),
        ("layer_norm", {"weight": 4}, {"eps": 1e-5}, "lacks the tensor 'bias'"),
        ("layer_norm", {"weight": 5, "bias": 5}, {"eps": 1e-5}, "last axis has 5 values"),
        ("rms_norm", {"weight": 5}, {"eps": 1e-5}, "last axis has 5 values"),
        ("rms_norm", {"weight": 4, "rsqrt_slope": 16}, {"eps": 1e-5}, "lacks rsqrt_intercept"),
        (
            "rms_norm",
            {"weight": 4, "rsqrt_slope": 12, "rsqrt_intercept": 12},
            {"eps": 1e-5},
            "8 or 16 or 32 entries",
        ),
    ],
)
def test_rules_of_norms(op: str, tensors: Any, attrs: Any, message: str) -> None:
    arrays = {role: np.ones(size, F) for role, size in tensors.items()}
    with pytest.raises(GraphError, match=message):
        single(op, ("x", (None, 3, 4)), tensors=arrays, **attrs).validate()


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 5), (1,)),
        ((2, 9, 4), (2,)),
        ((2, 9, 4), (1, 2)),
        ((2, 3, 5, 4), (1,)),
        ((1, 700), (1,)),
    ],
)
@pytest.mark.parametrize("keepdims", [False, True])
def test_l2_norm(shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool) -> None:
    form = (None, *shape[1:])
    graph = single("l2_norm", ("x", form), axes=axes, keepdims=keepdims)
    x = normal(*shape)
    got = check(graph, x)
    want = np.sqrt(np.square(x.astype(np.float64)).sum(axis=axes, keepdims=keepdims))
    np.testing.assert_allclose(got, want, rtol=1e-6)


# ---- two values together ------------------------------------------------------------------------

NUMPY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


@pytest.mark.parametrize("op", NUMPY)
@sweep(
    ("a", "b"),
    [
        ((2, 5), (2, 5)),
        ((2, 5), (2, 1)),
        ((2, 7, 4), (2, 7, 1)),
        ((2, 1, 4), (2, 7, 4)),
        ((2, 7, 1), (2, 1, 4)),
        ((3, 2, 1, 6), (3, 1, 5, 6)),
        ((2, 4, 3, 3), (2, 4, 1, 1)),
    ],
)
def test_pairs(op: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    graph = single(op, ("a", (None, *a[1:])), ("b", (None, *b[1:])))
    x, y = normal(*a), normal(*b, seed=1)
    want = NUMPY[op](x, y)
    assert output_shape(graph) == (None, *want.shape[1:])
    np.testing.assert_array_equal(check(graph, x, y, tolerance=0), want)


def test_sums_are_fused_with_residuals_of_their_own_shape_only() -> None:
    b = Builder(("x", (None, 6, 8)), ("r", (None, 1, 8)), ("s", (None, 6, 8)))
    y = b.add("add", b.pq_linear("x", 8, 8), "r")
    b.add("add", b.linear(y, 8, 8), "s")
    inputs = normal(2, 6, 8), normal(2, 1, 8, seed=1), normal(2, 6, 8, seed=2)
    check(b.graph(), *inputs)


def test_lengths_that_differ_are_not_repeated() -> None:
    graph = single("add", ("a", (None, None, 4)), ("b", (None, None, 4)))
    assert output_shape(graph) == (None, None, 4)
    session = Session(graph)
    for length in (1, 5):
        x = normal(2, length, 4)
        np.testing.assert_array_equal(session.run(None, {"a": x, "b": x})[0], x + x)
    message = r"adds 'a' of shape \(2, 1, 4\) and 'b' of shape \(2, 5, 4\).*or 1 where they differ"
    with pytest.raises(InputError, match=message):
        session.run(None, {"a": normal(2, 1, 4), "b": normal(2, 5, 4)})
    with pytest.raises(InputError, match=message):
        run_reference(graph, [normal(2, 1, 4), normal(2, 5, 4)])
    repeated = single("sub", ("a", (None, 1, 4)), ("b", (None, None, 4)))
    assert output_shape(repeated) == (None, None, 4)
    check(repeated, normal(2, 1, 4), normal(2, 5, 4))


@pytest.mark.parametrize(
    ("a", "b"),
    [((None, 3), (None, 4)), ((None, 3), (None, 3, 1)), ((1, 3), (4, 3)), ((None, 3), (4, 3))],
)
def test_pairs_that_do_not_fit(a: Shape, b: Shape) -> None:
    for op, what in (("sub", "subtracts"), ("div", "divides")):
        with pytest.raises(GraphError, match=rf"{what} 'a' .*the shapes must be the same"):
            single(op, ("a", a), ("b", b)).validate()


@pytest.mark.parametrize(
    ("a", "b", "flags"),
    [
        ((2, 5, 7), (2, 7, 3), (False, False)),
        ((2, 5, 7), (2, 3, 7), (False, True)),
        ((2, 7, 5), (2, 7, 3), (True, False)),
        ((2, 4, 1, 9), (2, 4, 9, 130), (False, False)),
        ((2, 1, 6, 9), (2, 4, 5, 9), (False, True)),
        ((1, 1, 1), (1, 1, 1), (True, True)),
    ],
)
def test_matmul(a: tuple[int, ...], b: tuple[int, ...], flags: tuple[bool, bool]) -> None:
    attrs = dict(zip(("transpose_a", "transpose_b"), flags, strict=True))
    graph = single("matmul", ("a", (None, *a[1:])), ("b", (None, *b[1:])), **attrs)
    x, y = normal(*a), normal(*b, seed=1)
    got = check(graph, x, y)
    x, y = (m.swapaxes(-1, -2) if t else m for m, t in zip((x, y), flags, strict=True))
    want = x.astype(np.float64) @ y
    assert output_shape(graph) == (None, *want.shape[1:])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_matmul_of_lengths_that_are_known_in_a_run() -> None:
    graph = single("matmul", ("a", (None, None, 6)), ("b", (None, None, 6)), transpose_b=True)
    assert output_shape(graph) == (None, None, None)
    check(graph, normal(2, 4, 6), normal(2, 9, 6, seed=1))
    graph = single("matmul", ("a", (None, None, None)), ("b", (None, None, 6)))
    check(graph, normal(2, 4, 9), normal(2, 9, 6, seed=1))
    with pytest.raises(InputError, match="must have the same number"):
        Session(graph).run(None, {"a": normal(2, 4, 8), "b": normal(2, 9, 6)})
    for a, b in (((None, 3), (None, 3)), ((None, 2, 3), (None, 2, 3)), ((None, 2, 4, 3), (None, 3,
                 3, 3))):  # fmt: skip
        with pytest.raises(GraphError, match="'a'"):
            single("matmul", ("a", a), ("b", b)).validate()


# ---- moving elements ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 5, 7), (0, 2, 1)),
        ((2, 3, 4, 5), (0, 2, 1, 3)),
        ((2, 3, 4, 5), (0, 3, 1, 2)),
        ((1, 2, 3, 4, 5), (0, 4, 2, 3, 1)),
        ((3, 4), (0, 1)),
    ],
)
def test_transpose(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    x = normal(*shape)
    for form in ((None, *shape[1:]), (None,) * len(shape)):
        graph = single("transpose", ("x", form), axes=axes)
        np.testing.assert_array_equal(check(graph, x, tolerance=0), x.transpose(axes))


def test_split_heads_and_join_them() -> None:
    b = Builder(("x", (None, None, 12)))
    x = b.add("transpose", b.add("reshape", "x", shape=(-1, 3, 4)), axes=(0, 2, 1, 3))
    assert b.graph().values[x].shape == (None, 3, None, 4)
    b.add("reshape", b.add("transpose", x, axes=(0, 2, 1, 3)), shape=(-1, 12))
    x = normal(2, 7, 12)
    np.testing.assert_array_equal(check(b.graph(), x, tolerance=0), x)


def test_expand() -> None:
    graph = single("expand", ("x", (None, 1, None, 3)), shape=(4, 0, 0))
    assert output_shape(graph) == (None, 4, None, 3)
    x = normal(2, 1, 5, 3)
    np.testing.assert_array_equal(check(graph, x, tolerance=0), np.repeat(x, 4, axis=1))


@pytest.mark.parametrize("axis", [1, 2])
def test_gather(axis: int) -> None:
    index = np.array([4, 0, 0, 2], np.int32)
    graph = single("gather", ("x", (None, 6, 5)), tensors={"index": index}, axis=axis)
    x = normal(3, 6, 5)
    np.testing.assert_array_equal(check(graph, x, tolerance=0), np.take(x, index, axis))


def test_the_first_token() -> None:
    graph = single("gather", ("x", (None, None, 5)), tensors={"index": np.array([2], np.int32)},
                   axis=1)  # fmt: skip
    x = normal(3, 4, 5)
    np.testing.assert_array_equal(check(graph, x, tolerance=0), x[:, 2:3])
    with pytest.raises(InputError, match=r"has the index 2 on axis 1 .* below 2"):
        Session(graph)(normal(1, 2, 5))


@pytest.mark.parametrize(
    ("op", "attrs", "message"),
    [
        ("transpose", {"axes": (1, 0, 2)}, "0, the batch, first"),
        ("transpose", {"axes": (0, 1)}, "3 axes once"),
        ("transpose", {"axes": (0, 1, 1)}, "3 axes once"),
        ("expand", {"shape": (3,)}, "give 2 sizes"),
        ("expand", {"shape": (3, 8)}, "only a size of 1 can change"),
        ("gather", {"axis": 2}, "index 4 .*must be below 4"),
        ("gather", {"axis": 3}, "axis=3"),
    ],
)
def test_rules_of_moves(op: str, attrs: dict[str, Any], message: str) -> None:
    tensors = {"index": np.array([1, 4], np.int32)} if op == "gather" else None
    with pytest.raises(GraphError, match=message):
        single(op, ("x", (None, 1, 4)), tensors=tensors, **attrs).validate()


# ---- scalars, layers on sequences, costs, everything together -----------------------------------


def test_affine_scalar_and_cast() -> None:
    graph = single("affine_scalar", ("x", (None, 5)), scale=-10000.0, bias=0.1)
    x = normal(3, 5)
    np.testing.assert_array_equal(check(graph, x, tolerance=0), x * F(-10000) + F(0.1))
    graph = single("cast", ("x", TOKENS, "int32"))
    x = np.array([[0, 1, -7, 2**24 + 1, 2**31 - 1]], np.int32)
    np.testing.assert_array_equal(check(graph, x, tolerance=0), x.astype(F))
    with pytest.raises(GraphError, match="float32 numbers"):
        single("affine_scalar", ("x", (None, 5)), scale=1e39).validate()


@pytest.mark.parametrize("layer", ["pq_linear", "int8_linear", "lookup_linear", "linear"])
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 9, 24), (1, 512, 24), (2, 3, 5, 24)])
def test_linear_layers_on_sequences(layer: str, shape: tuple[int, ...]) -> None:
    b = Builder(("x", (None,) * (len(shape) - 1) + (24,)))
    getattr(b, layer)("x", 24, 17)
    x = normal(*shape)
    got = check(b.graph(), x)
    flat = Builder(("x", (None, 24)))
    getattr(flat, layer)("x", 24, 17)
    (rows,) = run_reference(flat.graph(), [x.reshape(-1, 24)]).values()
    np.testing.assert_allclose(got.reshape(rows.shape), rows, rtol=1e-5, atol=1e-5)


def test_costs() -> None:
    graph = attention_graph(8, heads=2, scale=1.0)
    sizes = {"q": (1, 3, 8), "k": (1, 5, 8), "v": (1, 5, 8), "mask": (1, 5)}
    cost = graph.total_cost(sizes)
    assert (cost.macs, cost.dense_macs) == (2 * 3 * 5 * 8,) * 2
    assert cost.functions == 2 * 3 * 5 + 2 * 3
    assert cost.pieces == 0
    cost = attention_graph(8, heads=2, scale=1.0, tables=True).total_cost(sizes)
    assert (cost.functions, cost.pieces) == (0, 2 * 3 * 5 + 2 * 3)
    assert cost.table_bytes == cost.weight_bytes == 4 * 32 * 4
    assert cost.table_reads == 2 * cost.pieces
    graph = single("matmul", ("a", (None, 2, 7)), ("b", (None, 7, 3)))
    assert graph.total_cost() == Cost(macs=42, dense_macs=42)
    tensors = norm_tensors(np.random.default_rng(0), 6)
    cost = single("layer_norm", ("x", (None, 4, 6)), tensors=tensors, eps=1e-5).total_cost()
    assert cost.functions == 4


def test_codes_that_layers_share_are_counted_once() -> None:
    b = Builder(("x", (None, 3, 8)))
    b.pq_linear("x", 8, 5)
    first = b.nodes[0].tensors
    for role, name in (("centroids", first["centroids"]), ("centroids", "copy"), ("bias", "bias")):
        b.pq_linear("x", 8, 5)
        b.tensors |= {"copy": b.tensors[first["centroids"]].copy(), "bias": np.zeros(5, F)}
        last = b.nodes[-1]
        del b.tensors[last.tensors[role]]
        last.tensors[role] = name  # type: ignore[index]
    b.add("add", b.nodes[0].output, b.nodes[-1].output)
    costs = list(b.graph().cost().values())
    assert [cost.encode_ops for cost in costs] == [16 * 24, 0, 0, 16 * 24, 0]
    assert [cost.quantised for cost in costs] == [24, 0, 0, 24, 0]
    assert [cost.lookups for cost in costs] == [2 * 15] * 4 + [0]


@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_all_operators_together(length: int) -> None:
    graph = every_sequence_op_graph()
    ids, mask = ints(0, 40, 3, length), ints(0, 2, 3, length)
    mask[:, 0] = 1
    check(graph, ids, mask, normal(3, 4, 6), tolerance=0.05)  # codes may move

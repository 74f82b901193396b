"""Kernels of every instruction set against the reference: the same bits, nowhere else a byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from graphs import Builder
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Array, Layer, guarded, random_layer, run_native, same_bits
from sweeps import sweep

from lutra import Session, _engine, run_reference, runnable_isas
from lutra.reference.pq import quantise

ISAS = runnable_isas()
ROWS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 197)
WIDTHS = (1, 3, 4, 5, 8, 9, 16, 17, 18, 27, 36, 64)
COUNTS = (8, 16, 32, 64)

each_isa = pytest.mark.parametrize("isa", ISAS)


def check(layer: Layer, isa: str, order: str = "CNHW", threads: int = 1) -> None:
    """Output, codes and guards of the engine's layer against the reference."""
    y, codes = run_native(layer, isa, order, threads)
    np.testing.assert_array_equal(codes, layer.reference_codes())
    assert same_bits(y, np.ascontiguousarray(layer.reference()))


@each_isa
@sweep("rows", ROWS)
def test_rows_at_tile_edges(isa: str, rows: int) -> None:
    layer = random_layer(rows, size=(rows, 1, 1), channels=20, outputs=7)
    check(layer, isa)
    check(layer, isa, "NCHW", threads=2)
    strided = np.ascontiguousarray(layer.x.transpose(1, 0, 2, 3)).transpose(1, 0, 2, 3)
    check(replace(layer, x=strided), isa)


@each_isa
@sweep("codebooks", [1, 2, 3, 4, 5, 6, 257, 300])
def test_numbers_of_codebooks(isa: str, codebooks: int) -> None:
    check(random_layer(codebooks, size=(33, 1, 1), channels=codebooks * 2, width=2, outputs=6), isa)


@each_isa
@sweep("outputs", [1, 2, 3, 4, 5, 8, 15, 16, 17, 64, 65])
def test_numbers_of_outputs(isa: str, outputs: int) -> None:
    check(random_layer(outputs, size=(35, 1, 1), channels=18, outputs=outputs), isa)


@each_isa
@pytest.mark.parametrize("count", COUNTS)
@sweep("width", WIDTHS)
def test_codebook_sizes(isa: str, width: int, count: int) -> None:
    # the last sub-vector has one value less, where that is possible
    channels = 3 * width - (width > 1)
    check(random_layer(width, size=(65, 1, 1), channels=channels, width=width, count=count), isa)


@each_isa
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((1, 1), (2, 2), (0, 0), (1, 1)),
        ((1, 1), (1, 1), (1, 2), (1, 1)),
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((3, 3), (1, 3), (2, 0), (1, 2)),
        ((5, 2), (3, 2), (4, 1), (1, 3)),
        ((1, 7), (1, 4), (0, 9), (2, 1)),
        ((7, 7), (2, 2), (3, 3), (1, 1)),
    ],
)
@sweep("order", ["CNHW", "NCHW", "NHWC", "NCHW*"])
def test_geometry(
    isa: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    order: str,
) -> None:
    layer = random_layer(
        3,
        size=(2, 9, 11),
        channels=3,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        act_zero=64,
    )
    check(layer, isa, order, threads=2)


@each_isa
@pytest.mark.parametrize("kind", ["NHWC", "sliced", "reversed", "broadcast", "CNHW"])
@sweep("channels", [1, 3, 31, 32, 33, 70])
def test_input_strides(isa: str, channels: int, kind: str) -> None:
    layer = random_layer(
        channels, size=(2, 5, 6), channels=channels, kernel=(3, 2), stride=(1, 2), padding=(1, 1)
    )
    x = layer.x
    if kind == "NHWC":
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    elif kind == "CNHW":
        x = np.ascontiguousarray(x.transpose(1, 0, 2, 3)).transpose(1, 0, 2, 3)
    elif kind == "sliced":
        x = np.repeat(np.repeat(x, 2, axis=3), 2, axis=1)[:, ::2, :, ::2]
    elif kind == "reversed":
        x = x[::-1, ::-1, ::-1, ::-1]
    else:
        x = np.broadcast_to(x[:1, :, :, :1], x.shape)
    layer = Layer(
        x, layer.tensors, layer.kernel, layer.stride, layer.padding, act_bits=layer.act_bits
    )
    check(layer, isa)


@each_isa
@pytest.mark.parametrize("zero", [0, 1, 64])
@sweep("bits", range(1, 8))
def test_activation_bits(isa: str, bits: int, zero: int) -> None:
    zero = min(zero, 2**bits - 1)
    layer = random_layer(
        bits,
        size=(2, 5, 7),
        channels=6,
        kernel=(3, 3),
        padding=(1, 1),
        act_bits=bits,
        act_zero=zero,
    )
    check(layer, isa)


@each_isa
@pytest.mark.parametrize("entry", [-128, 127])
@pytest.mark.parametrize("codebooks", [255, 256, 257, 513])
def test_extreme_tables(isa: str, entry: int, codebooks: int) -> None:
    layer = random_layer(1, size=(70, 1, 1), channels=codebooks, width=1, outputs=5)
    layer.tensors["tables"][...] = entry
    check(layer, isa)
    layer.tensors["tables"][:, ::2] = -1 - entry
    check(layer, isa)


@each_isa
@pytest.mark.parametrize("count", COUNTS)
@sweep("width", [4, 9, 16, 64])
def test_largest_scores(isa: str, width: int, count: int) -> None:
    layer = random_layer(1, size=(65, 1, 1), channels=2 * width, width=width, count=count)
    layer.x[...] = np.float32(1e9)
    layer.tensors["centroids"][...] = 127
    check(layer, isa)
    layer.tensors["centroids"][:, : count - 1] = 0  # the last centroid wins
    check(layer, isa)
    layer.x[...] = np.float32(-1e9)  # the first one wins
    check(layer, isa)


@each_isa
@pytest.mark.parametrize("count", COUNTS)
@sweep("width", [1, 2, 9, 20])
def test_ties_go_to_the_lowest_code(isa: str, count: int, width: int) -> None:
    layer = random_layer(5, size=(64, 1, 1), channels=3 * width, width=width, count=count)
    centroids = layer.tensors["centroids"]
    half = count // 2
    centroids[:, half:] = centroids[:, :half][:, ::-1]  # each one twice
    check(layer, isa)
    _, codes = run_native(layer, isa)
    assert codes.max() < half
    centroids[...] = 17
    check(layer, isa)
    assert not run_native(layer, isa)[1].any()


def test_ties_by_the_rounding_of_the_norm() -> None:
    # (norm >> 1) makes 2 and 3 equally near to x = 2: 2 * 2 - 2 = 2 * 3 - 4
    layer = random_layer(1, size=(16, 1, 1), channels=1, width=1, count=8)
    layer.tensors["centroids"][0, :, 0] = [9, 9, 3, 9, 2, 9, 9, 9]
    layer.x[...] = np.float32(2 * layer.act_scale)
    for isa in ISAS:
        assert (run_native(layer, isa)[1] == 2).all()


@each_isa
@pytest.mark.parametrize("zero", [0, 64])
def test_rounding_of_activations(isa: str, zero: int) -> None:
    specials = [np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -1e-45, 0.0, -0.0]
    halves = np.arange(-80, 140, dtype=np.float32) + np.float32(0.5)
    near = np.concatenate([np.nextafter(halves, np.float32(s)) for s in (-1e9, 1e9)])
    x = np.concatenate([specials, halves, near, [2.0**31, -(2.0**31), 2.0**40]])
    x = x.astype(np.float32)
    # Two equal values make every integer of the grid a centroid that no other one ties with; 64
    # centroids hold half of the grid at a time.
    for act_scale in (1.0, 0.5, 0.1):
        inputs = np.repeat(x * np.float32(act_scale), 2).reshape(-1, 2, 1, 1)
        for low in (0, 64):
            grid = np.arange(low, low + 64, dtype=np.uint8)
            tensors: dict[str, Array] = {
                "centroids": np.stack((grid, grid), axis=1)[None],
                "tables": np.arange(64, dtype=np.int8).reshape(1, 64, 1),
                "scale": np.ones(1, np.float32),
                "bias": np.zeros(1, np.float32),
            }
            check(Layer(inputs, tensors, act_scale=act_scale, act_zero=zero), isa)
    assert quantise(x, 1.0, zero, 7)[0] == 0
    assert quantise(np.float32([0.5, 1.5, 2.5]), 1.0, zero, 7).tolist() == [
        zero,
        zero + 2,
        zero + 2,
    ]


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Any layer whose kernel fits its input."""
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    padding = (draw(st.integers(0, 4)), draw(st.integers(0, 4)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    bits = draw(st.integers(1, 7))
    return random_layer(
        draw(st.integers(0, 2**16)),
        size=(
            draw(st.integers(1, 4)),
            draw(st.integers(least[0], least[0] + 12)),
            draw(st.integers(least[1], least[1] + 40)),
        ),
        channels=draw(st.integers(1, 12)),
        outputs=draw(st.integers(1, 20)),
        count=draw(st.sampled_from(COUNTS)),
        width=draw(st.integers(1, 64)),
        kernel=kernel,
        stride=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        padding=padding,
        dilation=dilation,
        act_bits=bits,
        act_zero=draw(st.integers(0, 2**bits - 1)),
    )


@settings(max_examples=80, deadline=None)
@given(layer=layers(), order=st.sampled_from(["CNHW", "NCHW", "NHWC", "CNHW*"]))
def test_random_layers(layer: Layer, order: str) -> None:
    graph = layer.graph()
    reference = np.ascontiguousarray(layer.reference())
    for isa in ISAS:
        check(layer, isa, order, threads=2)
        assert same_bits(Session(graph, isa=isa, threads=2)(layer.x), reference)


@each_isa
@sweep("rows", ROWS)
def test_linear_graphs(isa: str, rows: int) -> None:
    b = Builder(("x", (None, 50)), seed=rows)
    b.pq_linear("x", 50, 11, width=7, count=32)
    graph = b.graph()
    x = b.rng.normal(size=(rows, 50)).astype(np.float32)
    (reference,) = run_reference(graph, [x]).values()
    assert same_bits(Session(graph, isa=isa, threads=1)(x), reference)


@pytest.mark.parametrize("op", ["pq_linear", "linear"])
@pytest.mark.parametrize(
    ("axes", "features", "outputs"),
    [
        ((1, 1), 5, 3),
        ((1, 7), 1, 1),
        ((3, 1), 33, 17),
        ((2, 5), 70, 16),
        ((5, 41), 40, 65),
        ((2, 3, 4), 31, 19),
        ((3, 1, 2, 5), 9, 4),
        ((2, 2, 3, 1, 4), 12, 33),
    ],
)
@sweep("tail", ["", "relu", "relu6", "add", "add relu6"])
def test_linear_layers_over_many_axes(
    axes: tuple[int, ...], features: int, outputs: int, op: str, tail: str
) -> None:
    """The same bits as over (N, features), from all, and the numbers of the reference."""
    rows = int(np.prod(axes))
    b = Builder(("x", (None, *axes[1:], features)), ("r", (None, *axes[1:], outputs)), seed=rows)
    y = getattr(b, op)("x", features, outputs)
    if "add" in tail:
        y = b.add("add", "r", y)
    if "relu" in tail:
        y = b.add(tail.split()[-1], y)
    b.inputs = b.inputs if "add" in tail else b.inputs[:1]
    graph = b.graph(y)
    flat = replace(
        graph, inputs=tuple(v.with_shape(v.name, (None, v.shape[-1])) for v in graph.inputs)
    )
    feeds = {
        v.name: b.rng.normal(size=(axes[0], *v.shape[1:])).astype(np.float32) for v in graph.inputs
    }
    flat_feeds = {name: x.reshape(rows, -1) for name, x in feeds.items()}
    (reference,) = run_reference(graph, feeds).values()
    assert reference.shape == (*axes, outputs)
    if op == "linear":
        np.testing.assert_allclose(
            Session(graph).run(None, feeds)[0], reference, rtol=1e-5, atol=1e-5
        )
        (reference,) = Session(flat, isa="scalar").run(None, flat_feeds)
        reference = reference.reshape(*axes, outputs)
    for isa in ISAS:
        for threads in (1, 3):
            (got,) = Session(graph, isa=isa, threads=threads).run(None, feeds)
            assert same_bits(got, reference), (isa, threads)
        (got,) = Session(flat, isa=isa, threads=2).run(None, flat_feeds)
        assert same_bits(got.reshape(reference.shape), reference), isa


@each_isa
@pytest.mark.parametrize("op", ["pq_linear", "linear"])
def test_linear_layers_over_many_rows(isa: str, op: str) -> None:
    b = Builder(("x", (None, 197, 48)), seed=3)
    y = b.add("relu", b.add("add", getattr(b, op)("x", 48, 48), "x"))
    graph = b.graph(y)
    x = b.rng.normal(size=(64, 197, 48)).astype(np.float32)
    got = Session(graph, isa=isa, threads=4)(x)
    assert same_bits(got, Session(graph, isa=ISAS[-1], threads=1)(x))
    if op == "pq_linear":
        assert same_bits(got, run_reference(graph, [x])[y])


@each_isa
@pytest.mark.parametrize("op", ["", "pq_linear", "linear", "conv2d", "pq_linear rows"])
@sweep("clamp", ["relu", "relu6"])
def test_clamps_of_nan_give_zero(isa: str, clamp: str, op: str) -> None:
    shape = (1, 1) if op == "conv2d" else (3,) if "rows" in op else ()
    features = (20, *shape) if op == "conv2d" else (*shape, 20)
    b = Builder(("x", (None, *features)), ("r", (None, *features)), seed=1)
    y = "x"
    if op:
        y = getattr(b, op.split()[0])("x", 20, 20, **({"kernel": (1, 1)} if "conv" in op else {}))
    y = b.add(clamp, b.add("add", y, "r"))
    graph = b.graph(y)
    feeds = {n: b.rng.normal(size=(9, *features)).astype(np.float32) for n in "xr"}
    feeds["r"].flat[::3] = np.nan
    feeds["r"].flat[1::3] *= np.inf
    reference = run_reference(graph, feeds)[y]
    assert (reference.ravel()[::3] == 0).all()
    (got,) = Session(graph, isa=isa, check_finite=False).run(None, feeds)
    np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-5)
    if op.startswith("pq") or not op:
        assert same_bits(got, reference)


DENSE: list[dict[str, Any]] = [
    {"channels": 3, "outputs": 5, "padding": (1, 1)},
    {"channels": 8, "outputs": 9, "stride": (2, 3), "padding": (2, 0), "dilation": (1, 2)},
    {"channels": 12, "outputs": 8, "groups": 4},
    {"channels": 6, "outputs": 6, "groups": 6, "padding": (1, 1)},
    {"channels": 4, "outputs": 4, "kernel": (1, 1)},
    {"channels": 2, "outputs": 1, "kernel": (5, 4), "stride": (3, 2)},
]


@pytest.mark.parametrize("attrs", DENSE)
@sweep("size", [(1, 6, 7), (3, 9, 13), (2, 20, 21)])
def test_dense_convolutions(attrs: dict[str, Any], size: tuple[int, int, int]) -> None:
    attrs = dict(attrs)
    channels = attrs.pop("channels")
    b = Builder(("x", (None, channels, *size[1:])), seed=1)
    b.conv2d("x", channels, attrs.pop("outputs"), **attrs)
    check_dense(b, (size[0], channels, *size[1:]))


@pytest.mark.parametrize(("features", "outputs"), [(1, 1), (7, 63), (40, 64), (100, 65), (33, 130)])
@sweep("rows", [1, 2, 17, 65])
def test_dense_linear(rows: int, features: int, outputs: int) -> None:
    b = Builder(("x", (None, features)), seed=rows)
    b.linear("x", features, outputs)
    check_dense(b, (rows, features))


def check_dense(b: Builder, shape: tuple[int, ...]) -> None:
    """The same bits from all, and the numbers of the reference."""
    graph = b.graph()
    x = b.rng.normal(size=shape).astype(np.float32)
    results = [Session(graph, isa=isa, threads=2)(x) for isa in ISAS]
    (reference,) = run_reference(graph, [x]).values()
    np.testing.assert_allclose(results[0], reference, rtol=1e-5, atol=1e-5)
    for isa, result in zip(ISAS, results, strict=True):
        assert same_bits(result, results[0]), isa


@each_isa
@pytest.mark.parametrize("op", ["pq_conv2d", "pq_linear", "conv2d", "linear"])
@sweep("tail", ["relu", "relu6", "add", "add relu"])
def test_fused_tails(isa: str, tail: str, op: str) -> None:
    shape = (5, 5, 7) if op.endswith("2d") else (5,)
    b = Builder(("x", (None, *shape)), ("r", (None, *shape)), seed=2)
    x = getattr(b, op)("x", 5, 5, **({"kernel": (1, 1)} if shape[1:] else {}))
    if "add" in tail:
        x = b.add("add", "r", x)
    if "relu" in tail:
        x = b.add(tail.split()[-1], x)
    graph = b.graph(x)
    feeds = {n: b.rng.normal(size=(9, *shape)).astype(np.float32) for n in ("x", "r")}
    if "add" not in tail:
        feeds.pop("r")
        graph = type(graph)(graph.inputs[:1], graph.outputs, graph.nodes, graph.tensors)
    (y,) = Session(graph, isa=isa, threads=2).run(None, feeds)
    (reference,) = run_reference(graph, feeds).values()
    if op.startswith("pq"):
        np.testing.assert_array_equal(y, reference)
    else:
        np.testing.assert_allclose(y, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 7, 8, 15, 16, 17, 33, 64, 65, 130])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_table_gradient(outputs: int, layout: str) -> None:
    rng = np.random.default_rng(outputs)
    codebooks, count, size = 5, 16, (3, 7, 11)
    rows = size[0] * size[1] * size[2]
    codes = rng.integers(0, count, (codebooks, rows)).astype(np.uint8)
    gradient = rng.normal(size=(*size, outputs)).astype(np.float32)  # NHWC
    want = np.zeros((codebooks, count, outputs), np.float32)
    flat = gradient.reshape(rows, outputs)
    for codebook in range(codebooks):
        np.add.at(want[codebook], codes[codebook], flat)  # in the order of the rows
    image = gradient.transpose(0, 3, 1, 2)
    if layout == "NCHW":
        image = np.ascontiguousarray(image)
    for isa in ISAS:
        for threads in (1, 3):
            memory, out = guarded(want.shape, np.float32, 7.0)
            _engine.table_gradient(isa, _engine.ThreadPool(threads), codes, image, out)
            assert same_bits(out, want), isa
            out[...] = 7
            assert (memory == 7).all()


@pytest.mark.parametrize("width", [1, 5, 9])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_cluster_sums(width: int, stride: tuple[int, int]) -> None:
    layer = random_layer(
        width,
        size=(2, 8, 9),
        channels=5,
        width=width,
        kernel=(3, 3),
        stride=stride,
        padding=(1, 0),
        act_zero=64,
    )
    codes = layer.reference_codes()
    codebooks, count, _ = layer.tensors["centroids"].shape
    rows = layer.quantised_rows()
    rows = np.pad(rows, ((0, 0), (0, codebooks * width - rows.shape[1]))).astype(np.int64)
    sums = np.zeros((codebooks, count, width), np.int64)
    counts = np.zeros((codebooks, count), np.int64)
    for codebook in range(codebooks):
        np.add.at(
            sums[codebook], codes[codebook], rows[:, codebook * width : (codebook + 1) * width]
        )
        np.add.at(counts[codebook], codes[codebook], 1)
    for isa in ISAS:
        memory, got_sums = guarded(sums.shape, np.int64, -7)
        got_counts = np.full_like(counts, -7)
        _engine.cluster_sums(
            isa,
            _engine.ThreadPool(2),
            layer.x,
            codes,
            act_scale=layer.act_scale,
            act_zero=layer.act_zero,
            act_bits=layer.act_bits,
            kernel=layer.kernel,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            sums=got_sums,
            counts=got_counts,
        )
        np.testing.assert_array_equal(got_sums, sums, isa)
        np.testing.assert_array_equal(got_counts, counts, isa)
        got_sums[...] = -7
        assert (memory == -7).all()


def test_sizes_that_do_not_fit_are_refused() -> None:
    layer = random_layer(1, size=(1, 2, 2), channels=2, kernel=(1, 1))
    native, pool = layer.native(ISAS[0]), _engine.ThreadPool(1)
    good = np.empty(layer.reference().shape, np.float32)
    native.run(pool, layer.x, good)
    for out in (good[:, 1:], good[..., 1:], good[:, :, 1:]):
        with pytest.raises(ValueError, match="do not fit"):
            native.run(pool, layer.x, out)
    with pytest.raises(ValueError, match="do not fit"):
        native.run(pool, layer.x[:, 1:], good)
    with pytest.raises(ValueError, match="codes must have the shape"):
        native.run(pool, layer.x, good, np.empty((1, 5), np.uint8))
    # a kernel that is larger than the image, with a stride that would round its size up to one
    wide = random_layer(1, size=(1, 3, 3), channels=1, kernel=(3, 3), stride=(2, 2))
    with pytest.raises(ValueError, match="do not fit"):
        wide.native(ISAS[0]).run(pool, wide.x[:, :, 1:, 1:], np.empty((1, 5, 1, 1), np.float32))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"act_bits": 8}, "bits"),
        ({"act_zero": 128}, "zero point"),
        ({"act_scale": 0.0}, "scale"),
        ({"in_channels": 19}, "codebooks"),
        ({"kernel": (0, 1)}, "at least 1"),
        ({"padding": (-1, 0)}, "negative"),
        ({"isa": "mmx"}, "cannot run"),
    ],
)
def test_bad_layers_are_refused(change: dict[str, Any], match: str) -> None:
    layer = random_layer(1, channels=9)
    attrs: dict[str, Any] = {**layer.node.attrs, **change}
    isa = attrs.pop("isa", ISAS[0])
    with pytest.raises(ValueError, match=match):
        _engine.Layer(layer.node.op, isa, attrs, layer.tensors)

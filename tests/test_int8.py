"""Dense operators in int8: the specification against plain loops, the engine against it."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder, int8_tensors
from layers import same_bits
from sweeps import sweep

from lutra import GraphError, Session, load_graph, run_reference, runnable_isas, save_graph
from lutra.graph import Graph
from lutra.ops.limits import MAX_INT8_DEPTH
from lutra.reference import windows
from lutra.runtime.fuse import fuse

ISAS = runnable_isas()


def inputs(b: Builder, *shape: int, spread: float = 4.0, seed: int = 9) -> Array:
    """Values that go beyond the grid on both sides."""
    x = np.random.default_rng(seed).uniform(-spread, 2 * spread, shape)
    return x.astype(np.float32)


def plain_quantise(value: float, scale: float, zero: int, bits: int) -> int:
    """Python's round is half to even; the quotient is the float32 one."""
    quotient = np.float32(value) / np.float32(scale)
    if not np.isfinite(quotient):
        return 2**bits - 1 if quotient > 0 else 0
    return max(0, min(2**bits - 1, round(Fraction(float(quotient))) + zero))


def plain_output(total: int, tensors: dict[str, Array], m: int) -> np.float32:
    product = np.float32(np.float32(total) * tensors["scale"][m])
    return np.float32(product + tensors["bias"][m])


# The specification


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1), 1),
        ((3, 2), (2, 1), (0, 2), (1, 2), 2),
        ((2, 3), (1, 2), (3, 0), (2, 1), 4),  # depthwise
        ((1, 1), (1, 1), (0, 0), (1, 1), 1),
    ],
)
def test_int8_conv2d_is_the_plain_loop(
    kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int, monkeypatch: Any
) -> None:
    b = Builder(("x", (None, 4, 5, 6)))
    b.int8_conv2d(
        "x", 4, 8, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
        act_zero=20, act_bits=6,
    )  # fmt: skip
    graph, x = b.graph(), inputs(b, 2, 4, 5, 6)
    x[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    tensors = graph.node_tensors(graph.nodes[0])
    (got,) = run_reference(graph, [x]).values()
    assert got.dtype == np.float32
    for n, m, i, j in np.ndindex(*got.shape):
        total = 0
        for c in range(4 // groups):
            for ki in range(kernel[0]):
                for kj in range(kernel[1]):
                    y = i * stride[0] + ki * dilation[0] - padding[0]
                    z = j * stride[1] + kj * dilation[1] - padding[1]
                    if 0 <= y < 5 and 0 <= z < 6:
                        channel = m // (8 // groups) * (4 // groups) + c
                        x_q = plain_quantise(x[n, channel, y, z], 0.05, 20, 6)
                        total += int(tensors["weight"][m, c, ki, kj]) * (x_q - 20)
        assert got[n, m, i, j] == plain_output(total, tensors, m)
    monkeypatch.setattr(windows, "MAX_PATCH_ENTRIES", 1)  # one row at a time
    assert same_bits(run_reference(graph, [x])[graph.outputs[0]], got)


@pytest.mark.parametrize("bits", range(1, 8))
def test_int8_linear_is_the_plain_loop(bits: int) -> None:
    b = Builder(("x", (None, 11)), seed=bits)
    b.int8_linear("x", 11, 3, act_bits=bits, act_zero=2 ** (bits - 1))
    graph, x = b.graph(), inputs(b, 4, 11)
    tensors = graph.node_tensors(graph.nodes[0])
    (got,) = run_reference(graph, [x]).values()
    zero = 2 ** (bits - 1)
    for n, m in np.ndindex(*got.shape):
        steps = [plain_quantise(value, 0.05, zero, bits) - zero for value in x[n]]
        total = sum(int(w) * s for w, s in zip(tensors["weight"][m], steps, strict=True))
        assert got[n, m] == plain_output(total, tensors, m)


def test_work_is_counted() -> None:
    b = Builder(("x", (None, 4, 5, 5)))
    b.int8_conv2d("x", 4, 6, groups=2)
    cost = b.graph().total_cost()
    assert cost.macs == cost.int8_macs == cost.dense_macs == 9 * 6 * 2 * 9
    assert cost.weight_bytes == 6 * 2 * 9 + 4 * 6 + 4 * 6
    assert (cost.lookups, cost.table_bytes) == (0, 0)
    b = Builder(("x", (None, 7, 4)))
    b.linear(b.int8_linear("x", 4, 3), 3, 2)
    assert b.graph().total_cost().int8_macs == 7 * 4 * 3
    assert b.graph().total_cost().macs == 7 * 4 * 3 + 7 * 3 * 2


# What is refused


def conv(size: tuple[int, ...] = (4, 3, 3, 3), channels: int = 3, **changes: Any) -> Graph:
    b = Builder(("x", (None, channels, 8, 8)))
    tensors = int8_tensors(b.rng, size)
    attrs: dict[str, Any] = {"act_scale": 0.1, "act_zero": 3, "act_bits": 5}
    for name, value in changes.items():
        (tensors if name in tensors else attrs)[name] = value
    b.add("int8_conv2d", "x", tensors=tensors, name="conv", **attrs)
    return b.graph()


def linear(shape: tuple[int | None, ...], size: tuple[int, ...] = (4, 5), **changes: Any) -> Graph:
    b = Builder(("x", shape))
    tensors = {**int8_tensors(b.rng, size), **changes}
    b.add("int8_linear", "x", tensors=tensors, act_scale=0.1, act_zero=3, act_bits=5)
    return b.graph()


def test_bad_tensors_and_attributes_are_refused() -> None:
    low = np.zeros((4, 3, 3, 3), np.int8)
    low[1, 2, 0, 1] = -128
    wrong = np.ones(5, np.float32)
    deep = (1, MAX_INT8_DEPTH + 1)
    cases: list[tuple[Graph, str]] = [
        (conv(weight=low), r"'conv' \(int8_conv2d\) has a weight of -128; .* -127..127"),
        (conv(weight=low.astype(np.float32)), "must be int8 with 4 axes"),
        (conv(weight=low[0]), "must be int8 with 4 axes"),
        (conv(scale=wrong), r"has scale of shape \(5,\); .* needs \(4,\)"),
        (conv(bias=wrong), r"needs \(4,\)"),
        (conv(act_zero=32), "act_zero=32 with act_bits=5; it must be in 0..31"),
        (conv(act_scale=0.0), "has act_scale=0.0; it must be in"),
        (conv(act_bits=8), "at most 7"),
        (conv(groups=3), "4 outputs in groups=3"),
        (conv(channels=4), "give it an input of 3 channels"),
        (conv((4, 3, 9, 9)), "kernel that spans 9"),
        (conv((1, MAX_INT8_DEPTH // 9 + 1, 3, 3), MAX_INT8_DEPTH // 9 + 1), "use at most 132104"),
        (conv(bits=3), "unknown attribute 'bits'"),
        (linear((None, 6)), "5 values"),
        (linear((5,)), "at least 2 axes"),
        (linear((None, 5), scale=wrong), r"needs \(4,\)"),
        (linear((None, 5), weight=np.full((4, 5), -128, np.int8)), "has a weight of -128"),
        (linear((None, deep[1]), deep), "adds up 132105 products"),
    ]
    for graph, message in cases:
        with pytest.raises(GraphError, match=message):
            graph.validate()


# The engine


def compare(graph: Graph, batches: tuple[int, ...] = (1, 5), spread: float = 4.0) -> None:
    """The same bits from every instruction set, on one thread and on three."""
    for batch in batches:
        feeds = {
            v.name: inputs(Builder(), batch, *(s or 1 for s in v.shape[1:]), spread=spread, seed=i)
            for i, v in enumerate(graph.inputs)
        }
        want = run_reference(graph, feeds)
        for isa in ISAS:
            for threads in (1, 3):
                got = Session(graph, threads=threads, isa=isa).run(None, feeds)
                for name, y in zip(graph.outputs, got, strict=True):
                    wrong = np.argwhere(y != want[name])[:3].tolist()
                    assert same_bits(y, want[name]), (isa, threads, batch, name, wrong)


CONVOLUTIONS: list[dict[str, Any]] = [
    {"channels": 3, "outputs": 16, "padding": (1, 1)},  # a first convolution
    {"channels": 3, "outputs": 7, "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)},
    {"channels": 8, "outputs": 8, "groups": 8, "padding": (1, 1)},  # depthwise
    {"channels": 5, "outputs": 10, "groups": 5, "stride": (2, 1), "padding": (2, 0)},
    {"channels": 6, "outputs": 9, "groups": 3, "dilation": (2, 3), "padding": (2, 3)},
    {"channels": 4, "outputs": 6, "groups": 2, "kernel": (2, 3), "stride": (1, 3)},
    {"channels": 17, "outputs": 33, "kernel": (1, 1)},
    {"channels": 64, "outputs": 70, "kernel": (1, 1), "stride": (2, 2)},
    {"channels": 130, "outputs": 3, "padding": (1, 1)},
    {"channels": 16, "outputs": 33, "padding": (1, 1), "stride": (2, 2)},
    {"channels": 6, "outputs": 17, "stride": (1, 3), "padding": (0, 2)},
    {"channels": 8, "outputs": 9, "kernel": (5, 5), "dilation": (1, 2), "padding": (2, 4)},
    {"channels": 12, "outputs": 24, "kernel": (3, 1), "padding": (1, 0)},
    {"channels": 1, "outputs": 1, "kernel": (1, 1)},
    {"channels": 1, "outputs": 1, "kernel": (5, 1), "padding": (4, 3)},
]


@pytest.mark.parametrize("case", range(len(CONVOLUTIONS)))
@sweep("zero", [0, 64, 127])
def test_convolutions_give_the_bits_of_the_specification(case: int, zero: int) -> None:
    settings = dict(CONVOLUTIONS[case])
    b = Builder(("x", (None, settings["channels"], 11, 13)), seed=case)
    settings.setdefault("kernel", (3, 3))
    b.int8_conv2d("x", act_zero=zero, **settings)
    compare(b.graph())


@pytest.mark.parametrize("size", [(1, 1), (1, 16), (4, 4), (3, 11), (31, 33)])
def test_tails_of_tiles(size: tuple[int, int]) -> None:
    for outputs in (1, 15, 16, 17, 31, 65):
        b = Builder(("x", (None, 4, *size)), seed=outputs)
        b.int8_conv2d("x", 4, outputs, padding=(1, 1), act_zero=9)
        compare(b.graph(), batches=(1, 2))


@pytest.mark.parametrize("rows", [*range(1, 17), 19, 33, 36, 49, 50, 60, 65, 75])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 3)])
def test_the_few_rows_at_the_end_of_a_tile(rows: int, kernel: tuple[int, int]) -> None:
    """Layers deep enough for products with the outputs in the lanes."""
    padding = (0, kernel[1] // 2)
    outputs, last = (61, 16) if rows % 2 else (16, 9)
    b = Builder(("x", (None, 90, 1, rows)), seed=rows)
    y = b.int8_conv2d("x", 90, outputs, kernel, padding=padding, act_zero=rows)
    z = b.int8_conv2d(b.add("relu", y), outputs, outputs, (1, 1), act_scale=0.7)  # folded, in bytes
    z = b.add("add", z, y)
    b.int8_conv2d(z, outputs, last, (1, 1), act_scale=0.9, act_zero=64)
    compare(b.graph(), batches=(1, 2))


@pytest.mark.parametrize("width", [7, 8, 14, 16, 24, 32])
@sweep("largest", [10, 43, 44, 64, 127])
def test_weights_that_let_taps_be_added_in_16_bits(width: int, largest: int) -> None:
    """Six weights of 43 times 127 are just below 2^15, and six of 44 above."""
    rng = np.random.default_rng(width)
    for sign in (-1, 1):
        tensors = int8_tensors(rng, (18, 8, 3, 3))
        random = np.rint(rng.normal(size=(18, 8, 3, 3)) * (largest / 3))
        tensors["weight"] = np.clip(random, -largest, largest).astype(np.int8)
        tensors["weight"][::5] = sign * largest
        b = Builder(("x", (None, 8, 5, width)))
        grid = {"act_scale": 0.05, "act_zero": 0, "act_bits": 7}
        b.add("int8_conv2d", "x", tensors=tensors, padding=(1, 1), **grid)
        compare(b.graph(), batches=(1, 3))
        compare(b.graph(), batches=(1,), spread=1e3)  # all activations are 0 or 127


@pytest.mark.parametrize("bits", range(1, 8))
def test_every_width_of_activations(bits: int) -> None:
    zero = 2 ** (bits - 1)
    for act_zero in {0, 1, zero, 2**bits - 1}:
        b = Builder(("x", (None, 5, 7, 6)), seed=bits)
        b.int8_conv2d("x", 5, 6, padding=(1, 1), act_bits=bits, act_zero=act_zero, act_scale=0.3)
        compare(b.graph(), batches=(2,))
        b = Builder(("x", (None, 37)), seed=bits)
        b.int8_linear("x", 37, 19, act_bits=bits, act_zero=act_zero, act_scale=0.3)
        compare(b.graph(), batches=(2,))


@pytest.mark.parametrize("rows", [(), (3,), (2, 4)])
@sweep("features", [1, 3, 4, 63, 64, 65, 130, 1000])
def test_linear_layers_give_the_bits_of_the_specification(
    features: int, rows: tuple[int, ...]
) -> None:
    for outputs in (1, 10, 17, 600):
        b = Builder(("x", (None, *rows, features)), seed=features)
        b.int8_linear("x", features, outputs)
        compare(b.graph())


def test_the_largest_sums_are_exact() -> None:
    """Every product is the largest there is; float32 must round the sum to nearest even."""
    for features in (1000, 5001, 132104):
        weight = np.full((3, features), 127, np.int8)
        weight[1] = -127
        weight[2, ::2] = -127
        weight[2, 0] = 126
        tensors = {
            "weight": weight,
            "scale": np.array([1, 1, 0.37], np.float32),
            "bias": np.array([0, 0.5, -0.25], np.float32),
        }
        for zero, value in ((0, 1e9), (127, -1e9)):
            b = Builder(("x", (None, features)))
            b.add("int8_linear", "x", tensors=tensors, act_scale=1.0, act_zero=zero, act_bits=7)
            x = np.full((5, features), value, np.float32)
            want = np.float32(127 * 127 * features * (1 if value > 0 else -1))
            for isa in ISAS:
                for batch in (1, 5):
                    y = Session(b.graph(), isa=isa)(x[:batch])
                    assert (y[:, 0] == want).all()
                    assert same_bits(y, run_reference(b.graph(), [x[:batch]])[b.graph().outputs[0]])


def test_nan_and_infinity_are_quantised() -> None:
    b = Builder(("x", (None, 3)))
    b.int8_linear("x", 3, 4, act_zero=10)
    x = np.array([[np.nan, np.inf, -np.inf], [1e38, -1e38, -0.0]], np.float32)
    want = run_reference(b.graph(), [x])[b.graph().outputs[0]]
    assert np.isfinite(want).all()
    for isa in ISAS:
        assert same_bits(Session(b.graph(), isa=isa, check_finite=False)(x), want)


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("clamp", ["relu", "relu6"])
def test_residual_and_clamp_share_the_step(groups: int, clamp: str) -> None:
    b = Builder(("x", (None, 6, 9, 7)), seed=groups)
    y = b.add("relu", b.int8_conv2d("x", 6, 6, padding=(1, 1), groups=groups, act_zero=40))
    z = b.int8_conv2d(y, 6, 6, padding=(1, 1), groups=groups)
    out = b.add(clamp, b.add("add", z, "x"))
    end = b.add("relu", b.add("add", b.int8_conv2d(out, 6, 6, (1, 1)), out))
    graph = b.graph()
    assert [(f.output, f.residual, f.clamp is not None) for f in fuse(graph)] == [
        (y, None, True),
        (out, "x", True),
        (end, out, True),
    ]
    compare(graph)


def test_linear_layers_fuse_too() -> None:
    b = Builder(("x", (None, 3, 5)))
    y = b.add("relu", b.add("add", b.int8_linear("x", 5, 5), "x"))
    assert [(f.node.op, f.output, f.residual) for f in fuse(b.graph())] == [("int8_linear", y, "x")]
    compare(b.graph())


def test_layers_of_all_families_share_a_network() -> None:
    """Grids, floats and clamps between them: whoever quantises, the bits are the same."""
    b = Builder(("x", (None, 3, 8, 8)), seed=5)
    x = b.add("relu", b.int8_conv2d("x", 3, 8, padding=(1, 1), act_zero=64))
    y = b.add("relu6", b.pq_conv2d(x, 8, 8, padding=(1, 1), act_scale=0.03))
    y = b.add("add", b.int8_conv2d(y, 8, 8, padding=(1, 1), groups=8, act_scale=0.03), x)
    z = b.int8_conv2d(y, 8, 4, (1, 1), act_scale=0.02, act_zero=50)
    z = b.add("max_pool2d", z, kernel=(2, 2), stride=(2, 2))
    z = b.add("flatten", z)
    end = b.int8_linear(z, 64, 10, act_scale=0.1)
    compare(b.graph(end, y))


def test_files_hold_int8_layers(tmp_path: Any) -> None:
    b = Builder(("x", (None, 4, 6, 6)))
    b.int8_conv2d("x", 4, 8, groups=4, act_zero=12)
    graph = b.graph()
    save_graph(graph, tmp_path / "m.lutra")
    loaded = load_graph(tmp_path / "m.lutra")
    assert loaded.nodes == graph.nodes
    x = inputs(b, 3, 4, 6, 6)
    want = run_reference(graph, [x])[graph.outputs[0]]
    assert same_bits(Session(tmp_path / "m.lutra")(x), want)
    assert math.isclose(loaded.nodes[0].attrs["act_scale"], 0.05)  # type: ignore[arg-type]

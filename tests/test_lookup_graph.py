"""Layers of one table: the specification against plain loops, the engine against it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder, lookup_tensors
from layers import same_bits
from sweeps import sweep

from lutra import GraphError, Session, load_graph, run_reference, runnable_isas, save_graph
from lutra.format import file_version
from lutra.graph import Graph, Value
from lutra.ops.limits import MAX_LOOKUP_DEPTH
from lutra.ops.lookup import bits_for, pack_weights, unpack_weights
from lutra.reference import lookup as reference
from lutra.reference import windows
from lutra.runtime.fuse import fuse

ISAS = runnable_isas()
SIZES = [(bits, weights) for bits in range(2, 7) for weights in (3, 5, 15, 17, 33)]


def inputs(*shape: int, spread: float = 4.0, seed: int = 9) -> Array:
    """Values that go beyond the grid on both sides."""
    x = np.random.default_rng(seed).uniform(-spread, 1.5 * spread, shape)
    return x.astype(np.float32)


def plain_index(value: float, scale: float, zero: int, bits: int) -> int:
    """Python's round is half to even; the quotient is the float32 one."""
    quotient = np.float32(value) / np.float32(scale)
    if not np.isfinite(quotient):
        return 2**bits - 1 if quotient > 0 else 0
    return max(0, min(2**bits - 1, round(Fraction(float(quotient))) + zero))


def plain_weight(packed: Array, bits: int, m: int, d: int) -> int:
    """Index d of row m, from the definition of the file format."""
    return int(packed[m, d * bits // 8]) >> (d * bits % 8) & (2**bits - 1)


def plain_output(total: int, tensors: dict[str, Array], m: int) -> np.float32:
    product = np.float32(np.float32(total) * tensors["scale"][m])
    return np.float32(product + tensors["bias"][m])


# Packed weights


@pytest.mark.parametrize("bits", [2, 4, 8])
@sweep("depth", [1, 2, 3, 4, 5, 7, 8, 27])
def test_weights_are_packed_from_the_lowest_bit(bits: int, depth: int) -> None:
    index = np.random.default_rng(depth).integers(0, 2**bits, (3, depth)).astype(np.uint8)
    packed = pack_weights(index, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (3, -(-depth * bits // 8))
    assert (unpack_weights(packed, bits, depth) == index).all()
    for m, d in np.ndindex(3, depth):
        assert plain_weight(packed, bits, m, d) == index[m, d]
    used = depth * bits - 8 * (packed.shape[1] - 1)
    assert not (packed[:, -1].astype(int) >> used).any()


def test_the_order_of_bits_is_fixed() -> None:
    assert pack_weights(np.array([[1, 2, 3, 0, 2]], np.uint8), 2).tolist() == [[0b00111001, 2]]
    assert pack_weights(np.array([[1, 14, 7]], np.uint8), 4).tolist() == [[0xE1, 0x07]]
    assert pack_weights(np.array([[1, 32]], np.uint8), 8).tolist() == [[1, 32]]


@pytest.mark.parametrize(("weights", "bits"), [(3, 2), (5, 4), (7, 4), (15, 4), (17, 8), (33, 8)])
def test_bits_for(weights: int, bits: int) -> None:
    assert bits_for(weights) == bits


# The specification


@sweep(("act_bits", "weights"), SIZES)
@sweep("signed", [False, True, 1, 3])
def test_lookup_linear_is_the_plain_loop(act_bits: int, weights: int, signed: bool | int) -> None:
    zero = 2 ** (act_bits - 1) if signed is True else int(signed)
    b = Builder(("x", (None, 11)), seed=weights)
    b.lookup_linear("x", 11, 3, weights=weights, act_bits=act_bits, act_zero=zero)
    graph, x = b.graph(), inputs(4, 11)
    tensors = graph.node_tensors(graph.nodes[0])
    (got,) = run_reference(graph, [x]).values()
    assert got.dtype == np.float32
    for n, m in np.ndindex(*got.shape):
        total = 0
        for d in range(11):
            row = plain_index(x[n, d], 0.25, zero, act_bits)
            column = plain_weight(tensors["weight"], bits_for(weights), m, d)
            total += int(tensors["table"][row, column])
        assert got[n, m] == plain_output(total, tensors, m)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 2), (2, 1), (0, 2), (1, 2)),
        ((2, 3), (1, 2), (3, 0), (2, 1)),
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((1, 1), (2, 3), (1, 1), (1, 1)),
    ],
)
@pytest.mark.parametrize(("act_bits", "weights", "zero"), [(4, 15, 8), (2, 3, 0), (6, 33, 32)])
def test_lookup_conv2d_is_the_plain_loop(
    kernel: Any, stride: Any, padding: Any, dilation: Any, act_bits: int, weights: int, zero: int,
    monkeypatch: Any,
) -> None:  # fmt: skip
    b = Builder(("x", (None, 3, 5, 6)))
    b.lookup_conv2d(
        "x", 3, 4, kernel, stride=stride, padding=padding, dilation=dilation, weights=weights,
        act_bits=act_bits, act_zero=zero,
    )  # fmt: skip
    graph, x = b.graph(), inputs(2, 3, 5, 6)
    x[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    tensors = graph.node_tensors(graph.nodes[0])
    (got,) = run_reference(graph, [x]).values()
    for n, m, i, j in np.ndindex(*got.shape):
        total = d = 0
        for c in range(3):
            for ki in range(kernel[0]):
                for kj in range(kernel[1]):
                    y = i * stride[0] + ki * dilation[0] - padding[0]
                    z = j * stride[1] + kj * dilation[1] - padding[1]
                    inside = 0 <= y < 5 and 0 <= z < 6
                    row = plain_index(x[n, c, y, z], 0.25, zero, act_bits) if inside else zero
                    column = plain_weight(tensors["weight"], bits_for(weights), m, d)
                    total += int(tensors["table"][row, column])
                    d += 1
        assert got[n, m, i, j] == plain_output(total, tensors, m)
    monkeypatch.setattr(windows, "MAX_PATCH_ENTRIES", 1)  # one row at a time
    monkeypatch.setattr(reference, "_MAX_ROWS", 3)
    assert same_bits(run_reference(graph, [x])[graph.outputs[0]], got)


def test_work_is_counted() -> None:
    b = Builder(("x", (None, 4, 5, 5)))
    b.lookup_conv2d("x", 4, 6)
    cost = b.graph().total_cost()
    assert cost.lookups == cost.dense_macs == cost.int_additions == 9 * 6 * 4 * 9
    assert (cost.macs, cost.int_multiplications, cost.encode_ops) == (0, 0, 0)
    assert (cost.quantised, cost.scaled) == (4 * 25, 6 * 9)
    assert cost.float_multiplications == cost.float_additions == 100 + 54
    assert cost.table_bytes == 16 * 15
    assert cost.weight_bytes == 6 * 18 + 16 * 15 + 4 * 6 + 4 * 6
    b = Builder(("x", (None, 7, 5)))
    b.lookup_linear("x", 5, 3, weights=3, act_bits=2)
    assert b.graph().total_cost().lookups == 7 * 5 * 3
    assert b.graph().total_cost().weight_bytes == 3 * 2 + 4 * 3 + 24


# What is refused


def conv(channels: int = 3, **changes: Any) -> Graph:
    """A convolution of 3 channels, 4 outputs and a 16 x 15 table on images of 8 x 8."""
    b = Builder(("x", (None, channels, 8, 8)))
    tensors: dict[str, Any] = lookup_tensors(b.rng, 27, 4, zero=8)
    attrs: dict[str, Any] = {
        "act_scale": 0.1,
        "act_zero": 8,
        "act_bits": 4,
        "weight_bits": 4,
        "in_channels": 3,
        "kernel": (3, 3),
    }
    for name, value in changes.items():
        (tensors if name in tensors else attrs)[name] = value
    kept = {role: tensor for role, tensor in tensors.items() if tensor is not None}
    b.add("lookup_conv2d", "x", tensors=kept, name="conv", **attrs)
    return b.graph()


def linear(shape: tuple[int | None, ...], features: int = 5, **changes: Any) -> Graph:
    b = Builder(("x", shape))
    tensors = {**lookup_tensors(b.rng, 5, 4, bits=2, weights=3), **changes}
    attrs = {"act_scale": 0.1, "act_zero": 0, "act_bits": 2, "weight_bits": 2}
    b.add("lookup_linear", "x", tensors=tensors, name="fc", in_features=features, **attrs)
    return b.graph()


def table(rows: int = 16, columns: int = 15, **entries: int) -> Array:
    result = np.zeros((rows, columns), np.int8)
    for where, value in entries.items():
        row, column = where[1:].split("_")
        result[int(row), int(column)] = value
    return result


def weight(size: int = 14, last: int = 0) -> Array:
    result = np.zeros((4, size), np.uint8)
    result[2, -1] = last
    return result


REFUSED: dict[str, tuple[Any, str]] = {
    "dtype of the weight": (
        lambda: conv(weight=weight().astype(np.int8)),
        r"'conv' \(lookup_conv2d\) has weight of dtype int8 .* must be uint8 with 2 axes",
    ),
    "axes of the weight": (lambda: conv(weight=weight()[0]), "must be uint8 with 2 axes"),
    "dtype of the table": (
        lambda: conv(table=table().astype(np.uint8)),
        "must be int8 with 2 axes",
    ),
    "no table": (lambda: conv(table=None), "lacks the tensor 'table'"),
    "no weight": (lambda: conv(weight=None), "lacks the tensor 'weight'"),
    "rows": (lambda: conv(table=table(8)), r"table of shape \(8, 15\) with act_bits=4; .* 16 rows"),
    "rows of other bits": (
        lambda: conv(act_bits=5, act_zero=0),
        r"table of shape \(16, 15\) with act_bits=5",
    ),
    "even columns": (lambda: conv(table=table(16, 14)), r"odd number of columns in 3..33"),
    "one column": (lambda: conv(table=table(16, 1)), r"odd number of columns in 3..33"),
    "many columns": (lambda: conv(table=table(16, 35)), r"odd number of columns in 3..33"),
    "-128": (lambda: conv(table=table(r3_4=-128)), r"entry of -128; .* in -127..127"),
    "the row of zero": (lambda: conv(table=table(r8_4=1)), r"entries other than 0 in row 8"),
    "the row of zero, unsigned": (lambda: conv(table=table(r0_4=1), act_zero=0), "in row 0"),
    "another row of zero": (lambda: conv(table=table(r7_4=1), act_zero=7), "in row 7"),
    "act_zero beyond the grid": (lambda: conv(act_zero=16), "it must be in 0..15"),
    "act_scale": (lambda: conv(act_scale=0.0), "has act_scale=0.0; it must be in"),
    "act_bits": (lambda: conv(act_bits=7), "has act_bits=7; it must be at most 6"),
    "one bit": (lambda: conv(act_bits=1), "has act_bits=1; it must be at least 2"),
    "weight_bits": (lambda: conv(weight_bits=8), "weight_bits=8 for a table of 15 columns; .* 4"),
    "few weight_bits": (lambda: conv(weight_bits=2), "weight_bits=2 .* it must be 4"),
    "odd weight_bits": (lambda: conv(weight_bits=3), "weight_bits=3 .* it must be 4"),
    "9 weight_bits": (lambda: conv(weight_bits=9), "has weight_bits=9; it must be at most 8"),
    "bytes of the weight": (
        lambda: conv(weight=weight(13)),
        r"weight of shape \(4, 13\); rows of 27 indices of 4 bits need \(4, 14\)",
    ),
    "rest of the last byte": (
        lambda: conv(weight=weight(last=0x10)),
        "bits other than 0 behind the last of 27 weight indices; set the highest 4 bits",
    ),
    "index": (lambda: conv(weight=weight(last=15)), r"index of 15; .* must be in 0..14"),
    "scale": (
        lambda: conv(scale=np.ones(5, np.float32)),
        r"has scale of shape \(5,\); the weight of shape \(4, 14\) needs \(4,\)",
    ),
    "bias": (lambda: conv(bias=np.ones(5, np.float32)), r"has bias .* needs \(4,\)"),
    "channels": (lambda: conv(channels=4), "give it an input of 3 channels"),
    "small images": (
        lambda: conv(kernel=(9, 3), weight=np.zeros((4, 41), np.uint8)),
        "kernel that spans 9 over an axis of 8",
    ),
    "groups": (lambda: conv(groups=1), "unknown attribute 'groups'"),
    "rank": (lambda: replace(conv(), inputs=(Value("x", "float32", (None, 3, 8)),)), "4 axes"),
    "features": (lambda: linear((None, 6)), "in_features=5 .* last axis has 5 values"),
    "one axis": (lambda: linear((5,)), "at least 2 axes"),
    "index of two bits": (
        lambda: linear((None, 5), weight=np.full((4, 2), 3, np.uint8)),
        r"weight index of 3; .* 0..2",
    ),
    "depth": (
        lambda: conv(in_channels=MAX_LOOKUP_DEPTH // 9 + 1),
        f"adds up {MAX_LOOKUP_DEPTH // 9 * 9 + 9} table entries .* use at most {MAX_LOOKUP_DEPTH}",
    ),
    "many features": (
        lambda: linear((None, 5), MAX_LOOKUP_DEPTH + 1),
        f"must be at most {MAX_LOOKUP_DEPTH}",
    ),
    "features of the attribute": (lambda: linear((None, 5), 0), "in_features=0; .* at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_tensors_and_attributes_are_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(GraphError, match=message):
        make().validate()


def test_the_cases_differ_from_a_good_graph_in_one_thing() -> None:
    conv().validate()
    conv(weight=weight(last=14)).validate()
    linear((None, 5)).validate()


# The engine


def compare(graph: Graph, batches: tuple[int, ...] = (1, 5), spread: float = 4.0) -> None:
    """The same bits from every instruction set, on one thread and on three."""
    for batch in batches:
        feeds = {
            v.name: inputs(batch, *(s or 1 for s in v.shape[1:]), spread=spread, seed=i)
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
    {"channels": 6, "outputs": 9, "dilation": (2, 3), "padding": (2, 3)},
    {"channels": 4, "outputs": 6, "kernel": (2, 3), "stride": (1, 3)},
    {"channels": 17, "outputs": 33, "kernel": (1, 1)},
    {"channels": 64, "outputs": 70, "kernel": (1, 1), "stride": (2, 2)},
    {"channels": 130, "outputs": 3, "padding": (1, 1)},
    {"channels": 1, "outputs": 1, "kernel": (1, 1)},
    {"channels": 1, "outputs": 1, "kernel": (5, 1), "padding": (4, 3)},
]


@pytest.mark.parametrize("case", range(len(CONVOLUTIONS)))
@sweep("signed", [False, True])
@sweep("size", [(16, 15), (4, 3), (64, 33)])
def test_convolutions_give_the_bits_of_the_specification(
    case: int, size: tuple[int, int], signed: bool
) -> None:
    settings = {"kernel": (3, 3), **CONVOLUTIONS[case]}
    b = Builder(("x", (None, settings["channels"], 11, 13)), seed=case)
    zero = size[0] // 2 if signed else 0
    bits = size[0].bit_length() - 1
    b.lookup_conv2d("x", act_zero=zero, act_bits=bits, weights=size[1], **settings)
    compare(b.graph(), batches=(1, 2))


@pytest.mark.parametrize("size", [(1, 1), (1, 16), (4, 4), (3, 11), (31, 33)])
def test_tails_of_tiles(size: tuple[int, int]) -> None:
    for outputs in (1, 15, 16, 17, 31, 65):
        b = Builder(("x", (None, 4, *size)), seed=outputs)
        b.lookup_conv2d("x", 4, outputs, padding=(1, 1), act_zero=8)
        compare(b.graph(), batches=(1, 2))


@sweep(("act_bits", "weights"), SIZES)
def test_every_table(act_bits: int, weights: int) -> None:
    for zero in (0, 2 ** (act_bits - 1)):
        settings = {"act_bits": act_bits, "act_zero": zero, "weights": weights}
        b = Builder(("x", (None, 5, 7, 6)), seed=weights)
        b.lookup_conv2d("x", 5, 6, padding=(1, 1), act_scale=6 / 2**act_bits, **settings)
        compare(b.graph(), batches=(2,))
        b = Builder(("x", (None, 37)), seed=weights)
        b.lookup_linear("x", 37, 19, act_scale=6 / 2**act_bits, **settings)
        compare(b.graph(), batches=(1, 7))


@pytest.mark.parametrize("rows", [(), (3,), (2, 4)])
@sweep("features", [1, 3, 4, 63, 64, 65, 130, 1000])
def test_linear_layers_give_the_bits_of_the_specification(
    features: int, rows: tuple[int, ...]
) -> None:
    for outputs, size in ((1, (16, 15)), (10, (4, 3)), (17, (8, 7)), (300, (32, 33))):
        b = Builder(("x", (None, *rows, features)), seed=features)
        bits = size[0].bit_length() - 1
        b.lookup_linear("x", features, outputs, act_bits=bits, weights=size[1])
        compare(b.graph())


@pytest.mark.parametrize("features", [100, 255, 260, 5001, 140001])
@pytest.mark.parametrize("size", [(4, 3), (16, 15), (64, 33)])
def test_the_largest_sums_are_exact(features: int, size: tuple[int, int]) -> None:
    """Every read is the largest there is; float32 must round the sum to nearest even."""
    rows, columns = size
    entries = np.zeros(size, np.int8)
    entries[-1] = 127
    entries[-1, 1], entries[-1, 2] = -127, 126
    index = np.zeros((3, features), np.uint8)
    index[1] = 1
    index[2, ::2] = 1
    index[2, 0] = 2
    tensors = {
        "weight": pack_weights(index, bits_for(columns)),
        "table": entries,
        "scale": np.array([1, 1, 0.37], np.float32),
        "bias": np.array([0, 0.5, -0.25], np.float32),
    }
    grid = {"act_scale": 1.0, "act_zero": 0, "act_bits": rows.bit_length() - 1}
    b = Builder(("x", (None, features)))
    b.add(
        "lookup_linear", "x", tensors=tensors, in_features=features,
        weight_bits=bits_for(columns), **grid,
    )  # fmt: skip
    x = np.full((5, features), 1e9, np.float32)
    (want,) = run_reference(b.graph(), [x]).values()
    assert (want[:, 0] == np.float32(127 * features)).all()
    assert (want[:, 1] == np.float32(-127 * features) + np.float32(0.5)).all()
    for isa in ISAS:
        for batch in (1, 5):
            assert same_bits(Session(b.graph(), isa=isa)(x[:batch]), want[:batch]), (isa, batch)


def test_nan_and_infinity_are_quantised() -> None:
    b = Builder(("x", (None, 3)))
    b.lookup_linear("x", 3, 4, act_zero=8)
    x = np.array([[np.nan, np.inf, -np.inf], [1e38, -1e38, -0.0]], np.float32)
    want = run_reference(b.graph(), [x])[b.graph().outputs[0]]
    assert np.isfinite(want).all()
    for isa in ISAS:
        assert same_bits(Session(b.graph(), isa=isa, check_finite=False)(x), want)


@pytest.mark.parametrize("clamp", ["relu", "relu6"])
def test_residual_and_clamp_share_the_step(clamp: str) -> None:
    b = Builder(("x", (None, 6, 9, 7)))
    y = b.add("relu", b.lookup_conv2d("x", 6, 6, padding=(1, 1), act_zero=8))
    z = b.lookup_conv2d(y, 6, 6, padding=(1, 1))
    out = b.add(clamp, b.add("add", z, "x"))
    end = b.add("relu", b.add("add", b.lookup_conv2d(out, 6, 6, (1, 1)), out))
    graph = b.graph()
    assert [(f.output, f.residual, f.clamp is not None) for f in fuse(graph)] == [
        (y, None, True),
        (out, "x", True),
        (end, out, True),
    ]
    compare(graph)


def test_linear_layers_fuse_too() -> None:
    b = Builder(("x", (None, 3, 5)))
    y = b.add("relu", b.add("add", b.lookup_linear("x", 5, 5), "x"))
    assert [(f.node.op, f.output, f.residual) for f in fuse(b.graph())] == [
        ("lookup_linear", y, "x")
    ]
    compare(b.graph())


def test_layers_of_all_families_read_one_value() -> None:
    """Grids of different families, a residual and an output that are all the same value."""
    b = Builder(("x", (None, 3, 8, 8)), seed=5)
    x = b.add("relu", b.lookup_conv2d("x", 3, 8, padding=(1, 1), act_zero=8, act_scale=0.5))
    two = b.lookup_conv2d(x, 8, 8, padding=(1, 1), act_bits=2, weights=3, act_scale=0.8)
    six = b.lookup_conv2d(x, 8, 8, padding=(1, 1), act_bits=6, weights=33, act_scale=0.06)
    pq = b.pq_conv2d(x, 8, 8, padding=(1, 1), act_scale=0.03)
    int8 = b.int8_conv2d(x, 8, 8, padding=(1, 1), act_scale=0.03)
    one = b.add("relu", b.add("add", two, x))
    other = b.add("relu6", b.add("add", b.add("add", six, pq), int8))
    y = b.lookup_conv2d(b.add("concat", one, other, axis=1), 16, 4, (1, 1), act_scale=0.4)
    y = b.add("max_pool2d", y, kernel=(2, 2), stride=(2, 2))
    end = b.lookup_linear(b.add("flatten", y), 64, 10, act_bits=3, weights=7, act_zero=4)
    compare(b.graph(end, x, one))


@pytest.mark.parametrize("act_scale", [1e-30, 1e-3, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("act_zero", [0, 8])
def test_extreme_grids_between_layers(act_scale: float, act_zero: int) -> None:
    b = Builder(("x", (None, 9)), seed=3)
    tensors = lookup_tensors(b.rng, 9, 24)
    for role in ("scale", "bias"):
        tensors[role] *= np.float32(5 * act_scale)
    grid = {"act_bits": 4, "weight_bits": 4}
    y = b.add(
        "lookup_linear", "x", tensors=tensors, in_features=9, act_scale=0.3, act_zero=0, **grid
    )
    b.add(
        "lookup_linear",
        b.add("relu", y),
        tensors=lookup_tensors(b.rng, 24, 7, zero=act_zero),
        in_features=24,
        act_scale=float(np.float32(act_scale)),
        act_zero=act_zero,
        **grid,
    )
    compare(b.graph(), batches=(1, 70))


def test_files_hold_lookup_layers(tmp_path: Path) -> None:
    b = Builder(("x", (None, 4, 6, 6)))
    x = b.lookup_conv2d("x", 4, 7, act_zero=8)
    b.lookup_linear(b.add("flatten", x), 112, 5, weights=3, act_bits=2)
    graph = b.graph()
    save_graph(graph, tmp_path / "m.lutra")
    loaded = load_graph(tmp_path / "m.lutra")
    assert loaded.nodes == graph.nodes
    assert loaded.tensors.keys() == graph.tensors.keys()
    assert all((loaded.tensors[name] == array).all() for name, array in graph.tensors.items())
    x = inputs(3, 4, 6, 6)
    want = run_reference(graph, [x])[graph.outputs[0]]
    assert same_bits(Session(tmp_path / "m.lutra")(x), want)
    size = (tmp_path / "m.lutra").stat().st_size
    assert graph.parameter_bytes() == 7 * 18 + 240 + 56 + 5 * 28 + 12 + 40
    assert size < graph.parameter_bytes() + 4096


@pytest.mark.parametrize(("zero", "version"), [(0, 1), (8, 1), (3, 3), (15, 3)])
def test_zeros_anywhere_are_of_version_3(zero: int, version: int) -> None:
    b = Builder(("x", (None, 4, 5, 6)), seed=zero)
    b.lookup_conv2d("x", 4, 9, padding=(1, 1), act_zero=zero)
    graph = b.graph()
    assert file_version(graph) == version
    compare(graph, batches=(1, 2))

"""The reference executor against PyTorch, and product quantisation against plain loops."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from graphs import Builder, every_op_graph, random_inputs, tiny_graph

from lutra.errors import InputError
from lutra.graph import Graph
from lutra.ops import OPS
from lutra.reference import KERNELS, pq, run_reference, windows

Array = np.ndarray[Any, Any]


def run(graph: Graph, *inputs: Array) -> Array:
    (result,) = run_reference(graph, inputs).values()
    return result


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_every_operator_has_a_kernel():
    assert set(KERNELS) == set(OPS)


# Product quantisation, against plain Python


def plain_quantise(value: float, scale: float, zero: int, bits: int) -> int:
    """One activation. Python's round is half to even; the quotient is the float32 one."""
    quotient = np.float32(value) / np.float32(scale)
    if math.isnan(quotient):
        return 0
    if math.isinf(quotient):
        return 2**bits - 1 if quotient > 0 else 0
    return max(0, min(2**bits - 1, round(Fraction(float(quotient))) + zero))


def plain_row(row: list[int], tensors: dict[str, Array]) -> list[np.float32]:
    """One row of integers to its outputs, with loops."""
    centroids, tables = tensors["centroids"].tolist(), tensors["tables"].tolist()
    width = len(centroids[0][0])
    row = row + [0] * (len(centroids) * width - len(row))
    sums = [0] * len(tables[0][0])
    for b, codebook in enumerate(centroids):
        best, best_score = 0, None
        for code, centroid in enumerate(codebook):
            score = -(sum(c * c for c in centroid) >> 1)
            for v in range(width):
                score += row[b * width + v] * centroid[v]
            if best_score is None or score > best_score:
                best, best_score = code, score
        for m in range(len(sums)):
            sums[m] += tables[b][best][m]
    return [
        np.float32(np.float32(np.float32(total) * scale) + bias)
        for total, scale, bias in zip(sums, tensors["scale"], tensors["bias"], strict=True)
    ]


@pytest.mark.parametrize("count", [8, 16, 32, 64])
@pytest.mark.parametrize(
    ("features", "width", "bits"), [(12, 4, 7), (10, 4, 6), (5, 9, 7), (7, 1, 3), (70, 64, 7)]
)
def test_pq_linear_is_the_plain_loop(count: int, features: int, width: int, bits: int):
    b = Builder(("x", (None, features)), seed=count + features)
    b.pq_linear("x", features, 3, count=count, width=width, act_bits=bits, act_zero=5)
    x = normal(6, features) * 2
    tensors = b.graph().node_tensors(b.nodes[0])
    want = [
        plain_row([plain_quantise(v, 0.05, min(5, 2**bits - 1), bits) for v in row], tensors)
        for row in x.tolist()
    ]
    got = run(b.graph(), x)
    assert got.tolist() == np.array(want).tolist()


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "width"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1), 9),
        ((3, 3), (2, 1), (0, 2), (1, 1), 4),
        ((2, 3), (1, 2), (3, 0), (2, 1), 5),
        ((1, 1), (1, 1), (0, 0), (1, 1), 16),
    ],
)
def test_pq_conv2d_is_the_plain_loop(
    kernel: Any, stride: Any, padding: Any, dilation: Any, width: int, monkeypatch: Any
):
    b = Builder(("x", (None, 2, 5, 6)))
    b.pq_conv2d(
        "x",
        2,
        3,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        width=width,
        act_zero=20,
        act_bits=6,
    )
    graph, x = b.graph(), normal(2, 2, 5, 6)
    tensors = graph.node_tensors(graph.nodes[0])
    got = run(graph, x)
    for n, m, i, j in np.ndindex(*got.shape):
        row = []
        for c in range(2):
            for ki in range(kernel[0]):
                for kj in range(kernel[1]):
                    y = i * stride[0] + ki * dilation[0] - padding[0]
                    z = j * stride[1] + kj * dilation[1] - padding[1]
                    inside = 0 <= y < 5 and 0 <= z < 6
                    row.append(plain_quantise(x[n, c, y, z], 0.05, 20, 6) if inside else 20)
        assert got[n, m, i, j] == plain_row(row, tensors)[m]
    # the same in bands of one row at a time
    monkeypatch.setattr(windows, "MAX_PATCH_ENTRIES", 1)
    monkeypatch.setattr(pq, "_MAX_ROWS", 2)
    assert run(graph, x).tolist() == got.tolist()


def test_quantise_rounds_half_to_even_and_clamps():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, np.inf, -np.inf, np.nan, -0.0])
    got = pq.quantise(x.astype(np.float32), 1.0, 10, 7)
    assert got.tolist() == [10, 12, 12, 10, 8, 127, 0, 127, 0, 0, 10]
    assert pq.quantise(np.float32([1e38]), 1e-38, 0, 3).tolist() == [7]


def test_quantise_divides_in_float32():
    x = np.linspace(0, 1, 10001, dtype=np.float32)
    want = np.clip(np.rint(x / np.float32(0.007)), 0, 127)
    assert pq.quantise(x, 0.007, 0, 7).tolist() == want.tolist()


def test_ties_go_to_the_lowest_code():
    centroids = np.zeros((1, 8, 2), np.uint8)
    centroids[0, 3:] = [3, 4]
    rows = np.array([[3, 4], [0, 0], [100, 100]], np.uint8)
    assert pq.encode(rows, centroids).ravel().tolist() == [3, 0, 3]


def test_half_norms_are_rounded_down():
    # norms 1 and 0: half of 1 rounds to 0, so the centroid (1) ties with (0) at x = 0
    centroids = np.zeros((1, 8, 1), np.uint8)
    centroids[0, 0] = 1
    assert pq.encode(np.array([[0]], np.uint8), centroids).item() == 0


def test_extreme_values_are_exact():
    centroids = np.full((1, 8, 64), 127, np.uint8)
    centroids[0, :, 0] = [119, 120, 121, 122, 123, 124, 125, 127]
    assert pq.encode(np.full((1, 64), 127, np.uint8), centroids).item() == 7
    tables = np.full((1000, 8, 1), -128, np.int8)
    assert pq.lookup(np.zeros((1, 1000), int), tables).item() == -128000


def test_nan_and_infinity_pass_through_a_lookup_layer():
    x = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    assert np.isfinite(run(tiny_graph(), x)).all()


@pytest.mark.parametrize(("op", "top"), [("relu", np.inf), ("relu6", 6)])
def test_clamps_give_zero_for_nan_and_negative_zero(op: str, top: float):
    b = Builder(("x", (None, 6)))
    b.add(op, "x")
    got = run(b.graph(), np.array([[np.nan, -0.0, -np.inf, np.inf, -1, 5]], np.float32))
    assert got.tolist() == [[0, 0, 0, top, 0, 5]]
    assert not np.signbit(got).any()
    assert got.dtype == np.float32


def test_pq_linear_keeps_leading_axes():
    b = Builder(("x", (None, 3, 2, 8)))
    b.pq_linear("x", 8, 5)
    x = normal(2, 3, 2, 8)
    got = run(b.graph(), x)
    b.inputs = (b.inputs[0].with_shape("x", (None, 8)),)
    assert got.shape == (2, 3, 2, 5)
    assert got.reshape(12, 5).tolist() == run(b.graph(), x.reshape(12, 8)).tolist()


def test_a_resnet_layer_runs():
    b = Builder(("x", (None, 16, 32, 32)))
    b.pq_conv2d("x", 16, 16, padding=(1, 1))
    assert run(b.graph(), normal(8, 16, 32, 32)).shape == (8, 16, 32, 32)


# The other operators, against PyTorch


def close(got: Array, want: Any) -> None:
    want = want.numpy()
    assert got.dtype == np.float32
    assert got.shape == want.shape
    # both add the same few hundred float32 numbers of size about 1, in another order
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"padding": (1, 2), "stride": (2, 1)},
        {"groups": 2, "dilation": (2, 1), "padding": (3, 0)},
        {"groups": 4, "stride": (3, 3)},
    ],
)
def test_conv2d(attrs: dict[str, Any], monkeypatch: Any):
    torch = pytest.importorskip("torch")
    b = Builder(("x", (None, 4, 9, 8)))
    b.conv2d("x", 4, 8, (3, 2), **attrs)
    x = normal(2, 4, 9, 8)
    weight, bias = (torch.from_numpy(array) for array in b.tensors.values())
    want = torch.nn.functional.conv2d(torch.from_numpy(x), weight, bias, **attrs)
    close(run(b.graph(), x), want)
    monkeypatch.setattr(windows, "MAX_PATCH_ENTRIES", 1)
    close(run(b.graph(), x), want)


@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6), (2, 3, 4, 6)])
def test_linear(shape: tuple[int, ...]):
    torch = pytest.importorskip("torch")
    b = Builder(("x", shape))
    b.linear("x", 6, 5)
    x = normal(*shape)
    arrays = (torch.from_numpy(array) for array in b.tensors.values())
    close(run(b.graph(), x), torch.nn.functional.linear(torch.from_numpy(x), *arrays))


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 2), (2, 6, 4, 5)])
def test_affine_is_batch_norm(shape: tuple[int, ...]):
    torch = pytest.importorskip("torch")
    b = Builder(("x", shape))
    b.affine("x", 6)
    scale, bias = (torch.from_numpy(array) for array in b.tensors.values())
    x = normal(*shape)
    want = torch.nn.functional.batch_norm(
        torch.from_numpy(x), torch.zeros(6), torch.ones(6), scale, bias, eps=0.0
    )
    close(run(b.graph(), x), want)


def one(op: str, sizes: tuple[int, ...], /, **attrs: Any) -> Graph:
    b = Builder(("x", sizes))
    b.add(op, "x", **attrs)
    return b.graph()


WINDOWS: list[dict[str, Any]] = [
    {"kernel": (2, 2), "stride": (2, 2)},
    {"kernel": (3, 2), "stride": (2, 3), "padding": (1, 0)},
    {"kernel": (3, 3), "stride": (2, 2), "ceil_mode": True},
    {"kernel": (2, 3), "stride": (3, 2), "padding": (1, 1), "ceil_mode": True},
    {"kernel": (4, 4), "stride": (1, 5), "padding": (2, 2), "ceil_mode": True},
    {"kernel": (9, 10), "stride": (2, 2), "ceil_mode": True},  # larger than the image
]


def torch_names(attrs: dict[str, Any]) -> dict[str, Any]:
    return {"kernel_size" if key == "kernel" else key: value for key, value in attrs.items()}


@pytest.mark.parametrize(
    ("attrs", "dilation"),
    [
        (attrs, dilation)
        for attrs in WINDOWS
        for dilation in [(1, 1), (1, 2)]
        if (attrs["kernel"], dilation) != ((9, 10), (1, 2))  # does not fit into the image
    ],
)
def test_max_pool2d(attrs: dict[str, Any], dilation: tuple[int, int]):
    torch = pytest.importorskip("torch")
    x = normal(2, 3, 8, 9)
    want = torch.nn.functional.max_pool2d(
        torch.from_numpy(x), dilation=dilation, **torch_names(attrs)
    )
    close(run(one("max_pool2d", x.shape, dilation=dilation, **attrs), x), want)


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("attrs", WINDOWS)
def test_avg_pool2d(attrs: dict[str, Any], count_include_pad: bool):
    torch = pytest.importorskip("torch")
    x = normal(2, 3, 8, 9)
    want = torch.nn.functional.avg_pool2d(
        torch.from_numpy(x), count_include_pad=count_include_pad, **torch_names(attrs)
    )
    graph = one("avg_pool2d", x.shape, count_include_pad=count_include_pad, **attrs)
    close(run(graph, x), want)


def test_pooling_has_the_sizes_of_torch():
    torch = pytest.importorskip("torch")
    for size in range(3, 9):
        for kernel in range(1, 5):
            for stride in range(1, 5):
                for padding in range(kernel // 2 + 1):
                    for ceil_mode in (False, True):
                        x = normal(1, 1, size, size)
                        attrs = {"padding": padding, "stride": stride, "ceil_mode": ceil_mode}
                        try:
                            want = torch.nn.functional.max_pool2d(
                                torch.from_numpy(x), kernel, **attrs
                            )
                        except RuntimeError:
                            continue
                        graph = one(
                            "max_pool2d",
                            x.shape,
                            kernel=(kernel, kernel),
                            stride=(stride, stride),
                            padding=(padding, padding),
                            ceil_mode=ceil_mode,
                        )
                        close(run(graph, x), want)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 7), (11, 4)])
@pytest.mark.parametrize("op", ["adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_adaptive_pooling(op: str, size: tuple[int, int]):
    torch = pytest.importorskip("torch")
    x = normal(2, 3, 7, 9)
    want = getattr(torch.nn.functional, op)(torch.from_numpy(x), size)
    close(run(one(op, x.shape, output_size=size), x), want)


def test_elementwise_and_shape_operators():
    torch = pytest.importorskip("torch")
    x = normal(2, 3, 6, 4) * 5
    t = torch.from_numpy(x)
    pads = (0, 0, 1, 0, 2, 3, 0, 4)
    cases = [
        (one("relu", x.shape), t.relu()),
        (one("relu6", x.shape), torch.nn.functional.relu6(t)),
        (one("softmax", x.shape, axis=1), t.softmax(1)),
        (one("softmax", x.shape, axis=3), t.softmax(3)),
        (one("mean", x.shape, axes=(2, 3)), t.mean((2, 3))),
        (one("mean", x.shape, axes=(1,), keepdims=True), t.mean(1, keepdim=True)),
        (one("flatten", x.shape), t.flatten(1)),
        (one("flatten", x.shape, start_axis=2), t.flatten(2)),
        (one("reshape", x.shape, shape=(4, 18)), t.reshape(2, 4, 18)),
        (
            one("pad", x.shape, pads=pads, value=-1.5),
            torch.nn.functional.pad(t, (0, 4, 2, 3, 1, 0), value=-1.5),
        ),
        (one("slice", x.shape, axis=2, start=1, stop=6, step=2), t[:, :, 1:6:2]),
    ]
    for graph, want in cases:
        close(run(graph, x), want)


def test_add_and_concat():
    torch = pytest.importorskip("torch")
    x, y, z = normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(2, 5, 4, seed=2)
    b = Builder(("x", (None, 3, 4)), ("y", (None, 3, 4)))
    b.add("add", "x", "y")
    close(run(b.graph(), x, y), torch.from_numpy(x + y))
    b = Builder(("x", (None, 3, 4)), ("z", (None, 5, 4)))
    b.add("concat", "x", "z", "x", axis=1)
    want = torch.cat([torch.from_numpy(array) for array in (x, z, x)], 1)
    close(run(b.graph(), x, z), want)


def test_max_pool_of_nan_is_nan():
    x = np.full((1, 1, 2, 2), np.nan, np.float32)
    assert np.isnan(run(one("max_pool2d", x.shape, kernel=(2, 2), stride=(1, 1)), x)).all()


# Running


def test_inputs_by_name_and_by_order_and_an_empty_batch():
    graph = every_op_graph()
    feeds = random_inputs(graph)
    by_name = run_reference(graph, feeds)
    by_order = run_reference(graph, list(feeds.values()))
    assert list(by_name) == list(graph.outputs)
    for name in graph.outputs:
        assert by_name[name].tolist() == by_order[name].tolist()
    assert run_reference(graph, random_inputs(graph, batch=0))[graph.outputs[0]].shape == (0, 5)


def test_samples_do_not_depend_on_each_other():
    graph = every_op_graph()
    x = normal(3, 3, 12, 12)
    low, top = run_reference(graph, [x]).values()
    low_1, top_1 = run_reference(graph, [x[1:2]]).values()
    np.testing.assert_allclose(low[1:2], low_1, atol=1e-5)
    np.testing.assert_allclose(top[1:2], top_1, atol=1e-5)


def test_bad_inputs():
    graph, x = tiny_graph(), normal(2, 3)
    cases: list[tuple[Any, str]] = [
        ({}, "exactly"),
        ({"y": x}, r"got the inputs \['y'\]; give exactly"),
        ({"X": x}, r"did you mean 'x'\? give exactly"),
        ({"x": x, "y": x}, "exactly"),
        ([x, x], "got 2 inputs"),
        ([x.astype(np.float64) * 1e39], "beyond float32"),
        ([x.astype(np.int64)], "int64"),
        ([x.tolist()], "list"),
        ([x[:, :2]], r"shape \(2, 2\); it must be \(2, 3\)"),
        ([x[0]], "shape"),
        ([np.zeros((), np.float32)], "shape"),
    ]
    for inputs, message in cases:
        with pytest.raises(InputError, match=message):
            run_reference(graph, inputs)
    b = Builder(("x", (None, 2)), ("y", (None, 2)))
    b.add("add", "x", "y")
    with pytest.raises(InputError, match=r"'y' has shape \(3, 2\)"):
        run_reference(b.graph(), [normal(2, 2), normal(3, 2)])

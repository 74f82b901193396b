"""Clamps, maxima and operators on images: engine against reference against PyTorch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder, int8_tensors
from layers import same_bits
from sweeps import sweep

from lutra import GraphError, InputError, Session, run_reference, runnable_isas
from lutra.graph import Graph
from lutra.ops.elementwise import NO_LIMIT
from lutra.runtime.fuse import fuse

ISAS = runnable_isas()
F = np.float32


def check(graph: Graph, *inputs: Array, finite: bool = True) -> Array:
    """The output: of every instruction set and number of threads, and the reference's."""
    (want,) = run_reference(graph, inputs).values()
    feeds = {value.name: x for value, x in zip(graph.inputs, inputs, strict=True)}
    for isa in ISAS:
        for threads in (1, 3):
            session = Session(graph, isa=isa, threads=threads, check_finite=finite)
            (got,) = session.run(None, feeds)
            assert got.shape == want.shape
            np.testing.assert_array_equal(got, want, f"{isa}, {threads} threads")
    return want


def single(op: str, shape: tuple[int | None, ...], **attrs: Any) -> Graph:
    b = Builder(("x", shape))
    b.add(op, "x", **attrs)
    return b.graph()


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


# ---- clamp --------------------------------------------------------------------------------------

LIMITS = [(-1.0, 1.0), (0.25, 0.5), (-NO_LIMIT, 0.3), (-0.7, NO_LIMIT), (0.5, 0.5), (-2.0, -1.0)]


@pytest.mark.parametrize(("low", "high"), LIMITS)
def test_clamp(low: float, high: float) -> None:
    graph = single("clamp", (None, 3, 50, 41), low=low, high=high)
    x = normal(3, 3, 50, 41)
    got = check(graph, x)
    assert same_bits(got, np.clip(x, F(low), F(high)))
    x.flat[:4] = np.nan, np.inf, -np.inf, -0.0
    got = check(graph, x, finite=False).ravel()[:3]
    lower = -np.inf if low == -NO_LIMIT else F(low)
    upper = np.inf if high == NO_LIMIT else F(high)
    assert got.tolist() == [lower, upper, lower]


@pytest.mark.parametrize(
    "op",
    ["pq_conv2d", "int8_conv2d", "lookup_conv2d", "conv2d", "pq_linear", "lookup_linear", "linear"],
)
@pytest.mark.parametrize("residual", [False, True])
@sweep(("low", "high"), LIMITS)
def test_clamps_are_fused_with_any_limits(op: str, low: float, high: float, residual: bool) -> None:
    shape = (None, 20) if op.endswith("linear") else (None, 20, 5, 7)
    b = Builder(("x", shape), ("r", shape), seed=1)
    attrs = {} if op.endswith("linear") else {"padding": (1, 1)}
    y = getattr(b, op)("x", 20, 20, **attrs)
    if residual:
        y = b.add("add", y, "r")
    else:
        b.inputs = b.inputs[:1]
    y = b.add("clamp", y, low=low, high=high)
    graph = b.graph()
    (step,) = fuse(graph)
    assert step.clamp == (
        -math.inf if low == -NO_LIMIT else low,
        math.inf if high == NO_LIMIT else high,
    )
    feeds = {v.name: normal(5, *shape[1:], seed=2) for v in graph.inputs}
    (want,) = run_reference(graph, feeds).values()
    for isa in ISAS:
        (got,) = Session(graph, isa=isa).run(None, feeds)
        if op in ("conv2d", "linear"):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        else:
            assert same_bits(got, want), isa


@pytest.mark.parametrize(("low", "high"), LIMITS)
def test_clamps_between_integer_layers(low: float, high: float) -> None:
    """The clamp and the rounding to the next grid become one multiply-add where they can."""
    for seed in range(4):
        b = Builder(("x", (None, 8, 6, 7)), seed=seed)
        y = b.int8_conv2d("x", 8, 24, padding=(1, 1), act_zero=64)
        y = b.add("clamp", y, low=low, high=high)
        grid = {"act_scale": 0.017, "act_bits": 6, "act_zero": 20}
        b.add("int8_conv2d", y, tensors=int8_tensors(b.rng, (9, 24, 3, 3)), **grid)
        assert same_bits(check(b.graph(), normal(2, 8, 6, 7)), check(b.graph(), normal(2, 8, 6, 7)))


def test_bad_limits() -> None:
    for low, high in ((1.0, 0.5), (-math.inf, 0.0), (0.0, 1e39), (math.nan, 0.0)):
        with pytest.raises(GraphError, match=r"clamp_0.*(low|high)"):
            single("clamp", (None, 3), low=low, high=high).validate()


# ---- max ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keepdims", [False, True])
@sweep(
    ("shape", "axes"),
    [
        ((2, 5), (1,)),
        ((3, 7, 1024), (2,)),
        ((3, 7, 100), (1,)),
        ((3, 7, 100), (1, 2)),
        ((2, 40, 33, 17), (2, 3)),
        ((1, 70, 1, 333), (3,)),
        ((2, 70, 333, 1), (2,)),
        ((2, 6, 33, 17), (2,)),
        ((2, 6, 33, 17), (1,)),
        ((2, 6, 33, 17), (1, 3)),
        ((3, 4, 5, 6, 7), (2, 4)),
        ((3, 4, 5, 2, 6, 7), (1, 3, 4)),
        ((1, 1, 70000), (2,)),
    ],
)
def test_max(shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool) -> None:
    graph = single("max", (None, *shape[1:]), axes=axes, keepdims=keepdims)
    x = normal(*shape)
    assert graph.values[graph.outputs[0]].shape[1:] == check(graph, x).shape[1:]
    np.testing.assert_array_equal(check(graph, x), x.max(axis=axes, keepdims=keepdims))
    check(graph, -np.abs(x) - 5)


def test_max_passes_nan_over() -> None:
    x = normal(2, 3, 40)
    x[0, 0, ::2] = x[0, 1] = np.nan
    x[1, 0, 3], x[1, 1] = np.inf, -np.inf
    got = check(single("max", (None, 3, 40), axes=(2,)), x, finite=False)
    assert got[0, 0] == np.nanmax(x[0, 0])
    assert got[0, 1] == got[1, 1] == -np.inf
    assert got[1, 0] == np.inf


@pytest.mark.parametrize("axes", [(2, 3), (2,), (3,), (1,)])
def test_max_between_integer_layers_is_of_bytes(axes: tuple[int, ...]) -> None:
    b = Builder(("x", (None, 4, 9, 5)), seed=2)
    y = b.add("max", b.int8_conv2d("x", 4, 6, padding=(1, 1)), axes=axes, keepdims=True)
    channels = 1 if axes == (1,) else 6
    b.int8_conv2d(y, channels, 7, (1, 1), act_zero=30)
    graph = b.graph()
    check(graph, normal(3, 4, 9, 5))
    steps = Session(graph).profile(normal(3, 4, 9, 5), runs=1).steps
    assert [s.method for s in steps if s.op == "max"] == ["uint8"]


# ---- pooling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize("integers", [False, True])
def test_a_window_may_be_larger_than_the_image_with_ceil_mode(op: str, integers: bool) -> None:
    torch = pytest.importorskip("torch")
    b = Builder(("x", (None, 3, 1, 7)), seed=5)
    y = b.add(op, "x", kernel=(2, 2), stride=(2, 2), ceil_mode=True)
    graph = b.graph(b.int8_conv2d(y, 3, 4, (1, 1)) if integers else y)
    x = b.rng.normal(size=(2, 3, 1, 7)).astype(F)
    got = check(graph, x)
    assert got.shape[2:] == (1, 4)
    if not integers:
        pool = getattr(torch.nn.functional, op)
        want = pool(torch.from_numpy(x), 2, 2, ceil_mode=True)
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


# ---- pixel shuffle ------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (2, 7, 13), (3, 40, 33)])
def test_pixel_shuffle(factor: int, batch: int, height: int, width: int) -> None:
    torch = pytest.importorskip("torch")
    channels = 2 * factor**2
    graph = single("pixel_shuffle", (None, channels, height, width), factor=factor)
    x = normal(batch, channels, height, width)
    want = torch.nn.functional.pixel_shuffle(torch.from_numpy(x), factor).numpy()
    assert same_bits(check(graph, x), want)


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle_between_integer_layers_moves_bytes(factor: int) -> None:
    b = Builder(("x", (None, 4, 9, 5)), seed=2)
    y = b.add("pixel_shuffle", b.pq_conv2d("x", 4, 6 * factor**2, padding=(1, 1)), factor=factor)
    b.pq_conv2d(y, 6, 7, padding=(1, 1), act_zero=30)
    graph = b.graph()
    x = normal(3, 4, 9, 5)
    check(graph, x)
    steps = Session(graph).profile(x, runs=1).steps
    assert [s.method for s in steps if s.op == "pixel_shuffle"] == ["uint8"]


def test_pixel_shuffle_needs_whole_groups_of_channels() -> None:
    with pytest.raises(GraphError, match=r"'x' of shape \(None, 6, 2, 2\).*multiple of 4"):
        single("pixel_shuffle", (None, 6, 2, 2), factor=2).validate()


# ---- upsampling ---------------------------------------------------------------------------------

TO_SIZES = [(14, 26), (7, 13), (1, 1), (3, 5), (20, 13), (21, 40), (7, 14), (64, 3)]
SCALES = [
    (2.0, 2.0),
    (2.05, 2.1),
    (3.0, 4.0),
    (1.5, 2.5),
    (0.5, 0.4),
    (1.1, 1.0),
    (1.3, 0.77),
    (8.0, 1.999),
]


def upsampled(x: Array, mode: str, align_corners: bool, **settings: Any) -> Array:
    torch = pytest.importorskip("torch")
    if mode == "bilinear":
        settings["align_corners"] = align_corners
    y = torch.nn.functional.interpolate(torch.from_numpy(x), mode=mode, **settings)
    result: Array = y.numpy()
    return result


@pytest.mark.parametrize(
    ("mode", "align"),
    [("nearest", False), ("nearest-exact", False), ("bilinear", False), ("bilinear", True)],
)
@sweep("settings", [*TO_SIZES, *SCALES])
def test_upsample(mode: str, align: bool, settings: tuple[Any, Any]) -> None:
    attrs: dict[str, Any] = {"mode": mode, "align_corners": align}
    if isinstance(settings[0], int):
        attrs["size"] = settings
        theirs = {"size": settings}
    else:
        attrs["scale_h"], attrs["scale_w"] = settings
        theirs = {"scale_factor": settings}
    for height, width in ((7, 13), (1, 1), (2, 30), (33, 10)):
        x = normal(2, 3, height, width)
        graph = single("upsample", (None, 3, None, None), **attrs)
        try:
            want = upsampled(x, mode, align, **theirs)
        except RuntimeError:  # nothing is left
            with pytest.raises(InputError, match=r"upsample_0.*'x' of shape"):
                Session(graph)(x)
            continue
        got = check(graph, x)
        if mode == "bilinear":
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        else:
            assert same_bits(got, want)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_upsample_to_the_size_of_another_value(mode: str) -> None:
    b = Builder(("x", (None, 3, None, None)), ("y", (None, 5, None, None)))
    b.add("upsample", "x", "y", mode=mode)
    graph = b.graph()
    for size in ((7, 9), (20, 4), (3, 3)):
        x, y = normal(2, 3, 3, 3), normal(2, 5, *size)
        want = upsampled(x, mode, False, size=size)
        np.testing.assert_allclose(check(graph, x, y), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [2.0, 1.7])
def test_nearest_between_integer_layers_moves_bytes(scale: float) -> None:
    b = Builder(("x", (None, 4, 9, 5)), seed=2)
    y = b.int8_conv2d("x", 4, 6, padding=(1, 1))
    y = b.add("upsample", y, mode="nearest", scale_h=scale, scale_w=scale)
    b.pq_conv2d(y, 6, 7, padding=(1, 1), act_zero=30)
    graph = b.graph()
    x = normal(3, 4, 9, 5)
    check(graph, x)
    steps = Session(graph).profile(x, runs=1).steps
    assert [s.method for s in steps if s.op == "upsample"] == ["uint8"]


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({}, "give one of these"),
        ({"size": (3,)}, "give one of these"),
        ({"size": (3, 3), "scale_h": 2.0, "scale_w": 2.0}, "give one of these"),
        ({"scale_h": 2.0}, "two scales above 0"),
        ({"scale_h": -2.0, "scale_w": 2.0}, "at least 0"),
        ({"size": (3, 3), "align_corners": True}, "mode 'bilinear' only"),
        ({"size": (3, 5000)}, "at most 4096"),
        ({"mode": "cubic", "size": (3, 3)}, "one of nearest, nearest-exact, bilinear"),
    ],
)
def test_bad_upsampling(attrs: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        single("upsample", (None, 2, 5, 5), **{"mode": "nearest", **attrs}).validate()


# ---- convolutions over points -------------------------------------------------------------------


@pytest.mark.parametrize("op", ["pq_conv2d", "int8_conv2d", "lookup_conv2d", "conv2d"])
@pytest.mark.parametrize("kernel", [1, 3])
@sweep("batch", [1, 3])
@sweep("points", [1, 5, 64, 129])
def test_points_in_a_column_are_points_in_a_row(
    op: str, kernel: int, batch: int, points: int
) -> None:
    """(N, C, L, 1) and (N, C, 1, L) give the same bits, and so do chains of them."""
    results = []
    x = normal(batch, 6, points)
    for column in (False, True):
        b = Builder(("x", (None, 6, points, 1) if column else (None, 6, 1, points)), seed=3)
        size, pad = (kernel, 1), (kernel // 2, 0)
        if not column:
            size, pad = size[::-1], pad[::-1]
        y = b.add("relu", getattr(b, op)("x", 6, 9, size, padding=pad))
        y = getattr(b, op)(y, 9, 40, size, padding=pad)
        y = b.add("max", y, axes=(2, 3))
        graph = b.graph()
        shaped = x[..., None] if column else x[:, :, None]
        (want,) = run_reference(graph, [shaped]).values()
        for isa in ISAS:
            got = Session(graph, isa=isa, threads=2)(shaped)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
            results.append(got)
    assert all(same_bits(y, results[0]) for y in results)

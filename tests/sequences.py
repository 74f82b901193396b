"""Graphs of the operators on sequences and functions, and tables of functions, by hand."""

from __future__ import annotations

from math import erf
from typing import Any

import numpy as np
from graphs import Array, Builder
from recurrences import grids, int8_weights

from lutra import Session, run_reference, runnable_isas
from lutra.graph import Graph, Shape

F = np.float32
_EXACT: dict[str, Any] = {
    "exp": np.exp2,  # on [0, 1)
    "reciprocal": lambda m: 1 / m,  # on [1, 2)
    "rsqrt": lambda m: 1 / np.sqrt(m),  # on [1, 4)
}


def reduced_table(name: str, entries: int = 16) -> dict[str, Array]:
    """A table of exp, reciprocal or rsqrt: chords between the ends of equal pieces.

    Returns:
        ``<name>_slope`` and ``<name>_intercept``, float32 (entries,)
    """
    if name == "rsqrt":
        halves = [np.linspace(low, 2 * low, entries // 2 + 1) for low in (1.0, 2.0)]
        ends = np.concatenate([halves[0][:-1], halves[1]])
    else:
        low = 0.0 if name == "exp" else 1.0
        ends = np.linspace(low, low + 1, entries + 1)
    values = _EXACT[name](ends)
    slope = np.diff(values) / np.diff(ends)
    intercept = values[:-1] - slope * ends[:-1]
    return {f"{name}_slope": slope.astype(F), f"{name}_intercept": intercept.astype(F)}


def gelu_table(entries: int = 16, span: float = 4.0) -> dict[str, Array]:
    """A table of GELU with its asymptotes.

    Returns:
        breakpoint, float32 (entries - 1,), and slope and intercept, float32 (entries,)
    """
    points = np.linspace(-span, span, entries - 1)
    values = np.array([0.5 * x * (1 + erf(x / 2**0.5)) for x in points])
    values[0], values[-1] = 0, points[-1]
    slope = np.concatenate([[0], np.diff(values) / np.diff(points), [1]])
    intercept = np.concatenate([[0], values[:-1] - slope[1:-1] * points[:-1], [0]])
    return {
        "breakpoint": points.astype(F),
        "slope": slope.astype(F),
        "intercept": intercept.astype(F),
    }


def norm_tensors(rng: np.random.Generator, size: int, *, bias: bool = True) -> dict[str, Array]:
    """weight and perhaps bias, float32 (size,)"""
    tensors = {"weight": rng.uniform(0.5, 1.5, size).astype(F)}
    return {**tensors, "bias": rng.normal(size=size).astype(F)} if bias else tensors


def every_sequence_op_graph(seed: int = 0) -> Graph:
    """Ids and a mask (N, ?) and floats (N, 4, 6) to (N, 12): operators that other graphs lack."""
    ids, mask = ((name, (None, None), "int32") for name in ("ids", "mask"))
    b = Builder(ids, mask, ("x", (None, 4, 6)), seed=seed)
    rng = b.rng
    words = b.add("embedding", "ids", tensors={
        "weight": rng.integers(-127, 128, (40, 12)).astype(np.int8),
        "scale": rng.uniform(0.005, 0.01, 40).astype(F),
    })  # fmt: skip
    h = b.add("position_embedding", words, tensors={"weight": rng.normal(size=(64, 12)).astype(F)})
    h = b.add("layer_norm", h, tensors=norm_tensors(rng, 12), eps=1e-12)
    q, k, v = (b.pq_linear(h, 12, 12) for _ in range(3))
    a = b.add("attention", q, k, v, "mask", heads=3, scale=0.5)
    h = b.add("add", b.pq_linear(a, 12, 12), h)
    h = b.add("rms_norm", h, tensors=norm_tensors(rng, 12, bias=False), eps=1e-6)
    f = b.add("gelu", b.pq_linear(h, 12, 16))
    f = b.add("piecewise", f, tensors=gelu_table())
    h = b.add("add", b.int8_linear(f, 16, 12), h)
    scores = b.add("matmul", h, h, transpose_b=True)  # (N, T, T)
    scores = b.add("softmax", b.add("silu", scores), axis=2)
    h = b.add("sub", b.add("matmul", scores, h), b.add("tanh", h))
    h = b.add("transpose", b.add("transpose", h, axes=(0, 2, 1)), axes=(0, 2, 1))
    seen = b.add("reshape", b.add("cast", "mask"), shape=(-1, 1))
    h = b.add("mul", h, b.add("expand", seen, shape=(0, 12)))
    pooled = b.add("masked_mean", h, "mask")  # (N, 12)
    length = b.add("clamp", b.add("l2_norm", pooled, axes=(1,), keepdims=True), low=1e-6)
    pooled = b.add("div", pooled, length)
    y = b.add("gather", "x", tensors={"index": np.array([3, 0, 1], np.int32)}, axis=1)
    y = b.add("affine_scalar", b.add("sigmoid", y), scale=0.5, bias=1.0)
    y = b.add("rsqrt", b.add("sqrt", b.add("reciprocal", b.add("exp", b.add("erf", y)))))
    y = b.add("mean", y, axes=(1,))  # (N, 6)
    return b.graph(b.add("add", pooled, b.add("concat", y, y, axis=1)))


def every_pointwise_op_graph() -> Graph:
    """Floats (N, 5, 6) to (N, 5, 6): the operators of version 3 of the file format."""
    b = Builder(("x", (None, 5, 6)))
    half = b.add("constant", "x", tensors={"value": np.full(1, 0.5, F)}, shape=(1, 1))
    row = b.add("constant", "x", tensors={"value": np.arange(6).astype(F)}, shape=(6,))
    row = b.add("reshape", row, shape=(1, 6))
    y = b.add("leaky_relu", b.add("hardswish", "x"), slope=0.2)
    y = b.add("maximum", b.add("minimum", y, row), half)
    y = b.add("softplus", b.add("mish", b.add("elu", b.add("log", y))))
    y = b.add("cumsum", b.add("abs", b.add("sin", b.add("cos", y))), axis=1)
    more = b.add("greater", "x", half)
    more = b.add("mul", more, b.add("greater_equal", row, half))
    whole = [b.add(op, "x") for op in ("floor", "ceil", "round", "sign")]
    z = b.add("equal", b.add("add", *whole[:2]), b.add("mul", *whole[2:]))
    kept = b.add("greater", b.add("mean", "x", axes=(2,)), row_of_zero(b))
    y = b.add("masked_attention", y, "x", z, kept, heads=2, scale=0.4, causal=True)
    return b.graph(b.add("where", more, y, z))


def row_of_zero(b: Builder) -> str:
    """A constant (N, 1)."""
    return b.add("constant", "x", tensors={"value": np.zeros(1, F)}, shape=(1,))


def every_selection_graph() -> Graph:
    """Images (N, 4, 6, 6) to (N, 4), by the operators that resample, select and go through time."""
    b = Builder(("x", (None, 4, 6, 6)))

    def vector(*shape: int) -> Array:
        return (b.rng.normal(size=shape) / np.sqrt(shape[-1])).astype(F)

    def gates(count: int, features: int, hidden: int) -> dict[str, Array]:
        rows = count * hidden
        sides = {"weight_ih": vector(rows, features), "weight_hh": vector(rows, hidden)}
        return {**sides, "bias_ih": vector(rows), "bias_hh": vector(rows)}

    up = {"weight": vector(6, 2, 3, 3), "bias": vector(6)}
    y = b.add("conv_transpose2d", "x", tensors=up, stride=(2, 2), padding=(1, 1), groups=2)
    y = b.add("group_norm", y, tensors={"weight": vector(6), "bias": vector(6)}, groups=3, eps=1e-5)
    y = b.add("upsample_bicubic", y, size=(8, 8))  # (6, 8, 8)
    grid = b.add("slice", "x", axis=3, start=0, stop=2, step=1)  # (4, 6, 2)
    y = b.add("grid_sample", y, grid)  # (6, 4, 6)
    y = b.add("trim", b.add("flip", y, axis=2), axis=3, first=0, last=0, step=1)
    y = b.add("reshape", b.add("regroup", y, sizes=(-1, 24)), shape=(6, 24))
    angles = {name: vector(9, 12) for name in ("cos", "sin")}
    y = b.add("rotary", y, tensors=angles, heads=2)
    scores = b.add("reshape", b.add("matmul", y, y, transpose_b=True), shape=(1, 6, 6))
    scores = b.add("relative_bias", scores, tensors={"weight": vector(1, 13)})
    y = b.add("matmul", b.add("reshape", scores, shape=(6, 6)), y)
    order = b.add("topk", b.add("mean", y, axes=(2,), keepdims=True), k=3, axis=1, indices=True)
    y = b.add("take_along", y, order, axis=1)  # (3, 24)
    y = b.add("gru", y, tensors=gates(3, 24, 5), reverse=True)
    y = b.add("lstm", y, tensors=gates(4, 5, 4))
    for op in ("int8_gru", "int8_lstm"):
        y = b.add(op, y, tensors=int8_weights(op, 4, 4), **grids(b.rng))
    return b.graph(b.add("from_end", y, axis=1, back=1))


def every_decoder_graph() -> Graph:
    """Ids (N, ?), starts (N,) and picks (N, ?) to (N, ?, 12): what a decoder has of its own."""
    ids, picked = ((name, (None, None), "int32") for name in ("ids", "picked"))
    b = Builder(ids, ("start", (None,), "int32"), picked)
    h = b.add("embedding", "ids", tensors={"weight": b.rng.normal(size=(40, 12)).astype(F)})
    angles = {name: b.rng.normal(size=(64, 4)).astype(F) for name in ("cos", "sin")}
    q = b.add("rotary", b.pq_linear(h, 12, 16), "start", tensors=angles, heads=4)
    k = b.add("rotary", b.pq_linear(h, 12, 8), "start", tensors=angles, heads=2)
    v = b.lowbit_linear(h, 12, 8)
    y = b.add("cached_attention", q, k, v, "start", heads=4, kv_heads=2, scale=0.5, length=64)
    y = b.add("pick_tokens", b.linear(y, 16, 12), "picked")
    return b.graph(b.add("rms_norm", y, tensors=norm_tensors(b.rng, 12, bias=False), eps=1e-6))


def check(graph: Graph, *inputs: Array, tolerance: float = 2e-6, finite: bool = True) -> Array:
    """The reference's output, after comparing the engine with it.

    All instruction sets and numbers of threads must give the same bits, as far from the reference
    as rounding of sums explains.

    Args:
        graph: A graph of one output.
        inputs: In the order of its inputs.
        tolerance: The largest difference, as a share of the largest value.
        finite: Whether floats of the inputs are.
    """
    (want,) = run_reference(graph, inputs).values()
    assert want.dtype == F
    feeds = {value.name: x for value, x in zip(graph.inputs, inputs, strict=True)}
    first: Array | None = None
    for isa in runnable_isas():
        for threads in (1, 3):
            session = Session(graph, isa=isa, threads=threads, check_finite=finite)
            (got,) = session.run(None, feeds)
            if first is None:
                first = got
            np.testing.assert_array_equal(got.view(np.int32), first.view(np.int32), isa)
    assert first is not None
    assert first.shape == want.shape
    np.testing.assert_array_equal(np.isnan(first), np.isnan(want))
    known = np.abs(want[np.isfinite(want)])
    scale = float(known.max()) if known.size else 1.0
    np.testing.assert_allclose(first, want, rtol=0, atol=tolerance * max(scale, 1e-6))
    return want


def single(
    op: str,
    *inputs: tuple[str, Shape] | tuple[str, Shape, str],
    tensors: dict[str, Array] | None = None,
    **attrs: Any,
) -> Graph:
    """A graph of one node."""
    b = Builder(*inputs)
    b.add(op, *(name for name, *_ in inputs), name="node", tensors=tensors, **attrs)
    return b.graph()

"""Depthwise convolutions: every geometry, on every instruction set, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder
from layers import same_bits
from sweeps import sweep

from lutra import Session, run_reference, runnable_isas
from lutra.graph import Graph

ISAS = runnable_isas()

# Kernel, stride, padding, dilation.
GEOMETRIES: list[tuple[tuple[int, int], ...]] = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((5, 5), (1, 1), (2, 2), (1, 1)),
    ((5, 5), (2, 2), (2, 2), (1, 1)),
    ((3, 3), (1, 1), (0, 0), (1, 1)),  # outputs narrower than the image
    ((3, 3), (2, 2), (0, 0), (1, 1)),
    ((3, 3), (1, 1), (4, 4), (1, 1)),  # outputs wider than the image
    ((3, 3), (1, 1), (2, 2), (2, 2)),
    ((3, 3), (2, 2), (3, 3), (3, 3)),
    ((3, 3), (1, 1), (5, 5), (5, 5)),  # taps farther apart than a dword
    ((7, 7), (1, 1), (3, 3), (1, 1)),
    ((2, 4), (1, 2), (1, 0), (1, 1)),
    ((4, 2), (2, 1), (0, 3), (1, 2)),
    ((3, 5), (3, 3), (1, 2), (1, 1)),
    ((2, 3), (4, 5), (1, 1), (2, 1)),
    ((1, 9), (1, 1), (0, 4), (1, 1)),  # in one dimension
    ((1, 3), (1, 1), (0, 8), (1, 8)),
    ((5, 1), (2, 1), (2, 0), (1, 1)),
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((13, 11), (1, 1), (6, 5), (1, 1)),  # more taps than the kernels take
]
SIZES = [(1, 1), (3, 3), (5, 5), (6, 7), (12, 12), (13, 25), (1, 70), (33, 1), (9, 56)]


def outputs_of(graph: Graph, x: Array) -> dict[str, Array]:
    """By instruction set, the one output; the plan is run twice to meet what it keeps."""
    found = {}
    for isa in ISAS:
        session = Session(graph, isa=isa, threads=2)
        session.run(None, {"x": x[:1]})
        (found[isa],) = session.run(None, {"x": x})
    return found


def fits(size: tuple[int, int], geometry: tuple[tuple[int, int], ...]) -> bool:
    kernel, _, padding, dilation = geometry
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    return all(n + 2 * p >= s for n, p, s in zip(size, padding, spans, strict=True))


def cases(geometry: int) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    kernel, stride, padding, dilation = GEOMETRIES[geometry]
    settings = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return [(size, settings) for size in SIZES if fits(size, GEOMETRIES[geometry])]


@pytest.mark.parametrize("geometry", range(len(GEOMETRIES)))
@sweep("multiplier", [1, 2])
def test_int8_gives_the_bits_of_the_reference(geometry: int, multiplier: int) -> None:
    for number, (size, settings) in enumerate(cases(geometry)):
        channels = 2 + 7 * number % 19
        b = Builder(("x", (None, channels, *size)), seed=number)
        y = b.int8_conv2d(
            "x", channels, channels * multiplier, groups=channels, act_zero=number % 2 * 50,
            **settings,
        )  # fmt: skip
        # Bytes for the next layer, folded, and the floats of the last one.
        y = b.add("relu", y)
        b.int8_conv2d(y, channels * multiplier, 3, (1, 1), act_scale=0.7)
        graph = b.graph()
        x = np.random.default_rng(number).uniform(-3, 6, (2, channels, *size)).astype(np.float32)
        want = run_reference(graph, {"x": x})[graph.outputs[0]]
        for isa, got in outputs_of(graph, x).items():
            assert same_bits(got, want), (isa, size, settings)


@pytest.mark.parametrize("geometry", range(len(GEOMETRIES)))
@sweep("multiplier", [1, 3])
def test_float32_has_the_same_bits_everywhere(geometry: int, multiplier: int) -> None:
    for number, (size, settings) in enumerate(cases(geometry)):
        channels = 2 + 5 * number % 17
        b = Builder(("x", (None, channels, *size)), seed=number)
        y = b.conv2d("x", channels, channels * multiplier, groups=channels, **settings)
        b.add("relu", y)
        graph = b.graph()
        x = np.random.default_rng(number).normal(size=(2, channels, *size)).astype(np.float32)
        want = run_reference(graph, {"x": x})[graph.outputs[0]]
        found = outputs_of(graph, x)
        for isa, got in found.items():
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=f"{isa} {size}")
            assert same_bits(got, found["scalar"]), (isa, size, settings)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (4, 4), (2, 7), (6, 6), (1, 16), (5, 13)])
@pytest.mark.parametrize("geometry", [0, 2, 7, 10, 15])
def test_many_small_planes_are_read_where_they_are(geometry: int, size: tuple[int, int]) -> None:
    """The blocks of channels in the middle need no copies, and four planes share a register."""
    kernel, stride, padding, dilation = GEOMETRIES[geometry]
    settings = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    for zero in (0, 31):
        b = Builder(("x", (None, 205, *size)), seed=zero)
        y = b.int8_conv2d("x", 205, 205, groups=205, act_zero=zero, **settings)
        y = b.int8_conv2d(b.add("relu", y), 205, 205, groups=205, act_scale=0.7, **settings)
        y = b.add("relu6", b.add("add", y, "x"))
        b.conv2d(y, 205, 205, groups=205, **settings)
        graph = b.graph()
        x = np.random.default_rng(3).uniform(-3, 6, (3, 205, *size)).astype(np.float32)
        want = run_reference(graph, {"x": x})[graph.outputs[0]]
        found = outputs_of(graph, x)
        for isa, got in found.items():
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4, err_msg=f"{isa} {size}")
            assert same_bits(got, found["scalar"]), (isa, size, settings)


def test_the_profile_names_the_method() -> None:
    b = Builder(("x", (None, 8, 9, 9)))
    y = b.int8_conv2d("x", 8, 8, groups=8, padding=(1, 1))
    b.conv2d(y, 8, 8, groups=8)
    session = Session(b.graph())
    profile = session.profile({"x": np.zeros((1, 8, 9, 9), np.float32)}, runs=1)
    methods = [step.method for step in profile.steps]
    assert "int8, depthwise" in methods
    assert "float32, depthwise" in methods


def test_images_of_many_sizes_take_turns() -> None:
    """More sizes than the layer keeps."""
    b = Builder(("x", (None, 3, None, None)))
    b.int8_conv2d("x", 3, 3, groups=3, padding=(1, 1), act_zero=20)
    graph = b.graph()
    session = Session(graph)
    for _ in range(2):
        for side in range(3, 15):
            x = np.random.default_rng(side).normal(size=(1, 3, side, 2 * side)).astype(np.float32)
            (got,) = session.run(None, {"x": x})
            assert same_bits(got, run_reference(graph, {"x": x})[graph.outputs[0]]), side


@pytest.mark.parametrize("isa", ISAS)
def test_functions_run_in_the_step_of_a_depthwise_layer(isa: str) -> None:
    """Between layers, and where the floats are the output."""
    b = Builder(("x", (None, 5, 9, 11)), seed=3)
    y = b.add("silu", b.conv2d("x", 5, 10, groups=5, padding=(1, 1)))
    y = b.add("gelu", b.int8_conv2d(y, 10, 10, groups=10, stride=(2, 2), act_zero=50))
    b.add("silu", b.int8_conv2d(y, 10, 10, groups=10, padding=(1, 1), act_zero=50))
    graph = b.graph()
    x = np.random.default_rng(4).normal(size=(3, 5, 9, 11)).astype(np.float32)
    want = run_reference(graph, {"x": x})[graph.outputs[0]]
    (got,) = Session(graph, isa=isa).run(None, {"x": x})
    # Where a function differs in its last bit, an activation may be on the next level.
    assert np.abs(got - want).max() <= 0.05 * np.abs(want).max()
    (scalar,) = Session(graph, isa="scalar").run(None, {"x": x})
    assert same_bits(got, scalar)

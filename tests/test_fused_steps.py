"""Paddings, scales and shifts, and functions go into the steps beside them, with the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from graphs import Builder, int8_tensors
from layers import same_bits

from lutra import Session, run_reference, runnable_isas
from lutra.graph import Graph
from lutra.ops.elementwise import NO_LIMIT

F = np.float32
LAYERS = ("conv2d", "depthwise", "int8_conv2d", "int8_depthwise", "pq_conv2d", "lookup_conv2d")
GRID = {"act_scale": 0.05, "act_zero": 32, "act_bits": 6}


def layer(b: Builder, kind: str, x: str, channels: int, outputs: int, **attrs: Any) -> str:
    if kind in ("pq_conv2d", "lookup_conv2d"):
        return str(getattr(b, kind)(x, channels, outputs, **{**GRID, **attrs}))
    groups = channels if "depthwise" in kind else 1
    shape = (outputs, channels // groups, 3, 3)
    if kind.startswith("int8"):
        tensors = int8_tensors(b.rng, shape)
        return b.add("int8_conv2d", x, tensors=tensors, groups=groups, **GRID, **attrs)
    weight = (b.rng.normal(size=shape) / 3).astype(F)
    tensors = {"weight": weight, "bias": b.rng.normal(size=outputs).astype(F)}
    return b.add("conv2d", x, tensors=tensors, groups=groups, **attrs)


def affine(b: Builder, x: str, channels: int) -> str:
    scale, bias = b.rng.normal(size=(2, channels)).astype(F)
    return b.add("affine", x, tensors={"scale": scale, "bias": bias})


def check(graph: Graph, x: np.ndarray[Any, Any], steps: Sequence[str], *, exact: bool) -> None:
    """The step names of the plan, and the bits: those of separate steps on every instruction set,
    and, where nothing is rounded but integers' scales, those of the reference."""
    apart = replace(graph, outputs=tuple(node.output for node in graph.nodes))
    alone = Session(apart, isa="scalar", threads=1, check_finite=False)
    want = dict(zip(apart.outputs, alone.run(None, {"x": x}), strict=True))[graph.outputs[0]]
    if exact:
        (reference,) = run_reference(graph, {"x": x}).values()
        assert same_bits(want, reference)
    for isa in runnable_isas():
        for threads in (1, 3):
            session = Session(graph, isa=isa, threads=threads, check_finite=False)
            assert same_bits(session(x), want), (isa, threads)
            assert same_bits(session(x[:1]), want[:1]), (isa, threads)
    profile = Session(graph, threads=1).profile(runs=1, warmup=0)
    assert [s.name for s in profile.steps if s.method != "quantize"] == list(steps)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("sides", [(0, 1, 0, 1), (2, 0, 1, 3)])
def test_layers_pad_by_themselves(
    kind: str, stride: tuple[int, int], sides: tuple[int, ...]
) -> None:
    b = Builder(("x", (None, 8, 9, 7)))
    y = b.add("pad", "x", pads=(0, 0, 0, 0, *sides), value=0.0)
    made = layer(b, kind, y, 8, 8, stride=stride, padding=(1, 0))
    graph = b.graph(made)
    x = b.rng.normal(size=(3, 8, 9, 7)).astype(F)
    check(graph, x, [graph.nodes[1].name], exact="int8" in kind or "pq" in kind or "look" in kind)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("value", "float_takes", "grid_takes"),
    [(0.0, True, True), (-0.0, False, True), (0.02, False, True), (0.5, False, False)],
)
def test_only_what_the_layer_pads_with(
    kind: str, value: float, float_takes: bool, grid_takes: bool
) -> None:
    b = Builder(("x", (None, 8, 9, 7)))
    y = b.add("pad", "x", pads=(0, 0, 0, 0, 1, 0, 0, 1), value=value)
    graph = b.graph(layer(b, kind, y, 8, 8))
    takes = float_takes if kind in ("conv2d", "depthwise") else grid_takes
    names = [node.name for node in graph.nodes][int(takes) :]
    x = b.rng.normal(size=(2, 8, 9, 7)).astype(F)
    check(graph, x, names, exact=kind not in ("conv2d", "depthwise"))


@pytest.mark.parametrize("op", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize("value", [0.0, -1.5, -NO_LIMIT])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_poolings_see_a_border(op: str, value: float, ceil_mode: bool) -> None:
    b = Builder(("x", (None, 5, 9, 7)))
    y = b.add("pad", "x", pads=(0, 0, 0, 0, 1, 0, 1, 0), value=value)
    y = b.add("pad", y, pads=(0, 0, 0, 0, 0, 2, 0, 1), value=value)
    y = b.add(op, y, kernel=(3, 2), stride=(2, 2), padding=(1, 0), ceil_mode=ceil_mode)
    graph = b.graph(y)
    x = b.rng.normal(size=(3, 5, 9, 7)).astype(F)
    with np.errstate(over="ignore"):
        check(graph, x, [graph.nodes[2].name], exact=op == "max_pool2d")
    x[0, 0, 0, 0] = np.nan  # which the engine passes over
    check(graph, x, [graph.nodes[2].name], exact=False)


def test_a_border_of_integers() -> None:
    """A max pooling in front of a layer works on the layer's grid, its border too."""
    b = Builder(("x", (None, 5, 9, 7)))
    y = b.add("pad", "x", pads=(0, 0, 0, 0, 1, 0, 1, 0), value=-0.3)
    y = b.add("max_pool2d", y, kernel=(3, 3), stride=(2, 2))
    graph = b.graph(layer(b, "int8_conv2d", y, 5, 4, padding=(1, 1)))
    x = (b.rng.normal(size=(3, 5, 9, 7)) - 1).astype(F)
    check(graph, x, [node.name for node in graph.nodes[1:]], exact=True)
    methods = [step.method for step in Session(graph).profile(runs=1, warmup=0).steps]
    assert "uint8" in methods


def test_a_padding_of_points_moves_behind_their_reshape() -> None:
    b = Builder(("x", (None, 6, 20)))
    y = b.add("pad", "x", pads=(0, 0, 0, 0, 4, 0), value=0.0)
    y = b.add("reshape", y, shape=(6, 1, 24))
    tensors = {"weight": b.rng.normal(size=(7, 6, 1, 3)).astype(F), "bias": np.zeros(7, F)}
    graph = b.graph(b.add("conv2d", y, tensors=tensors, dilation=(1, 2)))
    x = b.rng.normal(size=(2, 6, 20)).astype(F)
    check(graph, x, [node.name for node in graph.nodes[1:]], exact=False)


def test_paddings_that_others_read_stay() -> None:
    b = Builder(("x", (None, 6, 9, 9)))
    y = b.add("pad", "x", pads=(0, 0, 0, 0, 1, 1, 1, 1), value=0.0)
    a = layer(b, "int8_conv2d", y, 6, 6)
    c = b.add("mean", y, axes=(2, 3), keepdims=True)
    d = b.add("mul", a, c)
    graph = b.graph(d)
    x = b.rng.normal(size=(2, 6, 9, 9)).astype(F)
    names = [node.name for node in graph.nodes]
    check(graph, x, [names[0], names[1], names[2], names[3]], exact=False)
    channels = Builder(("x", (None, 5, 9, 9)))
    y = channels.add("pad", "x", pads=(0, 0, 0, 1, 1, 1, 1, 1), value=0.0)
    graph = channels.graph(layer(channels, "int8_conv2d", y, 6, 6))
    check(graph, x[:, :5], [node.name for node in graph.nodes], exact=True)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_take_over_chains(kind: str) -> None:
    b = Builder(("x", (None, 24, 9, 7)))
    y = layer(b, kind, "x", 24, 24, padding=(1, 1))
    y = affine(b, b.add("relu", affine(b, y, 24)), 24)
    y = b.add("affine_scalar", b.add("hardswish", y), scale=1.5, bias=-0.25)
    y = b.add("gelu", b.add("leaky_relu", b.add("sigmoid", y), slope=0.1))
    graph = b.graph(b.add("relu6", affine(b, y, 24)))
    x = b.rng.normal(size=(3, 24, 9, 7)).astype(F)
    check(graph, x, [" + ".join(node.name for node in graph.nodes)], exact=False)


@pytest.mark.parametrize("kind", ["int8_conv2d", "int8_depthwise", "pq_conv2d", "lookup_conv2d"])
@pytest.mark.parametrize("function", [None, "relu6", "hardswish"])
def test_scales_between_integers(kind: str, function: str | None) -> None:
    """What only scales, shifts and limits folds into the step from sums to the next grid."""
    b = Builder(("x", (None, 16, 9, 7)))
    y = affine(b, layer(b, kind, "x", 16, 16, padding=(1, 1)), 16)
    if function:
        y = b.add(function, y)
    made = layer(b, "int8_conv2d", affine(b, y, 16), 16, 5)
    graph = b.graph(made)
    names = [node.name for node in graph.nodes]
    x = b.rng.normal(size=(3, 16, 9, 7)).astype(F)
    check(graph, x, [" + ".join(names[:-1]), names[-1]], exact=True)


@pytest.mark.parametrize("kind", ["linear", "int8_linear", "pq_linear", "lookup_linear"])
@pytest.mark.parametrize("rows", [2, 40])
def test_rows_take_over_what_is_of_their_outputs(kind: str, rows: int) -> None:
    b = Builder(("x", (None, 12)))
    y = affine(b, getattr(b, kind)("x", 12, 21), 21)
    graph = b.graph(b.add("hardswish", y))
    x = b.rng.normal(size=(rows, 12)).astype(F)
    check(graph, x, [" + ".join(node.name for node in graph.nodes)], exact=kind != "linear")
    # Axis 1 of more axes holds no outputs: a step of its own, in one pass.
    b = Builder(("x", (None, 21, 12)))
    y = affine(b, getattr(b, kind)("x", 12, 21), 21)
    graph = b.graph(b.add("hardswish", y))
    names = [node.name for node in graph.nodes]
    x = b.rng.normal(size=(rows, 21, 12)).astype(F)
    check(graph, x, [names[0], f"{names[1]} + {names[2]}"], exact=kind != "linear")


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 5, 7), (6, 5, 3, 2)])
def test_chains_behind_arithmetic_and_alone(shape: tuple[int, ...]) -> None:
    b = Builder(("x", (None, *shape)))
    y = affine(b, b.add("mul", "x", "x"), 6)
    y = b.add("hardswish", affine(b, y, 6))
    z = b.add("tanh", b.add("affine_scalar", b.add("abs", y), scale=0.5, bias=1.0))
    graph = b.graph(z)
    x = b.rng.normal(size=(700, *shape)).astype(F)
    check(graph, x, [" + ".join(node.name for node in graph.nodes)], exact=False)


def test_transposed_convolutions_take_over_chains() -> None:
    b = Builder(("x", (None, 4, 5, 7)))
    weight = b.rng.normal(size=(6, 2, 3, 3)).astype(F)
    tensors = {"weight": weight, "bias": b.rng.normal(size=6).astype(F)}
    y = b.add("conv_transpose2d", "x", tensors=tensors, groups=2, stride=(2, 2), padding=(1, 1))
    graph = b.graph(b.add("leaky_relu", affine(b, y, 6), slope=0.2))
    x = b.rng.normal(size=(3, 4, 5, 7)).astype(F)
    check(graph, x, [" + ".join(node.name for node in graph.nodes)], exact=False)

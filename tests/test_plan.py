"""From graphs to steps: what is fused and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from graphs import Builder

from lutra import EngineError, GraphError, Session, run_reference
from lutra._engine import ops
from lutra.ops import OPS
from lutra.runtime.fuse import fuse
from lutra.runtime.plan import build_plan


def steps(b: Builder, *outputs: str) -> list[tuple[str, str, str | None, bool]]:
    """Operator, output, residual and whether it clamps, of every step; runs the graph too."""
    graph = b.graph(*outputs)
    feeds = {v.name: b.rng.normal(size=(3, *v.shape[1:])).astype(np.float32) for v in graph.inputs}
    want = run_reference(graph, feeds)
    got = Session(graph, threads=1).run(None, feeds)
    for name, y in zip(graph.outputs, got, strict=True):
        np.testing.assert_allclose(y, want[name], rtol=1e-5, atol=1e-5)
    return [(f.node.op, f.output, f.residual, f.clamp is not None) for f in fuse(graph)]


def test_every_operator_has_a_step() -> None:
    assert set(OPS) <= set(ops())  # and those of plugins


def test_a_residual_block_is_one_step_for_each_convolution() -> None:
    b = Builder(("x", (None, 4, 6, 6)))
    y = b.add("relu", b.pq_conv2d("x", 4, 4, padding=(1, 1)))
    z = b.pq_conv2d(y, 4, 4, padding=(1, 1))
    side = b.conv2d("x", 4, 4, (1, 1))
    out = b.add("relu6", b.add("add", z, side))
    assert steps(b) == [
        ("pq_conv2d", y, None, True),
        ("conv2d", side, None, False),
        ("pq_conv2d", out, side, True),  # it waited for what it adds
    ]
    assert [f.clamp for f in fuse(b.graph())] == [(0.0, math.inf), None, (0.0, 6.0)]


def test_a_layer_waits_for_a_side_branch_without_layers() -> None:
    b = Builder(("x", (None, 4, 6, 6)))
    y = b.pq_conv2d("x", 4, 4, padding=(1, 1))
    side = b.add("relu6", "x")
    out = b.add("relu", b.add("add", side, y))
    assert steps(b) == [("relu6", side, None, False), ("pq_conv2d", out, side, True)]


def test_linear_layers_add_what_exists() -> None:
    b = Builder(("x", (None, 5)))
    y = b.linear("x", 5, 5)
    out = b.add("add", "x", y)
    assert steps(b) == [("linear", out, "x", False)]


def test_clamp_before_the_sum_ends_the_step() -> None:
    b = Builder(("x", (None, 5)))
    y = b.add("relu", b.pq_linear("x", 5, 5))
    out = b.add("add", "x", y)
    assert steps(b) == [("pq_linear", y, None, True), ("add", out, None, False)]


def test_what_others_read_stays() -> None:
    b = Builder(("x", (None, 5)))
    y = b.linear("x", 5, 5)
    r = b.add("relu", y)
    s = b.add("add", y, r)
    t = b.add("add", s, s)
    assert [f.output for f in fuse(b.graph(t))] == [y, r, s, t]
    assert steps(b, t)[0] == ("linear", y, None, False)


def test_a_layer_added_to_itself_is_not_fused() -> None:
    b = Builder(("x", (None, 5)))
    y = b.linear("x", 5, 5)
    z = b.add("add", y, y)
    assert steps(b) == [("linear", y, None, False), ("add", z, None, False)]


def test_outputs_stay() -> None:
    b = Builder(("x", (None, 5)))
    y = b.linear("x", 5, 5)
    s = b.add("add", y, "x")
    r = b.add("relu", s)
    assert [f.output for f in fuse(b.graph(y, r))] == [y, s, r]
    assert [f.output for f in fuse(b.graph(s, r))] == [s, r]
    assert [f.output for f in fuse(b.graph(r))] == [r]
    for outputs in ((y, r), (s, r), (r,), (y, s, r)):
        steps(b, *outputs)


def test_rows_of_more_axes_are_fused_too() -> None:
    b = Builder(("x", (None, 3, 5)))
    y = b.add("relu", b.add("add", b.pq_linear("x", 5, 5), "x"))
    z = b.add("relu6", b.add("add", b.linear(y, 5, 5), "x"))
    assert steps(b) == [("pq_linear", y, "x", True), ("linear", z, "x", True)]


MOVES = {
    "pooling": ("max_pool2d", {"kernel": (2, 2), "stride": (2, 2)}),
    "slice": ("slice", {"axis": 1, "start": 1, "stop": 3}),
    "reshape": ("reshape", {"shape": (4, 18, 2)}),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("reader", ["relu", "sigmoid", "output", "layer", "move"])
def test_a_value_that_moves_as_bytes_keeps_its_floats_for_later_readers(
    move: str, reader: str
) -> None:
    b = Builder(("x", (None, 4, 6, 6)))
    y = b.int8_conv2d("x", 4, 4, padding=(1, 1), act_zero=64)
    op, attrs = MOVES[move]
    moved = b.add(op, y, **attrs)
    layers = [b.int8_conv2d(moved, 2 if move == "slice" else 4, 3, (1, 1), act_scale=0.02)]
    if reader == "layer":
        layers.append(b.conv2d(y, 4, 3, (1, 1)))
    elif reader == "move":
        layers.append(b.add("sigmoid", b.add(op, y, **attrs)))
    elif reader != "output":
        layers.append(b.add(reader, y))
    steps(b, *layers, *[y] * (reader == "output"))


def test_nine_axes_are_refused() -> None:
    b = Builder(("x", (None, 1, 1, 1, 1, 1, 1, 1, 2)))
    b.add("relu", "x")
    with pytest.raises(GraphError, match="'x' has 9 axes; values have 1 to 8 axes"):
        Session(b.graph())


def test_an_unknown_isa_is_refused() -> None:
    b = Builder(("x", (None, 2)))
    b.add("relu", "x")
    with pytest.raises(EngineError, match="'mmx' cannot run"):
        build_plan(b.graph(), "mmx", 1)

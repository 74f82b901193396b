"""Axes whose size is known at run time only: the rules of graphs, and sessions on many sizes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder, every_op_graph, int8_tensors, pq_tensors, tree_tensors
from layers import same_bits

import lutra.runtime.session
from lutra import (
    EngineError,
    GraphError,
    InputError,
    Session,
    load_graph,
    run_reference,
    runnable_isas,
    save_graph,
)
from lutra.graph import Graph, Shape, Value
from lutra.runtime.cpu import usable_memory

ISAS = runnable_isas()
F = np.float32
IMAGE = (None, 3, None, None)
SIZES = ((12, 12), (1, 1), (1, 37), (41, 1), (13, 7), (2, 3), (64, 51), (12, 12), (5, 130))


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


def with_input(graph: Graph, shape: Shape) -> Graph:
    """The same graph for an input of another shape."""
    (value,) = graph.inputs
    return replace(graph, inputs=(Value(value.name, "float32", shape),))


def convolutions() -> Graph:
    """All kinds of convolutions and of images of other sizes, with residual sums."""
    b = Builder(("x", IMAGE), seed=3)
    grid = {"act_scale": 0.05, "act_zero": 32, "act_bits": 6, "padding": (1, 1)}
    x = b.add("relu", b.conv2d("x", 3, 8, padding=(1, 1)))
    y = b.add("clamp", b.pq_conv2d(x, 8, 8, **grid), low=-1.0, high=2.0)
    y = b.add("add", y, x)
    z = b.int8_conv2d(y, 8, 8, (3, 3), groups=8, **grid)
    tree = tree_tensors(b.rng, 72, 12, bits=6)
    attrs = {"in_channels": 8, "kernel": (3, 3), "encoder": "tree", "stride": (2, 2)}
    z = b.add("pq_conv2d", z, tensors=tree, **attrs, **grid)
    z = b.lookup_conv2d(z, 12, 12, padding=(1, 1))
    z = b.add("pixel_shuffle", b.affine(z, 12), factor=2)
    z = b.add("max_pool2d", z, kernel=(3, 3), stride=(2, 1), padding=(1, 1))
    z = b.add("avg_pool2d", z, kernel=(2, 2), stride=(1, 1), padding=(1, 1))
    b.add("concat", z, b.add("pad", z, pads=(0,) * 8), axis=1)
    return b.graph()


def classifier() -> Graph:
    """Images of any size to scores, by means and maxima."""
    b = Builder(("x", IMAGE), seed=4)
    x = b.add("relu", b.int8_conv2d("x", 3, 16, stride=(2, 2), padding=(1, 1), act_zero=60))
    x = b.pq_conv2d(x, 16, 20, padding=(1, 1))
    mean, top = b.add("mean", x, axes=(2, 3)), b.add("max", x, axes=(2, 3))
    x = b.add("add", mean, top)
    x = b.add("add", x, b.add("flatten", b.add("adaptive_avg_pool2d", x4(b), output_size=(2, 2))))
    b.add("softmax", b.pq_linear(x, 20, 7), axis=1)
    return b.graph()


def x4(b: Builder) -> str:
    """Five channels of the second value of the graph, so that four windows make 20."""
    return b.add("slice", b.nodes[2].output, axis=1, start=0, stop=5)


GRAPHS: dict[str, Callable[[], Graph]] = {"convolutions": convolutions, "classifier": classifier}


@pytest.mark.parametrize("name", GRAPHS)
def test_any_size_gives_the_bits_of_a_graph_for_that_size(name: str) -> None:
    graph = GRAPHS[name]()
    assert graph.is_dynamic
    sessions = [Session(graph, isa=isa, threads=threads) for isa in ISAS for threads in (1, 2)]
    for turn, (height, width) in enumerate(SIZES):
        x = normal(1 + turn % 3, 3, height, width, seed=turn)
        (want,) = run_reference(graph, [x]).values()
        fixed = Session(with_input(graph, (None, 3, height, width)), threads=1)(x)
        np.testing.assert_allclose(fixed, want, rtol=1e-4, atol=1e-5)
        for session in sessions:
            assert same_bits(session(x), fixed), (session.isa, session.threads, x.shape)


def test_points_of_any_number() -> None:
    b = Builder(("x", (None, 3, None)), seed=5)
    x = b.add("reshape", "x", shape=(3, 1, -1))
    x = b.add("relu", b.int8_conv2d(x, 3, 16, (1, 1), act_zero=60))
    x = b.add("max", b.add("flatten", b.pq_conv2d(x, 16, 24, (1, 1)), start_axis=2), axes=(2,))
    b.pq_linear(x, 24, 5)
    graph = b.graph()
    assert [value.shape for value in graph.values.values()][-4:] == [
        (None, 24, 1, None),
        (None, 24, None),
        (None, 24),
        (None, 5),
    ]
    for points in (1, 2, 100, 7, 1025):
        x = normal(2, 3, points)
        (want,) = run_reference(graph, [x]).values()
        for isa in ISAS:
            assert same_bits(Session(graph, isa=isa)(x), want)
    with pytest.raises(InputError, match=r"shape \(1, 3, 0\), which is empty"):
        Session(graph)(np.zeros((1, 3, 0), F))


def test_every_second_of_a_row() -> None:
    """No value behind the last that counts is read or written, at any length."""
    for start in (0, 1):
        b = Builder(("x", (None, None)))
        b.add("slice", "x", axis=1, start=start, stop=2**31 - 1, step=2)
        session = Session(b.graph())
        for n in (*range(start + 1, 20), 63, 64, 65):
            x = normal(3, n, seed=n)
            assert same_bits(session(x), x[:, start::2])


def test_slices_to_the_end() -> None:
    b = Builder(("x", IMAGE))
    x = b.add("slice", "x", axis=2, start=1, stop=2**31 - 1, step=2)
    b.add("slice", x, axis=3, start=2, stop=5)
    graph = b.graph()
    assert graph.values[graph.outputs[0]].shape == (None, 3, None, 3)
    x = normal(2, 3, 8, 9)
    for result in (Session(graph)(x), *run_reference(graph, [x]).values()):
        assert same_bits(result, x[:, :, 1::2, 2:5])
    with pytest.raises(InputError, match=r"slice_1.*stop=5 on axis 3.*\(1, 3, 4, 4\)"):
        Session(graph)(normal(1, 3, 8, 4))
    with pytest.raises(InputError, match=r"slice_0.*start=1"):
        Session(graph)(normal(1, 3, 1, 9))


def test_threads_with_images_of_different_sizes() -> None:
    graph = convolutions()
    session = Session(graph, threads=2)
    images = [normal(1, 3, height, width, seed=height) for height, width in SIZES]
    want = [session(x) for x in images]
    wrong: list[Any] = []

    def work(first: int) -> None:
        for turn in range(40):
            at = (first + turn * (first + 1)) % len(images)
            if not same_bits(session(images[at]), want[at]):
                wrong.append(images[at].shape)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_many_sizes_do_not_pile_up_memory() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    b = Builder(("x", IMAGE))
    b.conv2d(b.conv2d("x", 3, 32, (1, 1)), 32, 2, (1, 1))
    session = Session(b.graph(), threads=1)
    each = session.arena_bytes(sizes={"x": (1, 3, 400, 400)})
    assert each > 30_000_000
    session(normal(1, 3, 400, 400))
    before = resident()
    for width in range(350, 420):  # 2.3 GB if all were kept
        session(normal(1, 3, 400, width))
    assert resident() - before < 600_000_000


# ---- errors -------------------------------------------------------------------------------------


def test_images_that_are_too_small_name_node_value_and_shape() -> None:
    b = Builder(("x", IMAGE))
    y = b.conv2d("x", 3, 4, (5, 5), name="first")
    b.add("max_pool2d", b.pq_conv2d(y, 4, 6, name="second"), kernel=(2, 2), stride=(2, 2))
    session = Session(b.graph())
    assert session(normal(1, 3, 8, 8)).shape == (1, 6, 1, 1)
    for size, message in (
        ((4, 9), r"'x' \(1, 3, 4, 9\): node 'first' .* of its input 'x' of shape \(1, 3, 4, 9\)"),
        ((9, 6), r"node 'second' \(pq_conv2d\).* spans 3 .* 'first.out' of shape \(1, 4, 5, 2\)"),
        ((7, 8), r"node 'max_pool2d_2'.* 'second.out' of shape \(1, 6, 1, 2\)"),
    ):
        with pytest.raises(InputError, match=message):
            session(normal(1, 3, *size))
    assert session(normal(1, 3, 8, 9)).shape == (1, 6, 1, 1)


def test_sums_of_sizes_that_differ_at_run_time() -> None:
    b = Builder(("a", IMAGE), ("b", IMAGE))
    b.add("concat", b.add("add", "a", "b"), "a", axis=3)
    graph = b.graph()
    session = Session(graph)
    x = normal(2, 3, 4, 5)
    assert session.run(None, {"a": x, "b": x})[0].shape == (2, 3, 4, 10)
    other = normal(2, 3, 4, 6)
    with pytest.raises(InputError, match=r"adds 'a' of shape \(2, 3, 4, 5\) and 'b' of shape"):
        session.run(None, {"a": x, "b": other})
    with pytest.raises(InputError, match=r"run_reference: .*adds 'a' of shape"):
        run_reference(graph, {"a": x, "b": other})
    with pytest.raises(InputError, match="batch of 1 and an input before it one of 2"):
        session.run(None, {"a": x, "b": x[:1]})


def test_halved_and_doubled_sizes_meet_at_even_sizes_only() -> None:
    b = Builder(("x", IMAGE))
    y = b.add("pixel_shuffle", b.conv2d("x", 3, 12, stride=(2, 2), padding=(1, 1)), factor=2)
    b.add("add", "x", y)
    session = Session(b.graph())
    assert session(normal(1, 3, 6, 8)).shape == (1, 3, 6, 8)
    with pytest.raises(InputError, match=r"add_2.*\(1, 3, 7, 8\).*\(1, 3, 8, 8\)"):
        session(normal(1, 3, 7, 8))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 3, 0, 4), F), r"\(1, 3, 0, 4\), which is empty.*\(N, 3, \?, \?\)"),
        (np.zeros((0, 3, 4, 4), F), "which is empty"),
        (np.zeros((3, 4, 4), F), "3 axes"),
        (np.zeros((1, 4, 4, 4), F), "axis 1 must be 3.*dynamic_axes"),
        (np.zeros((1, 3, 4, 4), complex), "complex128"),
        (np.full((1, 3, 4, 4), np.nan, F), "48 values of 48 that are NaN"),
    ],
)
def test_bad_inputs(x: Array, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Session(convolutions())(x)


def linear_over_width() -> Graph:
    b = Builder(("x", IMAGE))
    b.linear("x", 8, 4)
    return b.graph()


def flat() -> Graph:
    b = Builder(("x", IMAGE))
    b.pq_linear(b.add("flatten", "x"), 8, 4)
    return b.graph()


def several_sizes() -> Graph:
    b = Builder(("x", IMAGE))
    b.add("reshape", "x", shape=(3, 4, 4))
    return b.graph()


def channels() -> Graph:
    b = Builder(("x", (None, None, 8, 8)))
    b.int8_conv2d("x", 3, 4)
    return b.graph()


def norm() -> Graph:
    b = Builder(("x", (None, None, 8)))
    b.affine("x", 3)
    return b.graph()


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (linear_over_width, r"'linear_0' \(linear\) needs the size of axis 3 of its input 'x'"),
        (flat, r"needs the size of axis 1 of its input 'flatten_0.out'.*\(N, \?\)"),
        (several_sizes, r"'x', whose shape \(N, 3, \?, \?\).*must be -1"),
        (channels, r"needs the size of axis 1 of its input 'x', whose shape \(N, \?, 8, 8\)"),
        (norm, r"needs the size of axis 1 of its input 'x'"),
    ],
)
def test_operators_that_need_a_size(graph: Callable[[], Graph], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        graph().validate()


def test_reshapes_into_several_dynamic_axes_are_refused() -> None:
    b = Builder(("x", IMAGE))
    b.add("reshape", b.add("concat", "x", "x", axis=2), shape=(6, -1, 1))
    assert Session(b.graph())(normal(1, 3, 2, 5)).shape == (1, 6, 10, 1)
    b = Builder(("x", (None, 3, None)))
    b.add("reshape", "x", shape=(4, -1), name="four")
    session = Session(b.graph())
    assert session(normal(1, 3, 8)).shape == (1, 4, 6)
    with pytest.raises(InputError, match=r"'four'.*\(4, -1\).*\(1, 3, 5\).*15 elements"):
        session(normal(1, 3, 5))


# ---- memory -------------------------------------------------------------------------------------


def test_images_beyond_the_memory_are_an_error() -> None:
    graph = convolutions()
    small = Session(graph, max_memory=2_000_000)
    y = small(normal(1, 3, 20, 20))
    assert same_bits(y, Session(graph)(normal(1, 3, 20, 20)))
    with pytest.raises(MemoryError, match=r"'x' \(1, 3, 900, 900\) take .* GB .* 0.00 GB may be"):
        small(np.zeros((1, 3, 900, 900), F))
    # what no machine has: nothing of it is allocated to find that out
    assert small.arena_bytes(sizes={"x": (1, 3, 900, 900)}) > 900 * 900 * 8
    assert small.arena_bytes(sizes={"x": (1, 3, 15_000, 15_000)}) > 4 * 10**9
    with pytest.raises(InputError, match="one sample may hold"):
        Session(graph).arena_bytes(sizes={"x": (1, 3, 2**15, 2**15)})


def test_batches_are_cut_to_the_memory() -> None:
    graph = convolutions()
    x = normal(9, 3, 60, 60)
    want = Session(graph)(x)
    one = Session(graph).arena_bytes(sizes={"x": (2, 3, 60, 60)}) // 2
    session = Session(graph, max_memory=2 * one + one // 2)
    assert same_bits(session(x), want)
    assert session.arena_bytes(sizes={"x": x.shape}) <= 2 * one + one // 2


def test_a_fixed_model_beyond_the_memory_is_an_error() -> None:
    with pytest.raises(MemoryError, match="'x'"):
        Session(every_op_graph(), max_memory=1000)


def test_usable_memory(tmp_path: Path) -> None:
    total = usable_memory(tmp_path / "none", tmp_path)
    assert total is not None
    assert total > 2**20
    groups = tmp_path / "cgroup"
    groups.write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "memory.max").write_text("max\n")
    assert usable_memory(groups, tmp_path) == total
    (tmp_path / "a" / "memory.max").write_text("1000000\n")
    assert usable_memory(groups, tmp_path) == 1000000
    groups.write_text("3:memory:/c\n")
    (tmp_path / "memory" / "c").mkdir(parents=True)
    (tmp_path / "memory" / "c" / "memory.limit_in_bytes").write_text("2000000\n")
    assert usable_memory(groups, tmp_path) == 2000000


# ---- costs, files, golden data -------------------------------------------------------------------


def test_costs_are_those_of_given_sizes() -> None:
    graph = convolutions()
    sizes = {"x": (5, 3, 24, 16)}
    fixed = with_input(graph, (None, 3, 24, 16))
    assert graph.cost(sizes) == fixed.cost()
    assert graph.total_cost(sizes) == fixed.total_cost()
    with pytest.raises(GraphError, match=r"depends on the size of 'x'.*sizes="):
        graph.cost()
    for bad in ({}, {"x": (1, 3, 4)}, {"x": (1, 2, 4, 4)}, {"x": (1, 3, 0, 4)}):
        with pytest.raises(GraphError, match="'x'"):
            graph.cost(bad)
    assert "?" in str(graph)
    assert "(N, 12, ?, ?)" in str(graph)


def golden(graph: Graph, x: Array) -> Graph:
    return replace(graph, golden=((x,), tuple(Session(graph).run(None, {"x": x}))))


def test_golden_data_choose_the_nominal_size(tmp_path: Path) -> None:
    graph = golden(convolutions(), normal(2, 3, 9, 11))
    assert graph.nominal_sizes(4) == {"x": (4, 3, 9, 11)}
    assert graph.cost() == graph.cost({"x": (1, 3, 9, 11)})
    assert "work for x (1, 3, 9, 11)" in str(graph)
    path = tmp_path / "m.lutra"
    save_graph(graph, path)
    loaded = load_graph(path)
    assert loaded.inputs == graph.inputs
    assert loaded.golden is not None
    session = Session(path)
    assert same_bits(session(loaded.golden[0][0]), loaded.golden[1][0])
    assert session.get_inputs()[0].shape == IMAGE
    assert "3x?x? ->" in repr(session)
    assert session.profile(runs=1).batch == 1
    assert session.arena_bytes(2) == session.arena_bytes(sizes={"x": (2, 3, 9, 11)})


def test_golden_data_must_fit_each_other() -> None:
    graph = golden(convolutions(), normal(2, 3, 9, 11))
    assert graph.golden is not None
    (x,), (y,) = graph.golden
    with pytest.raises(GraphError, match=r"golden output .* must be \(2, 6, 6, 13\)"):
        replace(graph, golden=((x,), (y[..., :-1],))).validate()
    with pytest.raises(GraphError, match=r"golden input 'x' .* must be \(2, 3, \?, \?\)"):
        replace(graph, golden=((x[:, :2],), (y,))).validate()
    b = Builder(("x", IMAGE))
    b.conv2d("x", 3, 4, (5, 5))
    with pytest.raises(GraphError, match="golden inputs do not fit: node 'conv2d_0'"):
        replace(b.graph(), golden=((x[:, :, :3],), (y,))).validate()


def test_profiles_need_a_size() -> None:
    session = Session(convolutions())
    with pytest.raises(InputError, match=r"any size \('x' \(N, 3, \?, \?\)\).*give the shapes"):
        session.profile()
    with pytest.raises(InputError, match="sizes="):
        session.arena_bytes()
    with pytest.raises(InputError, match=r"Session.arena_bytes.*'x'"):
        session.arena_bytes(sizes={"x": (1, 2, 3, 4)})
    profile = session.profile(sizes={"x": (2, 3, 30, 20)}, runs=1)
    assert profile.batch == 2
    assert profile.steps[1].dense_gmacs is not None
    assert session.profile(normal(1, 3, 8, 8), runs=1).batch == 1


def test_the_engine_names_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that Python lets through must not crash the engine."""
    graph = convolutions()
    session = Session(graph)
    monkeypatch.setattr(Graph, "infer", lambda self, sizes: dict(graph.values))
    b = Builder(("x", IMAGE))
    b.conv2d("x", 3, 4, (5, 5))
    session = Session(b.graph())
    with pytest.raises(EngineError, match="kernel is larger than the padded image"):
        session(normal(1, 3, 4, 4))


def test_tables_of_every_kind_on_tiny_images() -> None:
    for kernel in ((1, 1), (3, 3), (1, 3)):
        b = Builder(("x", (None, 4, None, None)), seed=9)
        pad = (kernel[0] // 2, kernel[1] // 2)
        grid = {"act_scale": 0.05, "act_zero": 32, "act_bits": 6, "padding": pad}
        pq = {"in_channels": 4, "kernel": kernel, **grid}
        length = 4 * kernel[0] * kernel[1]
        y = b.add("pq_conv2d", "x", tensors=pq_tensors(b.rng, length, 4, bits=6), **pq)
        y = b.add(
            "pq_conv2d", y, tensors=tree_tensors(b.rng, length, 4, bits=6), **pq, encoder="tree"
        )
        b.add("int8_conv2d", y, tensors=int8_tensors(b.rng, (4, 4, *kernel)), **grid)
        graph = b.graph()
        for height in (1, 2, 3):
            for width in (1, 2, 17):
                x = normal(1, 4, height, width)
                (want,) = run_reference(graph, [x]).values()
                for isa in ISAS:
                    assert same_bits(Session(graph, isa=isa)(x), want)


def test_sizes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lutra.runtime.session, "_KNOWN_SIZES", 3)
    session = Session(convolutions())
    for width in (4, 5, 6, 7, 4, 5, 8):
        x = normal(1, 3, 4, width)
        assert same_bits(session(x), Session(convolutions())(x))
    assert len(session._fits) == 3

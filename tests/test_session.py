"""Whole graphs in the engine: against the reference, with bad inputs, many threads and forks."""

from __future__ import annotations

import gc
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import Array, Builder, every_op_graph, random_inputs, tied_graph, tiny_graph
from layers import same_bits

import lutra.runtime.session
from lutra import Graph, InputError, Session, Value, run_reference, runnable_isas, save_graph
from lutra.format import graph_to_bytes

ISAS = runnable_isas()
F = np.float32


def two_by_two() -> Graph:
    """Two inputs and two outputs."""
    b = Builder(("a", (None, 3, 6, 6)), ("b", (None, 4)), seed=2)
    x = b.add("flatten", b.add("relu", b.pq_conv2d("a", 3, 2, padding=(1, 1), act_zero=64)))
    y = b.pq_linear(x, 72, 4)
    return b.graph(b.add("relu6", b.add("add", y, "b")), x)


def resnet() -> Graph:
    """Residual blocks with every fusion that there is."""
    b = Builder(("x", (None, 3, 14, 14)), seed=4)
    x = b.add("relu", b.conv2d("x", 3, 8, padding=(1, 1)))
    for stride, outputs in ((1, 8), (2, 12)):
        channels = 8
        y = b.pq_conv2d(x, channels, outputs, stride=(stride, stride), padding=(1, 1))
        y = b.pq_conv2d(b.add("relu", y), outputs, outputs, padding=(1, 1), act_bits=6)
        if stride == 2:
            x = b.pq_conv2d(x, channels, outputs, (1, 1), width=4, stride=(2, 2))
        x = b.add("relu", b.add("add", x, y))
    x = b.add("flatten", b.add("adaptive_avg_pool2d", x, output_size=(1, 1)))
    b.add("softmax", b.linear(x, 12, 10), axis=1)
    return b.graph()


GRAPHS = {
    "every op": every_op_graph(),
    "two by two": two_by_two(),
    "resnet": resnet(),
    "tied": tied_graph(),
    "tiny": tiny_graph(),
}


@pytest.mark.parametrize("batch", [1, 2, 5, 33])
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_against_the_reference(name: str, batch: int) -> None:
    graph = GRAPHS[name]
    feeds = random_inputs(graph, batch, seed=batch)
    want = run_reference(graph, feeds)
    first: list[Array] = []
    for isa in ISAS:
        for threads in (1, 2, 3):
            session = Session(graph, isa=isa, threads=threads)
            got = session.run(None, feeds)
            first = first or got
            for output, y, same in zip(graph.outputs, got, first, strict=True):
                np.testing.assert_allclose(y, want[output], rtol=1e-4, atol=1e-5)
                assert same_bits(y, same), (isa, threads)


@pytest.mark.parametrize("isa", ISAS)
def test_every_node_against_the_reference(isa: str) -> None:
    graph = every_op_graph()
    values = graph.values
    arrays = run_reference(graph, random_inputs(graph, 3), intermediates=True)
    for node in graph.nodes:
        inputs = tuple(dict.fromkeys(node.inputs))
        tensors = {name: graph.tensors[name] for name in node.tensors.values()}
        ends = tuple(Value(name, "float32", values[name].shape) for name in inputs)
        session = Session(Graph(ends, (node.output,), (node,), tensors), isa=isa, threads=2)
        (y,) = session.run(None, {name: np.ascontiguousarray(arrays[name]) for name in inputs})
        want = arrays[node.output]
        if node.op in ("conv2d", "linear", "softmax", "mean") or "avg" in node.op:
            np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6, err_msg=node.name)
        else:
            np.testing.assert_array_equal(y, want, node.name)


def test_a_fixed_batch() -> None:
    graph = every_op_graph(batch=2)
    session = Session(graph)
    feeds = random_inputs(graph)
    want = run_reference(graph, feeds)
    for name, y in zip(graph.outputs, session.run(None, feeds), strict=True):
        np.testing.assert_allclose(y, want[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"shape \(3, 3, 12, 12\).*\(2, 3, 12, 12\).*axis 0"):
        session.run(None, {"x": np.zeros((3, 3, 12, 12), F)})


def test_files_bytes_and_graphs_are_the_same_model(tmp_path: Path) -> None:
    graph = tiny_graph()
    path = tmp_path / "tiny.lutra"
    save_graph(graph, path)
    x = random_inputs(graph, 4)["x"]
    want = Session(graph, threads=1)(x)
    for source, name in (
        (path, "tiny.lutra"),
        (str(path), "tiny.lutra"),
        (graph_to_bytes(graph), "bytes"),
    ):
        session = Session(source, threads=1, isa="scalar")
        assert same_bits(session(x), want)
        assert repr(session).startswith(f"Session({name}, 3 -> 2, 1 lookup layer, scalar, 1 thread")
    with pytest.raises(lutra.FormatError):
        Session(tmp_path / "none.lutra")


def test_outputs_by_name() -> None:
    graph = two_by_two()
    session = Session(graph)
    assert [v.name for v in session.get_inputs()] == ["a", "b"]
    assert [(v.name, v.shape) for v in session.get_outputs()] == [
        (name, graph.values[name].shape) for name in graph.outputs
    ]
    feeds = random_inputs(graph, 3)
    both = session.run(None, feeds)
    swapped = session.run(graph.outputs[::-1], feeds)
    assert same_bits(both[0], swapped[1])
    assert same_bits(both[1], swapped[0])
    assert len(session.run([graph.outputs[1]], feeds)) == 1
    assert session.inputs == tuple(session.get_inputs()) == graph.inputs
    assert session.outputs == tuple(graph.values[name] for name in graph.outputs)
    with pytest.raises(InputError, match="no output 'z'"):
        session.run(["z"], feeds)
    near = graph.outputs[1][:-1] + "_"
    with pytest.raises(InputError, match=f"no output '{near}'; did you mean '{graph.outputs[1]}'"):
        session.run([near], feeds)
    with pytest.raises(InputError, match=r"2 inputs and 2 outputs.*session\.run"):
        session(feeds["a"])
    with pytest.raises(InputError, match="batch of 2 and an input before it one of 3"):
        session.run(None, {"a": feeds["a"], "b": feeds["b"][:2]})


BAD = {
    "float64": (np.full((1, 3), -1e39), r"holds -1e\+39, which is beyond float32; give numbers in"),
    "int": (np.zeros((1, 3), np.int64), r"dtype int64.*if these numbers are meant.*astype"),
    "uint16": (np.zeros((1, 3), np.uint16), r"dtype uint16.*if these numbers are meant.*astype"),
    "bool": (np.zeros((1, 3), bool), r"dtype bool.*astype"),
    "byte order": (np.zeros((1, 3), ">f4"), r"dtype >f4.*astype"),
    "complex": (np.zeros((1, 3), np.complex64), r"dtype complex64.*astype"),
    "list": ([[1.0, 2.0, 3.0]], "is a list; give a numpy array"),
    "none": (None, "is a NoneType"),
    "rank 1": (np.zeros(3, F), r"shape \(3,\), which is 1 axes, but the model takes \(N, 3\)"),
    "rank 3": (np.zeros((1, 3, 1), F), "which is 3 axes"),
    "scalar": (np.array(1, F), "which is 0 axes"),
    "size": (np.zeros((1, 4), F), r"shape \(1, 4\).*axis 1 must be 3"),
    "no batch": (np.zeros((0, 3), F), r"shape \(0, 3\), which is empty"),
    "nan": (np.array([[np.nan, 1, np.inf]], F), "input 'x' holds 2 values of 3 that are NaN or"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(case: str) -> None:
    x, match = BAD[case]
    session = Session(tiny_graph(), threads=1)
    with pytest.raises(InputError, match=match):
        session(x)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float16", "float64", "uint8", "int8", "int16"])
def test_other_dtypes_are_cast(dtype: str) -> None:
    graph = tiny_graph()
    session = Session(graph, threads=1)
    info = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else None
    numbers = [-1.0 / 3, 1e-3, 2.5] if info is None else [info.min, info.max, 7]
    x = np.array([numbers, numbers[::-1]]).astype(dtype)
    plain = x.astype(F)
    assert same_bits(session(x), session(plain))
    (got,), (want,) = (run_reference(graph, [array]).values() for array in (x, plain))
    np.testing.assert_array_equal(got, want)
    assert same_bits(session(np.asfortranarray(x)), session(plain))


def test_casts_keep_nan_and_refuse_what_becomes_infinite() -> None:
    x = np.array([[np.nan, np.inf, -np.inf]])
    with pytest.raises(InputError, match="holds 3 values of 3 that are NaN or infinite"):
        Session(tiny_graph())(x)
    session = Session(tiny_graph(), check_finite=False)
    np.testing.assert_array_equal(session(x), session(x.astype(F)))
    x[0, 1] = float(np.finfo(F).max) * (1 + 2.0**-26)  # rounds to the largest float32
    session(x)
    x[0, 1] = -float(np.finfo(F).max) * (1 + 2.0**-24)
    for run in (session, lambda x: run_reference(tiny_graph(), [x])):
        with pytest.raises(InputError, match="beyond float32"):
            run(x)


def test_bad_names() -> None:
    session = Session(tiny_graph(), threads=1)
    x = np.zeros((1, 3), F)
    with pytest.raises(InputError, match=r"no input 'y'; the model has \['x'\]"):
        session.run(None, {"x": x, "y": x})
    with pytest.raises(InputError, match=r"no input 'X'; did you mean 'x'\? the model has \['x'\]"):
        session.run(None, {"X": x})
    with pytest.raises(InputError, match="'x' is missing"):
        session.run(None, {})
    with pytest.raises(InputError, match="give a dict"):
        session.run(None, [x])  # type: ignore[arg-type]


def test_infinities_are_let_in_on_request() -> None:
    graph = tiny_graph()
    x = np.array([[np.nan, np.inf, -np.inf]], F)
    session = Session(graph, check_finite=False)
    (want,) = run_reference(graph, [x]).values()
    np.testing.assert_array_equal(session(x), want)


def test_memory_layout_of_inputs_does_not_matter() -> None:
    graph = GRAPHS["resnet"]
    session = Session(graph)
    x = random_inputs(graph, 4)["x"]
    want = session(x)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(F).reshape(x.shape)
    assert not unaligned.flags.aligned
    frozen = x.copy()
    frozen.flags.writeable = False
    for other in (
        np.asfortranarray(x),
        np.repeat(x, 2, axis=3)[..., ::2],
        x[::-1].copy()[::-1],
        unaligned,
        frozen,
    ):
        assert same_bits(session(other), want)
    y = session(x)
    y += 1  # results belong to the caller
    assert same_bits(session(x), want)


def test_large_batches_run_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = two_by_two()
    feeds = random_inputs(graph, 23)
    whole = Session(graph, threads=2)
    want = whole.run(None, feeds)
    monkeypatch.setattr(lutra.runtime.session, "_ARENA_LIMIT", 5 * (whole.arena_bytes(2) // 2))
    session = Session(graph, threads=2)
    for got, y in zip(session.run(None, feeds), want, strict=True):
        assert same_bits(got, y)
    assert session.arena_bytes(10**9) == session.arena_bytes(5) < whole.arena_bytes(23)


def test_a_batch_beyond_memory_is_an_error() -> None:
    session = Session(tiny_graph())
    huge = np.broadcast_to(np.zeros((1, 3), F), (2**48, 3))
    with pytest.raises(MemoryError):
        session(huge)
    fixed = Session(replace(tiny_graph(), inputs=(Value("x", "float32", (1, 3)),)))
    assert fixed.arena_bytes(7) == fixed.arena_bytes(1)
    with pytest.raises(InputError, match="batch=0"):
        session.arena_bytes(0)
    assert session.arena_bytes(64) > session.arena_bytes(1) > 0


def test_eight_python_threads_share_a_session() -> None:
    graph = GRAPHS["resnet"]
    session = Session(graph, threads=2)
    batches = [random_inputs(graph, 1 + i % 5, seed=i)["x"] for i in range(8)]
    want = [session(x) for x in batches]
    wrong: list[int] = []

    def work(index: int) -> None:
        for turn in range(5):
            at = (index + turn) % len(batches)
            if not same_bits(session(batches[at]), want[at]):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_runs_and_ends() -> None:
    graph = GRAPHS["resnet"]
    session = Session(graph, threads=3)
    x = random_inputs(graph, 8)["x"]
    want = session(x)
    child = os.fork()
    if child == 0:  # no pytest in here: leave by _exit whatever happens
        status = 1
        try:
            signal.alarm(20)
            right = same_bits(session(x), want)
            del session
            gc.collect()  # ends a pool whose threads the child does not have
            right = right and same_bits(Session(graph, threads=3)(x), want)
            status = 0 if right else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert same_bits(session(x), want)


def test_threads_share_the_work_of_large_batches() -> None:
    """Small jobs are done by the caller alone, so this one is large enough for the pool."""
    graph = tiny_graph()
    feeds = random_inputs(graph, 4000, 0)
    want = Session(graph, threads=1).run(None, feeds)
    for threads in (2, 3):
        for got, expected in zip(
            Session(graph, threads=threads).run(None, feeds), want, strict=True
        ):
            np.testing.assert_array_equal(got, expected)

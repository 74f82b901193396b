"""Inputs of integers, token ids and masks: sessions, the reference, files and the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import save
from graphs import Array, Builder, tiny_graph, with_golden
from sequences import (
    every_decoder_graph,
    every_selection_graph,
    every_sequence_op_graph,
    reduced_table,
    single,
)

import lutra.format
from lutra import FormatError, GraphError, InputError, Session, load_graph, run_reference
from lutra.format import file_version, graph_from_bytes, graph_to_bytes, save_graph
from lutra.graph import Graph, Value
from lutra.inputs import id_ranges
from lutra.runtime.profile import input_pool, random_inputs

pytest_plugins = ["cli_support"]

F = np.float32
ROWS = 30


def pooled(**metadata: Any) -> Graph:
    """Ids and mask (N, T) to the mean of their embeddings, (N, 5)."""
    b = Builder(("ids", (None, None), "int32"), ("mask", (None, None), "int32"))
    weight = b.rng.normal(size=(ROWS, 8)).astype(F)
    x = b.add("embedding", "ids", name="words", tensors={"weight": weight})
    b.add("masked_mean", b.pq_linear(x, 8, 5), "mask", name="pool")
    return b.graph(metadata=metadata)


def feeds(batch: int = 2, length: int = 6, dtype: Any = np.int32) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, ROWS, (batch, length))
    mask = np.arange(length) < rng.integers(1, length + 1, (batch, 1))
    return {"ids": ids.astype(dtype), "mask": mask.astype(dtype)}


# ---- sessions -----------------------------------------------------------------------------------


def test_integers_of_other_widths_are_converted() -> None:
    graph = pooled()
    session = Session(graph)
    given = feeds()
    (want,) = session.run(None, given)
    (expected,) = run_reference(graph, given).values()
    np.testing.assert_allclose(want, expected, rtol=1e-5, atol=1e-6)
    for other in (
        *(feeds(dtype=dtype) for dtype in ("i8", "u8", "u4", "i2", "u2", "i1", "u1")),
        {**given, "mask": given["mask"].astype(np.bool_)},
        {name: np.asfortranarray(x) for name, x in given.items()},
        {name: np.repeat(x, 2, axis=1)[:, ::2] for name, x in given.items()},
    ):
        np.testing.assert_array_equal(session.run(None, other)[0], want)
        np.testing.assert_allclose(next(iter(run_reference(graph, other).values())), expected)
    assert [value.dtype for value in session.get_inputs()] == ["int32", "int32"]
    assert session.get_outputs()[0].dtype == "float32"


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, ">i4"])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    graph = pooled()
    given = {**feeds(), "ids": feeds()["ids"].astype(dtype)}
    message = (
        r"input 'ids' has dtype .*the model takes int32 .*other integers and bool are converted"
    )
    with pytest.raises(InputError, match=f"Session.run: {message}"):
        Session(graph).run(None, given)
    with pytest.raises(InputError, match=f"run_reference: {message}"):
        run_reference(graph, given)


def test_integers_are_no_floats() -> None:
    session = Session(tiny_graph())
    with pytest.raises(InputError, match="dtype int32; the model takes float32"):
        session(np.zeros((1, 3), np.int32))


@pytest.mark.parametrize("worst", [2**31, -(2**31) - 1, 2**62])
def test_numbers_beyond_int32_are_refused(worst: int) -> None:
    given = feeds(dtype=np.int64)
    given["mask"][1, 2] = worst
    for run in (Session(pooled()).run, lambda _, x: run_reference(pooled(), x)):
        with pytest.raises(InputError, match=rf"'mask' holds {worst}, which is no int32"):
            run(None, given)


@pytest.mark.parametrize("bad", [-1, ROWS])
def test_ids_without_a_row_are_refused_before_anything_runs(bad: int) -> None:
    session, given = Session(pooled()), feeds(dtype=np.int64)
    given["ids"][0, 0] = bad
    with pytest.raises(InputError, match=rf"'ids': node 'words' .*the id {bad}.* 0\.\.{ROWS - 1}"):
        session.run(None, given)


def test_shapes_and_lengths_of_inputs() -> None:
    session = Session(pooled())
    for length in (1, 2, 512):
        assert session.run(None, feeds(3, length))[0].shape == (3, 5)
    with pytest.raises(InputError, match="is empty"):
        session.run(None, {name: x[:, :0] for name, x in feeds().items()})
    with pytest.raises(InputError, match="1 axes"):
        session.run(None, {name: x[0] for name, x in feeds().items()})
    with pytest.raises(InputError, match="'mask' is missing"):
        session.run(None, {"ids": feeds()["ids"]})
    with pytest.raises(InputError, match=r"give a numpy array, such as .*dtype=np.int32"):
        session.run(None, {**feeds(), "ids": feeds()["ids"].tolist()})  # type: ignore[dict-item]


def test_large_batches_run_in_pieces() -> None:
    graph = pooled()
    given = feeds(40, 16)
    whole = Session(graph)
    want = whole.run(None, given)[0]
    sizes = dict.fromkeys(given, (2, 16))
    small = Session(graph, max_memory=2 * whole.arena_bytes(sizes=sizes))
    np.testing.assert_array_equal(small.run(None, given)[0], want)


def test_a_mask_without_any_token() -> None:
    given = feeds()
    given["mask"][:] = 0
    (got,) = Session(pooled()).run(None, given)
    assert not got.any()


# ---- random inputs ------------------------------------------------------------------------------


def test_random_inputs_are_valid() -> None:
    graph = every_sequence_op_graph()
    assert {name: limit.rows for name, limit in id_ranges(graph).items()} == {"ids": 40}
    sizes = {"ids": (64, 9), "mask": (64, 9), "x": (64, 4, 6)}
    made = random_inputs(graph, 1, np.random.default_rng(0), sizes)
    assert [made[name].dtype for name in sizes] == [np.int32, np.int32, np.float32]
    assert (made["ids"].min(), made["ids"].max()) == (0, 39)
    mask = made["mask"]
    assert set(np.unique(mask)) == {0, 1}
    assert mask[:, 0].all()
    assert (np.diff(mask, axis=1) <= 0).all()
    pool = input_pool(graph, 1, sizes=sizes)
    assert not np.array_equal(pool[0]["ids"], pool[1]["ids"])
    run_reference(graph, pool[1])


def test_the_smallest_table_limits_the_ids() -> None:
    b = Builder(("ids", (None, None), "int32"))
    parts = [
        b.add("embedding", "ids", name=f"table{rows}", tensors={"weight": np.ones((rows, 2), F)})
        for rows in (9, 4, 7)
    ]
    b.add("add", b.add("add", *parts[:2]), parts[2])
    assert id_ranges(b.graph()) == {"ids": ("table4", 4)}
    with pytest.raises(InputError, match=r"'table4' .* the id 5"):
        Session(b.graph())(np.full((1, 1), 5, np.int32))


# ---- graphs -------------------------------------------------------------------------------------


def test_operators_read_the_dtype_that_they_are_for() -> None:
    for op, inputs, message in (
        ("relu", [("x", (None, 3), "int32")], "'x' of dtype int32 .* float32: 'cast' makes floats"),
        ("add", [("a", (None, 3)), ("x", (None, 3), "int32")], "as its input 1"),
        ("cast", [("x", (None, 3))], "must be int32: only inputs"),
        ("reshape", [("x", (None, 3), "int32")], "must be float32"),
    ):
        tensors = {"weight": np.ones((3, 3), F)} if op == "embedding" else None
        attrs = {"shape": (3, 1)} if op == "reshape" else {}
        with pytest.raises(GraphError, match=message):
            single(op, *inputs, tensors=tensors, **attrs).validate()


def test_dtypes_that_do_not_exist() -> None:
    graph = replace(tiny_graph(), inputs=(Value("x", "int64", (None, 3)),))
    with pytest.raises(GraphError, match="'int64'; values are float32, inputs also int32"):
        graph.validate()


def golden() -> Graph:
    graph, given = pooled(), feeds()
    outputs = tuple(Session(graph).run(None, given))
    return replace(graph, golden=(tuple(given.values()), outputs))


def test_golden_data_have_the_dtype_of_the_input() -> None:
    graph = golden()
    graph.validate()
    assert graph.golden is not None
    (ids, mask), outputs = graph.golden
    with pytest.raises(GraphError, match=r"golden input 'ids' has dtype <f4; it must be int32"):
        replace(graph, golden=((ids.astype(F), mask), outputs)).validate()
    with pytest.raises(GraphError, match=r"do not fit: .*same number of tokens"):
        replace(graph, golden=((ids[:, 1:], mask), outputs)).validate()


# ---- files --------------------------------------------------------------------------------------


def test_files_of_integers_come_back(tmp_path: Path) -> None:
    graph = golden()
    path = tmp_path / "m.lutra"
    save_graph(graph, path)
    loaded = load_graph(path)
    assert loaded.inputs == graph.inputs
    assert loaded.golden is not None
    assert graph.golden is not None
    for got, want in zip(loaded.golden[0] + loaded.golden[1], graph.golden[0] + graph.golden[1],
                         strict=True):  # fmt: skip
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    given = feeds(4, 9)
    np.testing.assert_array_equal(
        Session(path).run(None, given)[0], Session(graph).run(None, given)[0]
    )


def softmax(**tables: Array) -> Graph:
    return single("softmax", ("x", (None, 4)), tensors=tables or None, axis=1)


@pytest.mark.parametrize(
    ("graph", "version"),
    [
        (tiny_graph(), 1),
        (with_golden(tiny_graph()), 1),
        (softmax(), 1),
        (single("add", ("a", (None, 4)), ("b", (None, 4))), 1),
        (single("add", ("a", (None, 4)), ("b", (None, 1))), 2),
        (softmax(**reduced_table("exp"), **reduced_table("reciprocal")), 2),
        (single("gelu", ("x", (None, 4))), 2),
        (single("cast", ("x", (None, 4), "int32")), 2),
        (every_sequence_op_graph(), 2),
        (every_selection_graph(), 3),
        (every_decoder_graph(), 3),
    ],
)
def test_files_have_the_oldest_version_that_can_hold_them(
    graph: Graph, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = graph_to_bytes(graph)
    assert file_version(graph) == version
    assert f'"version":"{version}"'.encode() in data
    again = graph_from_bytes(data)
    assert graph_to_bytes(again) == data
    monkeypatch.setattr(lutra.format, "VERSION", 1)  # a reader of version 1
    if version == 1:
        graph_from_bytes(data)
    else:
        with pytest.raises(
            FormatError, match=rf"newer lutra \(format version {version}; .*up to 1"
        ):
            graph_from_bytes(data)


# ---- the command line ---------------------------------------------------------------------------


def test_verify_and_bench(capture: Any, refuse: Any, folder: Path) -> None:
    save_graph(golden(), "golden.lutra")
    save_graph(pooled(), "bare.lutra")
    for words in (["golden.lutra"], ["bare.lutra", "--shape", "ids=3,7", "--shape", "mask=3,7"],
                  ["bare.lutra", "--shape", "1,12"]):  # fmt: skip
        code, out, _ = capture("verify", *words)
        assert code == 0, out
        assert out.rstrip().splitlines()[-1].startswith("ok")
        code, _, _ = capture("bench", *words, "--runs", "2", "--json", "-")
        assert code == 0
        code, out, _ = capture("bench", *words, "--profile", "--runs", "1")
        assert "masked_mean" in out
    refuse("verify", "bare.lutra", match="any size")
    words = ["bare.lutra", "--shape", "ids=1,4", "--shape", "mask=1,5"]
    refuse("verify", *words, match="same number of tokens")


def test_run_takes_arrays_of_integers(capture: Any, refuse: Any, folder: Path) -> None:
    save_graph(pooled(), "m.lutra")
    for dtype in (np.int32, np.int64):
        given = feeds(2, 5, dtype)
        words = [f"{name}={save(f'{name}.npy', x)}" for name, x in given.items()]
        assert capture("run", "m.lutra", "-i", words[0], "-i", words[1], "-o", "y.npy")[0] == 0
        np.testing.assert_array_equal(np.load("y.npy"), Session("m.lutra").run(None, given)[0])
    save("ids.npy", given["ids"].astype(F))
    words = ["-i", words[0], "-i", words[1], "-o", "z.npy"]
    refuse("run", "m.lutra", *words, match="ids.npy' has dtype float32; the model takes int32")


def test_inspect(capture: Any, folder: Path) -> None:
    save_graph(golden(), "m.lutra")
    code, out, _ = capture("inspect", "m.lutra")
    assert code == 0
    assert "format version 2" in out
    assert "ids int32 (N, ?), mask int32 (N, ?)" in out
    assert "embedding" in out
    report = json.loads(capture("inspect", "m.lutra", "--json")[1])
    assert [value["dtype"] for value in report["inputs"]] == ["int32", "int32"]
    assert report["format_version"] == 2

"""The C library gives the bits of a session, and refuses what is wrong."""

from __future__ import annotations

import ctypes
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import c_library
import numpy as np
import pytest
from c_library import ARGUMENT, CPU, FILE, FORMAT, INPUT, MEMORY, Library, LutraCError
from graphs import Array, Builder, every_op_graph, random_inputs, tiny_graph
from random_graphs import random_graph
from sequences import every_decoder_graph, every_selection_graph, every_sequence_op_graph

import lutra
from lutra import Session, compile_plan, load_graph, runnable_isas, save_compiled
from lutra.graph import Graph
from lutra.inputs import id_ranges, place_inputs, random_ints

pytestmark = pytest.mark.slow
ZOO = sorted((c_library.ROOT / "zoo").glob("*.lutra"))
F = np.float32


@pytest.fixture(scope="module")
def folder() -> Path:
    return c_library.build()


@pytest.fixture(scope="module")
def library(folder: Path) -> Library:
    return Library(folder / "liblutra.so")


def inputs_of(graph: Graph, batch: int, seed: int = 0, length: int = 5) -> dict[str, Array]:
    """Inputs of any graph, valid ids and masks among them; open sizes are ``length``."""
    rng = np.random.default_rng(seed)
    ranges, places = id_ranges(graph), place_inputs(graph)
    feeds = {}
    for value in graph.inputs:
        shape = tuple(length if size is None else size for size in value.shape[1:])
        shape = (batch if value.shape[0] is None else value.shape[0], *shape)
        if value.dtype == "float32":
            feeds[value.name] = rng.normal(size=shape).astype(F)
        elif value.name in places:
            feeds[value.name] = np.zeros(shape, np.int32)
        else:
            feeds[value.name] = random_ints(value, ranges, shape, rng)
    return feeds


def agree(
    library: Library, graph: Graph, *feeds: Mapping[str, Array], threads: tuple[int, ...] = (1,)
) -> None:
    """Both give the same bits, on every instruction set, one run after the other."""
    data = compile_plan(graph)
    for isa in runnable_isas():
        for count in threads:
            session = Session(graph, isa=isa, threads=count)
            model = library.open(data, isa, count)
            assert [v.name.decode() for v in model.inputs] == [v.name for v in graph.inputs]
            for values, ours in ((session.inputs, model.inputs), (session.outputs, model.outputs)):
                for value, our in zip(values, ours, strict=True):
                    assert our.sizes() == tuple(-1 if s is None else s for s in value.shape)
                    assert np.dtype(c_library.DTYPES[our.dtype]) == value.dtype
            for feed in feeds:
                for got, want in zip(model.run(feed), session.run(None, feed), strict=True):
                    assert got.shape == want.shape
                    np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("file", ZOO, ids=lambda p: p.stem)
def test_a_program_in_c_runs_every_file_of_the_zoo(
    folder: Path, file: Path, tmp_path: Path
) -> None:
    graph = load_graph(file)
    save_compiled(graph, tmp_path / "model.lutrac")
    feeds = inputs_of(graph, 3)
    words = []
    for name, array in feeds.items():
        (tmp_path / f"{name}.raw").write_bytes(array.tobytes())
        shape = "x".join(map(str, array.shape))
        open_sizes = None in graph.values[name].shape[1:]
        words.append(f"{tmp_path / name}.raw" + f":{shape}" * open_sizes)
    wanted = Session(graph).run(None, feeds)
    for index in range(len(wanted)):
        words += ["-o", str(tmp_path / f"{index}.out")]
    text = c_library.command(
        str(folder / "examples" / "c" / "run_model"), str(tmp_path / "model.lutrac"), *words
    )
    assert text.startswith(f"lutra {lutra.__version__}, {runnable_isas()[-1]}\n")
    for index, want in enumerate(wanted):
        assert (tmp_path / f"{index}.out").read_bytes() == want.tobytes()
        best = f"{graph.outputs[index]}[0]: {np.argmax(want[0])} "
        assert best in text


@pytest.mark.parametrize("file", ZOO, ids=lambda p: p.stem)
def test_every_file_of_the_zoo_on_every_instruction_set(library: Library, file: Path) -> None:
    graph = load_graph(file)
    agree(library, graph, *(inputs_of(graph, batch) for batch in (1, 5, 2)), threads=(1, 3))


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(library: Library, seed: int) -> None:
    graph, feeds = random_graph(seed)
    agree(library, graph, feeds, threads=(1, 3))


@pytest.mark.parametrize("batch", [None, 4])
def test_every_operator(library: Library, batch: int | None) -> None:
    graph = every_op_graph(batch=batch)
    agree(library, graph, random_inputs(graph, 4), random_inputs(graph, 4, seed=2))


@pytest.mark.parametrize(
    "make", [every_sequence_op_graph, every_selection_graph, every_decoder_graph]
)
def test_sequences(library: Library, make: object) -> None:
    graph = make()  # type: ignore[operator]
    agree(library, graph, *(inputs_of(graph, batch, length=5) for batch in (1, 3)))


def test_images_of_any_size(library: Library) -> None:
    b = Builder(("x", (None, 3, None, None)))
    x = b.add("relu", b.pq_conv2d("x", 3, 8, padding=(1, 1)))
    b.add("max_pool2d", b.int8_conv2d(x, 8, 4, padding=(1, 1)), kernel=(2, 2), stride=(2, 2))
    rng = np.random.default_rng(0)
    sizes = [(1, 3, 12, 12), (2, 3, 7, 31), (1, 3, 40, 2)]
    agree(library, b.graph(), *({"x": rng.normal(size=size).astype(F)} for size in sizes))


def test_metadata_and_names(library: Library) -> None:
    graph = every_op_graph()
    model = library.open(compile_plan(graph))
    assert b'"classes":["0","1"' in library.c.lutra_metadata(model.handle)
    assert library.c.lutra_isa(model.handle).decode() == runnable_isas()[-1]
    assert library.c.lutra_version().decode() == lutra.__version__


def test_the_same_graph_gives_the_same_bytes() -> None:
    assert compile_plan(every_op_graph()) == compile_plan(every_op_graph())


def refused(library: Library, data: bytes, status: int = FORMAT, **more: object) -> str:
    with pytest.raises(LutraCError) as caught:
        library.open(data, **more)  # type: ignore[arg-type]
    assert caught.value.status == status, caught.value
    return str(caught.value)


def test_every_changed_byte_is_noticed(library: Library) -> None:
    data = compile_plan(tiny_graph())
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 + place % 255
        refused(library, bytes(changed))
    for size in range(len(data)):
        refused(library, data[:size])
    refused(library, data + b"\0")


def test_what_is_no_compiled_model(library: Library, tmp_path: Path) -> None:
    assert "lutra compile" in refused(library, ZOO[0].read_bytes())
    data = compile_plan(tiny_graph())
    assert "version 2" in refused(library, data[:8] + b"\2" + data[9:])
    model = ctypes.c_void_p()
    for path in (tmp_path / "absent", tmp_path):
        status = library.c.lutra_open(str(path).encode(), None, ctypes.byref(model))
        assert status == FILE
        assert str(path) in library.error()
    assert not model


def test_options_that_cannot_be_had(library: Library) -> None:
    data = compile_plan(tiny_graph())
    assert "scalar" in refused(library, data, CPU, isa="mmx")
    assert "1024" in refused(library, data, ARGUMENT, threads=-1)


def test_arguments_that_are_wrong(library: Library) -> None:
    c, model = library.c, library.open(compile_plan(tiny_graph()))
    x = np.ones((2, 3), F)
    with pytest.raises(LutraCError, match="has not been set"):
        library.check(c.lutra_run(model.session))
    with pytest.raises(LutraCError, match="call lutra_run"):
        model.output(0)
    for shape in ((2, 4), (0, 3), (-1, 3)):
        with pytest.raises(LutraCError, match=r"takes \(any, 3\)") as caught:
            library.check(
                c.lutra_set_input(model.session, 0, x.ctypes.data_as(ctypes.c_void_p),
                                  (ctypes.c_int64 * 2)(*shape))
            )  # fmt: skip
        assert caught.value.status == ARGUMENT
    with pytest.raises(LutraCError, match="no input 1"):
        model.set_input(1, x)
    with pytest.raises(LutraCError, match="aligned"):
        library.check(c.lutra_set_input(model.session, 0, ctypes.c_void_p(x.ctypes.data + 1), None))
    with pytest.raises(LutraCError, match="data is NULL"):
        library.check(c.lutra_set_input(model.session, 0, None, None))
    with pytest.raises(LutraCError, match="no value 7"):
        library.check(c.lutra_output(model.handle, ctypes.c_size_t(7), ctypes.c_void_p(8)))
    assert c.lutra_open_memory(None, ctypes.c_size_t(0), None, None) == ARGUMENT
    c.lutra_close(None)
    c.lutra_session_free(None)


def test_content_that_is_wrong(library: Library) -> None:
    model = library.open(compile_plan(tiny_graph()))
    bad = np.ones((2, 3), F)
    for value in (np.nan, np.inf, -np.inf):
        bad[1, 2] = value
        with pytest.raises(LutraCError, match="NaN or infinite") as caught:
            model.run([bad])
        assert caught.value.status == INPUT
    (allowed,) = library.open(compile_plan(tiny_graph()), allow_nonfinite=1).run([bad])
    np.testing.assert_array_equal(allowed, Session(tiny_graph(), check_finite=False)(bad))
    b = Builder(("ids", (None, 4), "int32"))
    b.add("embedding", "ids", tensors={"weight": np.ones((9, 2), F)})
    model = library.open(compile_plan(b.graph()))
    with pytest.raises(LutraCError, match="the id 9 is outside") as caught:
        model.run([np.array([[0, 8, 9, 1]], np.int32)])
    assert caught.value.status == INPUT


def test_batches_that_differ(library: Library) -> None:
    b = Builder(("x", (None, 3)))
    two = replace(b.graph("x"), inputs=(*b.inputs, lutra.Value("y", "float32", (None, 3))))
    b.add("add", "x", "y")
    two = replace(two, nodes=tuple(b.nodes), outputs=(b.nodes[-1].output,))
    model = library.open(compile_plan(two))
    with pytest.raises(LutraCError, match="batch of 2 and an input before it one of 1"):
        model.run([np.ones((1, 3), F), np.ones((2, 3), F)])


def test_memory_is_limited(library: Library) -> None:
    graph = every_op_graph()
    one = Session(graph).arena_bytes(1)
    model = library.open(compile_plan(graph), max_memory=2 * one)
    model.run(random_inputs(graph, 1))
    with pytest.raises(LutraCError, match="bytes of working memory") as caught:
        model.run(random_inputs(graph, 100))
    assert caught.value.status == MEMORY
    model.run(random_inputs(graph, 1))


def test_threads_share_a_model(library: Library) -> None:
    graph = every_op_graph()
    model = library.open(compile_plan(graph), threads=2)
    want = Session(graph).run(None, random_inputs(graph))
    wrong: list[str] = []

    def work() -> None:
        own = c_library.Model(library, model.handle)
        for _ in range(20):
            got = own.run(random_inputs(graph))
            if any((a != b).any() for a, b in zip(got, want, strict=True)):
                wrong.append("outputs differ")
        if library.error():
            wrong.append(f"an error of another thread: {library.error()}")
        library.c.lutra_session_free(own.session)
        own.session = own.handle = ctypes.c_void_p()

    with pytest.raises(LutraCError):
        model.set_input(9, np.ones(1, F))  # an error of this thread
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert "no input 9" in library.error()


def test_a_session_outlives_its_model(library: Library) -> None:
    model = library.open(compile_plan(tiny_graph()))
    library.c.lutra_close(model.handle)
    model.handle = ctypes.c_void_p()
    x = np.ones((1, 3), F)
    np.testing.assert_array_equal(model.run([x])[0], Session(tiny_graph())(x))


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm: apt-get install binutils")
def test_only_its_functions_are_visible(folder: Path) -> None:
    listed = c_library.command("nm", "-D", "--defined-only", str(folder / "liblutra.so"))
    names = {line.split()[-1] for line in listed.splitlines()}
    header = (c_library.ROOT / "include" / "lutra.h").read_text()
    declared = set(re.findall(r"LUTRA_API [^;(]*?(lutra_\w+)\(", header))
    assert names == declared
    assert len(declared) == 16


def test_an_installed_library_is_found(folder: Path, tmp_path: Path) -> None:
    cmake = c_library.tool("cmake")
    c_library.command(cmake, "--install", str(folder), "--prefix", str(tmp_path / "place"))
    c_library.command(
        cmake, "-S", str(c_library.ROOT / "examples" / "c"), "-B", str(tmp_path / "build"),
        f"-DCMAKE_PREFIX_PATH={tmp_path / 'place'}", "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={c_library.tool('ninja')}",
    )  # fmt: skip
    c_library.command(cmake, "--build", str(tmp_path / "build"))
    save_compiled(tiny_graph(), tmp_path / "model.lutrac")
    (tmp_path / "x").write_bytes(np.ones((1, 3), F).tobytes())
    text = c_library.command(
        str(tmp_path / "build" / "run_model"), str(tmp_path / "model.lutrac"), str(tmp_path / "x")
    )
    assert "[0]:" in text

"""The file: what goes in comes out, and a damaged file is always found out."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Builder, every_op_graph, tied_graph, tiny_graph, with_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from lutra import format as lutra_format
from lutra.errors import FormatError, GraphError
from lutra.format import graph_from_bytes, graph_to_bytes, load_graph, save_graph
from lutra.graph import Graph
from lutra.runtime.compiled import save_compiled
from lutra.runtime.session import Session

SMALL = graph_to_bytes(with_golden(tiny_graph(), batch=1))


def assert_same(a: Graph, b: Graph) -> None:
    assert (a.inputs, a.outputs, a.nodes) == (b.inputs, b.outputs, b.nodes)
    assert a.metadata == b.metadata
    assert set(a.tensors) == set(b.tensors)
    for name, array in a.tensors.items():
        assert array.dtype == b.tensors[name].dtype
        np.testing.assert_array_equal(array, b.tensors[name])
    assert (a.golden is None) == (b.golden is None)
    if a.golden is not None and b.golden is not None:
        for ours, theirs in zip(a.golden, b.golden, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(one, other)


def refused(data: bytes, message: str | None = None) -> None:
    with pytest.raises(FormatError, match=message):
        graph_from_bytes(data)


def header_of(data: bytes) -> tuple[int, dict[str, Any]]:
    (length,) = struct.unpack_from("<Q", data)
    return length, json.loads(data[8 : 8 + length])


def forge(
    change: Callable[[Any], Any] | None = None,
    metadata: str | None = None,
    arrays: dict[str, Any] | None = None,
    **texts: str,
) -> bytes:
    """A file with a right checksum and a graph that somebody changed."""
    graph = tiny_graph()
    description = json.loads(lutra_format._graph_text(graph))
    if change is not None:
        description = change(description) or description
    tensors = dict(graph.tensors) if arrays is None else arrays
    made = {
        "format": "lutra",
        "version": "1",
        "graph": json.dumps(description),
        "metadata": "{}" if metadata is None else metadata,
        **texts,
    }
    made.setdefault("sha256", lutra_format._digest(made, tensors))
    return lutra_format._ordered(save(tensors, made))


# Round trips


@pytest.mark.parametrize("make", [every_op_graph, tiny_graph, tied_graph])
def test_round_trip(make: Callable[[], Graph], tmp_path: Path):
    graph = with_golden(replace(make(), metadata={"a": [1, 2.5, None, "é\n\u2028"], "b": {}}))
    path = tmp_path / "model.lutra"
    save_graph(graph, path)
    loaded = load_graph(path)
    assert_same(graph, loaded)
    assert_same(graph, load_graph(str(path)))
    for source in (path.read_bytes(), bytearray(path.read_bytes()), memoryview(path.read_bytes())):
        assert_same(graph, load_graph(source))
    assert loaded.golden is not None
    feeds = dict(zip((value.name for value in loaded.inputs), loaded.golden[0], strict=True))
    for got, want in zip(Session(loaded).run(None, feeds), loaded.golden[1], strict=True):
        np.testing.assert_array_equal(got, want)


def test_tensors_are_read_only_and_need_not_be_contiguous():
    graph = tied_graph()
    name = next(name for name in graph.tensors if name.endswith("weight"))
    strided = np.asfortranarray(graph.tensors[name])
    loaded = graph_from_bytes(
        graph_to_bytes(replace(graph, tensors={**graph.tensors, name: strided}))
    )
    np.testing.assert_array_equal(loaded.tensors[name], graph.tensors[name])
    with pytest.raises(ValueError, match="read-only"):
        loaded.tensors[name][0, 0] = 1


def test_tied_tensors_are_written_once():
    loaded = graph_from_bytes(graph_to_bytes(tied_graph()))
    assert len(loaded.tensors) == 2
    assert len(loaded.nodes) == 3


def test_the_same_graph_gives_the_same_bytes():
    assert {graph_to_bytes(with_golden(every_op_graph())) for _ in range(4)} == {
        graph_to_bytes(with_golden(every_op_graph()))
    }


def test_any_safetensors_tool_can_open_it(tmp_path: Path):
    path = tmp_path / "model.lutra"
    graph = with_golden(every_op_graph())
    save_graph(graph, path)
    with safe_open(str(path), framework="np") as file:
        assert file.metadata()["format"] == "lutra"
        assert file.metadata()["version"] == "1"
        names = set(file.keys())
        assert (
            set(graph.tensors) | {"golden.input.0", "golden.output.0", "golden.output.1"} == names
        )
        for name, array in graph.tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_missing_attributes_with_a_default_are_filled_in():
    b = Builder(("x", (None, 2)))
    b.add("flatten", "x")
    graph = b.graph()
    text = json.loads(lutra_format._graph_text(graph))
    del text["nodes"][0]["attrs"]["start_axis"]
    loaded = graph_from_bytes(forge(lambda _: text, arrays={}))
    assert loaded.nodes == graph.nodes


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(exclude_categories=["Cs"])),
            lambda inner: st.lists(inner) | st.dictionaries(st.text("abc"), inner),
        ),
    )
)
def test_any_json_metadata_comes_back(metadata: dict[str, Any]):
    graph = replace(tiny_graph(), metadata=metadata)
    assert graph_from_bytes(graph_to_bytes(graph)).metadata == metadata


# Damage


def test_every_flipped_bit_is_found():
    for position in range(len(SMALL)):
        for bit in range(8):
            damaged = bytearray(SMALL)
            damaged[position] ^= 1 << bit
            refused(bytes(damaged))


@settings(deadline=None, max_examples=2000)
@given(st.integers(0, len(SMALL) - 1), st.integers(0, 255))
def test_every_changed_byte_is_found(position: int, value: int):
    damaged = bytearray(SMALL)
    damaged[position] = value
    if bytes(damaged) != SMALL:
        refused(bytes(damaged))


def test_white_space_anywhere_is_found():
    for position in range(len(SMALL)):
        for value in b" \t\n\r":
            damaged = bytearray(SMALL)
            damaged[position] = value
            if bytes(damaged) != SMALL:
                refused(bytes(damaged))


def test_every_truncation_is_found():
    for length in range(len(SMALL)):
        refused(SMALL[:length])


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=64))
def test_appended_bytes_are_found(extra: bytes):
    refused(SMALL + extra)
    refused(extra + SMALL)


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_not_a_lutra_file(data: bytes):
    refused(data, "not a lutra file")


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**64 - 1) | st.integers(0, 2 * len(SMALL)))
def test_any_header_length(length: int):
    data = struct.pack("<Q", length) + SMALL[8:]
    if data != SMALL:
        refused(data)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8, 10**8 + 1, 2**40])
def test_a_huge_header_length(length: int):
    refused(struct.pack("<Q", length) + SMALL[8:], "its header should have")


def test_a_deep_header():
    deep = b"[" * 200_000
    refused(struct.pack("<Q", len(deep)) + deep, "not JSON")


def test_a_newer_file_says_so():
    refused(
        forge(version="7"),
        r"written by a newer lutra \(format version 7; this lutra reads up to 3\); "
        r"upgrade with pip install -U lutra",
    )
    # even when nothing else of it is understood
    refused(save({"a": np.zeros(1, np.float64)}, {"format": "lutra", "version": "12"}), "newer")


@pytest.mark.parametrize("version", ["0", "-1", "x", "", "1.0", " 1", "\u0661", "9" * 5000])
def test_versions_that_are_none(version: str):
    refused(forge(version=version), "version is not a number")


def test_other_safetensors_files():
    refused(save({"a": np.zeros(3, np.float32)}), "not a lutra file")
    refused(save({"a": np.zeros(3, np.float32)}, {"format": "pt"}), "not a lutra file")
    refused(save({}, {"format": "lutra", "version": "1"}), "must be exactly")
    refused(save({}, {"format": "lutra"}), "version is not a number")


# Lies: the checksum is right, the content is not


def node(key: str, value: Any) -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        graph["nodes"][0][key] = value

    return change


def attr(name: str, value: Any) -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        graph["nodes"][0]["attrs"][name] = value

    return change


def top(key: str, value: Any) -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        graph[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: [1], "the graph: expected a JSON object, found list"),
        (lambda _: "x", "found str"),
        (lambda g: g.pop("nodes") and None, "fields inputs, outputs, nodes"),
        (top("more", 1), "fields"),
        (top("nodes", {}), "expected a JSON array"),
        (top("nodes", [None]), "a node: expected a JSON object"),
        (top("nodes", []), "no node uses"),
        (top("outputs", "x"), "outputs: expected a JSON array"),
        (top("outputs", [1]), "outputs: expected a string"),
        (top("inputs", [{"name": "x", "dtype": "float32"}]), "fields name, dtype, shape"),
        (top("inputs", [{"name": 1, "dtype": "float32", "shape": [1]}]), "string"),
        (top("inputs", [{"name": "x", "dtype": None, "shape": [1]}]), "string"),
        (top("inputs", [{"name": "x", "dtype": "float32", "shape": 3}]), "array"),
        (top("inputs", [{"name": "x", "dtype": "float32", "shape": ["3"]}]), "ints and null"),
        (top("inputs", [{"name": "x", "dtype": "float32", "shape": [True]}]), "ints and null"),
        (top("inputs", [{"name": "x", "dtype": "float32", "shape": [-1, 3]}]), "at least 1"),
        (top("inputs", [{"name": "x", "dtype": "float32", "shape": [1e300, 3]}]), "ints"),
        (top("inputs", [{"name": "x", "dtype": "float32", "shape": [10**4000, 3]}]), "elements"),
        (node("op", "pq_magic"), "unknown operator 'pq_magic'"),
        (node("op", ["pq_linear"]), "string"),
        (node("op", "relu"), "unknown attribute"),
        (node("name", None), "string"),
        (node("name", "\ud800"), "printable"),
        (node("inputs", "x"), "array"),
        (node("inputs", [["x"]]), "string"),
        (node("inputs", []), "0 inputs"),
        (node("output", 3), "string"),
        (node("attrs", []), "object"),
        (node("attrs", {}), "lacks the attribute"),
        (node("tensors", []), "object"),
        (node("tensors", {}), "lacks the tensor|no node uses"),
        (node("tensors", {"centroids": 3}), "string"),
        (node("tensors", {"centroids": "nowhere"}), "does not have"),
        (attr("act_zero", None), "NoneType"),
        (attr("act_zero", {}), "dict"),
        (attr("act_zero", "0"), "type int"),
        (attr("act_zero", [0]), "type int"),
        (attr("act_zero", [[0]]), "other than ints"),
        (attr("act_zero", [0.0]), "other than ints"),
        (attr("act_zero", 10**4000), "at most 127"),
        (attr("act_scale", 10**4000), "type float"),
        (attr("act_scale", 1e300), "act_scale"),
        (attr("in_features", 2**31), "at most"),
        (attr("in_features", 300), "codebooks"),
    ],
)
def test_lies_about_the_graph(change: Any, message: str):
    refused(forge(change), message)


def test_numbers_that_json_should_not_hold():
    graph = lutra_format._graph_text(tiny_graph())
    for number in ("NaN", "Infinity", "1e999", "-1e999", "9" * 5000):
        refused(forge(graph=graph.replace('"act_scale":0.05', f'"act_scale":{number}')))
        refused(forge(metadata=f'{{"a":{number}}}'))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '{"a":1,"a":2}', "[" * 100_000, '{"a":"\\ud800"}']
)
def test_lies_about_the_metadata(text: str):
    refused(forge(metadata=text))


def test_lies_about_the_tensors():
    arrays = dict(tiny_graph().tensors)
    f4 = np.zeros((1, 2), np.float32)
    for extra, message in [
        ({"more": f4}, "no node uses"),
        ({"more": f4.astype(np.float64)}, "dtype F64"),
        ({"more": np.zeros((0, 3), np.float32)}, "empty"),
        ({"more": np.zeros((), np.float32)}, "no axis"),
        ({"more": np.zeros((1,) * 9, np.float32)}, "over 8"),
        ({"golden.extra": f4}, "neither golden.input"),
        ({"golden.input.01": f4}, "neither golden.input"),
        ({"golden.input.0": f4}, "golden"),
        ({"golden.output.1": f4}, r"numbered \[1\]"),
        ({"golden.input.0": f4, "golden.output.0": f4}, "golden input 'x'"),
    ]:
        refused(forge(arrays={**arrays, **extra}), message)
    name = next(name for name in arrays if name.endswith("bias"))
    refused(forge(arrays={**arrays, name: np.full(2, np.nan, np.float32)}), "NaN")
    refused(forge(arrays={**arrays, name: np.zeros(2, np.int8)}), "dtype int8")
    arrays.pop(name)
    refused(forge(arrays=arrays), "does not have")


def test_empty_tensors_with_absurd_axes():
    text = json.dumps(
        {
            "__metadata__": header_of(SMALL)[1]["__metadata__"],
            "a": {"dtype": "F32", "shape": [0, 2**63, 2**63], "data_offsets": [0, 0]},
        },
        separators=(",", ":"),
    ).encode()
    refused(struct.pack("<Q", len(text)) + text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "op", "inputs", "shape"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=500)
@given(st.data())
def test_any_json_anywhere_in_the_graph(data: st.DataObject):
    def change(graph: Any) -> Any:
        """Puts something else into a random place of the tree."""
        place, steps = graph, data.draw(st.integers(0, 5))
        for _ in range(steps):
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if not isinstance(place[key], (dict, list)):
                place[key] = data.draw(JSON)
                return graph
            parent, place = place, place[key]
            if data.draw(st.integers(0, 3)) == 0:
                parent[key] = data.draw(JSON)
                return graph
        return graph

    with contextlib.suppress(FormatError):
        graph_from_bytes(forge(change)).validate()


# Files


def test_bad_graphs_are_not_written(tmp_path: Path):
    graph = tiny_graph()
    name = next(name for name in graph.tensors if name.endswith("bias"))
    for value in (np.nan, np.inf):
        bad = replace(graph, tensors={**graph.tensors, name: np.full(2, value, np.float32)})
        with pytest.raises(GraphError, match="NaN or infinite"):
            save_graph(bad, tmp_path / "model.lutra")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["missing/model.lutra", "folder", "file/model.lutra", "a\0b"])
def test_unwritable_places(tmp_path: Path, name: str):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match="cannot write"):
        save_graph(tiny_graph(), tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize("name", ["missing.lutra", "folder", "a\0b"])
def test_unreadable_places(tmp_path: Path, name: str):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FormatError, match="cannot read"):
        load_graph(tmp_path / name)


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs /dev/null")
@pytest.mark.parametrize("write", [save_graph, save_compiled])
def test_devices_are_never_replaced(write: Any):
    with pytest.raises(FormatError, match="not a regular file"):
        write(tiny_graph(), "/dev/null")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, step: str, monkeypatch: Any):
    path = tmp_path / "model.lutra"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(FormatError, match=r"model\.lutra'?.*No space left"):
        save_graph(tiny_graph(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_replaced_and_a_link_is_kept(tmp_path: Path):
    path, link = tmp_path / "model.lutra", tmp_path / "link.lutra"
    path.write_bytes(b"old")
    link.symlink_to(path)
    save_graph(tiny_graph(), link)
    assert link.is_symlink()
    assert_same(load_graph(path), tiny_graph())
    assert len(list(tmp_path.iterdir())) == 2


def test_the_file_has_ordinary_permissions(tmp_path: Path):
    path, other = tmp_path / "model.lutra", tmp_path / "other"
    save_graph(tiny_graph(), path)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode

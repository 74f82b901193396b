"""WebAssembly gives the bits of a session, and refuses what is wrong without a trap."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import fuzz_corpus
import numpy as np
import pytest
import wasm
from c_library import ROOT
from graphs import Array, every_op_graph, random_inputs, tiny_graph
from random_graphs import random_graph
from sequences import (
    every_decoder_graph,
    every_pointwise_op_graph,
    every_selection_graph,
    every_sequence_op_graph,
)
from test_c_api import inputs_of
from wasm import Node, Refused

import lutra
from lutra import Session, compile_plan, load_graph
from lutra.graph import Graph

pytestmark = pytest.mark.slow
ZOO = sorted((ROOT / "zoo").glob("*.lutra"))


@pytest.fixture(scope="module", params=list(wasm.MODULES))
def node(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Node]:
    wasm.build("wasm")
    program = Node(tmp_path_factory.mktemp("wasm"), request.param)
    yield program
    program.close()


def agree(node: Node, graph: Graph, feeds: Mapping[str, Array]) -> None:
    """Both give the same bits, also in a second run."""
    wanted = Session(graph, isa="scalar").run(None, feeds)
    for got, want in zip(node.run(compile_plan(graph), feeds, times=2), wanted, strict=True):
        assert got.shape == want.shape
        same = (got.view(np.int32) == want.view(np.int32)) | (np.isnan(got) & np.isnan(want))
        assert same.all(), f"{(~same).sum()} of {same.size} differ"


@pytest.mark.parametrize("file", ZOO, ids=lambda p: p.stem)
def test_golden_data(node: Node, file: Path) -> None:
    graph = load_graph(file)
    assert graph.golden is not None
    feeds = {value.name: x for value, x in zip(graph.inputs, graph.golden[0], strict=True)}
    agree(node, graph, feeds)


@pytest.mark.parametrize("file", ZOO, ids=lambda p: p.stem)
def test_batches(node: Node, file: Path) -> None:
    graph = load_graph(file)
    agree(node, graph, inputs_of(graph, 3))


@pytest.mark.parametrize("seed", range(25))
def test_random_graphs(node: Node, seed: int) -> None:
    agree(node, *random_graph(seed))


def test_every_operator(node: Node) -> None:
    graph = every_op_graph()
    agree(node, graph, random_inputs(graph, 4))
    for make in (
        every_sequence_op_graph, every_selection_graph, every_decoder_graph,
        every_pointwise_op_graph,
    ):  # fmt: skip
        graph = make()
        agree(node, graph, inputs_of(graph, 3))


def test_what_a_session_says(node: Node, tmp_path: Path) -> None:
    graph = every_op_graph()
    (tmp_path / "model.lutrac").write_bytes(compile_plan(graph))
    said = node.ask(model=str(tmp_path / "model.lutrac"))
    assert said["isa"] == node.isa
    for kind in ("inputs", "outputs"):
        names = graph.outputs if kind == "outputs" else [value.name for value in graph.inputs]
        assert [value["name"] for value in said[kind]] == list(names)
    for value, want in zip(said["inputs"], graph.inputs, strict=True):
        assert (value["dtype"], tuple(value["shape"])) == (want.dtype, want.shape)
    assert said["metadata"]["classes"][:2] == ["0", "1"]


def refusal(node: Node, data: bytes, feeds: Mapping[str, Array]) -> Refused:
    with pytest.raises(Refused) as caught:
        node.run(data, feeds)
    return caught.value


def test_wrong_inputs(node: Node) -> None:
    graph = tiny_graph()
    data, (value,) = compile_plan(graph), graph.inputs
    right = random_inputs(graph, 2)[value.name]
    assert refusal(node, data, {}).code == "argument"
    assert f"'{value.name}' is missing" in str(refusal(node, data, {}))
    other = refusal(node, data, {value.name: right, "other": right})
    assert str(other) == f"there is no input 'other'; the model has '{value.name}'"
    short = refusal(node, data, {value.name: right[:, :-1]})
    assert short.code == "argument"
    assert "and the model takes" in str(short)
    ids = refusal(node, data, {value.name: right.astype(np.int32)})
    assert "is a Int32Array, and the model takes a Float32Array" in str(ids)
    nan = refusal(node, data, {value.name: np.full_like(right, np.nan)})
    assert (nan.code, str(nan)) == ("input", f"input '{value.name}' holds NaN or infinite values")
    node.run(data, {value.name: right})


def test_wrong_files(node: Node, tmp_path: Path) -> None:
    assert refusal(node, b"", {}).code == "format"
    assert "lutra compile" in str(refusal(node, b"no model at all, but of some length", {}))
    data = bytearray(compile_plan(tiny_graph()))
    data[-1] ^= 1
    assert "its checksum does not match its content" in str(refusal(node, bytes(data), {}))
    with pytest.raises(Refused, match="cannot") as caught:
        node.ask(model=str(tmp_path / "nothing"))
    assert caught.value.code == "file"


def trouble(node: Node, file: Path) -> Refused | None:
    """Why a model is refused, at load or when it runs."""
    try:
        node.ask(model=str(file), feeds="any")
    except Refused as error:
        return error
    return None


def test_files_of_strangers_do_not_trap(node: Node, tmp_path: Path) -> None:
    count = fuzz_corpus.write(tmp_path, fuzz_corpus.wrong(300))
    refused = 0
    for file in sorted(tmp_path.iterdir()):
        error = trouble(node, file)
        assert error is None or error.code != "internal", f"{file.name}: {error}"
        refused += error is not None
    assert count // 10 < refused < count


def test_damaged_bytes_do_not_trap(node: Node, tmp_path: Path) -> None:
    """Bytes change, and the checksum with them, so that the parser and the builders see them."""
    rng = random.Random(0)
    seeds = [compile_plan(every_op_graph()), compile_plan(tiny_graph())]
    file, refused = tmp_path / "model.lutrac", 0
    for _ in range(300):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(16, len(data))] = rng.choice(
                (0, 1, 127, 128, 255, rng.randrange(256))
            )
        data[12:16] = struct.pack("<I", zlib.crc32(data[16:]))
        file.write_bytes(data)
        error = trouble(node, file)
        assert error is None or error.code != "internal", str(error)
        refused += error is not None
    assert refused > 10


def test_size() -> None:
    wasm.build("wasm")
    for name in wasm.MODULES.values():
        assert (ROOT / "js" / name).stat().st_size < wasm.LARGEST


@pytest.mark.parametrize("told", [False, True], ids=["plain", "relaxed"])
def test_which_module_is_loaded(tmp_path: Path, told: bool) -> None:
    """The fastest that the engine can run; Node 20 has relaxed SIMD only when it is told so."""
    wasm.build("wasm")
    flags, model = wasm.flags(), tmp_path / "model.lutrac"
    model.write_bytes(compile_plan(tiny_graph()))
    program = tmp_path / "isa.mjs"
    program.write_text(
        f"import * as lutra from {json.dumps((ROOT / 'js' / 'lutra.js').as_uri())};\n"
        f"console.log((await lutra.load({json.dumps(str(model))})).isa);\n"
    )
    words = ["node", *(flags if told else []), str(program)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("wasm_dot" if told or not flags else "wasm")


def test_package(tmp_path: Path) -> None:
    wasm.build("wasm")
    words = ["npm", "pack", "--json", "--pack-destination", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT / "js", capture_output=True, text=True, check=True)
    (packed,) = json.loads(done.stdout)
    names = {entry["path"] for entry in packed["files"]}
    assert names == {"README.md", "lutra.d.ts", "lutra.js", *wasm.MODULES.values(), "package.json"}
    assert packed["version"] == lutra.__version__


def test_kernels() -> None:
    wasm.build("kernels-wasm")

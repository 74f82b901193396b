"""The benchmark commands: every network is built, one tiny case goes the whole way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweeps import sweep

import lutra

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import command, layers, models, sentences
from benchmarks.graphs import lutra_graph
from benchmarks.llama_peer import FORMATS, open_product
from benchmarks.lookups import FAMILIES, GROUPED, Method, Multiplied, Pq, Range, Response, encoders
from benchmarks.machine import interleaved, spread
from benchmarks.measure import Case, Setting, measure
from benchmarks.networks import (
    Network,
    convolutions,
    dscnn,
    keyword_resnet,
    linears,
    pointnet,
    resnet20,
    vdsr,
)
from benchmarks.networks_text import Encoder, Sentences, TabledPq, encoder_graph
from benchmarks.peers import CAPS, NOT_CAPPED, PEERS
from benchmarks.table import markdown
from lutra.format import load_graph
from lutra.graph import Graph
from lutra.ops.lookup import unpack_weights

CASES = {case.network.name: case for case in (*layers.CASES, *models.CASES)}
#: One way of looking up for every kind of kernel.
METHODS = (*encoders(), GROUPED[0], GROUPED[-1], Response(16, 15), Response(4, 3))
#: Multiply-adds of the published networks.
MACS = {
    "ResNet-20 32x32": 40_551_040,
    "ResNet-18 32x32": 555_422_720,
    "ResNet-18 224x224": 1_814_073_344,
    "VGG-11 32x32": 152_769_536,
    "VDSR 128x128": 664_704 * 128 * 128,
    "PointNet 512 points": 512 * (192 + 2 * 64 * 64 + 64 * 128 + 128 * 512) + 165_120,
    "3 x conv 3x3 64@56": 3 * 64 * 64 * 9 * 56 * 56,
    "2 x linear 1x4096x4096": 2 * 4096 * 4096,
    "DS-CNN keywords": 125 * (64 * 40 + 4 * (64 * 9 + 64 * 64)) + 64 * 12,
}
#: A sentence encoder of all the parts of MiniLM.
TINY = Sentences(8, Encoder("tiny", 2, 32, 2, 64, vocabulary=50, positions=16))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_graphs_are_valid(name: str) -> None:
    case = CASES[name]
    for method in case.methods:
        graph = lutra_graph(case.network, method)
        graph.validate()
        assert (graph.total_cost().lookups > 0) != isinstance(method, Multiplied)
        assert graph.total_cost().dense_macs == MACS.get(name, graph.total_cost().dense_macs)


@pytest.mark.slow
@pytest.mark.parametrize("case", sentences.CASES, ids=lambda case: f"{case.network.tokens}")
def test_encoders_are_valid(case: Case) -> None:
    tokens, blocks = case.batch * case.network.tokens, 6
    linear = 4 * 384 * 384 + 2 * 384 * 1536
    attention = 2 * case.network.tokens * 384
    graph = case.graph(case.methods[0])
    graph.validate()
    assert case.macs(graph) == tokens * blocks * (linear + attention)


def test_sizes_of_encoders() -> None:
    sizes = [(case.network.tokens, case.batch) for case in sentences.CASES]
    assert sizes == [(32, 1), (32, 16), (128, 1), (128, 16)]
    assert {(m.encoder, m.v) for m in sentences.CASES[0].methods} > {
        ("nearest", v) for v in (4, 16, 32)
    }
    graph = Case(TINY, 1, ()).graph(TabledPq(v=8))
    ops = [node.op for node in graph.nodes]
    assert ops.count("piecewise") == ops.count("attention") == 2
    assert ops.count("pq_linear") == 12
    assert "gelu" not in ops
    assert "exp_slope" in graph.nodes[ops.index("attention")].tensors
    with pytest.raises(ValueError, match="product quantisation, not table 16x15"):
        Case(TINY, 1, ()).graph(Response())


def test_every_case_has_every_family() -> None:
    for case in (*layers.CASES, *models.CASES):
        assert {method.family for method in case.methods} == {f.family for f in FAMILIES}
        assert len({str(method) for method in case.methods}) == len(case.methods)
        assert {Response(16, 15), Response(4, 3)} <= set(case.methods)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_dense_layers_in_int8(method: Method) -> None:
    graph = lutra_graph(resnet20(), method, "int8")
    graph.validate()
    ops = [node.op for node in graph.nodes]
    assert (ops.count("int8_conv2d"), ops.count("int8_linear")) == (1, 1)
    assert not {"conv2d", "linear"} & set(ops)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(
    "network",
    [resnet20(), vdsr(12), pointnet(64), dscnn(), keyword_resnet()],
    ids=lambda network: str(network.name),
)
def test_activations_keep_their_size(network: Network, method: Method) -> None:
    graph = lutra_graph(network, method)
    x = np.random.default_rng(0).standard_normal((2, *network.shape), np.float32)
    last = [node for node in graph.nodes if node.op.startswith(("pq_", "lookup_"))][-1]
    inner = Graph(graph.inputs, (last.output, *graph.outputs), graph.nodes, graph.tensors)
    for y in lutra.Session(inner).run(None, {"x": x}):
        assert 0.05 < y.std() < 5
        assert (y[0] != y[1]).any()


@pytest.mark.parametrize("weights", [3, 7, 15, 33])
@sweep("signed", [False, True])
@sweep("levels", [4, 8, 16, 32, 64])
def test_tables_are_those_of_training(levels: int, weights: int, signed: bool) -> None:
    pytest.importorskip("torch", reason="needs PyTorch")
    from lutra.train import Lookup
    from lutra.train.layers.lookup_table import Response as Trained
    from lutra.train.layers.lookup_table import default_entries, quantize_table

    method, made = Lookup(levels, weights, table="linear"), Response(levels, weights)
    zero = Range(1.0, signed).grid(method.act_bits)["act_zero"]
    assert made.entries(zero) == default_entries(method, zero)
    table = quantize_table(Trained(method)(zero).table, made.entries(zero))
    assert made.table(zero).dtype == np.int8
    assert np.abs(made.table(zero).astype(int) - table.numpy()).max() <= 1  # ties may round apart


def test_tables_are_not_better_than_trained_ones() -> None:
    """Columns with small ranges are faster on AVX2."""
    file = Path(__file__).parents[1] / "zoo" / "resnet20_cifar10_nearest.lutra"
    trained = load_graph(file)
    drawn = lutra_graph(resnet20(), Pq())

    def ranges(graph: Graph) -> dict[tuple[int, ...], Any]:
        tables = [graph.node_tensors(n)["tables"] for n in graph.nodes if n.op == "pq_conv2d"]
        return {t.shape: np.ptp(t.astype(int), axis=1) for t in tables}

    known, made = ranges(trained), ranges(drawn)
    assert set(known) & set(made)
    for shape in set(known) & set(made):
        for percent in (50, 95):
            assert np.percentile(made[shape], percent) >= np.percentile(known[shape], percent)


def test_default_entries() -> None:
    assert [Response(*size).entries(0) for size in ((16, 15), (8, 7), (4, 3))] == [105, 63, 15]


def test_weights_are_like_trained_ones() -> None:
    graph = lutra_graph(linears(1, 1024, 256), Response())
    packed = graph.tensors[graph.nodes[0].tensors["weight"]]
    index = unpack_weights(packed, 4, 1024)
    counts = np.bincount(index.ravel(), minlength=15) / index.size
    assert counts.argmax() == 7
    assert abs(counts - counts[::-1]).max() < 0.01
    assert (counts > 0).all()


@pytest.mark.parametrize("name", [name for name in CASES if "224" not in name])
def test_pytorch_has_the_same_shapes(name: str) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from benchmarks.dense import Dense

    network = CASES[name].network
    graph = lutra_graph(network, Pq(v=64))
    with torch.inference_mode():
        y = Dense(network).eval()(torch.randn(2, *network.shape))
    assert y.isfinite().all()
    assert y.shape[1:] == graph.values[graph.outputs[0]].shape[1:]


def run_peers_of_encoders(folder: str) -> list[Any]:
    """Outputs of the peers of the tiny encoder, and of lutra's reference, by name."""
    from benchmarks.peers import open_model, peer_files, random_input, write_models

    feeds = random_input(TINY, 3, 0)
    feeds["mask"][1, 5:] = feeds["mask"][2, 1:] = 0
    failed = write_models(TINY, 3, Path(folder))
    assert not failed, failed
    outputs = {}
    for name, file in peer_files(TINY).items():
        if name != "openvino bf16":  # not every CPU has it
            opened = open_model(name, Path(folder) / file, 1, "scalar")
            outputs[name] = np.array(opened.run(feeds)).tolist()
    graph = encoder_graph(TINY.encoder)
    ints = {name: array.astype(np.int32) for name, array in feeds.items()}
    known = lutra.run_reference(graph, ints)[graph.outputs[0]]
    return [outputs, known.tolist()]


def need_peers() -> None:
    for package in ("torch", "onnx", "onnxruntime", "openvino"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'lutra[bench]'")


def need_llama() -> None:
    if find_spec("llama_cpp") is None:
        pytest.skip("needs llama_cpp: pip install llama-cpp-python")


def in_a_process(code: str) -> Any:
    """What a call of a function of this module returns.

    In a process of its own: where OpenVINO has run, a process with torch crashes when its forked
    data loaders end, and other tests have such.
    """
    process = subprocess.run(
        [sys.executable, "-c", f"import json, test_benchmarks as t\nprint(json.dumps(t.{code}))"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_peers_compute_the_encoder(tmp_path: Path) -> None:
    need_peers()
    outputs, known = in_a_process(f"run_peers_of_encoders({str(tmp_path)!r})")
    assert np.shape(known) == (3, 32)
    for name, output in outputs.items():
        if name.endswith("fp32"):
            np.testing.assert_allclose(output, known, atol=1e-5, err_msg=name)
        else:
            cosines = (np.array(output) * known).sum(axis=1)
            assert (cosines > 0.98).all(), name
            assert np.abs(np.subtract(output, known)).max() > 1e-5  # it is quantised


def measure_encoder() -> tuple[list[dict[str, Any]], dict[str, str]]:
    case = Case(TINY, 2, (Pq(v=16), TabledPq(v=8)))
    return measure(case, Setting(runs=2, memory=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_whole_way_of_encoders() -> None:
    need_peers()
    records, broken = in_a_process("measure_encoder()")
    assert not broken
    assert [record["lookups"] for record in records] == [
        "nearest V=16 K=16",
        "nearest V=8 K=16, tables of functions",
    ]
    assert records[1]["function_entries"] == 16
    for record in records:
        assert record["case"] == "tiny 8 tokens"
        assert set(record["peers_ms"]) | set(record["peers_failed"]) == set(PEERS)
        assert set(record["peers_failed"]) <= {"openvino bf16"}
        assert record["macs"] == 2 * 8 * 2 * (4 * 32 * 32 + 2 * 32 * 64 + 2 * 8 * 32)
        assert set(record["peak_memory"]) == set(record["ms"]) == {"lutra", *record["peers_ms"]}
    assert "| tiny 8 tokens | 2 | nearest V=16 K=16 |" in markdown(records)


def measure_peers() -> tuple[list[dict[str, Any]], dict[str, str]]:
    case = Case(convolutions(8, 6), 2, (Pq(), Pq(k=32), Response(8, 7)))
    return measure(case, Setting(runs=2, memory=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_whole_way() -> None:
    need_peers()
    records, broken = in_a_process("measure_peers()")
    assert not broken
    assert [record["method"] for record in records] == ["pq", "pq", "lookup"]
    assert [(record["encoder"], record["v"], record["k"]) for record in records[:2]] == [
        ("nearest", 9, 16),
        ("nearest", 9, 32),
    ]
    assert (records[2]["levels"], records[2]["weights"]) == (8, 7)
    for record in records:
        assert set(record["peers_failed"]) <= {"openvino bf16"}  # not every CPU has it
        assert set(record["peers_ms"]) | set(record["peers_failed"]) == set(PEERS)
        best = min(ms for name, ms in record["peers_ms"].items() if name.endswith("int8"))
        assert record["speedup_int8"] == best / record["lutra_ms"]
        assert record["macs"] == 2 * 3 * 8 * 8 * 9 * 36
        assert set(record["file_bytes"]) == {"lutra", "onnx fp32", "onnx int8"}
        assert set(record["peak_memory"]) == set(record["ms"]) == {"lutra", *record["peers_ms"]}
        assert record["openvino_kernels"]["openvino fp32"]
    assert len(markdown(records).splitlines()) == 5


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "benchmarks.dense", raising=False)
    case = Case(linears(3, 64, 32), 3, (Response(8, 7),))
    (record,), broken = measure(case, Setting(runs=1))
    assert not broken
    assert set(record["peers_failed"]) == set(PEERS)
    assert all("Error" in text for text in record["peers_failed"].values())
    assert record["speedup_fp32"] is None
    assert record["lutra_ms"] > 0
    assert "| - | - | - | - |" in markdown([record])


def test_a_broken_lutra_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measure.PEERS", {})
    monkeypatch.setattr("benchmarks.measure.write_models", lambda *_: {})
    case = Case(linears(3, 16, 8), 3, (Pq(v=4, k=7), Response(16, 15), Response(16, 35)))
    records, broken = measure(case, Setting(runs=1))
    assert [record["lookups"] for record in records] == ["table 16x15"]
    assert "GraphError" in broken["lutra nearest V=4 K=7"]
    assert "odd number of columns" in broken["lutra table 16x35"]


@pytest.mark.skipif(
    lutra.runnable_isas()[-1] == "avx2" or "avx2" not in lutra.runnable_isas(),
    reason="needs a CPU with more than AVX2",
)
def test_avx2_begins_again_with_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CAPS["avx2"]:
        monkeypatch.delenv(name, raising=False)
    begun: list[Any] = []

    def execve(path: str, words: list[str], environment: dict[str, str]) -> None:
        begun.append((words[1:], environment["ONEDNN_MAX_CPU_ISA"]))
        raise SystemExit

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["layers", "--isa", "avx2"])
    with pytest.raises(SystemExit):
        command.run_command("benchmarks.layers", "", layers.CASES)
    assert begun == [(["-m", "benchmarks.layers", "--isa", "avx2"], "AVX2")]
    assert set(NOT_CAPPED) < set(PEERS)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the command with these words on one small case, without peers."""
    methods = (*encoders(v=4), GROUPED[0], Response(16, 15), Response(4, 3))
    case = Case(replace(convolutions(8, 4), name="tiny"), 2, methods)
    monkeypatch.setattr("benchmarks.measure.PEERS", {})
    monkeypatch.setattr("benchmarks.measure.write_models", lambda *_: {})

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["layers", *words])
        command.run_command("benchmarks.layers", "", [case])

    return run


def test_command(
    tiny: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "out.json"
    tiny("--case", "tin", "--runs", "1", "--markdown", "--profile", "--json", str(file))
    text = capsys.readouterr().out
    assert "3 x pq_conv2d, nearest, code once a kernel row" in text
    assert "| tiny | 2 | nearest V=4 K=16 |" in text
    assert "| tiny | 2 | table 4x3 |" in text
    records = json.loads(file.read_text())["records"]
    assert [record.get("group") for record in records] == ["patch", "patch", "row", None, None]
    for record in records:
        steps = record["profile"]["steps"].values()
        assert sum(step["steps"] for step in steps) >= 2  # ReLU is fused
        assert record["profile"]["total_ms"] > 0
    with pytest.raises(SystemExit, match="there are tiny"):
        tiny("--case", "nothing")
    with pytest.raises(SystemExit, match="no batch of 3; there are 2"):
        tiny("--batch", "3")


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ("--method lookup", ["table 16x15", "table 4x3"]),
        ("--table 4x3 --method lookup", ["table 4x3"]),
        ("--encoder tree", ["tree V=4 K=16", "table 16x15", "table 4x3"]),
        ("--group row --method pq", ["row nearest V=3 K=16"]),
        ("--v 3 --encoder nearest --method pq", ["row nearest V=3 K=16"]),
        ("--encoder tree --table 4x3 --table 16x15 --method pq", ["tree V=4 K=16"]),
    ],
)
def test_choice_of_lookups(
    tiny: Callable[..., None], tmp_path: Path, words: str, chosen: list[str]
) -> None:
    file = tmp_path / "out.json"
    tiny("--runs", "1", "--json", str(file), *words.split())
    assert [record["lookups"] for record in json.loads(file.read_text())["records"]] == chosen


def test_unknown_choices_are_errors(
    tiny: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ("--table 8x7", "--encoder oak", "--method oak"):
        with pytest.raises(SystemExit):
            tiny(*words.split())
        assert "invalid choice" in capsys.readouterr().err


def test_nothing_to_measure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        Case(replace(linears(2, 8, 4), name=name), 2, (method,))
        for name, method in (("first", Pq()), ("second", Response()))
    ]
    words = ["layers", "--case", "first", "--method", "lookup"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="there are nearest V=9 K=16"):
        command.run_command("benchmarks.layers", "", cases)


def test_records_of_the_past_are_read() -> None:
    folder = Path(__file__).parents[1] / "benchmarks" / "results"
    files = [f for kind in ("layers", "models", "sentences") for f in folder.glob(f"{kind}*.json")]
    records = [record for file in files for record in json.loads(file.read_text())["records"]]
    assert records
    assert len(markdown(records).splitlines()) == 2 + len(records)
    old = {"encoder": "tree", "v": 9, "k": 16, "dense": "int8", "case": "a", "batch": 1}
    old |= {"isa": "avx2", "threads": 1, "lutra_ms": 1.0, "peers_ms": {}}
    old |= {"speedup_fp32": None, "speedup_int8": None}
    assert "| tree V=9 K=16, int8 ends |" in markdown([old])


def test_turns_rotate() -> None:
    seen: list[str] = []
    cases = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    times = interleaved(cases, 2, 1, lead_in=1)
    assert "".join(seen) == "aabbccbbccaaccaabb"
    assert all(len(seconds) == 2 for seconds in times.values())
    assert spread([0.001, 0.002, 0.003])["median"] == 2


def test_products_of_low_bit_weights(tmp_path: Path) -> None:
    need_peers()
    file = tmp_path / "lowbit.json"
    command = [sys.executable, "-m", "benchmarks.lowbit", "--runs", "1", "--json", str(file)]
    command += ["--shape", "48x256", "--rows", "33"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    llama = [f"llama.cpp {name}" for name in FORMATS]
    assert (report["llama_cpp"] is None) == (find_spec("llama_cpp") is None)
    assert [record["bits"] for record in report["records"]] == [1, 1.58, 2, 3, 4]
    for record in report["records"]:
        assert (record["shape"], record["rows"], record["threads"]) == ([48, 256], 33, 1)
        assert record["isa"] == lutra.runnable_isas()[-1]
        assert record["lutra_ms"] == record["kernels_ms"][record["kernel"]]
        assert set(record["kernels_ms"]) == {"dense", "tables"}
        least = {" 2 bits": 2, "TQ": 1.58, "Q2_K": 2}  # of the others 4
        able = [
            ms
            for peer, ms in record["peers_ms"].items()
            if record["bits"] <= next((b for n, b in least.items() if n in peer), 4)
        ]
        assert record["speedup_peer"] == min(able) / record["lutra_ms"]
        assert record["gmacs"] == pytest.approx(48 * 256 * 33 / record["lutra_ms"] / 1e6)
        assert {*record["peers_ms"], *record["peers_failed"]} >= {"onnxruntime 2 bits", *llama}
        assert record["peers_ms"]["onnxruntime float32"] > 0
    assert report["records"][1]["bytes"] == 48 * 52 + 48 * 4


@pytest.mark.parametrize("format_", FORMATS)
def test_products_of_llama_cpp(format_: str) -> None:
    """They are the products of the weights, as exact as the format is; repacked or not."""
    need_llama()
    rng = np.random.default_rng(0)
    for outputs, depth in ((64, 512), (35, 256)):
        weights = rng.integers(-1, 2, (outputs, depth)).astype(np.float32) / 2
        run = open_product(format_, outputs, depth, 1, weights)
        for rows in (1, 5, 33):
            x = rng.normal(size=(rows, depth)).astype(np.float32)
            want = x @ weights.T
            bound = {"Q2_K": 0.4, "Q4_0": 0.15}.get(format_, 0.02)  # they do not hold -1, 0, 1
            np.testing.assert_allclose(run(x), want, atol=bound * np.abs(want).max())
    with pytest.raises(ValueError, match="takes inputs in blocks of"):
        open_product(format_, 8, 250, 1)


def test_the_shape_of_low_bit_weights_is_checked() -> None:
    command = [sys.executable, "-m", "benchmarks.lowbit", "--shape", "48*256"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "--shape 48*256: give it as MxK" in done.stderr

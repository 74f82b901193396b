"""The benchmark commands: every network is built, one tiny case goes the whole way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lutra

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import command, layers, models
from benchmarks.lookups import Lookup, known_encoders, knows_int8, lutra_graph
from benchmarks.machine import interleaved, spread
from benchmarks.measure import Case, Setting, measure
from benchmarks.networks import convolutions, linears, resnet20
from benchmarks.peers import AVX2_CAP, NOT_CAPPED, PEERS
from benchmarks.table import markdown

CASES = {case.network.name: case for case in (*layers.CASES, *models.CASES)}
TREE = pytest.param(
    "tree",
    marks=pytest.mark.skipif("tree" not in known_encoders(), reason="this lutra has no trees"),
)
#: Multiply-adds of the published networks.
MACS = {
    "ResNet-20 32x32": 40_551_040,
    "ResNet-18 32x32": 555_422_720,
    "ResNet-18 224x224": 1_814_073_344,
    "VGG-11 32x32": 152_769_536,
    "3 x conv 3x3 64@56": 3 * 64 * 64 * 9 * 56 * 56,
    "2 x linear 1x4096x4096": 2 * 4096 * 4096,
}


@pytest.mark.parametrize("encoder", ["nearest", TREE])
@pytest.mark.parametrize("name", CASES)
def test_graphs_are_valid(name: str, encoder: str) -> None:
    case = CASES[name]
    for lookup in case.lookups:
        graph = lutra_graph(case.network, Lookup(encoder, lookup.v, lookup.k))
        graph.validate()
        assert graph.total_cost().lookups > 0
    assert graph.total_cost().dense_macs == MACS.get(name, graph.total_cost().dense_macs)


@pytest.mark.skipif(not knows_int8(), reason="this lutra has no int8 layers")
def test_dense_layers_in_int8() -> None:
    graph = lutra_graph(resnet20(), Lookup(dense="int8"))
    graph.validate()
    ops = [node.op for node in graph.nodes]
    assert (ops.count("int8_conv2d"), ops.count("int8_linear")) == (1, 1)
    assert not {"conv2d", "linear"} & set(ops)


@pytest.mark.parametrize("encoder", ["nearest", TREE])
def test_activations_keep_their_size(encoder: str) -> None:
    graph = lutra_graph(resnet20(), Lookup(encoder))
    x = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    y = lutra.Session(graph)(x)
    assert y.shape == (2, 10)
    assert 0.05 < y.std() < 5
    assert (y[0] != y[1]).any()


@pytest.mark.parametrize("name", [name for name in CASES if "224" not in name])
def test_pytorch_has_the_same_shapes(name: str) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from benchmarks.dense import Dense

    network = CASES[name].network
    graph = lutra_graph(network, Lookup(v=64))
    with torch.inference_mode():
        y = Dense(network).eval()(torch.randn(2, *network.shape))
    assert y.isfinite().all()
    assert y.shape[1:] == graph.values[graph.outputs[0]].shape[1:]


def measure_peers() -> tuple[list[dict[str, Any]], dict[str, str]]:
    case = Case(convolutions(8, 6), 2, (Lookup(), Lookup(k=32)))
    return measure(case, Setting(runs=2, encoders=("nearest",), memory=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_whole_way() -> None:
    for package in ("torch", "onnx", "onnxruntime", "openvino"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'lutra[bench]'")
    # In a process of its own: where OpenVINO has run, a process with torch crashes when its
    # forked data loaders end, and other tests have such.
    code = (
        "import json, test_benchmarks\n"
        "records, broken = test_benchmarks.measure_peers()\n"
        "print(json.dumps([records, broken]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    records, broken = json.loads(process.stdout.splitlines()[-1])
    assert not broken
    assert [(record["v"], record["k"]) for record in records] == [(9, 16), (9, 32)]
    for record in records:
        assert set(record["peers_failed"]) <= {"openvino bf16"}  # not every CPU has it
        assert set(record["peers_ms"]) | set(record["peers_failed"]) == set(PEERS)
        best = min(ms for name, ms in record["peers_ms"].items() if name.endswith("int8"))
        assert record["speedup_int8"] == best / record["lutra_ms"]
        assert record["macs"] == 2 * 3 * 8 * 8 * 9 * 36
        assert set(record["file_bytes"]) == {"lutra", "onnx fp32", "onnx int8"}
        assert set(record["peak_memory"]) == set(record["ms"]) == {"lutra", *record["peers_ms"]}
        assert record["openvino_kernels"]["openvino fp32"]
    assert len(markdown(records).splitlines()) == 4


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "benchmarks.dense", raising=False)
    case = Case(linears(3, 16, 8), 3, (Lookup(v=4),))
    (record,), broken = measure(case, Setting(runs=1, encoders=("nearest",)))
    assert not broken
    assert set(record["peers_failed"]) == set(PEERS)
    assert all("Error" in text for text in record["peers_failed"].values())
    assert record["speedup_fp32"] is None
    assert record["lutra_ms"] > 0
    assert "| - | - | - | - |" in markdown([record])


def test_a_broken_lutra_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measure.PEERS", {})
    monkeypatch.setattr("benchmarks.measure.write_models", lambda *_: {})
    case = Case(linears(3, 16, 8), 3, (Lookup(v=4, k=7),))
    records, broken = measure(case, Setting(runs=1, encoders=("nearest",)))
    assert not records
    assert "GraphError" in broken["lutra nearest V=4 K=7"]


@pytest.mark.skipif(
    lutra.runnable_isas()[-1] == "avx2" or "avx2" not in lutra.runnable_isas(),
    reason="needs a CPU with more than AVX2",
)
def test_avx2_begins_again_with_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AVX2_CAP:
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
    assert Setting(isa="avx2").capped
    assert not Setting().capped
    assert set(NOT_CAPPED) < set(PEERS)


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(replace(linears(2, 8, 4), name="tiny"), 2, (Lookup(v=4),))
    monkeypatch.setattr("benchmarks.measure.PEERS", {})
    monkeypatch.setattr("benchmarks.measure.write_models", lambda *_: {})
    monkeypatch.setattr("benchmarks.command.known_encoders", lambda: ("nearest",))
    file = tmp_path / "new" / "out.json"
    words = ["layers", "--case", "tin", "--runs", "1", "--markdown", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    command.run_command("benchmarks.layers", "", [case])
    text = capsys.readouterr().out
    assert "skipping the encoder tree" in text
    assert "| tiny | 2 | nearest V=4 K=16 |" in text
    assert '"encoders_left_out"' in file.read_text()
    monkeypatch.setattr(sys, "argv", ["layers", "--case", "nothing"])
    with pytest.raises(SystemExit, match="there are tiny"):
        command.run_command("benchmarks.layers", "", [case])


def test_turns_rotate() -> None:
    seen: list[str] = []
    cases = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    times = interleaved(cases, 2, 1, lead_in=1)
    assert "".join(seen) == "aabbccbbccaaccaabb"
    assert all(len(seconds) == 2 for seconds in times.values())
    assert spread([0.001, 0.002, 0.003])["median"] == 2

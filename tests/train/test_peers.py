"""ONNX Runtime and OpenVINO beside a study: the same samples, the same answers in float32."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lutra.node import Array
from lutra.train import Budget, load_onnx, optimize
from lutra.train.search import peers
from lutra.train.search.samples import Split, split

REASON = "needs {}: pip install 'lutra[bench]'"


def write(path: Path, layer: nn.Linear, kind: str = "FLOAT", opset: int = 17) -> None:
    """A file of one product, of inputs of this type."""
    onnx = pytest.importorskip("onnx", reason=REASON.format("onnx"))
    make, kinds = onnx.helper, onnx.TensorProto
    nodes = [make.make_node("Gemm", ["z", "w", "b"], ["y"], transB=1)]
    cast = make.make_node("Cast", ["x"], ["z"], to=kinds.FLOAT)
    graph = make.make_graph(
        [cast, *nodes],
        "gemm",
        [make.make_tensor_value_info("x", getattr(kinds, kind), ["n", 6])],
        [make.make_tensor_value_info("y", kinds.FLOAT, ["n", 3])],
        [
            onnx.numpy_helper.from_array(value.detach().numpy(), name)
            for name, value in (("w", layer.weight), ("b", layer.bias))
        ],
    )
    onnx.save(
        make.make_model(graph, opset_imports=[make.make_opsetid("", opset)], ir_version=9), path
    )


class Judge:
    """Keeps the outputs that were judged."""

    def __init__(self) -> None:
        self.seen: list[Array] = []

    def __call__(self, outputs: Any) -> tuple[float, float]:
        self.seen.append(np.concatenate([batch[0] for batch in outputs]))
        return 1.0, 0.5


@pytest.fixture
def case(tmp_path: Path) -> tuple[Path, Split, Array]:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 3), torch.rand(24, 6)
    write(tmp_path / "gemm.onnx", layer)
    parts = split(layer, x, None, 0)
    with torch.no_grad():
        wanted = np.concatenate([layer(*batch).numpy() for batch in parts.judged.batches])
    return tmp_path / "gemm.onnx", parts, wanted


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes it as if of the runtimes only some were installed."""

    def hide(*installed: str) -> None:
        monkeypatch.setattr(peers, "_is_installed", lambda name: name in installed)

    return hide


def need(*packages: str) -> None:
    for name in packages:
        pytest.importorskip(name, reason=REASON.format(name))


def test_both_runtimes_in_float32_and_int8(
    case: tuple[Path, Split, Array], only: Callable[..., None]
) -> None:
    need("onnxruntime", "openvino")
    only("onnxruntime", "openvino")
    path, parts, wanted = case
    judge = Judge()
    found = peers.runtimes(path, 1)(parts, judge)
    assert [entry["name"] for entry in found] == [
        "ONNX Runtime", "ONNX Runtime int8", "OpenVINO", "OpenVINO int8",
    ]  # fmt: skip
    assert all(entry["ms"] > 0 and entry["drop"] == 0.5 for entry in found)
    for number, entry in enumerate(found):
        difference = np.abs(judge.seen[number] - wanted)
        if entry["name"].endswith("int8"):
            assert 0 < difference.mean() < 0.05  # it is rounded
            assert "by the quantiser of ONNX Runtime" in entry["text"]
            assert "calibrated on the same samples" in entry["text"]
        else:
            assert difference.max() < 1e-5
            assert "int8" not in entry["text"]
        assert "1 thread" in entry["text"]


def test_openvino_alone_says_that_int8_is_not_measured(
    case: tuple[Path, Split, Array], only: Callable[..., None]
) -> None:
    need("openvino")
    only("openvino")
    path, parts, wanted = case
    judge = Judge()
    (entry,) = peers.runtimes(path, 2)(parts, judge)
    assert entry["name"] == "OpenVINO"
    assert "its int8 is not measured" in entry["text"]
    assert "2 threads" in entry["text"]
    np.testing.assert_allclose(judge.seen[0], wanted, atol=1e-5)


def test_nncf_makes_the_int8_of_openvino_where_it_is_installed(
    case: tuple[Path, Split, Array],
    only: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    need("openvino")
    path, parts, wanted = case
    calls: list[dict[str, Any]] = []
    if importlib.util.find_spec("nncf") is None:
        monkeypatch.setitem(sys.modules, "nncf", Nncf(calls))  # type: ignore[arg-type]
    only("openvino", "nncf")
    judge = Judge()
    found = peers.runtimes(path, 1)(parts, judge)
    assert [entry["name"] for entry in found] == ["OpenVINO", "OpenVINO int8"]
    assert "by NNCF" in found[1]["text"]
    assert "not measured" not in found[0]["text"]
    assert np.abs(judge.seen[1] - wanted).mean() < 0.05
    assert capsys.readouterr().out == ""
    assert all(call["subset_size"] == 18 and call["shape"] == (1, 6) for call in calls)
    # what it cannot quantise is not measured in int8
    monkeypatch.setattr(peers, "_by_nncf", lambda path, data: None)
    (entry,) = peers.runtimes(path, 1)(parts, judge)
    assert "its int8 is not measured: no quantiser made a file" in entry["text"]
    monkeypatch.setattr(peers, "_by_nncf", lambda path, data: "no model")
    (entry,) = peers.runtimes(path, 1)(parts, judge)
    assert "its int8 is not measured: it does not run the quantised file" in entry["text"]


class Nncf:
    """Stands for the package where it is missing: checks its arguments, and rounds nothing."""

    class QuantizationPreset:
        MIXED = "mixed"

    Dataset = list

    def __init__(self, calls: list[dict[str, Any]]) -> None:
        self.calls = calls

    def quantize(self, model: Any, dataset: Any, *, preset: str, subset_size: int) -> Any:
        assert preset == "mixed"
        self.calls.append({"subset_size": subset_size, "shape": dataset[0]["x"].shape})
        return model


def test_files_that_do_not_run_are_left_out(
    case: tuple[Path, Split, Array], only: Callable[..., None]
) -> None:
    path, parts, _ = case
    only()
    assert peers.runtimes(path, 1)(parts, Judge()) == []
    need("onnxruntime", "openvino")
    only("onnxruntime", "openvino", "nncf")
    path.write_bytes(b"no model")
    assert peers.runtimes(path, 1)(parts, Judge()) == []


def test_files_of_old_operator_sets_are_quantised_too(
    tmp_path: Path, only: Callable[..., None]
) -> None:
    need("onnxruntime", "openvino")
    only("onnxruntime", "openvino")
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 3), torch.rand(24, 6)
    write(tmp_path / "gemm.onnx", layer, opset=11)
    parts = split(layer, x, None, 0)
    judge = Judge()
    names = [each["name"] for each in peers.runtimes(tmp_path / "gemm.onnx", 1)(parts, judge)]
    assert names == ["ONNX Runtime", "ONNX Runtime int8", "OpenVINO", "OpenVINO int8"]
    assert all(np.abs(seen - judge.seen[0]).mean() < 0.05 for seen in judge.seen)


@pytest.mark.parametrize("kind", ["INT64", "INT32", "BOOL"])
def test_inputs_get_the_types_of_the_file(
    kind: str, tmp_path: Path, only: Callable[..., None]
) -> None:
    need("onnxruntime", "openvino")
    only("onnxruntime", "openvino")
    torch.manual_seed(0)

    class Ids(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.float())

    layer, x = Ids(6, 3), torch.randint(0, 2, (24, 6))
    write(tmp_path / "gemm.onnx", layer, kind)
    parts = split(layer, x, None, 0)
    judge = Judge()
    names = [entry["name"] for entry in peers.runtimes(tmp_path / "gemm.onnx", 1)(parts, judge)]
    assert {"ONNX Runtime", "OpenVINO"} <= set(names)
    with torch.no_grad():
        wanted = np.concatenate([layer(*batch).numpy() for batch in parts.judged.batches])
    for name, seen in zip(names, judge.seen, strict=True):
        if not name.endswith("int8"):
            np.testing.assert_allclose(seen, wanted, atol=1e-5)


@pytest.mark.slow
def test_peers_are_points_of_the_plot_and_rows_of_the_page(
    case: tuple[Path, Split, Array], only: Callable[..., None], tmp_path: Path
) -> None:
    need("onnxruntime", "openvino", "jinja2", "matplotlib")
    only("onnxruntime", "openvino")
    path, _, _ = case
    study = optimize(
        load_onnx(path), torch.rand(64, 6), budget=Budget(minutes=0), peers=peers.runtimes(path, 1)
    )
    study.save_report(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    plot = page[page.index("<svg") : page.index("</svg>")]
    for name in ("ONNX Runtime", "ONNX Runtime int8", "OpenVINO", "OpenVINO int8"):
        assert f">{name}</text>" in plot
        assert f"<td>{name}</td>" in page

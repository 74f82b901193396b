"""The demo, from training to the engine, on a part of its digits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import digits
import pytest

import lutra
from lutra.train import finetune


def test_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y, x_test, y_test = digits.load(0)
    part = (x[:512], y[:512], x_test[:200], y_test[:200])
    monkeypatch.setattr(digits, "load", lambda seed: part)
    epochs: list[int] = []

    def briefly(*args: Any, **settings: Any) -> Any:
        epochs.append(settings["epochs"])
        return finetune(*args, **{**settings, "epochs": 3})

    monkeypatch.setattr(digits, "finetune", briefly)
    file = tmp_path / "digits.lutra"
    page = tmp_path / "report.html"
    monkeypatch.setattr(digits, "SAMPLES", 64)
    monkeypatch.setattr(digits, "SEARCH_MINUTES", 0)
    words = ["digits.py", "--output", str(file), "--report", str(page)]
    monkeypatch.setattr(sys, "argv", words)
    digits.main()
    assert len(epochs) == 2  # the dense network, then the lookups
    ops = [node.op for node in lutra.load_graph(file).nodes]
    assert ops.count("pq_conv2d") == 3
    assert ops.count("conv2d") == 1
    right = (lutra.Session(file)(x_test[:200].numpy()).argmax(1) == y_test[:200].numpy()).mean()
    assert right > 0.5
    out = capsys.readouterr().out
    assert "3 of 5 layers replaced" in out
    shown = [line.split() for line in out.splitlines() if "accuracy, engine" in line]
    assert float(shown[0][-3]) == pytest.approx(100 * right, abs=0.05)
    assert "engine: Session(" in out
    assert "int8 everywhere" in out
    assert "48 of 64 samples calibrate" in page.read_text()

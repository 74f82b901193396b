"""Models, arrays and fixtures for the tests of the command line.

PYTEST_DONT_REWRITE: test modules import this module before pytest loads it as their plugin.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Builder, random_inputs, with_golden

import lutra
from lutra import cli
from lutra.format import save_graph
from lutra.graph import Graph

PREPROCESS = {
    "kind": "image",
    "layout": "NCHW",
    "range": [0, 1],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}


def image_graph(batch: int | None = None, **metadata: Any) -> Graph:
    """A small classifier (batch, 3, 8, 8) -> (batch, 10) with lookup and dense layers."""
    b = Builder(("x", (batch, 3, 8, 8)))
    stem = b.add("relu", b.conv2d("x", 3, 8, padding=(1, 1)))
    x = b.affine(b.pq_conv2d(stem, 8, 8, padding=(1, 1)), 8)
    x = b.add("relu", b.add("add", x, stem))
    x = b.add("max_pool2d", x, kernel=(2, 2), stride=(2, 2))
    x = b.add("mean", b.pq_conv2d(x, 8, 16, act_scale=0.2, width=4), axes=(2, 3))
    b.pq_linear(x, 16, 10)
    return b.graph(metadata=metadata)


def two_graph() -> Graph:
    """Two inputs and two outputs, one of them with an awkward name."""
    b = Builder(("a", (None, 4)), ("b", (None, 4)))
    total = b.add("add", "a", "b", name="total")
    b.add("relu", total, name="file")
    nodes = (b.nodes[0], replace(b.nodes[1], output="file"))
    return replace(b.graph(), nodes=nodes, outputs=("total.out", "file"))


class Broken(lutra.Session):
    """A session that gets the last bit of one value wrong."""

    victim = ""

    def run(self, output_names: Any, feeds: Any) -> list[Any]:
        results = super().run(output_names, feeds)
        names = list(self.graph.outputs)
        index = names.index(self.victim) if self.victim in names else len(names) - 1
        if not self.victim or self.victim in names:
            flat = results[index].reshape(-1)
            flat[0] = np.nextafter(flat[0], np.float32(np.inf))
        return results


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, without settings of the engine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LUTRA_ISA", raising=False)
    monkeypatch.delenv("LUTRA_NUM_THREADS", raising=False)
    return tmp_path


@pytest.fixture
def model(folder: Path) -> str:
    save_graph(with_golden(image_graph(preprocess=PREPROCESS, classes=["c"] * 10)), "m.lutra")
    return "m.lutra"


@pytest.fixture
def capture(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; returns the exit code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        code = cli.main(list(words))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refuse(capture: Any) -> Any:
    """Runs a command that must end with one sentence, exit code 2 and no new file."""

    def call(*words: str, match: str) -> None:
        before = sorted(os.listdir("."))
        code, out, err = capture(*words)
        assert (code, out) == (2, ""), (code, out, err)
        assert err.startswith("lutra: error: "), err
        assert err.count("\n") == 1, err
        assert re.search(match, err), err
        assert sorted(os.listdir(".")) == before, os.listdir(".")

    return call


def save(name: str, array: Any) -> str:
    np.save(name, array)
    return name


def images(count: int = 5) -> Any:
    return np.random.default_rng(3).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def floats(count: int = 5) -> Any:
    return random_inputs(image_graph(), count)["x"]

"""The trained files are sound on every instruction set, and as good as zoo/README.md says."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import lutra
from lutra.cli import main

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "zoo").glob("*.lutra"))
DATASETS = Path(os.environ.get("LUTRA_TEST_DATA", ROOT.parent / "shared" / "data"))
DATA = DATASETS / "image"


def stated(name: str, what: str = r"engine accuracy \| ([\d.]+) %") -> float:
    """The engine's accuracy, or another number, in the section of a file in zoo/README.md."""
    text = (ROOT / "zoo" / "README.md").read_text()
    section = text[text.index(f"## `{name}`") + 3 :].split("\n## ")[0]
    found = re.search(what, section)
    assert found, name
    return float(found[1])


def needs(path: str) -> pytest.MarkDecorator:
    """Skips a test whose data are absent."""
    reason = f"needs {path}: set LUTRA_TEST_DATA to the folder that holds {Path(path).parts[0]}/"
    return pytest.mark.skipif(not (DATASETS / path).exists(), reason=reason)


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the examples, which read the data sets."""
    pytest.importorskip("torch", reason="the examples need PyTorch")
    monkeypatch.syspath_prepend(ROOT / "examples")
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def test_there_are_files() -> None:
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_verify(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(file), "--isa", "all"]) == 0, capsys.readouterr().out


@needs("image/cifar10_test.npy.xz")
@pytest.mark.parametrize(
    "file", [file for file in FILES if "cifar10" in file.name], ids=lambda p: p.stem
)
def test_cifar10_accuracy_is_as_stated(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = example("cifar10", monkeypatch).load_test_images(DATA)
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", labels)
    arguments = ["--images", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "y.npy")]
    assert main(["eval", str(file), *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == len(labels)
    assert round(100.0 * result["correct"] / len(labels), 2) == stated(file.name)


@needs("points/modelnet10_vox24_test.npy.xz")
def test_point_cloud_accuracy_is_as_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    points = example("points", monkeypatch)
    _, tests = points.load_modelnet10(DATASETS / "points")
    x, y = points.fixed(tests, 512, 0)
    session = lutra.Session(ROOT / "zoo" / "pointnet_modelnet10_lookup4.lutra")
    answers = np.concatenate([session(x[i : i + 64]).argmax(1) for i in range(0, len(x), 64)])
    accuracy = round(100.0 * float((answers == y).mean()), 2)
    assert accuracy == stated("pointnet_modelnet10_lookup4.lutra")


@needs("sr/set5_hr.npy.xz")
def test_super_resolution_is_as_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    sr = example("sr", monkeypatch)
    session = lutra.Session(ROOT / "zoo" / "sr_x2_lookup4.lutra")
    pairs = sr.load_set5(DATASETS / "sr", 2, enlarge=True)
    psnr = np.mean([sr.psnr(session(x[None, None])[0, 0], y, 2) for x, y in pairs])
    want = stated("sr_x2_lookup4.lutra", r"engine, Set5 x2 \| ([\d.]+) dB")
    assert round(float(psnr), 2) == want

"""The trained files are sound on every instruction set, and as good as zoo/README.md says."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from lutra.cli import main

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "zoo").glob("*.lutra"))
DATA = Path(os.environ.get("LUTRA_TEST_DATA", ROOT.parent / "shared" / "data")) / "image"


def stated_accuracy(name: str) -> float:
    """The engine's accuracy in the table of zoo/README.md."""
    text = (ROOT / "zoo" / "README.md").read_text()
    section = text[text.index(f"`{name}`") :]
    found = re.search(r"engine accuracy \| ([\d.]+) %", section)
    assert found, name
    return float(found[1])


def test_there_are_files() -> None:
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_verify(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(file), "--isa", "all"]) == 0, capsys.readouterr().out


@pytest.mark.skipif(
    not (DATA / "cifar10_test.npy.xz").exists(),
    reason="needs the CIFAR-10 test images: set LUTRA_TEST_DATA to the folder that holds image/",
)
@pytest.mark.parametrize(
    "file", [file for file in FILES if "cifar10" in file.name], ids=lambda p: p.stem
)
def test_cifar10_accuracy_is_as_stated(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="the example's image reader needs PyTorch")
    monkeypatch.syspath_prepend(ROOT / "examples")
    sys.modules.pop("cifar10", None)
    from cifar10 import load_test_images

    images, labels = load_test_images(DATA)
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", labels)
    arguments = ["--images", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "y.npy")]
    assert main(["eval", str(file), *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == len(labels)
    assert round(100.0 * result["correct"] / len(labels), 2) == stated_accuracy(file.name)

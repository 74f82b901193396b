"""The examples in the docstrings of the most used names run, in an empty folder."""

from __future__ import annotations

import doctest
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lutra
import lutra.train

NAMES = ["Session", "Stream", "load_graph", "convert", "finetune", "export", "PQ", "Lookup", "Int8",
         "Function"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found: Any = getattr(lutra, name)
    tests = doctest.DocTestFinder(exclude_empty=True).find(
        found, name, module=sys.modules[found.__module__], globs={}
    )
    examples = [example for test in tests for example in test.examples]
    assert tests[0].examples, f"{name} has no example"
    assert not any(doctest.SKIP in example.options for example in examples), name
    for test in tests:
        said: list[str] = []
        failed = doctest.DocTestRunner().run(test, out=said.append).failed
        assert not failed, "".join(said)

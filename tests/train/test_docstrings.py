"""Docstrings and pages say what is there: examples run, names and paths exist."""

from __future__ import annotations

import doctest
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import lutra
import lutra.functions
import lutra.train

ROOT = Path(__file__).parents[2]
REFERENCE = sorted((ROOT / "docs" / "api").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "zoo" / "README.md", ROOT / "benchmarks" / "README.md", *REFERENCE]  # fmt: skip
NAMES = ["Session", "Stream", "load_graph", "convert", "finetune", "export", "optimize", "PQ",
         "Lookup", "Int8", "Function", "auto_recipe", "save_pretrained",
         "LowBitMatrix"]  # fmt: skip
#: Files that the commands of a page make.
MADE = {
    "build/site", "build/web", "build/arm", "build/aarch64", "build/digits.lutra",
    "build/c", "build/c-api/liblutra.so", "build/c-api/examples/c/run_model",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found: Any = getattr(lutra, name)
    tests = doctest.DocTestFinder().find(
        found, name, module=sys.modules[found.__module__], globs={}
    )
    examples = [example for test in tests for example in test.examples]
    assert any(test.name == name and test.examples for test in tests), f"{name} has no example"
    assert not any(doctest.SKIP in example.options for example in examples), name
    for test in tests:
        said: list[str] = []
        failed = doctest.DocTestRunner().run(test, out=said.append).failed
        assert not failed, "".join(said)


def is_module(module: str) -> bool:
    """Whether there is such a module."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is none
        return False


def resolve(path: str) -> Any:
    """The module, class, function or attribute of a dotted path."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if is_module(module):
            found: Any = import_module(module)
            for part in parts[end:]:
                found = getattr(found, part)
            return found
    raise AssertionError(path)


def test_the_reference_has_every_public_name() -> None:
    pages = "\n".join(page.read_text() for page in REFERENCE)
    paths = re.findall(r"^::: (\S+)$", pages, re.M)
    assert len(paths) == len(set(paths))
    for path in paths:  # the tool reads the sources: a name must stand where it is defined
        assert path == f"{resolve(path).__module__}.{path.rpartition('.')[2]}"
    listed = {path.rpartition(".")[2] for path in paths}
    for module in (lutra, lutra.train, lutra.functions):
        public = {name for name in module.__all__ if callable(getattr(module, name))}
        assert public <= listed, f"{module.__name__}: {sorted(public - listed)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_in_the_pages_exist(page: Path) -> None:
    text = re.sub(r"```js\n.*?```", "", page.read_text(), flags=re.S)  # has names of its own
    for name in set(re.findall(r"\blutra(?!\.(?:h|js|wasm|d\.ts)\b)(?:\.[A-Za-z]\w*)+", text)):
        resolve(name)
    paths = set(
        re.findall(r"\b(?:src|cpp|tests|docs|zoo|examples|benchmarks|build)/[\w./*-]+", text)
    )
    for path in paths - MADE:
        assert any(ROOT.glob(path.rstrip("./"))), f"{page.name}: {path}"

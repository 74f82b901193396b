"""Old module paths: they work with a warning, and nothing here uses them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from moved import check_old_paths

import lutra
from lutra._moved import MOVED, MOVED_OPS, MOVED_TRAINING

ROOT = Path(__file__).resolve().parent.parent
#: Old paths of modules that are names of functions too.
FUNCTIONS = {f"lutra.train.{name}" for name in ("convert", "export", "finetune")}
#: The names that packages forward where a module had their path.
FORWARDED = {
    "lutra.preprocess": ("lutra.preprocess.image", ["ImagePreprocess", "KEY", "shown"]),
    "lutra.train.layers": (
        "lutra.train.layers.pq",
        [
            "FrozenPQ",
            "PQConv2d",
            "PQLinear",
            "StraightThroughLookup",
            "TableSum",
            "quantize_tables",
        ],
    ),
}


@pytest.mark.parametrize("raises", [True, False])
def test_old_paths_work_with_a_warning(raises: bool) -> None:
    paths = {old: (new, None) for old, new in {**MOVED, **MOVED_OPS}.items()}
    paths |= {"lutra.preprocess": FORWARDED["lutra.preprocess"]}
    assert not check_old_paths(paths, package="lutra", raises=raises), "PyTorch was imported"


def test_the_warning_names_the_line_of_the_caller(tmp_path: Path) -> None:
    script = tmp_path / "old.py"
    script.write_text("import lutra.session\n\nlutra.session.Session\nfrom lutra.cpu import *\n")
    done = subprocess.run(
        [sys.executable, "-W", "always", script], capture_output=True, text=True, check=True
    )
    assert f"{script}:3: DeprecationWarning: lutra.session.Session is lutra.runtime." in done.stderr
    assert f"{script}:4: DeprecationWarning: lutra.cpu.cpu_info is lutra.runtime." in done.stderr


def test_a_name_that_never_was_is_an_attribute_error() -> None:
    for old in ("lutra.session", "lutra.preprocess"):
        with pytest.raises(AttributeError, match=f"'{old}'.*has no attribute 'nothing'"):
            import_module(old).nothing  # noqa: B018


def test_importing_lutra_loads_nothing_for_old_paths() -> None:
    code = "import lutra, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert set(MOVED) <= loaded
    assert not loaded & {"torch", "lutra.train"}


def test_names_of_the_graph_are_where_they_were() -> None:
    from lutra import graph, node

    for name in ("AttrValue", "Node", "Shape", "Value"):
        assert getattr(graph, name) is getattr(node, name)
    assert lutra.Node is node.Node


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """What a file imports: modules, and names with the modules that they come from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module), node.lineno
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name not in FUNCTIONS:
                    yield name, node.lineno


def test_nothing_here_uses_an_old_path() -> None:
    old = {*MOVED, *MOVED_OPS, *MOVED_TRAINING}
    old |= {f"{package}.{name}" for package, (_, names) in FORWARDED.items() for name in names}
    written = re.compile(rf"\b({'|'.join(map(re.escape, old - FUNCTIONS))})\b(?!/)")
    allowed = {ROOT / "src/lutra/_moved.py", Path(__file__)}
    wrong = []
    for folder in ("src", "tests", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path in allowed:
                continue
            lines = {line for name, line in imports(path) if name in old}
            text = path.read_text().splitlines()
            lines |= {number for number, line in enumerate(text, 1) if written.search(line)}
            wrong += [f"{path.relative_to(ROOT)}:{line}" for line in sorted(lines)]
    assert not wrong, "old module paths in " + ", ".join(wrong)

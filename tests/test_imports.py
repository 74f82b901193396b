"""Imports inside lutra run downwards only: no arrow runs up, and no circle exists."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

SOURCE: Final = Path(__file__).resolve().parent.parent / "src"

#: The rooms of the package from the top to the bottom. A room may import the rooms in the lines
#: below its own line, and nothing else. A room is a module or a package with all that is in it; of
#: a package whose parts are rooms themselves (lutra, lutra.train), it is the ``__init__`` only.
ORDER: Final[tuple[tuple[str, ...], ...]] = (
    ("lutra.__main__",),
    ("lutra.cli",),
    ("lutra",),
    ("lutra.train",),
    ("lutra.train.search", "lutra.train.publishing"),
    ("lutra.train.exporting", "lutra.train.finetuning"),
    ("lutra.train.importing",),
    ("lutra.train.conversion",),
    ("lutra.train.layers",),
    ("lutra.train.functions",),
    ("lutra.train.operators",),
    ("lutra.train.recipe", "lutra.train.report"),
    ("lutra.train.encoder",),
    ("lutra.train.parts",),
    ("lutra.train.geometry",),
    (
        "lutra.train.watch", "lutra.train.distributed", "lutra.train.progress",
        "lutra.train.batches", "lutra.train.threads", "lutra.train.modes",
    ),
    ("lutra.sentences",),
    ("lutra.stream", "lutra.generator"),
    ("lutra.hardware",),
    ("lutra.functions", "lutra.lowbit", "lutra.reporting"),
    ("lutra.runtime",),
    ("lutra.reference", "lutra.preprocess"),
    ("lutra.format", "lutra.energy", "lutra.inputs", "lutra.hub"),
    ("lutra.graph",),
    ("lutra.ops",),
    ("lutra.node",),
    ("lutra.atomic", "lutra.errors", "lutra.formatting", "lutra._engine", "lutra._moved"),
)  # fmt: skip
LINE: Final = {room: line for line, rooms in enumerate(ORDER) for room in rooms}
#: The only module that may import the package root: it prints the version.
READS_VERSION: Final = "lutra.cli"


@dataclass(frozen=True)
class Arrow:
    """An import.

    Attributes:
        source: The module that imports.
        target: The module that is imported.
        place: File and line.
    """

    source: str
    target: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}: {self.source} imports {self.target}"


def modules(source: Path) -> dict[str, Path]:
    """The files of the package by module name."""
    result = {}
    for path in sorted((source / "lutra").rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        result[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return result


def arrows(source: Path) -> list[Arrow]:
    """Every import of the package by the package: for types only and inside functions too."""
    files = modules(source)
    known = {*files, "lutra._engine"}
    found = {
        Arrow(module, target, f"{path.relative_to(source.parent)}:{line}")
        for module, path in files.items()
        for target, line in imported(path, known)
        if target != module
    }
    return sorted(found, key=str)


def imported(path: Path, known: set[str]) -> Iterator[tuple[str, int]]:
    """The modules of lutra that a file imports, each with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports with the whole name"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in full]
        elif isinstance(node, ast.Call):
            names = by_name(node)
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "lutra":
                assert name in known, f"{path}:{node.lineno}: no module {name} is in src"
                yield name, node.lineno


def by_name(call: ast.Call) -> list[str]:
    """The module that ``import_module("...")`` imports, where its name is written out."""
    name = ast.unparse(call.func).rpartition(".")[2]
    given = call.args[0] if call.args else None
    if name != "import_module" or not isinstance(given, ast.Constant):
        return []
    return [str(given.value)]


def room(module: str) -> str:
    """The room that a module is in."""
    parts = module.split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        divided = any(other.startswith(name + ".") for other in LINE)
        if name in LINE and (name == module or not divided):
            return name
    raise AssertionError(f"{module} is in no room; give it a place in ORDER")


def upward(found: Sequence[Arrow]) -> list[Arrow]:
    """The arrows between rooms that do not run downwards."""
    return [
        arrow
        for arrow in found
        if room(arrow.source) != room(arrow.target)
        and LINE[room(arrow.source)] >= LINE[room(arrow.target)]
    ]


def circles(found: Sequence[Arrow]) -> list[list[str]]:
    """The circles of modules: every set of modules that all reach each other."""
    graph: dict[str, list[str]] = {}
    for arrow in found:
        graph.setdefault(arrow.source, []).append(arrow.target)
    reach = {module: reachable(graph, module) for module in graph}
    sets = {
        tuple(sorted(other for other in ends if module in reach.get(other, ())))
        for module, ends in reach.items()
        if module in ends
    }
    return [list(members) for members in sorted(sets)]


def reachable(graph: dict[str, list[str]], start: str) -> set[str]:
    """The modules at the end of a way of one or more arrows."""
    seen: set[str] = set()
    stack = list(graph.get(start, ()))
    while stack:
        module = stack.pop()
        if module not in seen:
            seen.add(module)
            stack += graph.get(module, ())
    return seen


def listed(lines: Sequence[object]) -> str:
    return "\n".join(map(str, ("", *lines)))


def test_every_module_has_a_place() -> None:
    rooms = {room(module) for module in modules(SOURCE)}
    assert rooms | {"lutra._engine"} == set(LINE), "ORDER names rooms that are not in src"


def test_no_import_runs_up() -> None:
    wrong = upward(arrows(SOURCE))
    assert not wrong, listed(wrong)


def test_no_circle() -> None:
    found = arrows(SOURCE)
    wrong = [
        arrow
        for members in circles(found)
        for arrow in found
        if arrow.source in members and arrow.target in members
    ]
    assert not wrong, listed(wrong)


def test_only_the_command_line_imports_the_root() -> None:
    wrong = [a for a in arrows(SOURCE) if a.target == "lutra" and a.source != READS_VERSION]
    assert not wrong, listed(wrong)


def test_the_engine_is_imported_by_name() -> None:
    wrong = []
    for path in modules(SOURCE).values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "lutra":
                wrong += [
                    f"{path.relative_to(SOURCE.parent)}:{node.lineno}: write "
                    "'from lutra._engine import NAME'"
                    for alias in node.names
                    if alias.name == "_engine"
                ]
    assert not wrong, listed(wrong)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("from lutra.graph import Graph\n", "lutra.node imports lutra.graph"),
        ("import lutra.graph\n", "lutra.node imports lutra.graph"),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lutra.graph\n",
            "lutra.node imports lutra.graph",
        ),
        ("def f():\n    from lutra import graph\n", "lutra.node imports lutra.graph"),
        (
            "import importlib\nx = importlib.import_module('lutra.graph')\n",
            "lutra.node imports lutra.graph",
        ),
        ("from lutra import Graph\n", "lutra.node imports lutra"),
        ("from lutra.errors import LutraError\n", None),
    ],
)
def test_an_arrow_up_is_found(tmp_path: Path, text: str, ends: str | None) -> None:
    package = tmp_path / "src" / "lutra"
    package.mkdir(parents=True)
    for name in ("__init__", "graph", "errors"):
        (package / f"{name}.py").touch()
    (package / "node.py").write_text(text)
    wrong = [str(arrow) for arrow in upward(arrows(tmp_path / "src"))]
    assert [line.partition(": ")[2] for line in wrong] == ([] if ends is None else [ends])


def test_a_circle_is_found(tmp_path: Path) -> None:
    package = tmp_path / "src" / "lutra" / "ops"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("from lutra.ops import pq\n")
    (package / "pq.py").write_text("def f():\n    from lutra.ops.spec import OpSpec\n")
    (package / "spec.py").write_text("import lutra.ops\n")
    found = arrows(tmp_path / "src")
    assert upward(found) == []
    assert circles(found) == [["lutra.ops", "lutra.ops.pq", "lutra.ops.spec"]]

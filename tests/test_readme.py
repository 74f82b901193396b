"""The README and the guides say what works: their code runs, their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "zoo" / "README.md", ROOT / "benchmarks" / "README.md"]  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def test_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks(ROOT / "README.md", "python"):
        exec(compile(block, "README.md", "exec"), names)
    logits = names["logits"]
    assert logits.shape == (1, 10)  # type: ignore[attr-defined]
    session, x, y = names["session"], names["x"], names["y"]
    test = x[1400:].numpy()  # type: ignore[index]
    accuracy = (session(test).argmax(1) == y[1400:].numpy()).mean()  # type: ignore[operator,index]
    assert accuracy > 0.9


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from lutra.cli import main

    commands = set(re.findall(r"^lutra (\w+)", "\n".join(blocks(ROOT / "README.md", "sh")), re.M))
    assert {"doctor", "inspect", "verify", "bench", "eval"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert command in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    assert "@" not in re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S), page


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES[:2]:
        for target in re.findall(r"`?make ([\w-]+)", page.read_text()):
            assert re.search(rf"^{target}:", makefile, re.M), target

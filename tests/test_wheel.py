"""The check of a wheel's contents finds what is wrong; ``make wheel`` runs it on the real one."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
import wheel_smoke

STABLE = sys.version_info >= (3, 12)
TAGS = ("cp312-abi3", "abi3") if STABLE else ("cp311-cp311", "cpython-311-x86_64-linux-gnu")
OTHER = ("cp311-cp311", "cpython-311-x86_64-linux-gnu") if STABLE else ("cp312-abi3", "abi3")
INFO = "lutra-0.1.0.dist-info/"


def make(folder: Path, *more: str, tags: tuple[str, str] = TAGS, lacks: str = "") -> Path:
    """A wheel of empty files."""
    names = ["lutra/__init__.py", *wheel_smoke.NEEDED]
    names += [f"lutra/_engine.{tags[1]}.so", "lutra/ops/latest.py", f"{INFO}RECORD", *more]
    wheel = folder / f"lutra-0.1.0-{tags[0]}-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            if name != lacks:
                archive.writestr(name, "")
    return wheel


def test_a_good_wheel(tmp_path: Path) -> None:
    assert wheel_smoke.complaints(make(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("tests/test_graph.py", "outside the package"),
        ("lutra/tests/graphs.py", "files of the tests"),
        ("lutra/test_graph.py", "files of the tests"),
        ("lutra/kernels_test.cc", "files of the tests"),
        ("lutra/conftest.py", "files of the tests"),
        ("zoo/sr_x2_lookup4.lutra", "outside the package"),
        ("lutra/_engine.other.so", "holds 2 engines"),
    ],
)
def test_a_file_too_many(tmp_path: Path, name: str, complaint: str) -> None:
    found = wheel_smoke.complaints(make(tmp_path, name))
    assert any(complaint in each for each in found), found


def test_a_file_too_few_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wheel_smoke.complaints(make(tmp_path, lacks="lutra/py.typed")) == [
        "it lacks lutra/py.typed"
    ]
    wheel = make(tmp_path)
    monkeypatch.setattr(wheel_smoke, "LARGEST", wheel.stat().st_size)
    assert len(wheel_smoke.complaints(wheel)) == 1


def test_the_other_interface_of_python(tmp_path: Path) -> None:
    (found,) = wheel_smoke.complaints(make(tmp_path, tags=OTHER))
    assert "its tags are not those of a wheel" in found

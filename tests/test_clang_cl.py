"""The kernels of x86 in the dialect of Microsoft's compiler, by clang's stand-in for it.

Microsoft's headers are not needed: the files of instruction sets include nothing of the standard
library but names of types, which clang has.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "cstddef": "#include <stddef.h>\nnamespace std { using ::ptrdiff_t; using ::size_t; }\n",
    "cstdint": "#include <stdint.h>\n",
}


def clang_cl() -> list[str]:
    """clang-cl with clang's own headers and no others."""
    if found := find_spec("ziglang"):
        folder = Path(found.submodule_search_locations[0])  # type: ignore[index]
        return [
            str(folder / "zig"),
            "clang",
            "--driver-mode=cl",
            "/X",
            f"-imsvc{folder}/lib/include",
        ]
    if clang := shutil.which("clang"):
        ask = [clang, "-print-resource-dir"]
        folder = Path(
            subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
        )
        return [clang, "--driver-mode=cl", "/X", f"-imsvc{folder}/include"]
    pytest.skip("needs clang: pip install ziglang")


def flags(isa: str) -> list[str]:
    """The options of an instruction set, as CMakeLists.txt has them."""
    text = (ROOT / "CMakeLists.txt").read_text()
    match = re.search(
        rf"lutra_add_isa\({isa} immintrin\.h.*?\n((?: *-m[^\n]*\n)+)", text, re.DOTALL
    )
    assert match
    return re.findall(r"-m[\w=-]+", match[1])


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_kernels_compile_without_a_warning(isa: str, tmp_path: Path) -> None:
    for name, text in NAMES.items():
        (tmp_path / name).write_text(text)
    assert "-mfma" in flags(isa)
    answer = subprocess.run(
        [
            *clang_cl(),
            "--target=x86_64-pc-windows-msvc",
            *("/Zs", "/std:c++20", "/W4", "/WX", "-Wno-missing-field-initializers"),
            *("/clang:-ffp-contract=off", "/clang:-ffreestanding", f"/I{ROOT / 'cpp'}"),
            *(f"-imsvc{tmp_path}", f"/DLUTRA_HAVE_{isa.upper()}", *flags(isa)),
            *("--", str(ROOT / "cpp" / "kernels" / f"{isa}.cc")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]

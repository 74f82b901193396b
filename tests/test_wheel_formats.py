"""Extensions for every platform, as Zig links them, read back by the checks of wheels.

An extension in C of one function: the C++ library takes Zig minutes to build for each platform.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import check_wheels
import pytest
from python_headers import copy_headers, import_library, interpreter
from wheel_targets import TARGETS, Interface, Target
from zig_cxx import translated, zig

NEEDED = ("ziglang", "elftools", "macholib", "pefile")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in NEEDED),
        reason="needs ziglang: pip install 'lutra[wheels]'",
    ),
]
THIS = Interface(f"cp3{sys.version_info[1]}-any", (3, sys.version_info[1]))
SOURCE = """
#include <Python.h>
_Static_assert(sizeof(long) == SIZEOF_LONG && sizeof(wchar_t) == SIZEOF_WCHAR_T, "pyconfig.h");
static struct PyModuleDef engine = {PyModuleDef_HEAD_INIT, "_engine", 0, -1, 0, 0, 0, 0, 0};
#ifdef MORE
__attribute__((visibility("default"))) int more(void) { return 1; }
#endif
PyMODINIT_FUNC PyInit__engine(void) {
  if (!PyFloat_Check(Py_None)) return PyModule_Create(&engine);
  return 0;
}
"""


def link(target: Target, folder: Path, *more: str) -> bytes:
    """The extension for a target."""
    source = interpreter(THIS.version)
    if source is None:
        pytest.skip("this interpreter has no headers")
    headers = copy_headers(source, THIS, folder / "include")
    code, engine = folder / "engine.c", folder / f"_engine{THIS.suffix(target)}"
    code.write_text(SOURCE)
    words = [zig(), "cc", "-target", target.zig, "-O2", "-fvisibility=hidden", f"-I{headers}"]
    words += [*more, str(code), "-o", str(engine)]
    if target.windows:
        words += ["-shared", str(import_library(source, THIS.library, folder))]
    else:
        kind = ["-bundle", "-Wl,@python.sym"] if target.format == "macho" else ["-shared"]
        words += translated(target.zig, kind)
    subprocess.run(words, check=True, capture_output=True)
    return engine.read_bytes()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.tag)
def test_an_extension_is_read_back(target: Target, tmp_path: Path) -> None:
    read = check_wheels.READERS[target.format]
    engine = read(link(target, tmp_path))
    assert check_wheels.engine_complaints(engine, target, THIS) == []
    assert any("PyModule_Create2" in name for name in engine.needs)
    # the same, said to be in a wheel for the other kind of processors
    machine = "aarch64" if target.machine in ("x86_64", "AMD64") else "x86_64"
    found = check_wheels.engine_complaints(engine, replace(target, machine=machine), THIS)
    assert len(found) == 1
    assert "its engine is for" in found[0]


@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[4]], ids=lambda target: target.tag)
def test_a_symbol_too_many_is_seen(target: Target, tmp_path: Path) -> None:
    engine = check_wheels.READERS[target.format](link(target, tmp_path, "-DMORE"))
    found = check_wheels.engine_complaints(engine, target, THIS)
    assert found == ["its engine shows 1 symbols more than PyInit__engine: more"]

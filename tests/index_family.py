"""The operator ``index_linear`` of ``index_family_op.cc``, in the engine of this process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

from lutra._engine import load_ops
from lutra.runtime.plugins import include_folder

TESTS = Path(__file__).parent


def compile_plugin(source: Path, target: Path) -> None:
    """Compiles a plugin with the headers of the engine; skips the test without a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("compiling a plugin needs a C++ compiler: neither CXX nor c++ is there")
    if sys.platform == "win32":
        pytest.skip("compiling a plugin needs a compiler that takes the flags of GCC")
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    command = [*compiler.split(), *flags, "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-missing-field-initializers", f"-I{include_folder()}"]
    subprocess.run([*command, str(source), "-o", str(target)], check=True)


@lru_cache(maxsize=1)
def load_index_family() -> None:
    """Compiles and loads the plugin, once in a process."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "index_family_op.so"
        compile_plugin(TESTS / "index_family_op.cc", library)
        load_ops(str(library))

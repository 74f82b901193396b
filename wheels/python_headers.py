"""What an extension is compiled with and linked to, for a Python of another machine.

The headers of CPython are the same on all platforms but for ``pyconfig.h``, so they come from an
interpreter of that version on this machine, and ``pyconfig.h`` is the one of this folder. An
extension for Linux and macOS finds Python's functions when it is loaded; for Windows it needs an
import library, which is made from the names that the interpreter here exports.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from wheel_targets import Interface
from zig_cxx import zig

HERE = Path(__file__).parent
ASK = """
import json, sysconfig
names = ("INCLUDEPY", "LIBDIR", "LDLIBRARY", "Py_ENABLE_SHARED")
print(json.dumps({name: sysconfig.get_config_var(name) for name in names}))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python of this machine that has headers."""

    program: Path
    include: Path
    exporter: Path  # its library, or itself where it has none


def _candidates(version: tuple[int, int]) -> list[Path]:
    name = f"python{version[0]}.{version[1]}"
    folders = [Path(word) for word in os.environ.get("PATH", "").split(os.pathsep) if word]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    folders += sorted(pyenv.glob(f"{version[0]}.{version[1]}.*/bin"), reverse=True)
    found = [folder / name for folder in folders if (folder / name).is_file()]
    return [Path(sys.executable), *found] if sys.version_info[:2] == version else found


def interpreter(version: tuple[int, int]) -> Interpreter | None:
    """An interpreter of a version on this machine, with headers; None where there is none."""
    import json

    for program in _candidates(version):
        answer = subprocess.run(
            [program, "-I", "-c", ASK], capture_output=True, text=True, check=False
        )
        if answer.returncode != 0:  # a shim of pyenv for a version that is not chosen
            continue
        facts = json.loads(answer.stdout)
        include = Path(facts["INCLUDEPY"])
        if (include / "Python.h").is_file():
            library = Path(facts["LIBDIR"], facts["LDLIBRARY"])
            shared = facts["Py_ENABLE_SHARED"] and library.is_file()
            return Interpreter(program, include, library if shared else program.resolve())
    return None


def copy_headers(source: Interpreter, interface: Interface, folder: Path) -> Path:
    """The headers with the ``pyconfig.h`` of this folder."""
    config = (HERE / "pyconfig.h").read_text()
    if interface.free_threaded:
        config += "#define Py_GIL_DISABLED 1\n"
    there = folder / "pyconfig.h"
    if there.is_file() and there.read_text() == config:
        return folder  # as they are, so that what was compiled with them is not compiled again
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source.include, folder)
    there.write_text(config)
    return folder


def exported(program: Path) -> dict[str, bool]:
    """The public names of Python that a program of this machine exports; whether each is data."""
    from elftools.elf.elffile import ELFFile

    with program.open("rb") as file:
        symbols = ELFFile(file).get_section_by_name(".dynsym")
        return {
            symbol.name: symbol["st_info"]["type"] == "STT_OBJECT"
            for symbol in symbols.iter_symbols()
            if symbol.name.startswith(("Py", "_Py")) and symbol["st_shndx"] != "SHN_UNDEF"
        }


def import_library(source: Interpreter, dll: str, folder: Path) -> Path:
    """The import library of a DLL that has Python's functions on Windows."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = dll.removesuffix(".dll")
    definition, library = folder / f"{stem}.def", folder / f"{stem}.lib"
    names = exported(source.exporter)
    lines = [f"    {name}{' DATA' * data}" for name, data in sorted(names.items())]
    text = "\n".join([f"LIBRARY {dll}", "EXPORTS", *lines, ""])
    if library.is_file() and definition.read_text() == text:
        return library
    definition.write_text(text)
    command = ["dlltool", "-m", "i386:x86-64", "-d", str(definition), "-l", str(library)]
    subprocess.run([zig(), *command], check=True)
    return library

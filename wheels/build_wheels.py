"""Wheels for all platforms, built on this one.

    python wheels/build_wheels.py [--output dist] [--target TAG ...] [--interface TAG ...]

Zig's clang compiles, CMake builds, and the wheel is packed here: the Python part of every wheel is
that of the one that scikit-build-core makes without the engine. What cannot be built, because this
machine has no headers of a version of Python, is named at the end.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from python_headers import Interpreter, copy_headers, import_library, interpreter
from wheel_targets import INTERFACES, TARGETS, Interface, Target, built
from zig_cxx import zig

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
WORK = ROOT / "build" / "wheels"
BIN = Path(sys.executable).parent
TIME = (1980, 1, 1, 0, 0, 0)  # of every file in a wheel, so that equal wheels are equal files


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Runs a command; what it printed is shown where it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-5000:]}\n{shlex.join(words[:3])} ... failed")


def pure_wheel(folder: Path) -> Path:
    """The wheel without an engine."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"),
        *("--no-deps", "--no-build-isolation", "--wheel-dir", folder),
        *("-C", "wheel.cmake=false", "-C", "wheel.py-api=py3", ROOT),
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def compilers(target: Target) -> dict[str, Path]:
    """Scripts that are the compiler, the archiver and its indexer of a target."""
    folder = WORK / target.tag / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    commands = {
        "c++": [sys.executable, "-I", str(HERE / "zig_cxx.py"), zig(), target.zig],
        "ar": [zig(), "ar"],
        "ranlib": [zig(), "ranlib"],
    }
    scripts = {}
    for name, command in commands.items():
        script = folder / name
        text = f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n'
        if not script.is_file() or script.read_text() != text:
            script.write_text(text)
            script.chmod(script.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        scripts[name] = script
    return scripts


def configure(target: Target, interface: Interface, source: Interpreter) -> Path:
    """The build folder of a target, made ready for an interface. What does not depend on Python is
    compiled once for all."""
    import nanobind

    build = WORK / target.tag / "cmake"
    tools = compilers(target)
    headers = copy_headers(source, interface, WORK / "python" / interface.number)
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": target.system,
        "CMAKE_SYSTEM_PROCESSOR": target.machine,
        "CMAKE_CXX_COMPILER": tools["c++"],
        "CMAKE_AR": tools["ar"],
        "CMAKE_RANLIB": tools["ranlib"],
        # A program would be linked to libraries that Zig builds for the flags of each probe.
        "CMAKE_TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",
        "CMAKE_MAKE_PROGRAM": BIN / "ninja",
        "SKBUILD_SOABI": f"cpython-{interface.number}-any",
        "SKBUILD_SOSABI": "abi3",
        "NB_SUFFIX": interface.suffix(target),
        "NB_SUFFIX_S": interface.suffix(target),
        "Python_EXECUTABLE": source.program,
        "Python_INCLUDE_DIR": headers,
        "nanobind_DIR": nanobind.cmake_dir(),
    }
    if target.system == "Darwin":  # whose tools CMake would look for
        options |= {"CMAKE_INSTALL_NAME_TOOL": "true", "CMAKE_OSX_SYSROOT": ""}
    if target.windows:
        folder = WORK / "python" / f"{interface.number}-lib"
        options["Python_LIBRARY"] = import_library(source, interface.versioned_library, folder)
        options["Python_SABI_LIBRARY"] = import_library(source, "python3.dll", folder)
    if ccache := shutil.which("ccache"):
        options["CMAKE_CXX_COMPILER_LAUNCHER"] = ccache
    run(
        *(BIN / "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-Wno-author"),
        *("-U", "Python_*", "-U", "_Python*", "-U", "NB_*"),
        *(f"-D{name}={value}" for name, value in options.items()),
    )
    return build


def compiled(target: Target, interface: Interface, source: Interpreter, folder: Path) -> None:
    """Builds the engine and installs it in a folder."""
    build = configure(target, interface, source)
    headers = WORK / "python" / interface.number
    environment = dict(os.environ)
    for name in ("ZIG_LOCAL_CACHE_DIR", "ZIG_GLOBAL_CACHE_DIR"):
        environment.setdefault(name, str(WORK / "zig"))
    sizes = ("-c", HERE / "python_sizes.cc", "-o", build / "python_sizes.o")
    run(compilers(target)["c++"], "-std=c++20", f"-I{headers}", *sizes, env=environment)
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    command = (BIN / "cmake", "--build", build, "--target", "_engine", "-j", jobs)
    run(*command, env=environment)
    run(BIN / "cmake", "--install", build, "--prefix", folder)


def record_line(name: str, data: bytes) -> str:
    """The line of a file in RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"


def members(pure: Path, installed: Path, tag: str) -> Iterator[tuple[str, bytes]]:
    """The files of a wheel but RECORD: first the package, then what describes it."""
    with zipfile.ZipFile(pure) as archive:
        names = sorted(archive.namelist())
        info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/WHEEL"))
        described = [name for name in names if name.startswith(f"{info}/")]
        for name in names:
            if name not in described and not name.endswith("/"):
                yield name, archive.read(name)
        for path in sorted(installed.rglob("*")):
            if path.is_file():
                yield path.relative_to(installed).as_posix(), path.read_bytes()
        for name in described:
            if not name.endswith(("/RECORD", "/WHEEL", "/")):
                yield name, archive.read(name)
    text = f"Wheel-Version: 1.0\nGenerator: lutra\nRoot-Is-Purelib: false\nTag: {tag}\n"
    yield f"{info}/WHEEL", text.encode()


def pack(pure: Path, installed: Path, tag: str, output: Path) -> Path:
    """Writes a wheel of the package and the files of an installed engine."""
    wheel = output / f"{'-'.join(pure.name.split('-')[:2])}-{tag}.whl"
    lines = []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:

        def add(name: str, data: bytes) -> None:
            entry = zipfile.ZipInfo(name, TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, data)

        for name, data in members(pure, installed, tag):
            add(name, data)
            lines.append(record_line(name, data))
        record = name.rsplit("/", 1)[0] + "/RECORD"  # beside WHEEL, the last one
        add(record, "\n".join([*lines, f"{record},,", ""]).encode())
    return wheel


def main(arguments: list[str]) -> int:
    """Builds what was asked for; 1 where something could not be built."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--target", nargs="+", choices=[t.tag for t in TARGETS])
    parser.add_argument("--interface", nargs="+", choices=[i.tag for i in INTERFACES])
    options = parser.parse_args(arguments)
    targets = [t for t in TARGETS if options.target is None or t.tag in options.target]
    interfaces = [
        i for i in INTERFACES if options.interface in (None, []) or i.tag in options.interface
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    pure = pure_wheel(WORK / "pure")
    missing = []
    for target in targets:
        for interface in interfaces:
            if not built(target, interface):
                continue
            source = interpreter(interface.version)
            if source is None:
                version = ".".join(map(str, interface.version))
                missing.append(f"{interface.tag}-{target.tag} (no Python {version} with headers)")
                continue
            with tempfile.TemporaryDirectory() as folder:
                compiled(target, interface, source, Path(folder))
                wheel = pack(pure, Path(folder), f"{interface.tag}-{target.tag}", options.output)
            print(f"{wheel.name}: {wheel.stat().st_size:,} bytes", flush=True)
    for line in missing:
        print(f"not built: {line}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

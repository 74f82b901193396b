"""Zig's clang as the C++ compiler of a target, for CMake.

    python zig_cxx.py ZIG TARGET ARGUMENTS...

Zig takes the options of clang, but those that CMake and nanobind mean for Apple's linker, and names
processors in its own way. ``build_wheels.py`` writes a script for each target that calls this one.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


def zig() -> str:
    """The program; an error in one sentence where it is not installed."""
    try:
        import ziglang
    except ModuleNotFoundError:
        raise SystemExit("wheels need Zig as their C++ compiler: pip install ziglang") from None
    return str(Path(ziglang.__file__).with_name("zig"))


def translated(target: str, arguments: list[str]) -> list[str]:
    """The options of clang in Zig's words."""
    result = []
    for word in arguments:
        if match := re.fullmatch(r"-march=armv8(\.\d)?-a((?:\+\w+)*)", word):
            version = (match[1] or "").replace(".", "_")
            result.append(f"-mcpu=generic+v8{version}a{match[2]}")
        elif word == "-bundle":
            result.append("-shared")  # Python opens both kinds
        elif word.startswith("-Wl,@") and word.endswith(".sym"):
            result += ["-undefined", "dynamic_lookup"]  # what Python itself has
        elif "macos" in target and word.startswith("-Wl,-"):
            # one option of the linker each: space for names, no symbols, nothing unused
            result += {"-Wl,-dead_strip": ["-dead_strip"], "-Wl,-S": ["-s"]}.get(word, [])
        else:
            result.append(word)
    # CMake reads who the compiler is from what it makes. For a program Zig would first build its
    # C++ library, for flags that no wheel has.
    asked = ["-c"] if result[-1:] == ["CMakeCXXCompilerId.cpp"] and "-c" not in result else []
    return [*asked, *result, "-fomit-frame-pointer", "-g0"]


if __name__ == "__main__":
    program, name, *words = sys.argv[1:]
    os.execv(program, [program, "c++", "-target", name, *translated(name, words)])

"""The WebAssembly module, built from the source tree, and sessions of it in Node."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from c_library import ROOT
from graphs import Array

#: The modules by the name of their kernels.
MODULES: Final = {"wasm": "lutra.wasm", "wasm_dot": "lutra_dot.wasm"}
#: Bytes that each module must stay below.
LARGEST: Final = 400_000


def needs_tools() -> None:
    """Skips where the module cannot be built or run."""
    if os.environ.get("LUTRA_CI") == "runtime":
        pytest.skip("needs the environment of make dev")
    for name, package in (("emcc", "emscripten"), ("node", "nodejs"), ("npm", "npm")):
        if shutil.which(name) is None:
            pytest.skip(f"needs {name}: apt-get install {package}")
    if not (ROOT / "js").is_dir():
        pytest.skip("needs the source tree of lutra")


def flags() -> list[str]:
    """What Node has to be told so that it knows relaxed SIMD; newer ones need not be told."""
    flag = "--experimental-wasm-relaxed-simd"
    known = subprocess.run(["node", "--v8-options"], capture_output=True, text=True, check=True)
    return [flag] if flag in known.stdout else []


def build(target: str) -> None:
    """Runs make; several processes may run tests."""
    needs_tools()
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / ".wasm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            ["make", "--no-print-directory", target],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "MAKEFLAGS": ""},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


class Refused(Exception):
    """A ``LutraError``."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Node:
    """A program that loads and runs models, one after the other."""

    def __init__(self, folder: Path, isa: str = "wasm") -> None:
        self.folder = folder
        self.isa = isa
        js = ROOT / "js"
        program = [ROOT / "tests" / "wasm_run.mjs", js / "lutra.js", js / MODULES[isa]]
        self._process = subprocess.Popen(
            ["node", *flags(), *map(str, program)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def close(self) -> None:
        self._process.communicate()

    def ask(self, **request: Any) -> Any:
        """The answer to a request, see wasm_run.mjs."""
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._process.stderr.read()
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(*answer["error"])
        return answer

    def run(self, data: bytes, feeds: Mapping[str, Array], times: int = 1) -> list[Array]:
        """The outputs of a compiled model."""
        model, given = self.folder / "model.lutrac", {}
        model.write_bytes(data)
        for name, array in feeds.items():
            file = self.folder / f"{len(given)}.in"
            file.write_bytes(np.ascontiguousarray(array).tobytes())
            given[name] = [str(file), str(array.dtype), list(array.shape)]
        prefix = str(self.folder / "out")
        made = self.ask(model=str(model), feeds=given, output=prefix, times=times)
        outputs = []
        for index in range(len(made["outputs"])):
            shape = json.loads(Path(f"{prefix}{index}.shape").read_text())
            outputs.append(np.fromfile(f"{prefix}{index}", np.float32).reshape(shape))
        return outputs

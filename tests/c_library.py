"""The C library, built from the source tree, and its functions by ctypes."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from graphs import Array

ROOT: Final = Path(__file__).resolve().parent.parent
BUILD: Final = ROOT / "build" / "c-api"
#: The library and the example.
LIBRARY: Final = ("-DLUTRA_C=ON", "-DLUTRA_C_EXAMPLE=ON")
MAX_RANK: Final = 8
OK, ARGUMENT, FILE, FORMAT, CPU, INPUT, MEMORY = range(7)
DTYPES: Final = (np.float32, np.int32)


def tool(name: str) -> str:
    """A program of the environment of the tests, or of the system."""
    return str(shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"))


#: Scalar kernels only: the others take long to build with sanitizers.
FUZZ: Final = (
    "-DLUTRA_FUZZ=ON", "-DLUTRA_SANITIZE=ON", "-DLUTRA_CAN_AVX2=OFF", "-DLUTRA_CAN_AVX512=OFF",
    "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1",
)  # fmt: skip


def build(folder: Path = BUILD, options: Sequence[str] = LIBRARY, target: str = "all") -> Path:
    """Builds a target of a build of its own, and returns its folder; skips where nothing can."""
    for name, why in (("cmake", "pip install cmake ninja"), ("ninja", "pip install cmake ninja")):
        if tool(name) == "None":
            pytest.skip(f"needs {name}: {why}")
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        pytest.skip("needs a C compiler: apt-get install gcc g++")
    if not (ROOT / "cpp" / "c").is_dir():
        pytest.skip("needs the source tree of lutra")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:  # several processes run tests
        fcntl.flock(lock, fcntl.LOCK_EX)
        ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
        command(
            tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", ninja,
            "-DLUTRA_PYTHON=OFF", *options,
        )  # fmt: skip
        command(tool("cmake"), "--build", str(folder), "--target", target)
    return folder


def command(*words: str) -> str:
    """Runs a program and returns what it prints."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Value(ctypes.Structure):
    """``lutra_value``."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_size_t),
        ("shape", ctypes.c_int64 * MAX_RANK),
    ]

    def sizes(self) -> tuple[int, ...]:
        return tuple(self.shape[: self.rank])


class Options(ctypes.Structure):
    """``lutra_options``."""

    _fields_ = [
        ("isa", ctypes.c_char_p),
        ("threads", ctypes.c_int),
        ("allow_nonfinite", ctypes.c_int),
        ("max_memory", ctypes.c_uint64),
    ]


class LutraCError(Exception):
    """A call that failed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Library:
    """The functions of ``lutra.h``."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        for name in ("version", "last_error", "metadata", "isa"):
            getattr(self.c, f"lutra_{name}").restype = ctypes.c_char_p
        for name in ("input_count", "output_count"):
            getattr(self.c, f"lutra_{name}").restype = ctypes.c_size_t
        for name in ("close", "session_free"):
            getattr(self.c, f"lutra_{name}").restype = None

    def error(self) -> str:
        return str(self.c.lutra_last_error().decode())

    def check(self, status: int) -> None:
        if status != OK:
            raise LutraCError(status, self.error())

    def open(self, data: bytes, isa: str | None = None, threads: int = 1, **more: int) -> Model:
        options = Options(None if isa is None else isa.encode(), threads, **more)
        model = ctypes.c_void_p()
        place = ctypes.c_char_p(data)
        self.check(
            self.c.lutra_open_memory(
                place, ctypes.c_size_t(len(data)), ctypes.byref(options), ctypes.byref(model)
            )
        )
        return Model(self, model)


class Model:
    """An open model and a session of it."""

    def __init__(self, library: Library, model: ctypes.c_void_p) -> None:
        self.library, self.handle, self.session = library, model, ctypes.c_void_p()
        self.inputs = self._values("input")
        self.outputs = self._values("output")
        library.check(library.c.lutra_session_new(model, ctypes.byref(self.session)))

    def __del__(self) -> None:
        self.library.c.lutra_session_free(self.session)
        self.library.c.lutra_close(self.handle)

    def _values(self, kind: str) -> list[Value]:
        c, values = self.library.c, []
        for index in range(getattr(c, f"lutra_{kind}_count")(self.handle)):
            value = Value()
            place = ctypes.byref(value)
            self.library.check(
                getattr(c, f"lutra_{kind}")(self.handle, ctypes.c_size_t(index), place)
            )
            values.append(value)
        return values

    def set_input(self, index: int, array: Array) -> None:
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        place = array.ctypes.data_as(ctypes.c_void_p)
        self.library.check(
            self.library.c.lutra_set_input(self.session, ctypes.c_size_t(index), place, shape)
        )

    def run(self, feeds: Mapping[str, Array] | Sequence[Array]) -> list[Array]:
        """Copies of all outputs."""
        arrays = feeds
        if isinstance(feeds, Mapping):
            arrays = [feeds[value.name.decode()] for value in self.inputs]
        kept = [
            np.ascontiguousarray(array, DTYPES[value.dtype])
            for value, array in zip(self.inputs, arrays, strict=True)
        ]
        for index, array in enumerate(kept):
            self.set_input(index, array)
        self.library.check(self.library.c.lutra_run(self.session))
        return [self.output(index) for index in range(len(self.outputs))]

    def output(self, index: int) -> Array:
        data = ctypes.POINTER(ctypes.c_float)()
        sizes = ctypes.POINTER(ctypes.c_int64)()
        self.library.check(
            self.library.c.lutra_get_output(
                self.session, ctypes.c_size_t(index), ctypes.byref(data), ctypes.byref(sizes)
            )
        )
        shape = tuple(sizes[: self.outputs[index].rank])
        return np.ctypeslib.as_array(data, shape).copy()

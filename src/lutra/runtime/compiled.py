"""The plan of a graph as one file, for programs without Python: see docs/c-api.md.

A compiled file says in order what ``lutra.runtime.plan.add_steps`` adds to a plan. Everything that
it says holds for every instruction set and number of threads: tables are packed when it is loaded.

All numbers are little-endian, and a text is its length in bytes as u32, then UTF-8. Sizes are their
number as u32, then i64 each; -1 is a size that is known at run time only::

    magic        8 bytes, MAGIC
    version      u32, VERSION
    checksum     u32, CRC-32 of everything behind it
    length       u64, bytes of the description
    description  as below
    (zeros to a multiple of 64 bytes, counted from the start of the file)
    data         the arrays, each at a multiple of 64 bytes

    description:
      metadata   text, JSON: that of the graph
      arrays     u32 count, then each: dtype u8 (the place in DTYPES), sizes, u64 place in data
      inputs     u32 count, then each: name text, dtype u8, sizes
      steps      u32 count, then each:
        operator text, label text
        inputs   u32 count, then each: value u32, plane u32, sizes
        output   sizes
        residual u32, value + 1, or 0
        clamp    u8, 0 or 1; then f32 low, f32 high
        attrs    u32 count, then each: name text, kind u8, and by its kind
                 0 bool u8, 1 int i64, 2 float f64, 3 text, 4 sizes
        tensors  u32 count, then each: role text, array u32
      outputs    u32 count, then each: name text, value u32, sizes

Values are numbered: the inputs, then the outputs of the steps in order.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from lutra.errors import EngineError
from lutra.format import write_file
from lutra.graph import Graph
from lutra.node import Array, AttrValue
from lutra.runtime.cpu import runnable_isas
from lutra.runtime.plan import add_steps, build_plan
from lutra.runtime.steps import sizes

__all__ = ["MAGIC", "VERSION", "compile_plan", "save_compiled"]

#: Not text, so that a transfer as text is noticed.
MAGIC: Final = b"\x89lutrac\n"
#: The version of the format, which one version of the C library reads.
VERSION: Final = 1
#: Dtypes of arrays; inputs are the last two.
DTYPES: Final = ("int8", "uint8", "int32", "float32")
_ALIGN: Final = 64


def compile_plan(graph: Graph) -> bytes:
    """Compiles a graph for the C library and the browser, which read no .lutra files.

    Args:
        graph: A graph; it is validated.

    Returns:
        The content of a compiled file; the same bytes for the same graph. It runs on every machine.

    Raises:
        GraphError: If the graph is not valid.
        EngineError: If the engine cannot run the graph, with the node named.

    Examples:
        >>> import lutra
        >>> relu = lutra.Node("relu", "relu", ("x",), "y")
        >>> graph = lutra.Graph((lutra.Value("x", "float32", (None, 3)),), ("y",), (relu,))
        >>> len(lutra.compile_plan(graph)) < 300
        True
    """
    # The engine has the last word on what it can run.
    build_plan(graph, runnable_isas()[0], 1)
    writer = _Writer()
    add_steps(writer, graph)
    return writer.content(graph)


def save_compiled(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Compiles a graph into a file, all of it or nothing.

    Args:
        graph: The graph.
        path: Where to write, by convention with the ending ``.lutrac``; an existing file is
            replaced.

    Raises:
        GraphError: If the graph is not valid.
        EngineError: If the engine cannot run the graph.
        FormatError: If the file cannot be written.
    """
    write_file(path, compile_plan(graph))


class _Writer:
    """A plan that is written down (``lutra.runtime.steps.PlanBuilder``)."""

    def __init__(self) -> None:
        self._values = 0
        self._label = ""
        self._steps: list[bytes] = []
        self._arrays: list[bytes] = []
        self._data: list[bytes] = []
        self._size = 0
        self._known: dict[tuple[str, tuple[int, ...], bytes], int] = {}
        self._outputs: list[int] = []

    def input(self, dtype: str = "float32") -> int:
        """Adds an input; the graph says what it is."""
        del dtype
        return self._next()

    def label(self, name: str) -> None:
        """What steps added from now on are called."""
        self._label = name

    def add(
        self,
        op: str,
        inputs: Sequence[int],
        attrs: Mapping[str, AttrValue],
        tensors: Mapping[str, Array],
        *,
        input_shapes: Sequence[Sequence[int]],
        output_shape: Sequence[int],
        residual: int = -1,
        clamp: tuple[float, float] | None = None,
        planes: Sequence[int] = (),
    ) -> int:
        """Adds a step and returns the number of its output."""
        read = zip(inputs, planes or [0] * len(inputs), input_shapes, strict=True)
        parts = [
            _text(op),
            _text(self._label),
            _list(
                [struct.pack("<II", value, plane) + _sizes(shape) for value, plane, shape in read]
            ),
            _sizes(output_shape),
            struct.pack("<I", residual + 1),
            struct.pack("<B", clamp is not None),
            b"" if clamp is None else struct.pack("<2f", *clamp),
            _list([_text(name) + _attr(name, value) for name, value in sorted(attrs.items())]),
            _list(
                [
                    _text(role) + struct.pack("<I", self._array(tensor))
                    for role, tensor in sorted(tensors.items())
                ]
            ),
        ]
        self._steps.append(b"".join(parts))
        return self._next()

    def finish(self, outputs: Sequence[int]) -> None:
        """Ends building."""
        self._outputs = list(outputs)

    def content(self, graph: Graph) -> bytes:
        """The file."""
        inputs = [
            _text(value.name)
            + struct.pack("<B", DTYPES.index(value.dtype))
            + _sizes(sizes(value.shape))
            for value in graph.inputs
        ]
        outputs = [
            _text(name) + struct.pack("<I", number) + _sizes(sizes(graph.values[name].shape))
            for name, number in zip(graph.outputs, self._outputs, strict=True)
        ]
        metadata = json.dumps(dict(graph.metadata), sort_keys=True, separators=(",", ":"))
        description = b"".join(
            (
                _text(metadata),
                _list(self._arrays),
                _list(inputs),
                _list(self._steps),
                _list(outputs),
            )
        )
        head = len(MAGIC) + struct.calcsize("<IIQ")
        body = b"".join(
            (
                struct.pack("<Q", len(description)),
                description,
                _padding(head + len(description)),
                *self._data,
            )
        )
        return MAGIC + struct.pack("<II", VERSION, zlib.crc32(body)) + body

    def _next(self) -> int:
        self._values += 1
        return self._values - 1

    def _array(self, array: Array) -> int:
        """The number of an array; equal ones are written once."""
        dtype = array.dtype.name
        if dtype not in DTYPES:
            raise EngineError(f"a tensor of {dtype} cannot be compiled; it takes {DTYPES}")
        little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        key = (dtype, array.shape, little.tobytes())
        if key not in self._known:
            self._known[key] = len(self._arrays)
            self._arrays.append(
                struct.pack("<B", DTYPES.index(dtype))
                + _sizes(array.shape)
                + struct.pack("<Q", self._size)
            )
            self._data += [key[2], _padding(len(key[2]))]
            self._size += len(key[2]) + len(self._data[-1])
        return self._known[key]


def _padding(size: int) -> bytes:
    return bytes(-size % _ALIGN)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")
    return struct.pack("<I", len(raw)) + raw


def _sizes(shape: Sequence[int]) -> bytes:
    return struct.pack(f"<I{len(shape)}q", len(shape), *shape)


def _list(parts: Sequence[bytes]) -> bytes:
    return struct.pack("<I", len(parts)) + b"".join(parts)


def _attr(name: str, value: AttrValue) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<BB", 0, value)
    if isinstance(value, int):
        return struct.pack("<Bq", 1, value)
    if isinstance(value, float):
        return struct.pack("<Bd", 2, value)
    if isinstance(value, str):
        return struct.pack("<B", 3) + _text(value)
    if isinstance(value, tuple):
        return struct.pack("<B", 4) + _sizes(value)
    raise EngineError(f"the attribute {name!r} is a {type(value).__name__} and cannot be compiled")

"""The .lutra file: a safetensors file with the graph in its metadata.

The metadata of the file are strings::

    format    "lutra"
    version   "1", "2" or "3": the first that has all that is in the graph
    graph     JSON: inputs, outputs, nodes
    metadata  JSON: the metadata of the graph
    sha256    hex digest of version, graph, metadata and every tensor, see _digest

Tensors have the names that the graph gives them; golden data are ``golden.input.<i>`` and
``golden.output.<i>``. Nothing in a file is trusted: the loader raises FormatError and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from lutra.atomic import write_whole
from lutra.errors import FormatError, GraphError
from lutra.graph import RESERVED_PREFIX, Graph, make_node
from lutra.node import Array, AttrValue, Node, Shape, Value
from lutra.ops import OPS
from lutra.ops.elementwise import PAIRS
from lutra.ops.lookup import has_shifted_zero

__all__ = [
    "VERSION",
    "file_version",
    "graph_from_bytes",
    "graph_to_bytes",
    "load_graph",
    "save_graph",
    "write_file",
]

PathLike: TypeAlias = str | os.PathLike[str]

#: The newest format version, which this code reads and writes; see ``file_version``.
VERSION: Final = 3
_KEYS: Final = frozenset({"format", "version", "graph", "metadata", "sha256"})
_DTYPES: Final = {"F32": "<f4", "I32": "<i4", "I8": "|i1", "U8": "|u1"}
_MAX_HEADER: Final = 100_000_000  # the limit of safetensors itself
_GOLDEN: Final = re.compile(r"golden\.(input|output)\.(0|[1-9][0-9]{0,3})", re.ASCII)


def save_graph(graph: Graph, path: PathLike) -> None:
    """Writes a graph to a .lutra file, all of it or nothing.

    The file appears under its name only when it is complete and on the disk.

    Args:
        graph: The graph.
        path: Where to write; an existing file is replaced.

    Raises:
        GraphError: If the graph is not valid.
        FormatError: If the file cannot be written.
    """
    write_file(path, graph_to_bytes(graph))


def write_file(path: PathLike, data: bytes) -> None:
    """Writes a file, all of it or nothing.

    Raises:
        FormatError: If the file cannot be written.
    """
    # A link keeps pointing to its file, and no device or pipe is ever replaced by a file.
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise FormatError(f"cannot write {os.fspath(path)!r}: it is not a regular file")
        write_whole(target, data)
    except (OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise FormatError(
            f"cannot write {os.fspath(path)!r}: {reason}; choose a place that can be written to"
        ) from error


def load_graph(source: PathLike | bytes | bytearray | memoryview) -> Graph:
    """Reads a .lutra file and checks all of it.

    Args:
        source: Path of the file, or its content.

    Returns:
        A valid graph with read-only tensors.

    Raises:
        FormatError: If the file cannot be read, is damaged, is not a lutra file or is too new.

    Examples:
        >>> import lutra
        >>> relu = lutra.Node("relu", "relu", ("x",), "y")
        >>> graph = lutra.Graph((lutra.Value("x", "float32", (None, 3)),), ("y",), (relu,))
        >>> lutra.save_graph(graph, "relu.lutra")
        >>> lutra.load_graph("relu.lutra").nodes[0].op
        'relu'
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return graph_from_bytes(bytes(source))
    name = os.fspath(source)
    try:
        data = Path(name).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FormatError(f"cannot read {name!r}: {reason}; check the path") from error
    return graph_from_bytes(data, name)


def file_version(graph: Graph) -> int:
    """The oldest format version that can hold a graph, which is the one that is written.

    A reader of version 1 can so read whatever it understands, and says of everything else that it
    is newer. Version 2 has int32 inputs, the operators of sequences and functions, tables of
    functions, and sums and products of values whose shapes differ; version 3 has comparisons,
    choices, constants, cumulative sums, more functions, embeddings of computed ids, transposed
    convolutions, norms over groups of channels, recurrent layers, positions, and operators that
    choose entries or read images between their pixels, codes that are made once a pixel, low-bit
    weights, and tables of two axes whose zero is any index.

    Args:
        graph: A valid graph.
    """
    floats = all(value.dtype == "float32" for value in graph.inputs)
    values, version = graph.values, 1 if floats else 2
    for node in graph.nodes:
        spec = OPS[node.op]
        roles = (spec.tensors[role].since for role in node.tensors if role in spec.tensors)
        attrs = (spec.attrs[name].since for name in _written_attrs(node))
        version = max(version, spec.since, *roles, *attrs, 1)
        if node.op in PAIRS and len({values[name].shape for name in node.inputs}) > 1:
            version = max(version, 2)
        if has_shifted_zero(node):
            version = max(version, 3)
        if node.op == "embedding" and values[node.inputs[0]].dtype == "float32":
            version = max(version, 3)
    return version


def graph_to_bytes(graph: Graph) -> bytes:
    """The content of the .lutra file of a graph; the same bytes for the same graph.

    Raises:
        GraphError: If the graph is not valid.
    """
    graph.validate()
    # safetensors reads raw memory, so every array must be contiguous.
    arrays = {name: np.ascontiguousarray(array) for name, array in graph.tensors.items()}
    if graph.golden is not None:
        for kind, group in zip(("input", "output"), graph.golden, strict=True):
            for index, array in enumerate(group):
                arrays[f"{RESERVED_PREFIX}{kind}.{index}"] = np.ascontiguousarray(array)
    texts = {
        "format": "lutra",
        "version": str(file_version(graph)),
        "graph": _graph_text(graph),
        "metadata": _json_text(dict(graph.metadata)),
    }
    texts["sha256"] = _digest(texts, arrays)
    return _ordered(save(arrays, texts))


def graph_from_bytes(data: bytes, name: str = "<bytes>") -> Graph:
    """Reads the content of a .lutra file.

    Args:
        data: The content.
        name: What to call it in errors.

    Raises:
        FormatError: If it is damaged, not a lutra file or too new.
    """
    try:
        texts = _read_texts(data)
        arrays = _read_tensors(data)
        if _digest(texts, arrays) != texts["sha256"]:
            _refuse("its checksum does not match its content")
        return _read_graph(texts, arrays)
    except _NotLutraError as error:
        raise FormatError(
            f"{name!r} is not a lutra file: {error}; make one with lutra.train.export"
        ) from error
    except _NewerError as error:
        raise FormatError(
            f"{name!r} was written by a newer lutra (format version {error}; this lutra reads up "
            f"to {VERSION}); upgrade with pip install -U lutra"
        ) from error
    except (_DamagedError, GraphError) as error:
        raise FormatError(
            f"{name!r} is damaged or was not written by lutra: {error}; copy or export it again"
        ) from error


class _NotLutraError(Exception):
    """The bytes are something else."""


class _NewerError(Exception):
    """The bytes are from the future."""


class _DamagedError(Exception):
    """The bytes were a lutra file once, or pretend to be one."""


def _refuse(why: str) -> NoReturn:
    raise _DamagedError(why)


# Writing


def _ordered(data: bytes) -> bytes:
    """Sorts the metadata of a safetensors file, which safetensors writes in random order."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((struct.pack("<Q", len(text)), text, memoryview(data)[8 + length :]))


def _graph_text(graph: Graph) -> str:
    """The graph, without its tensors and metadata, as JSON."""
    inputs = [{"name": v.name, "dtype": v.dtype, "shape": v.shape} for v in graph.inputs]
    nodes = [
        {
            "op": node.op,
            "name": node.name,
            "inputs": node.inputs,
            "output": node.output,
            "attrs": _written_attrs(node),
            "tensors": node.tensors,
        }
        for node in graph.nodes
    ]
    return _json_text({"inputs": inputs, "outputs": graph.outputs, "nodes": nodes})


def _written_attrs(node: Node) -> dict[str, AttrValue]:
    """The attributes of a node, without those of later versions that have their default."""
    known = OPS[node.op].attrs
    return {
        name: value
        for name, value in node.attrs.items()
        if known[name].since == 1 or value != known[name].default
    }


def _json_text(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(texts: Mapping[str, str], arrays: Mapping[str, Array]) -> str:
    """SHA-256 of everything that a file says.

    The hash runs over byte strings, each after its own length as 8 little-endian bytes: version,
    graph, metadata; then for each tensor, sorted by name: name, dtype (as numpy writes it, such as
    ``float32``), shape (such as ``16,9``) and its little-endian bytes.
    """
    digest = hashlib.sha256()

    def add(part: bytes | memoryview) -> None:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)

    for key in ("version", "graph", "metadata"):
        add(texts[key].encode("utf-8", "surrogatepass"))
    for name in sorted(arrays):
        array = arrays[name]
        add(name.encode())
        add(array.dtype.name.encode())
        add(",".join(str(size) for size in array.shape).encode())
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        add(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


# Reading

#: How files of other kinds begin that are given for a model.
_OTHERS = {
    b"\x93NUMPY": "an array of NumPy's",
    b"PK\x03\x04": "an archive, such as PyTorch and NumPy write",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GGUF": "a GGUF file",
}


def _read_texts(data: bytes) -> dict[str, str]:
    """The metadata strings of the file, with format and version checked."""
    if len(data) < 8:
        raise _NotLutraError(f"it has {len(data)} bytes")
    known = next((what for magic, what in _OTHERS.items() if data.startswith(magic)), None)
    if known is not None:
        raise _NotLutraError(f"it is {known}")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(len(data) - 8, _MAX_HEADER):
        raise _NotLutraError(
            f"its header should have {length} bytes, but the file has {len(data) - 8} after "
            f"the length and a header may have {_MAX_HEADER}"
        )
    raw = data[8 : 8 + length]
    try:
        header = _parse(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _NotLutraError("its header is not JSON") from error
    texts = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(texts, dict) or texts.get("format") != "lutra":
        raise _NotLutraError("its metadata do not say format = lutra")
    version = texts.get("version")
    if not isinstance(version, str) or not re.fullmatch(r"[1-9][0-9]{0,8}", version, re.ASCII):
        _refuse("its format version is not a number")
    if int(version) > VERSION:
        raise _NewerError(version)
    if set(texts) != _KEYS or not all(isinstance(text, str) for text in texts.values()):
        _refuse(f"its metadata must be exactly {', '.join(sorted(_KEYS))}, all of them strings")
    # No white space but the spaces at the end: otherwise a changed byte could go unnoticed.
    if not raw.startswith(b"{") or not raw.rstrip(b" ").endswith(b"}"):
        _refuse("its header is not padded with spaces")
    return texts


def _read_tensors(data: bytes) -> dict[str, Array]:
    """All arrays of the file by name, read-only."""
    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise _DamagedError(f"safetensors cannot read it ({error})") from error
    arrays: dict[str, Array] = {}
    for name, entry in entries:
        dtype, shape = entry["dtype"], entry["shape"]
        if dtype not in _DTYPES:
            _refuse(f"tensor {name!r} has dtype {dtype}, which lutra files do not use")
        if not 1 <= len(shape) <= 8 or 0 in shape:
            _refuse(f"tensor {name!r} has shape {shape}, which has no axis, an empty one or over 8")
        stored = np.frombuffer(entry["data"], _DTYPES[dtype]).reshape(shape)
        array = stored.astype(stored.dtype.newbyteorder("="), copy=False)
        array.flags.writeable = False
        arrays[name] = array
    return arrays


def _read_graph(texts: Mapping[str, str], arrays: Mapping[str, Array]) -> Graph:
    """The graph, valid."""
    try:
        description, metadata = _parse(texts["graph"]), _parse(texts["metadata"])
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"its graph or metadata are not JSON ({error})") from error
    top = _object("the graph", description, ("inputs", "outputs", "nodes"))
    if not isinstance(metadata, dict):
        _refuse("its metadata are not a JSON object")
    graph = Graph(
        inputs=tuple(_read_value(entry) for entry in _array("inputs", top["inputs"])),
        outputs=_strings("outputs", top["outputs"]),
        nodes=tuple(_read_node(entry) for entry in _array("nodes", top["nodes"])),
        tensors={n: a for n, a in arrays.items() if not n.startswith(RESERVED_PREFIX)},
        metadata=metadata,
        golden=_read_golden(arrays),
    )
    _ = graph.values  # checks everything and keeps the answer
    return graph


def _read_value(entry: object) -> Value:
    fields = _object("an input", entry, ("name", "dtype", "shape"))
    shape = _array("the shape of an input", fields["shape"])
    if any(size is not None and type(size) is not int for size in shape):
        _refuse("the shape of an input holds something other than ints and null")
    sizes: Shape = tuple(shape)
    return Value(
        _string("the name of an input", fields["name"]),
        _string("the dtype of an input", fields["dtype"]),
        sizes,
    )


def _read_node(entry: object) -> Node:
    fields = _object("a node", entry, ("op", "name", "inputs", "output", "attrs", "tensors"))
    attrs: dict[str, AttrValue] = {}
    for name, value in _mapping("the attributes of a node", fields["attrs"]).items():
        if isinstance(value, list):
            if any(type(part) is not int for part in value):
                _refuse(f"the attribute {name[:80]!r} is a list of something other than ints")
            attrs[name] = tuple(value)
        elif isinstance(value, (bool, int, float, str)):
            attrs[name] = value
        else:
            _refuse(f"the attribute {name[:80]!r} is a {type(value).__name__}")
    tensors = _mapping("the tensors of a node", fields["tensors"])
    return make_node(
        _string("the operator of a node", fields["op"]),
        _string("the name of a node", fields["name"]),
        _strings("the inputs of a node", fields["inputs"]),
        _string("the output of a node", fields["output"]),
        attrs,
        {role: _string("the tensor of a node", name) for role, name in tensors.items()},
    )


def _read_golden(arrays: Mapping[str, Array]) -> tuple[tuple[Array, ...], tuple[Array, ...]] | None:
    found: dict[str, dict[int, Array]] = {"input": {}, "output": {}}
    for name, array in arrays.items():
        if name.startswith(RESERVED_PREFIX):
            match = _GOLDEN.fullmatch(name)
            if match is None:
                _refuse(f"tensor {name[:80]!r} is neither golden.input.<i> nor golden.output.<i>")
            found[match[1]][int(match[2])] = array
    if not any(found.values()):
        return None
    for kind, group in found.items():
        if sorted(group) != list(range(len(group))):
            _refuse(f"its golden {kind}s are numbered {sorted(group)}")
    inputs, outputs = (tuple(group[i] for i in range(len(group))) for group in found.values())
    return inputs, outputs


# JSON from strangers


def _parse(text: str) -> Any:
    """Parses strict JSON: no repeated names and no NaN; raises ValueError or RecursionError."""

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise ValueError(f"the name {name[:80]!r} is repeated")
            result[name] = value
        return result

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def _mapping(what: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value


def _object(what: str, value: object, keys: tuple[str, ...]) -> dict[str, Any]:
    fields = _mapping(what, value)
    if set(fields) != set(keys):
        found = ", ".join(sorted(fields))[:200]
        _refuse(f"{what} must have the fields {', '.join(keys)}, found {found or 'none'}")
    return fields


def _array(what: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        _refuse(f"{what}: expected a JSON array, found {type(value).__name__}")
    return value


def _string(what: str, value: object) -> str:
    if not isinstance(value, str):
        _refuse(f"{what}: expected a string, found {type(value).__name__}")
    return value


def _strings(what: str, value: object) -> tuple[str, ...]:
    return tuple(_string(what, entry) for entry in _array(what, value))

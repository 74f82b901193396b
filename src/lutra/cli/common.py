"""What the commands share: models, arrays, files and tables."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lutra.atomic import write_whole
from lutra.errors import GraphError, InputError, LutraError
from lutra.format import load_graph
from lutra.graph import Graph
from lutra.node import Array
from lutra.preprocess.audio import KIND, AudioPreprocess
from lutra.preprocess.image import KEY, ImagePreprocess
from lutra.preprocess.text import takes_text
from lutra.runtime.session import Session

_NPY_MAGIC = b"\x93NUMPY"
_ZIP_MAGIC = b"PK"


class UserError(LutraError):
    """A mistake in the arguments of a command."""


# Arguments


def fraction(text: str) -> float:
    """The argparse type of a number between 0 and 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return number


def at_least(least: int) -> Callable[[str], int]:
    """The argparse type of an int that is not smaller."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return number

    return parse


def counts(text: str) -> list[int]:
    """The argparse type of positive ints with commas between them."""
    return [at_least(1)(part.strip()) for part in text.split(",")]


def seconds(text: str) -> float:
    """The argparse type of a time above zero."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds in 0..86400")
    return number


def above_zero(text: str) -> float:
    """The argparse type of a finite number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def add_file(parser: argparse.ArgumentParser) -> None:
    """Adds the argument FILE."""
    parser.add_argument("file", metavar="FILE", help="the model, a .lutra file")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Adds --threads and --isa."""
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="default: all cores")
    add_isa(parser)


def add_isa(parser: argparse.ArgumentParser) -> None:
    """Adds --isa."""
    parser.add_argument("--isa", metavar="NAME", help="kernels to use; see lutra doctor")


def add_shape(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --shape, for models that take inputs of any size."""
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="[NAME=]N,...",
        help=f"shape of an input, such as 1,3,224,224, {what}; needed only where the model takes "
        "any size (default: the size of its golden data); other inputs of the same dtype have the "
        "same, if nothing is said of them",
    )


def read_sizes(words: Sequence[str], graph: Graph) -> dict[str, tuple[int, ...]] | None:
    """The shapes that --shape gives, by input name; None where it is not given.

    Raises:
        UserError: If one is not a shape, is missing, or does not fit the model.
    """
    if not words:
        return None
    names = [value.name for value in graph.inputs]
    given: dict[str, tuple[int, ...]] = {}
    for word in words:
        name, text = next(
            ((n, word[len(n) + 1 :]) for n in names if word.startswith(f"{n}=")), (names[0], word)
        )
        try:
            given[name] = tuple(counts(text))
        except argparse.ArgumentTypeError:
            raise UserError(
                f"--shape {word!r} is no shape; give whole numbers with commas between them, the "
                f"batch first, as NAME=N,... for each of {', '.join(names)}"
            ) from None
    named = {value.name: value for value in graph.inputs}
    for value in graph.inputs:
        like = [n for n in given if (named[n].dtype, named[n].shape) == (value.dtype, value.shape)]
        if value.name not in given and like:
            given[value.name] = given[like[0]]
    try:
        graph.infer(given)
    except GraphError as error:
        raise UserError(f"--shape: {error}") from error
    return given


def with_batch(
    graph: Graph, sizes: Mapping[str, tuple[int, ...]] | None, batch: int
) -> dict[str, tuple[int, ...]] | None:
    """Shapes with another batch, where the model does not fix it."""
    if sizes is None:
        return None
    fixed = {value.name: value.shape[0] for value in graph.inputs}
    return {name: (fixed[name] or batch, *shape[1:]) for name, shape in sizes.items()}


# Models


def open_model(
    path: str, threads: int | None = None, isa: str | None = None
) -> tuple[Graph, Session]:
    """Loads a file and makes a session for it."""
    graph = load_graph(path)
    return graph, new_session(graph, threads, isa)


def new_session(graph: Graph, threads: int | None = None, isa: str | None = None) -> Session:
    """A session; a number of threads that makes no sense is a mistake of the user."""
    try:
        return Session(graph, threads=threads, isa=isa)
    except LutraError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def preprocess_of(graph: Graph) -> ImagePreprocess | AudioPreprocess | None:
    """What the metadata of a model say about its inputs, None for nothing.

    Raises:
        FormatError: If they say something that makes no sense.
        UserError: If the model takes text.
    """
    if takes_text(graph.metadata):
        raise UserError("the model takes text, not arrays of numbers; give --text")
    entry = graph.metadata.get(KEY)
    if isinstance(entry, Mapping) and entry.get("kind") == KIND:
        return AudioPreprocess.from_dict(entry)
    return ImagePreprocess.from_metadata(graph.metadata)


# Arrays in


def read_array(path: str) -> Array:
    """Maps a .npy file into memory, read-only; nothing in it is ever executed.

    Raises:
        InputError: If it cannot be read, is something else, is truncated or holds objects.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_NPY_MAGIC))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {path!r}: {reason}; check the path") from error
    if magic != _NPY_MAGIC:
        kind = "an archive" if magic.startswith(_ZIP_MAGIC) else "not a .npy file"
        raise InputError(f"{path!r} is {kind}; give an array that np.save wrote")
    try:
        # Mapping compares the shape with the size of the file before anything is allocated.
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises whatever its parser meets
        raise InputError(f"cannot read {path!r} as a .npy file: {_first_line(error)}") from error
    if array.dtype.kind not in "fiub":
        raise InputError(f"{path!r} holds values of dtype {array.dtype}; it must hold numbers")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def read_archive(path: str, name: str) -> Array:
    """One array of a .npz file.

    Raises:
        InputError: If it cannot be read, is something else or lacks the array.
    """
    arrays = _open_archive(path, lambda names: [name], f"np.savez({path!r}, {name}=...)")
    return arrays[name]


def read_arrays(path: str, wanted: Callable[[list[str]], list[str]] = list) -> dict[str, Array]:
    """Arrays of a .npz file, which must hold numbers, by name.

    Args:
        path: The file.
        wanted: Picks those to read from all names; it may raise InputError.

    Raises:
        InputError: If it cannot be read, is something else, is empty or holds anything but numbers.
    """
    arrays = _open_archive(path, wanted, f"np.savez({path!r}, **arrays)")
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise InputError(
                f"{path!r} holds values of dtype {array.dtype} in {name!r}; it must hold numbers"
            )
        arrays[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    return arrays


def _open_archive(
    path: str, wanted: Callable[[list[str]], list[str]], how: str
) -> dict[str, Array]:
    """Those arrays of a .npz file that are wanted of all its names."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is not an archive")
        with loaded as archive:
            names = list(archive)
            arrays: dict[str, Array] = {}
            for name in wanted(names):
                if name not in names:
                    raise ValueError(f"it has no array {name!r}, only {names}")
                arrays[name] = archive[name]
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"cannot read {path!r}: {error.strerror or error}; check the path"
        ) from error
    except Exception as error:  # numpy and zipfile raise whatever their parsers meet
        raise InputError(
            f"cannot read {path!r} as a .npz file: {_first_line(error)}; make it with {how}"
        ) from error
    return arrays


def need_finite(path: str, array: Array) -> None:
    """Raises InputError if the array holds NaN or infinity."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = array.size - int(np.isfinite(array).sum())
        raise InputError(f"{path!r} holds {bad} values that are NaN or infinite; remove them")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# Files out


def check_writable(path: str) -> None:
    """Finds out before the work whether a file can be written after it.

    Raises:
        UserError: If it cannot.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UserError(f"cannot write {path!r}: it is not a regular file")
    if not target.parent.is_dir():
        raise UserError(f"cannot write {path!r}: the folder {str(target.parent)!r} does not exist")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path!r}: no permission to write in {str(target.parent)!r}")


def write_file(path: str, data: bytes) -> None:
    """Writes a file, all of it or nothing.

    Raises:
        UserError: If it cannot be written.
    """
    check_writable(path)
    try:
        write_whole(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise UserError(f"cannot write {path!r}: {error.strerror or error}") from error


def npy_bytes(array: Array) -> bytes:
    """The content of a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def npz_bytes(arrays: Mapping[str, Array]) -> bytes:
    """The content of a .npz file."""
    # Not np.savez: it cannot hold an array that has the name of one of its arguments.
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", npy_bytes(array))
    return buffer.getvalue()


# Text out


def print_json(value: object) -> None:
    """Prints a value as JSON, in ASCII."""
    sys.stdout.write(json_text(value))


def json_text(value: object) -> str:
    """A value as JSON of several lines, in ASCII."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def plain(text: object) -> str:
    """Text from a file in ASCII, without anything that a terminal could obey."""
    return str(text).encode("unicode_escape").decode("ascii")


def bytes_text(count: int) -> str:
    """A number of bytes for people."""
    if count < 1024:
        return f"{count} B"
    if count < 1024**2:
        return f"{count / 1024:.1f} KiB"
    return f"{count / 1024**2:.2f} MiB"


def pairs(entries: Mapping[str, Any]) -> str:
    """Names and values in two columns."""
    width = max(map(len, entries))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in entries.items())

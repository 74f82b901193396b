"""``lutra run``: a model on .npy files, on sound or on text."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lutra.cli import sound, texts
from lutra.cli.common import (
    UserError,
    add_engine,
    add_file,
    check_writable,
    need_finite,
    npy_bytes,
    npz_bytes,
    open_model,
    preprocess_of,
    read_array,
    read_arrays,
    write_file,
)
from lutra.errors import InputError
from lutra.graph import Graph
from lutra.inputs import cast_input
from lutra.node import Array, Value
from lutra.preprocess.audio import AudioPreprocess


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_file(parser)
    parser.add_argument(
        "-i",
        "--input",
        action="append",
        metavar="[NAME=]FILE",
        help="a .npy file, with NAME= for each input where the model has several, or a .npz file "
        "with an array for each",
    )
    parser.add_argument(
        "-o",
        "--output",
        action="append",
        metavar="[NAME=]FILE",
        help="where to write an output: .npy, or one .npz for all outputs",
    )
    sound.add_arguments(parser)
    texts.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="with --wav or --text: print JSON")
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    sound.check_arguments(args)
    texts.check_arguments(args)
    if args.text or args.texts:
        return texts.run(args)
    if args.wav is None:
        for flag, given in (("--input", args.input), ("--output", args.output)):
            if not given:
                raise UserError(
                    f"run needs {flag} FILE, or --wav FILE for a model of sound, or --text TEXT "
                    "for a model of text"
                )
        if args.json:
            raise UserError("--json is for --wav and --text; give one of them, or leave it out")
    graph, session = open_model(args.file, args.threads, args.isa)
    if args.wav is not None:
        return sound.run(args, graph, session)
    sources = sources_of(args.input, [value.name for value in graph.inputs])
    targets, archive = _targets(args.output, graph)
    for path in [archive] if archive else targets.values():
        check_writable(path)
    feeds = {value.name: prepared(sources[value.name], value, graph) for value in graph.inputs}
    names = list(graph.outputs) if archive else list(targets)
    outputs = dict(zip(names, session.run(names, feeds), strict=True))
    if archive:
        write_file(archive, npz_bytes(outputs))
    for name, path in targets.items():
        write_file(path, npy_bytes(outputs[name]))
    return 0


@dataclass(frozen=True)
class Source:
    """Where an input comes from.

    Attributes:
        name: What errors call it: the path of a .npy file, or an archive and the name in it.
        held: The array of an archive; None for a file that was not read yet.
    """

    name: str
    held: Array | None = None

    def read(self) -> Array:
        """The array.

        Raises:
            InputError: If the file cannot be read.
        """
        return read_array(self.name) if self.held is None else self.held


def sources_of(
    words: Sequence[str], names: Sequence[str], flag: str = "input"
) -> dict[str, Source]:
    """Where each input comes from: .npz files hold inputs by name, other files one each.

    Args:
        words: ``FILE`` or ``NAME=FILE`` each.
        names: Of the inputs.
        flag: What errors call the option that gives them.

    Raises:
        InputError: An archive cannot be read, or holds what is no input.
        UserError: An input is given twice, or not at all, or a file is one too many; see
            ``assign``.
    """
    rest: list[str] = []
    found: dict[str, Source] = {}
    for word in words:
        if not word.endswith(".npz") or any(word.startswith(f"{name}=") for name in names):
            rest.append(word)
            continue
        for name, array in read_arrays(word).items():
            if name not in names:
                raise InputError(
                    f"{word!r} holds an array {name!r}, which is no input of the model; name the "
                    f"arrays as its inputs are: {', '.join(names)}"
                )
            if name in found or any(each.startswith(f"{name}=") for each in words):
                raise UserError(f"--{flag} gives {name!r} twice; give each input once")
            found[name] = Source(f"{word}: {name}", array)
    left = [name for name in names if name not in found]
    if rest and not left:
        raise UserError(
            f"--{flag} {rest[0]!r} is one more than the model takes: the archives hold each of "
            f"{', '.join(names)}; leave it out"
        )
    files = assign(rest, left, "input", flag) if rest or left else {}
    return {**found, **{name: Source(path) for name, path in files.items()}}


def prepared(source: Source, value: Value, graph: Graph) -> Array:
    """One input of a model.

    Args:
        source: Of floats or integers as ``Session.run`` takes them, or of what the metadata of the
            model say how to prepare: uint8 images (N, H, W, C), int16 waveforms (N, samples), 8-bit
            features. Integers for a float32 input need such metadata.
        value: The input.
        graph: The model.

    Returns:
        Contiguous, float32 or int32.

    Raises:
        InputError: If the array does not fit.
    """
    path, array = source.name, source.read()
    if value.dtype == "int32":
        return np.ascontiguousarray(cast_input(repr(path), value, array))
    if array.dtype in (np.uint8, np.int8, np.int16):
        preprocess = preprocess_of(graph)
        if preprocess is None and array.dtype == np.uint8:
            raise InputError(
                f"{path!r} holds uint8 values, but the model does not say how to prepare images; "
                f"give float32 as the input {value.name!r} takes it"
            )
        if preprocess is not None and (
            array.dtype == np.uint8 or isinstance(preprocess, AudioPreprocess)
        ):
            return preprocess.apply(array, value.shape)
    if array.dtype.kind != "f":
        raise InputError(
            f"{path!r} holds {array.dtype} values but the input {value.name!r} takes float32; "
            "save it with x.astype(np.float32)"
        )
    need_finite(path, array)
    return np.ascontiguousarray(cast_input(repr(path), value, array))


def assign(
    words: Sequence[str], names: Sequence[str], kind: str, flag: str | None = None
) -> dict[str, str]:
    """Files by input or output name.

    Args:
        words: ``NAME=FILE`` each; the name may be left out where there is one name only.
        names: The names that exist.
        kind: What they are, for errors.
        flag: What errors call the option that gives them; that of their kind by default.

    Raises:
        UserError: If a name is missing, unknown or repeated.
    """
    flag = flag or kind
    result: dict[str, str] = {}
    for word in words:
        # A name may hold an equals sign, and so may the path of a file.
        name = max((n for n in names if word.startswith(f"{n}=")), key=len, default=None)
        path = word if name is None else word[len(name) + 1 :]
        if name is None:
            meant = "=" in word and "/" not in word.partition("=")[0] and not os.path.exists(word)
            if len(names) > 1 or meant:
                raise UserError(
                    f"--{flag} {word!r} names no {kind} of the model; "
                    f"use NAME=FILE with {' or '.join(names)}"
                )
            name = names[0]
        if not path:
            raise UserError(f"--{flag} {word!r} names no file; use NAME=FILE")
        if name in result:
            raise UserError(f"--{flag} gives {name!r} twice; give each {kind} once")
        result[name] = path
    missing = [name for name in names if name not in result]
    if missing and kind == "input":
        raise UserError(
            f"--{flag} lacks {', '.join(missing)}; give NAME=FILE for each of {', '.join(names)}"
        )
    return result


def _targets(words: Sequence[str], graph: Graph) -> tuple[dict[str, str], str | None]:
    """Files by output name, or one archive for all outputs."""
    named = any(words[0].startswith(f"{name}=") for name in graph.outputs)
    if len(words) == 1 and not named and words[0].endswith(".npz"):
        return {}, words[0]
    if len(words) == 1 and not named and len(graph.outputs) > 1:
        raise UserError(
            f"the model has the outputs {', '.join(graph.outputs)}; give -o FILE.npz for all of "
            "them or -o NAME=FILE.npy for each"
        )
    targets = assign(words, graph.outputs, "output")
    if len({os.path.realpath(path) for path in targets.values()}) < len(targets):
        raise UserError("two outputs have the same --output file; give each its own")
    return targets, None

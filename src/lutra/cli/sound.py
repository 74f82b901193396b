"""``--wav`` of ``lutra run`` and ``lutra eval``: sound in, classes out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from lutra.cli.common import (
    UserError,
    at_least,
    check_writable,
    npy_bytes,
    plain,
    print_json,
    write_file,
)
from lutra.errors import InputError
from lutra.graph import Graph
from lutra.node import Array
from lutra.preprocess.audio import AudioPreprocess, read_wav
from lutra.runtime.session import Session
from lutra.stream import Answer, Stream, has_softmax, need_audio, probabilities

_SHOWN: Final = 3  # classes of a file
_EVERY: Final = 5  # hops from an answer of a stream to the next
_STREAM_FLAGS: Final = ("every", "smooth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``lutra run`` for sound."""
    parser.add_argument(
        "--wav",
        nargs="+",
        metavar="FILE",
        help="for a model of sound: print the class of each WAV file, or write the scores (-o)",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="with --wav: an answer for every window of one recording of any length",
    )
    parser.add_argument(
        "--every",
        type=at_least(1),
        metavar="N",
        help=f"with --stream: hops of the front end between answers (default: {_EVERY})",
    )
    parser.add_argument(
        "--smooth",
        type=at_least(1),
        metavar="N",
        help="with --stream: answers whose probabilities are averaged (default: 1)",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Finds arguments that do not go together.

    Raises:
        UserError: If there are some.
    """
    if args.wav is None:
        for name in ("stream", *_STREAM_FLAGS):
            if getattr(args, name):
                raise UserError(f"--{name} is for --wav; give --wav FILE, or leave it out")
        return
    if args.input:
        raise UserError("--wav stands for --input; give one of them")
    if args.output and len(args.output) > 1:
        raise UserError("with --wav there is one --output, for the scores; give it once")
    if args.stream and len(args.wav) > 1:
        raise UserError(f"--stream takes one recording, not {len(args.wav)}; give one --wav FILE")
    for name in _STREAM_FLAGS:
        if getattr(args, name) is not None and not args.stream:
            raise UserError(f"--{name} is for --stream; give that too, or leave it out")


def run(args: argparse.Namespace, graph: Graph, session: Session) -> int:
    """Runs a model on WAV files."""
    preprocess = need_audio(graph)
    target = args.output[0].removeprefix(f"{graph.outputs[0]}=") if args.output else None
    if target is not None:
        check_writable(target)
    if args.stream:
        answers = _stream(args, session)
        scores = np.stack([answer.scores for answer in answers])
        entries = [
            {"seconds": a.seconds, "label": a.label, "probability": float(a.probabilities.max())}
            for a in answers
        ]
        lines = [f"{a.seconds:8.2f} s  {ranked(graph, a.probabilities, 1)}" for a in answers]
    else:
        clips = read_clips(args.wav, preprocess)
        scores = _scores(session, preprocess.apply(clips, (None, *graph.inputs[0].shape[1:])))
        shares = scores if has_softmax(graph) else probabilities(scores)
        entries = [
            {
                "file": path,
                "label": label_of(graph, int(row.argmax())),
                "probability": float(row.max()),
                "probabilities": {label_of(graph, i): float(p) for i, p in enumerate(row)},
            }
            for path, row in zip(args.wav, shares, strict=True)
        ]
        lines = [
            f"{plain(path)}: {ranked(graph, row)}"
            for path, row in zip(args.wav, shares, strict=True)
        ]
    if target is not None:
        write_file(target, npy_bytes(scores))
    if args.json:
        print_json({"model": args.file, "answers": entries})
    elif target is None:
        print("\n".join(lines))
    return 0


def read_clips(paths: Sequence[str], preprocess: AudioPreprocess) -> Array:
    """Recordings of the right rate, none longer than a clip.

    Returns:
        float32 (files, samples), the shorter ones with zeros at the end.

    Raises:
        InputError: If one cannot be read or does not fit.
    """
    clips = np.zeros((len(paths), preprocess.samples), np.float32)
    for row, path in zip(clips, paths, strict=True):
        samples = read_recording(path, preprocess)
        if len(samples) > len(row):
            raise InputError(
                f"{path!r} has {len(samples)} samples ({len(samples) / preprocess.rate:.2f} s), "
                f"but the model looks at {len(row)} ({len(row) / preprocess.rate:.2f} s); give "
                "--stream for answers all along, or cut it"
            )
        row[: len(samples)] = samples
    return clips


def read_recording(path: str, preprocess: AudioPreprocess) -> Array:
    """A recording of any length, float32 (n,).

    Raises:
        InputError: If it cannot be read or has another rate than the model.
    """
    samples, rate = read_wav(path)
    if rate != preprocess.rate:
        raise InputError(
            f"{path!r} has {rate} samples a second, but the model takes {preprocess.rate}; convert "
            f"it first, for example with ffmpeg -i IN.wav -ac 1 -ar {preprocess.rate} OUT.wav"
        )
    return samples


def read_folder(folder: str, graph: Graph, limit: int | None) -> tuple[Array, Array]:
    """The recordings of a folder that has a folder for each class.

    Args:
        folder: Holds CLASS/*.wav; folders of classes may be missing.
        graph: The model.
        limit: Use the first ones only.

    Returns:
        Clips as ``read_clips`` gives them, and labels (N,).

    Raises:
        InputError: If a folder is no class of the model, or there is no recording.
        UserError: If the model names no classes.
    """
    preprocess = need_audio(graph)
    classes = graph.metadata.get("classes")
    if not isinstance(classes, list) or not classes:
        raise UserError("--wav needs a model that names its classes in its metadata")
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise InputError(f"cannot read {folder!r}: {error.strerror}; give a folder") from error
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise InputError(
            f"{folder!r} holds the folder {unknown[0]!r}, which is no class of the model; its "
            f"classes are {', '.join(map(str, classes))}"
        )
    pairs = [
        (str(path), classes.index(name))
        for name in found
        for path in sorted(Path(folder, name).glob("*.wav"))
    ][:limit]
    if not pairs:
        raise InputError(f"{folder!r} holds no recordings CLASS/*.wav; give at least one")
    clips = read_clips([path for path, _ in pairs], preprocess)
    return clips, np.array([label for _, label in pairs])


def label_of(graph: Graph, index: int) -> str:
    """The name of a class, or its number where the metadata have none."""
    classes: Any = graph.metadata.get("classes")
    named = isinstance(classes, list) and index < len(classes)
    return str(classes[index]) if named else str(index)


def _scores(session: Session, inputs: Array) -> Array:
    """Scores of inputs one by one, which suits models of any batch."""
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x[None]})[0] for x in inputs])


def _stream(args: argparse.Namespace, session: Session) -> list[Answer]:
    """The answers all along one recording."""
    stream = Stream(session, every=args.every or _EVERY, smooth=args.smooth or 1)
    pre, path = stream.preprocess, args.wav[0]
    samples = read_recording(path, pre)
    answers = stream.push(samples)
    if not answers:
        raise InputError(
            f"{path!r} has {len(samples) / pre.rate:.2f} s, less than a window of "
            f"{pre.samples / pre.rate:.2f} s; leave --stream out for a clip"
        )
    return answers


def ranked(graph: Graph, row: Array, count: int = _SHOWN) -> str:
    """The classes with the largest probabilities (classes,), for people."""
    best = np.argsort(-row, kind="stable")[:count]
    return ", ".join(f"{plain(label_of(graph, int(i)))} {100 * row[i]:.1f} %" for i in best)

"""``--text`` of ``lutra run`` and ``lutra eval``: text in, vectors or classes out."""

from __future__ import annotations

import argparse
import gzip
import lzma
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from lutra.cli.common import (
    UserError,
    check_writable,
    npy_bytes,
    open_model,
    plain,
    print_json,
    write_file,
)
from lutra.cli.metrics import Top1
from lutra.cli.sound import ranked
from lutra.errors import InputError
from lutra.formatting import table
from lutra.node import Array
from lutra.preprocess.text import takes_text
from lutra.sentences import SentenceEncoder

_SHOWN: Final = 6  # values of a vector
_WIDTH: Final = 60  # characters of a text
_MOST: Final = 16  # texts whose similarities are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``lutra run`` for text."""
    parser.add_argument(
        "--text",
        action="append",
        metavar="TEXT",
        help="for a model of text: print its vector or class, or write it (-o); may be repeated, "
        "which shows cosine similarities too",
    )
    parser.add_argument(
        "--texts", metavar="FILE", help="the same for every line of a file; - is standard input"
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Finds arguments that do not go together.

    Raises:
        UserError: If there are some.
    """
    given = [flag for flag, value in (("--text", args.text), ("--texts", args.texts)) if value]
    if len(given) > 1:
        raise UserError("--texts stands for --text; give one of them")
    for flag, value in (("--input", args.input), ("--wav", args.wav)):
        if given and value:
            raise UserError(f"{given[0]} stands for {flag}; give one of them")
    if given and args.output and len(args.output) > 1:
        raise UserError(f"with {given[0]} there is one --output; give it once")


def run(args: argparse.Namespace) -> int:
    """Runs a model on texts."""
    encoder = _open(args)
    texts = args.text or read_lines(args.texts)
    (name,) = encoder.session.graph.outputs
    target = args.output[0].removeprefix(f"{name}=") if args.output else None
    if target is not None:
        check_writable(target)
    classifies = encoder.classes is not None
    made = encoder.encode(texts)
    if target is not None:
        write_file(target, npy_bytes(made))
    if args.json:
        entries = _classes(encoder, texts, made) if classifies else _vectors(texts, made)
        report: dict[str, Any] = {"model": args.file, "answers": entries}
        if not classifies:
            report["similarities"] = encoder.similarity(made, made).tolist()
        print_json(report)
    elif target is None:
        graph = encoder.session.graph
        if classifies:
            rows = [ranked(graph, row) for row in encoder.shares(made)]
        else:
            rows = [_vector(row) for row in made]
        lines = [f"{_short(text)}: {row}" for text, row in zip(texts, rows, strict=True)]
        if not classifies and 1 < len(texts) <= _MOST:
            lines += ["", "cosine similarities", _similarities(encoder, made)]
        print("\n".join(lines))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Measures a classifier of text on labelled texts."""
    encoder = _open(args)
    labels, texts = read_tsv(args.text, encoder.classes, args.limit)
    metric = Top1(labels, encoder.dimension, args.text)
    encoder.encode(texts[: args.batch], args.batch)  # the first run is slower than the others
    start = time.perf_counter()
    scores = encoder.encode(texts, args.batch)
    spent = time.perf_counter() - start
    metric.add(scores)
    session = encoder.session
    report = {
        "metric": metric.name,
        "texts": len(texts),
        **metric.entries(),
        "ms_per_text": 1000 * spent / len(texts),
        "batch": args.batch,
        "threads": session.threads,
        "isa": session.isa,
    }
    if args.json:
        print_json({"file": args.file, **report})
    else:
        print(
            f"{plain(args.file)}: top-1 {100 * report['top1']:.2f}% ({report['correct']} of "
            f"{len(texts)} texts), {report['ms_per_text']:.4g} ms per text with its tokens "
            f"(batch {args.batch}, {session.threads} threads, {session.isa})"
        )
    return 0


def read_lines(path: str) -> list[str]:
    """The lines of a text file in UTF-8, which may be packed as .gz or .xz; - is standard input.

    Raises:
        InputError: If it cannot be read or is empty.
    """
    try:
        if path == "-":
            data = sys.stdin.buffer.read()
        else:
            opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path[-3:], open)
            with opener(path, "rb") as file:
                data = file.read()
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {path!r}: {reason}; check the path") from error
    except ValueError as error:
        raise InputError(f"{path!r} is not text in UTF-8 ({error}); convert it first") from error
    # Not splitlines: a text may hold other characters that Unicode calls ends of lines.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if lines == [""]:
        raise InputError(f"{path!r} holds no text; give one text a line")
    return lines


def read_tsv(
    path: str, classes: Sequence[str] | None, limit: int | None = None
) -> tuple[Array, list[str]]:
    """Labels and texts of a file with a label, a tab and a text on each line.

    Args:
        path: The file, see ``read_lines``.
        classes: The names of the classes; a label is one of them or a number.
        limit: Use the first lines only.

    Returns:
        Labels int64 (n,) and n texts.

    Raises:
        InputError: If a line is something else.
    """
    labels: list[int] = []
    texts: list[str] = []
    names = {name: index for index, name in enumerate(classes or ())}
    for number, line in enumerate(read_lines(path)[:limit], 1):
        cells = line.split("\t")
        if len(cells) != 2:
            raise InputError(
                f"line {number} of {path!r} has {len(cells)} columns; give a label, a tab and a "
                "text on each line"
            )
        label, text = cells
        if label not in names and not (label.isascii() and label.isdigit() and len(label) < 10):
            known = f"one of {', '.join(names)} or " if names else ""
            raise InputError(
                f"line {number} of {path!r} has the label {label[:40]!r}; give {known}the number "
                "of a class, a tab and a text on each line"
            )
        labels.append(names[label] if label in names else int(label))
        texts.append(text)
    return np.array(labels), texts


def _open(args: argparse.Namespace) -> SentenceEncoder:
    graph, session = open_model(args.file, args.threads, args.isa)
    if not takes_text(graph.metadata):
        raise UserError(
            "the model takes no text; export it with metadata={'preprocess': "
            "lutra.sentences.text_preprocess(tokenizer)}"
        )
    return SentenceEncoder(session)


def _classes(encoder: SentenceEncoder, texts: Sequence[str], scores: Array) -> list[dict[str, Any]]:
    names = encoder.classes or ()
    return [
        {
            "text": text,
            "label": names[int(row.argmax())],
            "probability": float(row.max()),
            "probabilities": dict(zip(names, row.tolist(), strict=True)),
        }
        for text, row in zip(texts, encoder.shares(scores), strict=True)
    ]


def _vectors(texts: Sequence[str], vectors: Array) -> list[dict[str, Any]]:
    return [
        {"text": text, "vector": row.tolist()} for text, row in zip(texts, vectors, strict=True)
    ]


def _vector(row: Array) -> str:
    """The beginning of a vector."""
    more = " ..." if len(row) > _SHOWN else ""
    values = " ".join(f"{value:.4f}" for value in row[:_SHOWN])
    return f"{len(row)} values of length {np.linalg.norm(row):.4g}: {values}{more}"


def _similarities(encoder: SentenceEncoder, vectors: Array) -> str:
    numbers = [str(index) for index in range(1, len(vectors) + 1)]
    rows = encoder.similarity(vectors, vectors)
    cells = [[n, *(f"{x:.3f}" for x in row)] for n, row in zip(numbers, rows, strict=True)]
    return table([["text", *numbers], *cells])


def _short(text: str) -> str:
    """A text for the terminal, in quotes and without anything that it could obey."""
    cut = text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
    return f'"{"".join(c if c.isprintable() else plain(c) for c in cut)}"'

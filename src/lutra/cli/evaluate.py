"""``lutra eval``: the accuracy of a classifier."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from lutra.cli.common import (
    UserError,
    add_engine,
    add_file,
    at_least,
    need_finite,
    open_model,
    plain,
    print_json,
    read_array,
)
from lutra.errors import InputError
from lutra.graph import Graph
from lutra.ops.registry import Array
from lutra.preprocess import ImagePreprocess
from lutra.session import Session
from lutra.text import shape_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_file(parser)
    parser.add_argument(
        "--images",
        required=True,
        metavar="X.npy",
        help="uint8 (N, H, W, C), or float32 as the model takes it",
    )
    parser.add_argument("--labels", required=True, metavar="Y.npy", help="whole numbers (N,)")
    parser.add_argument("--batch", type=at_least(1), default=64, metavar="N", help="default: 64")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="use the first N images")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    graph, session = open_model(args.file, args.threads, args.isa)
    images, labels = _data(args.images, args.labels, args.limit, _classes(graph))
    report = evaluate(graph, session, images, labels, batch=args.batch, name=args.images)
    if args.json:
        print_json({"file": args.file, **report})
    else:
        print(
            f"{plain(args.file)}: top-1 {100 * report['top1']:.2f}% "
            f"({report['correct']} of {report['images']} images), "
            f"{report['ms_per_image']:.4g} ms per image "
            f"(batch {report['batch']}, {report['threads']} threads, {report['isa']})"
        )
    return 0


def evaluate(
    graph: Graph,
    session: Session,
    images: Array,
    labels: Array,
    *,
    batch: int = 64,
    name: str = "images",
) -> dict[str, Any]:
    """Runs a classifier on images and counts the right answers.

    Args:
        graph: The model: one input, one output (N, classes).
        session: A session for it.
        images: uint8 (N, H, W, C), or float32 as the model takes it.
        labels: Whole numbers (N,).
        batch: Images per run; a batch that the model fixes wins.
        name: What to call the images in errors.

    Returns:
        ``images``, ``correct``, ``top1``, ``ms_per_image`` (time inside the engine alone),
        ``batch``, ``threads`` and ``isa``.

    Raises:
        InputError: If the images do not fit the model.
        FormatError: If the metadata of the model are not sound.
    """
    value = graph.inputs[0]
    preprocess = ImagePreprocess.from_metadata(graph.metadata)
    if images.dtype == np.uint8 and preprocess is None:
        raise InputError(
            f"{name!r} holds uint8 images, but the model does not say how to prepare them; give "
            "float32 inputs, or export the model with metadata={'preprocess': ...}"
        )
    if images.dtype not in (np.uint8, np.float32):
        raise InputError(f"{name!r} holds {images.dtype} values; give uint8 images or float32")
    fixed = value.shape[0]
    batch = fixed or min(batch, len(images))
    correct, spent = 0, 0.0
    for first in range(0, len(images), batch):
        part = np.asarray(images[first : first + batch])
        need_finite(name, part)
        ready = part if preprocess is None else preprocess.apply(part, (None, *value.shape[1:]))
        if fixed and len(ready) < fixed:  # the last images again, to fill it up
            ready = np.resize(ready, (fixed, *ready.shape[1:]))
        ready = np.ascontiguousarray(ready)
        if first == 0:
            session.run(None, {value.name: ready})  # the first run is slower than the others
        start = time.perf_counter()
        (scores,) = session.run(None, {value.name: ready})
        spent += time.perf_counter() - start
        correct += int((scores.argmax(axis=1)[: len(part)] == labels[first : first + batch]).sum())
    return {
        "images": len(images),
        "correct": correct,
        "top1": correct / len(images),
        "ms_per_image": 1000 * spent / len(images),
        "batch": batch,
        "threads": session.threads,
        "isa": session.isa,
    }


def _classes(graph: Graph) -> int:
    """How many classes the model tells apart."""
    shapes = [graph.values[name].shape for name in graph.outputs]
    count = shapes[0][-1]
    if len(graph.inputs) != 1 or len(shapes) != 1 or len(shapes[0]) != 2 or count is None:
        raise UserError(
            f"eval needs a model with one input and one output (N, classes); this one has "
            f"{len(graph.inputs)} inputs and the outputs {', '.join(map(shape_text, shapes))}"
        )
    return count


def _data(
    images_path: str, labels_path: str, limit: int | None, classes: int
) -> tuple[Array, Array]:
    """Images and labels of the same, positive number."""
    images, labels = read_array(images_path), read_array(labels_path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(
            f"{labels_path!r} holds {labels.dtype} values of shape {labels.shape}; labels must be "
            "whole numbers (N,)"
        )
    if images.ndim < 2 or len(images) != len(labels):
        raise InputError(
            f"{images_path!r} has shape {images.shape} and {labels_path!r} has shape "
            f"{labels.shape}; give one label for each image"
        )
    images, labels = images[:limit], labels[:limit]
    if not len(images):
        raise InputError(f"{images_path!r} holds no images; give at least one")
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"{labels_path!r} holds labels {labels.min()}..{labels.max()}, but the model has "
            f"{classes} classes; labels must be in 0..{classes - 1}"
        )
    return images, labels

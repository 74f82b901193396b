"""``lutra eval``: how good a model is on data with known answers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lutra.cli import sound, texts
from lutra.cli.common import (
    UserError,
    above_zero,
    add_engine,
    add_file,
    at_least,
    need_finite,
    open_model,
    plain,
    preprocess_of,
    print_json,
    read_array,
    read_arrays,
)
from lutra.cli.metrics import (
    Metric,
    Psnr,
    Top1,
    classes_of,
    is_of_images,
    need_images,
    output_of,
)
from lutra.cli.run import assign, sources_of
from lutra.errors import InputError
from lutra.graph import Graph
from lutra.inputs import cast_input
from lutra.node import Array
from lutra.preprocess.audio import AudioPreprocess
from lutra.preprocess.text import takes_text
from lutra.runtime.session import Session

_EPILOG = """\
classifiers, also of point clouds (float32 inputs):
  lutra eval FILE --images X.npy --labels Y.npy
classifiers of sound, X with waveforms (N, samples), or a folder with a folder for each class:
  lutra eval FILE --inputs X.npy --labels Y.npy
  lutra eval FILE --wav FOLDER
classifiers of text, X with a label, a tab and a text on each line:
  lutra eval FILE --text X.tsv
several inputs, of integers too; of several outputs one:
  lutra eval FILE --inputs ids=A.npy --inputs mask=B.npy --labels Y.npy --output logits
  lutra eval FILE --inputs X.npz --labels Y.npy, X with an array for each input
images from images, of several sizes (an array for each, the same names in both archives):
  lutra eval FILE --metric psnr --images X.npz --targets Y.npz --border 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_file(parser)
    parser.add_argument(
        "--metric",
        choices=("top1", "psnr"),
        default="top1",
        help="top1: share of right labels (default); psnr: dB of images",
    )
    parser.add_argument(
        "--images",
        "--inputs",
        dest="inputs",
        action="append",
        metavar="[NAME=]X",
        help=".npy: uint8 (N, H, W, C), int16 (N, samples), or floats or integers as the model "
        "takes them, with NAME= for each input where it has several; .npz: an array without the "
        "axis N for each sample, of any size",
    )
    parser.add_argument(
        "--output", metavar="NAME", help="what is measured, where the model has several outputs"
    )
    parser.add_argument(
        "--labels",
        "--targets",
        dest="targets",
        metavar="Y",
        help="top1: .npy, whole numbers (N,); psnr: .npy or .npz with images, uint8 (H, W, C) or "
        "float32 (C, H, W)",
    )
    parser.add_argument(
        "--wav", metavar="FOLDER", help="WAV files FOLDER/CLASS/*.wav instead of --inputs, --labels"
    )
    parser.add_argument(
        "--text",
        metavar="X.tsv",
        help="labels and texts instead of --inputs, --labels; also .tsv.gz and .tsv.xz, - is "
        "standard input",
    )
    parser.add_argument(
        "--border", type=at_least(0), metavar="S", help="psnr: leave out S pixels at every side"
    )
    parser.add_argument(
        "--luminance", action="store_true", help="psnr: of the luminance of RGB images (BT.601)"
    )
    parser.add_argument(
        "--peak", type=above_zero, metavar="P", help="psnr: largest value of float targets (1)"
    )
    parser.add_argument("--batch", type=at_least(1), default=64, metavar="N", help="default: 64")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="use the first N samples")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.text is not None:
        if args.inputs or args.targets or args.wav or args.metric != "top1":
            raise UserError("--text stands for --inputs and --labels of top1; leave those out")
        _no_image_flags(args)
        return texts.evaluate(args)
    if args.wav is not None and (args.inputs or args.targets or args.metric != "top1"):
        raise UserError("--wav stands for --inputs and --labels of top1; leave those out")
    if args.wav is None and not (args.inputs and args.targets):
        answers = "--labels Y" if args.metric == "top1" else "--targets Y"
        raise UserError(
            f"eval has --inputs, and needs {answers} beside it: what the model should answer"
            if args.inputs
            else f"eval has {answers[:-2]}, and needs --inputs X beside it: what the model is given"
            if args.targets
            else f"eval needs --inputs X and {answers}, or --wav FOLDER, or --text X.tsv"
        )
    graph, session = open_model(args.file, args.threads, args.isa)
    output = output_of(graph, args.output)
    inputs, metric = (_images if args.metric == "psnr" else _labelled)(args, graph, output)
    name = args.wav or args.inputs[0]
    report = evaluate(graph, session, inputs, metric, batch=args.batch, name=name, output=output)
    if args.json:
        print_json({"file": args.file, **report})
    else:
        what = "image" if is_of_images(graph) else "sample"
        print(
            f"{plain(args.file)}: {metric.text()}, {report['ms_per_image']:.4g} ms per {what} "
            f"(batch {report['batch']}, {report['threads']} threads, {report['isa']})"
        )
    return 0


def evaluate(
    graph: Graph,
    session: Session,
    inputs: Array | Sequence[Array] | Mapping[str, Array],
    metric: Metric,
    *,
    batch: int = 64,
    name: str = "images",
    output: str | None = None,
) -> dict[str, Any]:
    """Runs a model on samples, and measures one of its outputs.

    Args:
        graph: The model.
        session: A session for it.
        inputs: As ``Session.run`` takes them, or what the front end of a model of one input
            prepares: uint8 (N, H, W, C), int16 (N, samples); or a list of samples of any size, each
            with N = 1. Arrays by name where the model has several inputs.
        metric: What to measure.
        batch: Samples per run; a batch that the model fixes wins, and a list is run one by one.
        name: What to call the inputs in errors.
        output: Which output; by default the first.

    Returns:
        ``metric``, its entries, ``images`` (how many), ``ms_per_image`` (time inside the engine
        alone), ``batch``, ``threads`` and ``isa``.

    Raises:
        InputError: If the inputs do not fit the model.
        FormatError: If the metadata of the model are not sound.
    """
    count = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)
    measured = [graph.outputs[0] if output is None else output]
    fixed = graph.inputs[0].shape[0]
    batch = fixed or (1 if isinstance(inputs, list) else min(batch, count))
    spent, known = 0.0, None
    for feeds, samples in _ready(graph, inputs, batch, name):
        sizes = [array.shape[1:] for array in feeds.values()]
        if sizes != known:  # the first run of a size is slower than the others
            session.run(measured, feeds)
            known = sizes
        start = time.perf_counter()
        (outputs,) = session.run(measured, feeds)
        spent += time.perf_counter() - start
        metric.add(outputs[:samples])
    return {
        "metric": metric.name,
        "images": count,
        **metric.entries(),
        "ms_per_image": 1000 * spent / count,
        "batch": batch,
        "threads": session.threads,
        "isa": session.isa,
    }


def _ready(
    graph: Graph, inputs: Array | Sequence[Array] | Mapping[str, Array], batch: int, name: str
) -> Iterator[tuple[dict[str, Array], int]]:
    """What every run is given, and how many samples of it count."""
    value, fixed = graph.inputs[0], graph.inputs[0].shape[0]
    single = len(graph.inputs) == 1 and not isinstance(inputs, Mapping)
    preprocess = preprocess_of(graph) if single and value.dtype == "float32" else None
    for part in _parts(inputs, batch):
        feeds: dict[str, Array] = {}
        for end in graph.inputs:
            array = part[end.name] if isinstance(part, Mapping) else part
            samples = len(array)
            if end.dtype == "float32":
                _check(array, name, preprocess)
            if preprocess is not None:
                array = preprocess.apply(array, (None, *end.shape[1:]))
            array = cast_input(repr(name), end, array)
            if fixed and len(array) < fixed:  # the last samples again, to fill it up
                array = np.resize(array, (fixed, *array.shape[1:]))
            feeds[end.name] = np.ascontiguousarray(array)
        yield feeds, samples


def _parts(
    inputs: Array | Sequence[Array] | Mapping[str, Array], batch: int
) -> Iterator[Array | Mapping[str, Array]]:
    """The inputs of every run."""
    if isinstance(inputs, Mapping):
        for first in range(0, len(next(iter(inputs.values()))), batch):
            yield {name: np.asarray(x[first : first + batch]) for name, x in inputs.items()}
    elif isinstance(inputs, np.ndarray):
        for first in range(0, len(inputs), batch):
            yield np.asarray(inputs[first : first + batch])
    else:
        yield from inputs


def _check(part: Array, name: str, preprocess: object) -> None:
    """Raises InputError unless these are inputs that the model or its front end takes."""
    if isinstance(preprocess, AudioPreprocess):  # which says itself what it takes
        need_finite(name, part)
        return
    if part.dtype == np.uint8 and preprocess is None:
        raise InputError(
            f"{name!r} holds uint8 values, but the model does not say how to prepare them; give "
            "float32 inputs, or export the model with metadata={'preprocess': ...}"
        )
    if part.dtype != np.uint8 and part.dtype.kind != "f":
        known = "float32" if preprocess is None else "uint8 images or float32"
        raise InputError(
            f"{name!r} holds {part.dtype} values; give {known}, such as x.astype(np.float32)"
        )
    need_finite(name, part)


def _read(path: str, limit: int | None) -> tuple[Array | list[Array], list[str]]:
    """The samples of a .npy file, or of a .npz file as a list, and a name for each."""
    if path.endswith(".npz"):
        arrays = read_arrays(path)
        chosen = sorted(arrays)[:limit]
        return [arrays[name] for name in chosen], chosen
    array = read_array(path)
    if array.ndim < 1:
        raise InputError(f"{path!r} holds one number; give an array with an entry for each sample")
    return array[:limit], [str(i) for i in range(len(array[:limit]))]


def _need_samples(path: str, count: int) -> None:
    if not count:
        raise InputError(f"{path!r} holds no samples; give at least one")


def _as_batches(inputs: Array | list[Array], graph: Graph) -> Array | list[Array]:
    """Samples of a list with the axis N in front; where the model takes images, planes get C."""
    if isinstance(inputs, np.ndarray):
        return inputs
    batches = []
    for sample in inputs:
        if sample.ndim == 2 and len(graph.inputs[0].shape) == 4:
            sample = sample[:, :, None] if sample.dtype == np.uint8 else sample[None]
        batches.append(sample[None])
    return batches


def _no_image_flags(args: argparse.Namespace) -> None:
    for flag, given in (
        ("--border", args.border is not None),
        ("--luminance", args.luminance),
        ("--peak", args.peak is not None),
    ):
        if given:
            raise UserError(f"{flag} is for --metric psnr; leave it out, or give --metric psnr")


def _labelled(
    args: argparse.Namespace, graph: Graph, output: str
) -> tuple[Array | list[Array] | dict[str, Array], Metric]:
    """Inputs and labels of the same, positive number."""
    _no_image_flags(args)
    classes = classes_of(graph, output)
    if args.wav is not None:
        clips, labels = sound.read_folder(args.wav, graph, args.limit)
        return clips, Top1(labels, classes, args.wav, "samples")
    labels = read_array(args.targets)
    what = "images" if is_of_images(graph) else "samples"
    metric = Top1(labels[: args.limit], classes, args.targets, what)
    if len(graph.inputs) > 1:
        return _several(args, graph, len(labels)), metric
    path = _only_input(args, graph)
    inputs, _ = _read(path, None)
    if len(inputs) != len(labels) or getattr(inputs, "ndim", 2) < 2:
        held = f"{len(inputs)} arrays" if isinstance(inputs, list) else f"shape {inputs.shape}"
        raise InputError(
            f"{path!r} has {held} and {args.targets!r} has shape {labels.shape}; give one "
            f"label for each {'image' if is_of_images(graph) else 'sample'}"
        )
    inputs = inputs[: args.limit]
    _need_samples(path, len(inputs))
    return _as_batches(inputs, graph), metric


def _several(args: argparse.Namespace, graph: Graph, count: int) -> dict[str, Array]:
    """The arrays of a model of several inputs, with an entry for each of ``count`` targets."""
    names = [value.name for value in graph.inputs]
    if takes_text(graph.metadata) and not any("=" in word for word in args.inputs):
        raise UserError(
            "the model takes text; give --text, or its inputs as numbers, as NAME=FILE for each of "
            f"{', '.join(names)}"
        )
    sources = sources_of(args.inputs, names, "inputs")
    arrays = {}
    for name in names:
        path, array = sources[name].name, sources[name].read()
        if array.ndim < 1 or len(array) != count:
            raise InputError(
                f"{path!r} has shape {array.shape} and {args.targets!r} {count} entries; give one "
                "target for each sample"
            )
        arrays[name] = array[: args.limit]
    _need_samples(args.targets, len(next(iter(arrays.values()))))
    return arrays


def _only_input(args: argparse.Namespace, graph: Graph) -> str:
    """The file of a model of one input."""
    value = graph.inputs[0]
    return assign(args.inputs, [value.name], "input", "inputs")[value.name]


def _images(
    args: argparse.Namespace, graph: Graph, output: str
) -> tuple[Array | list[Array], Metric]:
    """Input images and the images that they should become."""
    need_images(graph, output)
    path = _only_input(args, graph)
    inputs, names = _read(path, args.limit)
    targets, target_names = _read(args.targets, args.limit)
    if names != target_names:
        raise InputError(
            f"{path!r} and {args.targets!r} hold {len(names)} and {len(target_names)} "
            "images, or images of other names; give one target of the same name for each input"
        )
    _need_samples(path, len(inputs))
    for name, target in zip(names, targets, strict=True):
        if args.peak is not None and target.dtype == np.uint8:
            raise UserError(
                f"--peak is for float targets, but {args.targets!r} ({name}) holds uint8 images, "
                "whose peak is 255; leave it out"
            )
    metric = Psnr(
        list(targets),
        [f"{args.targets!r} ({name})" for name in names],
        border=args.border or 0,
        luminance=args.luminance,
        peak=1.0 if args.peak is None else args.peak,
    )
    return _as_batches(inputs, graph), metric

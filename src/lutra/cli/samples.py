"""The samples of ``lutra optimize`` and ``lutra convert``: arrays, images, sounds or texts."""

from __future__ import annotations

import argparse
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from lutra.cli.calibration import in_batches, read_inputs
from lutra.cli.common import UserError, at_least, need_finite, read_array
from lutra.cli.folders import files_of
from lutra.cli.pictures import PICTURES, read_pictures
from lutra.cli.sound import read_clips
from lutra.cli.texts import read_lines
from lutra.errors import FormatError, InputError
from lutra.format import load_graph
from lutra.node import Array
from lutra.preprocess.audio import AudioPreprocess
from lutra.preprocess.text import TextPreprocess, takes_text, text_preprocess

_BATCH: Final = 64
_SOUNDS: Final = (".wav",)
_TEXTS: Final = (".tsv", ".txt")
_PACKED: Final = (".gz", ".xz")
#: Where labels come from that stand beside the samples.
FOLDERS: Final = "folders"
COLUMN: Final = "column"
_LENGTH: Final = 256
#: Metadata of a file that hold for a model that is made of it.
_CARRIED: Final = ("preprocess", "classes", "prompts")
_SHOWN: Final = 200  # characters of a text in a report


@dataclass(frozen=True)
class Samples:
    """Inputs of a model.

    Attributes:
        batches: The arguments of ``forward`` by position.
        labels: Of the samples in the order of the batches; None without.
        names: What a report calls the samples: files, texts; None of arrays.
        metadata: For the file that is written: how such samples become inputs, and classes.
        dynamic_axes: Axes in which the samples differ, beside the batch.
        order: Places of the samples in the file, where the batches have another order.
    """

    batches: Sequence[tuple[Array, ...]]
    labels: Array | None = None
    names: Sequence[str] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dynamic_axes: tuple[int, ...] = ()
    order: Array | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say how samples are read."""
    parser.add_argument(
        "--size", type=_size, metavar="H,W", help="images: cut and scale them to this size"
    )
    parser.add_argument(
        "--mean", type=_floats, default=[0.0], metavar="M,...", help="images: subtracted from 0..1"
    )
    parser.add_argument(
        "--std", type=_floats, default=[1.0], metavar="S,...", help="images: divide, after --mean"
    )
    parser.add_argument(
        "--preprocess",
        metavar="FILE",
        help="sounds and texts: a .lutra file whose preprocessing is taken, or a .json file with "
        "such an entry (default: that of a MODEL that is a .lutra file)",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="texts: the tokenizer.json, in place of --preprocess"
    )
    parser.add_argument(
        "--max-length",
        type=at_least(1),
        metavar="N",
        help=f"texts: cut them to so many tokens (default: as in --preprocess, or {_LENGTH}); "
        "language models: the most tokens of a text (default: the model's, 2048 at most)",
    )
    parser.add_argument(
        "--fill",
        action="store_true",
        help="texts: fill all up to --max-length, for models of a fixed length",
    )


def read_samples(args: argparse.Namespace, model: Any, labels: str | None = None) -> Samples:
    """The samples of ``--data``.

    Args:
        args: Parsed, with ``data`` and ``model`` and the arguments above.
        model: The module that takes the samples.
        labels: A file of labels, FOLDERS, COLUMN or None.

    Returns:
        The samples, in batches.

    Raises:
        LutraError: If they cannot be read, or arguments are for samples of another kind.
    """
    path: str = args.data
    kind = _kind(path)
    check_arguments(args, kind, labels)
    if kind == "arrays":
        made = Samples(in_batches(read_inputs(path, model.forward), _BATCH))
    elif kind == "images":
        pictures, places = read_pictures(path, args.size, args.mean, args.std)
        names = _names(files_of(path, PICTURES)[0], path)
        made = Samples(in_batches({"x": pictures}, _BATCH), places, names)
    elif kind == "sounds":
        made = _sounds(args, model, labels == FOLDERS)
    else:
        made = _texts(args, model, labels == COLUMN)
    if args.model.endswith(".lutra"):
        source = load_graph(args.model).metadata
        carried = {name: source[name] for name in _CARRIED if name in source}
        made = replace(made, metadata={**carried, **made.metadata})
    if labels is None:
        return replace(made, labels=None)
    if labels in (FOLDERS, COLUMN):
        return made
    own = np.array(read_array(labels))
    need_finite(labels, own)
    if made.order is not None and len(own) == len(made.order):
        own = own[made.order]
    return replace(made, labels=own)


def _kind(path: str) -> str:
    """What the samples are."""
    if os.path.isdir(path):
        sounds, pictures = (bool(files_of(path, ends)[0]) for ends in (_SOUNDS, PICTURES))
        if sounds and pictures:
            raise InputError(f"{path!r} holds images and WAV files; give a folder of one kind")
        return "sounds" if sounds else "images"
    name = path.lower()
    for ending in _PACKED:
        name = name.removesuffix(ending)
    return "texts" if name.endswith(_TEXTS) else "arrays"


def check_arguments(args: argparse.Namespace, kind: str, labels: str | None) -> None:
    """Finds arguments for samples of another kind.

    Args:
        args: Parsed.
        kind: "arrays", "images", "sounds" or "texts".
        labels: As of ``read_samples``.

    Raises:
        UserError: If there are some.
    """
    images = args.size is not None or args.mean != [0.0] or args.std != [1.0]
    if images and kind != "images":
        raise UserError("--size, --mean and --std are for a folder of images; leave them out")
    if args.preprocess is not None and kind not in ("sounds", "texts"):
        raise UserError("--preprocess is for WAV files and texts; leave it out")
    if (args.tokenizer is not None or args.max_length is not None or args.fill) and kind != "texts":
        raise UserError("--tokenizer, --max-length and --fill are for texts; leave them out")
    if args.preprocess is not None and args.tokenizer is not None:
        raise UserError("--preprocess and --tokenizer both say how texts are read; give one")
    if labels == FOLDERS and kind not in ("images", "sounds"):
        raise UserError(
            f"--labels {FOLDERS} is for a folder of images or WAV files; give a .npy file"
        )
    if labels == COLUMN and kind != "texts":
        raise UserError(f"--labels {COLUMN} is for a .tsv file of texts; give a .npy file")


def _names(files: Sequence[tuple[Path, int]], folder: str) -> list[str]:
    """Paths of files in a folder."""
    return [str(path.relative_to(folder)) for path, _ in files]


def _entry(args: argparse.Namespace) -> tuple[Mapping[str, Any], str]:
    """The metadata that say how samples become inputs, and where they are from."""
    path = args.preprocess
    if path is None and args.model.endswith(".lutra"):
        path = args.model
    if path is None:
        return {}, ""
    if path.endswith(".lutra"):
        return load_graph(path).metadata, path
    try:
        entry = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path!r}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise InputError(
            f"{path!r} is no JSON ({error}); write AudioPreprocess(...).to_dict() or "
            "text_preprocess(...) into it"
        ) from error
    return {"preprocess": entry}, path


def _classes_of(metadata: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes in the metadata of a file."""
    classes = metadata.get("classes")
    sound = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return list(classes) if sound and classes else None


def _places(names: Sequence[str], classes: list[str] | None, where: str) -> tuple[Array, list[str]]:
    """The place of each name among the classes of the model, or in the order of the names."""
    if classes is None:
        classes = sorted(set(names))
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise InputError(
            f"{where} holds the class {unknown[0]!r}, which is none of the model; its classes are "
            f"{', '.join(classes)}"
        )
    return np.array([classes.index(name) for name in names], np.int64), classes


# ---- sounds -------------------------------------------------------------------------------------


def _sounds(args: argparse.Namespace, model: Any, wants_labels: bool) -> Samples:
    """The features of WAV files, as the model takes them."""
    metadata, place = _entry(args)
    front = AudioPreprocess.from_metadata(metadata)
    if front is None:
        raise UserError(
            f"{place!r} does not say how sound becomes the input of a model; give --preprocess "
            "with a file that does"
            if place
            else f"{args.data!r} holds WAV files; give --preprocess FILE with the front end of the "
            "model, a .lutra file of sound or AudioPreprocess(...).to_dict() as JSON"
        )
    files, folders = files_of(args.data, _SOUNDS)
    paths = [str(path) for path, _ in files]
    parts = [read_clips(paths[i : i + _BATCH], front) for i in range(0, len(paths), _BATCH)]
    batches = [(_shaped(front.apply(clips), model),) for clips in parts]
    entries: dict[str, Any] = {"preprocess": front.to_dict()}
    labels, classes = None, _classes_of(metadata)
    if folders and all(path.parent != Path(args.data) for path, _ in files):
        labels, classes = _places([folders[i] for _, i in files], classes, repr(args.data))
    if classes is not None:
        entries["classes"] = classes
    if wants_labels and labels is None:
        raise UserError(f"{args.data!r} holds WAV files beside folders of classes; sort them in")
    return Samples(batches, labels, _names(files, args.data), entries)


def _shaped(features: Array, model: Any) -> Array:
    """Features (N, 1, frames, width) in the shape that an imported model has for them."""
    from lutra.train.importing.examples import example_of

    example = example_of(model)
    if example is None:
        return features
    shape = example.shapes[0][1:]
    if len(example.shapes) != 1 or shape not in (features.shape[1:], features.shape[2:]):
        raise UserError(
            f"the preprocessing gives features of the shape {features.shape[1:]}, and the model "
            f"takes {' and '.join(map(str, (s[1:] for s in example.shapes)))}; give the "
            "preprocessing that the model was trained with"
        )
    return features.reshape(len(features), *shape)


# ---- texts --------------------------------------------------------------------------------------


def _texts(args: argparse.Namespace, model: Any, wants_labels: bool) -> Samples:
    """Token ids of texts, those of about the same length in a batch."""
    metadata, place = _entry(args)
    pre = _tokenizer(args, model, metadata, place)
    texts, labels, classes = _read_texts(args.data, _classes_of(metadata))
    if wants_labels and labels is None:
        raise UserError(
            f"{args.data!r} has texts alone; give a label, a tab and a text on each line"
        )
    tokenizer = pre.load()
    rows = [np.array(each.ids, np.int64) for each in tokenizer.encode_batch(texts)]
    order = np.array(sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i)), np.int64)
    batches = []
    for first in range(0, len(order), _BATCH):
        chosen = [rows[i] for i in order[first : first + _BATCH]]
        batches.append(_padded(chosen, pre, pre.max_length if args.fill else None))
    entries: dict[str, Any] = {"preprocess": pre.to_dict()}
    if classes is not None:
        entries["classes"] = classes
    return Samples(
        batches,
        None if labels is None else labels[order],
        [texts[i][:_SHOWN] for i in order],
        entries,
        () if args.fill else (1,),
        order,
    )


def _tokenizer(
    args: argparse.Namespace, model: Any, metadata: Mapping[str, Any], place: str
) -> TextPreprocess:
    """How texts become the inputs of the model."""
    roles = _roles(model)
    if args.tokenizer is not None:
        entry = text_preprocess(args.tokenizer, max_length=args.max_length or _LENGTH, inputs=roles)
        return TextPreprocess.from_dict(entry)
    if not takes_text(metadata):
        raise UserError(
            f"{place or args.model!r} carries no tokenizer; give --tokenizer tokenizer.json, or "
            "--preprocess with a .lutra file that has one"
        )
    pre = TextPreprocess.from_dict(metadata["preprocess"])
    try:
        return replace(pre, inputs=roles, max_length=args.max_length or pre.max_length)
    except InputError as error:
        raise FormatError(str(error)) from error


def _roles(model: Any) -> dict[str, str]:
    """Which argument of forward holds ids, mask and types, by their names, in their order."""
    roles: dict[str, str] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        lower = name.lower()
        role = "mask" if "mask" in lower else "types" if "type" in lower else "ids"
        if role in roles:
            if parameter.default is parameter.empty and parameter.kind < parameter.VAR_POSITIONAL:
                raise UserError(
                    f"forward takes {name!r}, which is neither token ids nor their mask or types; "
                    "give arrays, .npz, for this model"
                )
            break
        roles[role] = name
    if "ids" not in roles:
        raise UserError(
            "forward has no argument for token ids in front of the mask; give arrays, .npz, for "
            "this model"
        )
    return roles


def _read_texts(
    path: str, classes: list[str] | None
) -> tuple[list[str], Array | None, list[str] | None]:
    """Texts, and labels and classes where a label and a tab stand in front of each."""
    lines = read_lines(path)
    cells = [line.split("\t") for line in lines]
    for number, each in enumerate(cells, 1):
        if len(each) != len(cells[0]) or len(each) > 2:
            raise InputError(
                f"line {number} of {path!r} has {len(each)} columns; give a text, or a label, a "
                "tab and a text, on every line alike"
            )
    if len(cells[0]) == 1:
        return lines, None, classes
    names, texts = [label for label, _ in cells], [text for _, text in cells]
    are_numbers = all(n.isascii() and n.isdigit() and len(n) < 10 for n in names)
    if are_numbers and not set(names) <= set(classes or ()):
        return texts, np.array([int(name) for name in names], np.int64), classes
    places, classes = _places(names, classes, repr(path))
    return texts, places, classes


def _padded(rows: Sequence[Array], pre: TextPreprocess, length: int | None) -> tuple[Array, ...]:
    """The arguments of one batch, filled up to its longest text or to a length."""
    length = length or max(1, *map(len, rows))
    ids = np.full((len(rows), length), pre.pad_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    given = {"ids": ids, "mask": mask, "types": np.zeros_like(ids)}
    return tuple(given[role] for role in pre.inputs)


def _floats(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [float("nan")]
    if not np.isfinite(values).all():
        raise argparse.ArgumentTypeError(f"{text!r} are not numbers with commas between them")
    return values


def _size(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) not in (1, 2) or not all(p.isdigit() and 0 < int(p) <= 1 << 15 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give H,W in pixels")
    return int(parts[0]), int(parts[-1])

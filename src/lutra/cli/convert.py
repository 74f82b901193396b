"""``lutra convert``: a PyTorch, ONNX or language model to a file, or function tables into one."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lutra.cli import language, models, samples
from lutra.cli.common import (
    UserError,
    at_least,
    bytes_text,
    check_writable,
    counts,
    fraction,
    need_finite,
    plain,
    read_archive,
)
from lutra.errors import InputError, LutraError
from lutra.format import load_graph, save_graph
from lutra.formatting import counted
from lutra.functions import swap_functions
from lutra.ops.limits import CENTROID_COUNTS, FUNCTION_ENTRIES
from lutra.ops.pq import DISTANCES, ENCODERS

_BATCH: Final = 64
_EXAMPLES: Final = 8
METHODS: Final = ("pq", "lookup", "int8", "auto")
#: Activation and weight indices of lookup layers, by bits.
_LOOKUP_BITS: Final = {2: (4, 3), 3: (8, 7), 4: (16, 15)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "model",
        metavar="MODULE:FUNCTION|FILE",
        help="builds the model: pkg.mod:build or file.py:build; or an ONNX file or a language "
        "model (.gguf, or .bin of llama2.c), which stay float unless a method is given; or a "
        ".lutra file of float layers, or any of them for --functions",
    )
    parser.add_argument(
        "--data",
        metavar="D",
        help="calibration inputs: .npy of the one input, or .npz with an array for each argument "
        "of forward (x is the first argument of any model); a folder of images or of WAV files; "
        ".tsv and .txt files of texts; for --functions of a file, its inputs by name (optional)",
    )
    samples.add_arguments(parser)
    models.add_arguments(parser)
    language.add_arguments(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the .lutra file")
    parser.add_argument(
        "--recipe",
        metavar="FILE.json",
        help="methods by pattern of module path, as lutra.recipe_to_json writes them; all settings "
        "of all methods are for this file",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="of all layers, without --recipe; auto fits any network (default: pq)",
    )
    parser.add_argument(
        "--v", type=at_least(1), metavar="V", help="pq: values per sub-vector (default: per layer)"
    )
    parser.add_argument(
        "--k", type=int, choices=CENTROID_COUNTS, help="pq: centroids (default: 16)"
    )
    parser.add_argument(
        "--encoder",
        choices=ENCODERS,
        help="pq: what makes codes; tree: faster, less accurate (default: nearest)",
    )
    parser.add_argument(
        "--distance",
        choices=DISTANCES,
        help="pq: which centroid is the nearest; l1 and chebyshev are for circuits without "
        "multipliers (default: l2)",
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=sorted(_LOOKUP_BITS),
        help="lookup: bits of a weight and of an activation (default: 4)",
    )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="GLOB", help="layers to leave as they are"
    )
    parser.add_argument(
        "--speed-gate",
        action="store_true",
        help="leave layers dense, int8 or float32, that lookups do not make faster here (batch 1, "
        "one thread)",
    )
    parser.add_argument(
        "--tables",
        choices=["stored", "compact", "factors"],
        default="stored",
        help="compact: int8 weights in place of tables, a smaller file (default: stored)",
    )
    parser.add_argument(
        "--dynamic-axes",
        type=counts,
        default=[],
        metavar="AXIS,...",
        help="axes of the input that may have any size in the file besides the batch, such as 2,3",
    )
    parser.add_argument(
        "--functions",
        type=int,
        choices=FUNCTION_ENTRIES,
        metavar="E",
        help="read activations, softmaxes and norms from tables of 8, 16 or 32 lines",
    )
    parser.add_argument(
        "--tolerance",
        type=fraction,
        default=1e-3,
        metavar="T",
        help="how far the file may be from PyTorch, as a share of the largest output (default: "
        "0.001)",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="default: 0")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.model.endswith(".lutra") and not _names_method(args):
        return _swap(args)
    language.check_arguments(args)
    of_language = language.is_language_model(args)
    stays_float = of_language or (args.model.endswith(".onnx") and not _names_method(args))
    if args.data is None and not stays_float and not of_language:
        raise UserError(
            "convert needs calibration inputs; give --data D.npz with an array for each argument, "
            "or x"
        )
    torch, train = training("convert")
    check_writable(args.output)
    _check_flags(args)
    if of_language:
        return _language(args, torch, train)
    given = None if args.recipe is None else _read_recipe(args.recipe, train)
    torch.manual_seed(args.seed)
    model = models.load(args, torch, train)
    found = samples.Samples([])
    if args.data is not None:
        found = samples.read_samples(args, model)
    batches = [tuple(torch.from_numpy(array) for array in batch) for batch in found.batches]
    args.dynamic_axes = sorted({*args.dynamic_axes, *found.dynamic_axes})
    try:
        if stays_float:
            example = batches[0] if batches else train.example_inputs(model, _EXAMPLES)
            return _write_float(args, model, example, train, found.metadata)
        recipe = _recipe(args, given, model, train)
        return _convert(args, model, recipe, given, batches, train, found.metadata)
    except (LutraError, OSError, MemoryError):
        raise
    except Exception as error:  # what the model raises on the calibration data
        shapes = ", ".join(str(tuple(x.shape)) for x in batches[0]) if batches else ""
        shown = f" on samples of {args.data!r} of shape {shapes}" if shapes else ""
        raise UserError(
            f"{args.model!r} cannot be converted: {type(error).__name__}{shown}: {error}; give "
            "what forward takes, or see --debug for where it fails"
        ) from error


def _language(args: argparse.Namespace, torch: Any, train: Any) -> int:
    """Writes a language model, as it is or by a method."""
    if not _names_method(args):
        return language.run(args, None, torch, train)
    given = None if args.recipe is None else _read_recipe(args.recipe, train)
    return language.run(args, lambda model: _recipe(args, given, model, train), torch, train)


def _names_method(args: argparse.Namespace) -> bool:
    """Whether the flags say what becomes of the layers."""
    settings = (args.recipe, args.method, args.v, args.k, args.encoder, args.bits)
    return any(each is not None for each in settings)


def _write_float(
    args: argparse.Namespace,
    model: Any,
    example: Sequence[Any],
    train: Any,
    more: Mapping[str, Any],
) -> int:
    """Writes an ONNX file as it is."""
    if args.functions is not None or args.speed_gate or args.keep or args.tables != "stored":
        raise UserError(
            "--functions, --speed-gate, --keep and --tables go with a method; give --method or "
            "--recipe, or put function tables into the file afterwards"
        )
    graph = train.export(
        model,
        args.output,
        tuple(tensor[:_EXAMPLES] for tensor in example),
        metadata={"source": {"format": "onnx", "name": Path(args.model).name}, **more},
        dynamic_axes=args.dynamic_axes,
        tolerance=args.tolerance,
    )
    print(f"{counted(len(graph.nodes), 'node')} in float32, the same as in {plain(args.model)}")
    print(f"wrote {plain(args.output)}, {bytes_text(os.path.getsize(args.output))}")
    return 0


def _convert(
    args: argparse.Namespace,
    model: Any,
    recipe: Mapping[str, Any],
    given: Mapping[str, Any] | None,
    batches: Sequence[tuple[Any, ...]],
    train: Any,
    more: Mapping[str, Any],
) -> int:
    """Replaces layers and writes the result."""
    if args.tables != "stored":
        recipe = _with_weight_bits(recipe, train)
    converted, report = train.convert(
        # arguments in a tuple of their own: none of them is taken for targets
        model,
        recipe,
        [(batch,) for batch in batches],
        seed=args.seed,
        speed_gate=args.speed_gate,
    )
    details = report.to_dict()
    del details["speed_gate"]  # the exporter writes it
    metadata = {
        "recipe": {
            "method": args.method or ("recipe" if given else "pq"),
            "keep": list(args.keep),
            "functions": args.functions,
            "patterns": train.recipe_to_json(recipe),
        },
        "seed": args.seed,
        "report": details,
        **more,
    }
    graph = train.export(
        converted,
        args.output,
        tuple(tensor[:_EXAMPLES] for tensor in batches[0]),
        metadata=metadata,
        dynamic_axes=args.dynamic_axes,
        tolerance=args.tolerance,
        tables=args.tables,
    )
    print(report)
    print(f"wrote {plain(args.output)}, {bytes_text(os.path.getsize(args.output))}")
    if "tables" in graph.metadata:
        print(_compact_text(graph.metadata["tables"]))
    if any(layer.codebooks for layer in report.replaced):
        print("the codebooks are not fine-tuned: accuracy is better after lutra.train.finetune")
    return 0


def _swap(args: argparse.Namespace) -> int:
    """Function tables into a file that is there already."""
    if args.functions is None:
        raise UserError(
            f"{args.model!r} is converted already; say what to do: --functions 16, or --method and "
            "--data for the layers of a float file"
        )
    samples.check_arguments(args, "arrays", None)
    check_writable(args.output)
    graph = load_graph(args.model)
    feeds = None
    if args.data is not None:
        arrays = {value.name: read_archive(args.data, value.name) for value in graph.inputs}
        for value in graph.inputs:
            need_finite(args.data, arrays[value.name])
        sizes = {name: len(array) for name, array in arrays.items()}
        if len(set(sizes.values())) > 1:
            raise InputError(f"{args.data!r} holds arrays of different length: {sizes}")
        count = next(iter(sizes.values()))
        feeds = [
            {name: array[i : i + _BATCH] for name, array in arrays.items()}
            for i in range(0, count, _BATCH)
        ]
    swapped = swap_functions(graph, args.functions, feeds=feeds)
    save_graph(swapped, args.output)
    entry = swapped.metadata["functions"]
    print(f"{counted(len(entry['nodes']), 'node')} with tables of {args.functions} lines:")
    for name, function in entry["nodes"].items():
        print(f"  {plain(name)}: {function}")
    for name, moved in entry.get("largest_output_difference", {}).items():
        print(f"golden output {plain(name)} moved by up to {moved:.2g} of its largest value")
    print(f"wrote {plain(args.output)}, {bytes_text(os.path.getsize(args.output))}")
    return 0


def _with_weight_bits(recipe: Mapping[str, Any], train: Any) -> dict[str, Any]:
    """The recipe with tables of 8-bit weights, so that compact tables are those of calibration."""

    def may_be_compact(method: Any) -> bool:
        known = isinstance(method, train.PQ) and not method.has_free_tables
        return known and (method.v is None or method.v < method.k)

    return {
        pattern: replace(method, weight_bits=8) if may_be_compact(method) else method
        for pattern, method in recipe.items()
    }


def _compact_text(entry: Mapping[str, Any]) -> str:
    """Which tables are built from int8 weights, and which are not and why."""
    built, kept = len(entry["layers"]), entry["stored"]
    lines = []
    if built:
        lines.append(f"tables of {counted(built, 'layer')} are built from int8 weights")
    lines += [f"layer '{plain(name)}' keeps its tables: {reason}" for name, reason in kept.items()]
    return "\n".join(lines) or "there are no tables to build from int8 weights"


def training(command: str) -> tuple[Any, Any]:
    """torch and lutra.train.

    Args:
        command: that needs them.

    Raises:
        UserError: If they are not installed.
    """
    try:
        return importlib.import_module("torch"), importlib.import_module("lutra.train")
    except ModuleNotFoundError as error:
        raise UserError(
            f"{command} needs {error.name}, which is not installed; "
            "install it with pip install 'lutra[train]'"
        ) from error


def _check_flags(args: argparse.Namespace) -> None:
    """Raises UserError about settings of another method than the one that is used."""
    if "*" in args.keep:
        raise UserError("--keep '*' leaves no layer to convert; name the layers to leave")
    settings = {"v": "pq", "k": "pq", "encoder": "pq", "distance": "pq", "bits": "lookup"}
    given = {name: owner for name, owner in settings.items() if getattr(args, name) is not None}
    if args.recipe is not None:
        given = {**given, **({} if args.method is None else {"method": ""})}
        if given:
            raise UserError(
                f"--recipe says which layer gets which method; leave out --{next(iter(given))}, or "
                "write it into the file"
            )
    for name, owner in given.items():
        if owner != (args.method or METHODS[0]):
            raise UserError(f"--{name} is for --method {owner}; leave it out, or give that method")


def _recipe(
    args: argparse.Namespace, given: Mapping[str, Any] | None, model: Any, train: Any
) -> dict[str, Any]:
    """The recipe of a file or of the flags; --keep comes first."""
    recipe = {glob: train.Keep() for glob in args.keep}
    if given is not None:
        rest = dict(given)
    elif args.method == "auto":
        rest = train.auto_recipe(model)
    elif args.method == "int8":
        rest = {"*": train.Int8()}
    elif args.method == "lookup":
        rest = {"*": train.Lookup(*_LOOKUP_BITS[args.bits or 4])}
    else:
        settings = {name: getattr(args, name) for name in ("v", "k", "encoder", "distance")}
        rest = {"*": train.PQ(**{name: v for name, v in settings.items() if v is not None})}
    recipe.update({pattern: method for pattern, method in rest.items() if pattern not in recipe})
    if args.functions is not None:
        recipe["**"] = train.Function(entries=args.functions)
    return recipe


def _read_recipe(path: str, train: Any) -> Mapping[str, Any]:
    """The recipe in a JSON file.

    Raises:
        UserError: If it cannot be read, or is no recipe.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path!r}: {error.strerror or error}; check the path"
        ) from error
    except ValueError as error:  # no JSON, or no text at all
        raise UserError(
            f"cannot read {path!r} as JSON: {error}; write it with lutra.recipe_to_json"
        ) from error
    try:
        recipe: Mapping[str, Any] = train.recipe_from_json(data)
    except LutraError as error:
        raise UserError(f"{path!r}: {error}") from error
    if not recipe:
        raise UserError(f'{path!r} holds no pattern; give at least one, such as "*"')
    return recipe

"""``lutra optimize``: the fastest or smallest recipe for a model within a budget."""

from __future__ import annotations

import argparse
import os
from typing import Any, Final

from lutra.cli import models, samples
from lutra.cli.common import add_isa, at_least, bytes_text, check_writable, plain
from lutra.cli.convert import training
from lutra.cli.verify import verify
from lutra.format import load_graph
from lutra.formatting import counted
from lutra.reporting.page import need_packages
from lutra.runtime.cpu import runnable_isas

_FAILED: Final = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="FILE.onnx, FILE.lutra in float32, or what builds a PyTorch model: pkg.mod:build or "
        "file.py:build",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="D",
        help="samples, some hundred: .npy of the one input; .npz with an array for each argument "
        "of forward (x is the first argument of any model); a folder of images or of WAV files; or "
        ".tsv and .txt files of texts, one a line, also .gz and .xz",
    )
    parser.add_argument(
        "--labels",
        metavar="Y",
        help=".npy with a class for each sample, or a target of the output's shape; "
        f"'{samples.FOLDERS}': images or sounds lie in a folder for each class; "
        f"'{samples.COLUMN}': a label and a tab stand in front of each text. Without labels the "
        "outputs of the dense model are what counts",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="the .lutra file of the choice"
    )
    parser.add_argument(
        "--max-drop",
        type=_drop,
        default=1.0,
        metavar="P",
        help="points (or dB) that may be lost against the dense model (default: 1)",
    )
    parser.add_argument(
        "--target",
        choices=("latency", "size"),
        default="latency",
        help="what becomes as small as possible (default: latency)",
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=10.0, metavar="N", help="of the search (default: 10)"
    )
    parser.add_argument(
        "--finetune",
        type=_minutes,
        default=0.0,
        metavar="MINUTES",
        help="of fine-tuning behind it, with the dense model as teacher (default: none)",
    )
    parser.add_argument(
        "--threads", type=at_least(1), default=1, metavar="N", help="of the engine (default: 1)"
    )
    add_isa(parser)
    parser.add_argument(
        "--storage",
        metavar="FILE",
        help="keeps finished trials: the same command goes on after a stop, and several may run "
        "at once",
    )
    parser.add_argument(
        "--report", metavar="FILE.html", help="also write a page about what was found"
    )
    samples.add_arguments(parser)
    models.add_arguments(parser)
    parser.add_argument("--seed", type=at_least(0), default=0, help="default: 0")


def run(args: argparse.Namespace) -> int:
    """Runs the command; 1 where the written file fails its check."""
    torch, train = training("optimize")
    check_writable(args.output)
    if args.report is not None:
        check_writable(args.report)
        need_packages()
    torch.manual_seed(args.seed)
    budget = train.Budget(
        max_drop=args.max_drop, target=args.target, minutes=args.minutes, threads=args.threads,
        isa=args.isa, finetune_minutes=args.finetune, seed=args.seed,
    )  # fmt: skip
    model = models.load(args, torch, train)
    found = samples.read_samples(args, model, args.labels)
    study = train.optimize(
        model,
        [(tuple(map(torch.from_numpy, batch)),) for batch in found.batches],
        budget=budget,
        labels=found.labels,
        names=found.names,
        storage=args.storage,
        output=args.output,
        metadata=dict(found.metadata),
        peers=_peers(args),
    )
    print(plain_lines(str(study)))
    print(f"wrote {plain(args.output)}, {bytes_text(os.path.getsize(args.output))}")
    graph = load_graph(args.output)
    problems = [p for result in verify(graph, runnable_isas(), samples=0 if graph.golden else 4)
                for p in result.problems]  # fmt: skip
    if args.report is not None:
        study.save_report(args.report, os.path.basename(args.output))
        print(f"wrote {plain(args.report)}")
    if problems:
        print(f"the file fails its check: {plain(problems[0])}")
        return _FAILED
    print(f"verified with {counted(len(runnable_isas()), 'set')} of kernels")
    return 0


def plain_lines(text: str) -> str:
    """Lines of text without anything that a terminal could obey."""
    return "\n".join(map(plain, text.split("\n")))


def _peers(args: argparse.Namespace) -> Any:
    """Measures other runtimes beside an ONNX file, where they are installed."""
    if not args.model.endswith(".onnx"):
        return None
    from lutra.train.search.peers import runtimes

    return runtimes(args.model, args.threads)


def _drop(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return number


def _minutes(text: str) -> float:
    number = _drop(text)
    if number > 60 * 24 * 30:
        raise argparse.ArgumentTypeError(f"{text!r} minutes are more than a month")
    return number

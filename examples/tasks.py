"""What the examples of the three tasks share: methods, arguments, results."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lutra.train import Lookup

#: Levels of activations and of weights for a number of bits.
TABLES = {4: (16, 15), 3: (8, 7), 2: (4, 3)}


def lookup_method(bits: int, rank: int = 1) -> Lookup:
    """The lookup layer of so many bits: tables of 16x15, 8x7 or 4x3."""
    levels, weights = TABLES[bits]
    return Lookup(levels=levels, weights=weights, rank=rank)


def add_data(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --data, by default what LUTRA_DATA says."""
    default = os.environ.get("LUTRA_DATA")
    parser.add_argument(
        "--data",
        type=Path,
        default=None if default is None else Path(default),
        help=f"{what}; the default is the environment variable LUTRA_DATA",
    )


def add_training(parser: argparse.ArgumentParser, output: str, *, tables: bool = True) -> None:
    """Adds what every training has: output, checkpoints, bits, threads, seed.

    Without `tables` there are no options for the tables of `lookup_method`.
    """
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--checkpoints", type=Path, help="folder; enables stop and resume")
    if tables:
        bits = sorted(TABLES)
        parser.add_argument("--bits", type=int, default=4, choices=bits, help="default: 4")
        parser.add_argument("--rank", type=int, default=1, help="of the learned table; default: 1")
    parser.add_argument("--clip-norm", type=float, help="largest gradient norm; default: any")
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"))
    add_steady(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)


def add_steady(parser: argparse.ArgumentParser) -> None:
    """Adds what steadies a training."""
    parser.add_argument("--average", type=float, help="decay of an average of the parameters")
    parser.add_argument("--codebook-lr", type=float, help="default: the rate of the weights")
    parser.add_argument(
        "--frozen-batch-norm", type=float, default=0.0, help="share of the run, at its start"
    )
    parser.add_argument(
        "--frozen-codebooks", type=float, default=0.0, help="share of the run, at its end"
    )
    parser.add_argument(
        "--frozen-weights", type=float, default=0.0, help="share of the run, at its start"
    )


def steady(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_steady` has added, as keywords of `finetune`."""
    names = ("average", "codebook_lr", "frozen_batch_norm", "frozen_codebooks", "frozen_weights")
    return {name: getattr(options, name) for name in names}


def stage(folder: Path | None, name: str) -> Path | None:
    """The checkpoint folder of one stage of a run."""
    return None if folder is None else folder / name


class Log:
    """Prints one line per evaluation: stage, metric, time. Give it to `finetune`."""

    def __init__(self, name: str, measure: Callable[[nn.Module], float], unit: str) -> None:
        self.name, self.measure, self.unit = name, measure, unit
        self.start = time.perf_counter()

    def __call__(self, model: nn.Module) -> float:
        value = self.measure(model)
        minutes = (time.perf_counter() - self.start) / 60
        print(
            f"{self.name}: validation {value:.2f} {self.unit}, {minutes:.1f} min in this process",
            flush=True,
        )
        return value


def as_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """The collate function of data sets that fetch whole batches."""
    inputs, targets = batch
    return inputs, targets


def milliseconds(runs: Sequence[Callable[[], object]], rounds: int = 200) -> list[float]:
    """Median milliseconds of calls that take turns, after a tenth of the rounds to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + rounds // 10):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if turn >= rounds // 10:
                found.append(1000 * (time.perf_counter() - start))
    return [statistics.median(found) for found in times]


def finish(output: Path, result: dict[str, Any]) -> None:
    """Prints the results as JSON and keeps them beside the file."""
    text = json.dumps({**result, "bytes": output.stat().st_size}, indent=2)
    output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)

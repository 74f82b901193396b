"""The ResNet-20 files of the zoo beside other runtimes, interleaved.

    python -m benchmarks.engine [--json FILE] [--threads N] [--isa avx2] [--batch N] [--clock cpu]

The peers run the dense network in float32 and in int8, as in `benchmarks.models`, with random
weights, on which their speed does not depend. `--isa` keeps everybody at an instruction set.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import lutra
from benchmarks.machine import CLOCKS, interleaved, machine, spread, write_json
from benchmarks.networks import resnet20
from benchmarks.peers import (
    CAPS,
    NOT_CAPPED,
    PEERS,
    Opened,
    open_model,
    random_input,
    write_models,
)

_ZOO: Final = Path(__file__).parents[1] / "zoo"
_INPUTS: Final = 17  # different arrays that take turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", choices=list(CAPS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=50, help="turns of eight runs; default: 50")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    options = parser.parse_args()
    cap = CAPS.get(options.isa, {})
    if not cap.items() <= os.environ.items():
        # The libraries read these variables when they are loaded, so begin again with them.
        words = [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:]]
        os.execve(sys.executable, words, os.environ | cap)
    with TemporaryDirectory(prefix="lutra-bench-") as folder:
        report = measured(options, Path(folder))
    for name, ratio in report["speedup_int8"].items():
        print(f"{name:30s} {report['ms'][name]['median']:8.4f} ms   int8 peer / it: {ratio:.2f}")
    if options.json:
        write_json(options.json, {**report, "machine": machine()})


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The times of all files and peers."""
    isa = options.isa or lutra.runnable_isas()[-1]
    opened: dict[str, Opened] = {}
    for file in sorted(_ZOO.glob("resnet20_*.lutra")):
        opened[file.stem] = open_model("lutra", file, options.threads, isa)
    network = resnet20()
    failed = write_models(network, options.batch, folder)
    for name, file in PEERS.items():
        if not (options.isa and name in NOT_CAPPED) and file not in failed:
            opened[name] = open_model(name, folder / file, options.threads, isa)
    pool = itertools.cycle(random_input(network, options.batch, i) for i in range(_INPUTS))
    times = interleaved(
        {name: lambda run=each.run: run(next(pool)) for name, each in opened.items()},
        options.runs, 5, lead_in=4, counted=8, settle=options.threads > 1, clock=options.clock,
    )  # fmt: skip
    middle = {name: median(seconds) for name, seconds in times.items()}
    fastest = min(time for name, time in middle.items() if name.endswith("int8"))
    return {
        "case": "ResNet-20 32x32", "batch": options.batch, "threads": options.threads, "isa": isa,
        "clock": options.clock,
        "ms": {name: spread(seconds) for name, seconds in times.items()},
        "speedup_int8": {name: fastest / time for name, time in middle.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()

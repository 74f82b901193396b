"""The ResNet-20 files of the zoo in the engine against the dense network in PyTorch, interleaved.

    python -m benchmarks.engine [--json FILE] [--threads 1] [--isa NAME]

PyTorch runs eagerly in float32 and eval mode, in both memory layouts; inputs change from run to
run. Other runtimes are not measured here.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

import lutra
from benchmarks.machine import interleaved, machine, spread, write_json

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from cifar10 import ResNet  # noqa: E402

#: How the lookups of a file find their codes -> the file.
FILES = {"nearest": "resnet20_cifar10.lutra", "tree": "resnet20_cifar10_fast.lutra"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa")
    parser.add_argument("--runs", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sessions = {
        name: lutra.Session(ROOT / "zoo" / file, threads=options.threads, isa=options.isa)
        for name, file in FILES.items()
    }
    plain = ResNet().eval()
    channels_last = ResNet().eval().to(memory_format=torch.channels_last)
    generator = np.random.default_rng(0)
    records = []
    for batch in (1, 32):
        pool = [generator.standard_normal((batch, 3, 32, 32), np.float32) for _ in range(16)]
        tensors = [torch.from_numpy(x) for x in pool]
        last = [x.contiguous(memory_format=torch.channels_last) for x in tensors]
        images, last_images = (itertools.cycle(p) for p in (tensors, last))
        arrays = {name: itertools.cycle(pool) for name in sessions}
        with torch.no_grad():
            times = interleaved(
                {
                    **{
                        name: lambda s=session, a=arrays[name]: s(next(a))
                        for name, session in sessions.items()
                    },
                    "torch": lambda a=images: plain(next(a)),
                    "torch channels last": lambda a=last_images: channels_last(next(a)),
                },
                options.runs,
                10,
            )
        record = {
            "case": "ResNet-20, CIFAR-10, V=9, K=16",
            "batch": batch,
            "threads": options.threads,
            "isa": sessions["nearest"].isa,
            "ms": {name: spread(t) for name, t in times.items()},
        }
        records.append(record)
        for name, t in times.items():
            each = spread(t)
            print(f"batch {batch:2d}  {name:20s} {each['median']:8.3f} ms  (min {each['min']:.3f})")
    write_json(options.json, {"records": records, "machine": machine()})


if __name__ == "__main__":
    main()

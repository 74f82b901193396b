"""Cost of a fine-tuning step of a converted ResNet-20 against the dense network's.

    python -m benchmarks.train_step [--json FILE] [--batch 64] [--threads N] [--group row] [--v N]

Both networks take the same batch of 32x32 images, channels last in memory (the faster layout for
PyTorch's CPU convolutions), forward, backward and an Adam step, in float32, in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.machine import CLOCKS, interleaved, machine, spread, write_json
from lutra.ops.pq import ENCODERS, GROUPS
from lutra.train import PQ, convert

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar10 import ResNet


def stepper(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """One training step on a fixed batch."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--group", choices=GROUPS, default="patch", help="what codes are of")
    parser.add_argument("--v", type=int, help="values in a sub-vector (default: that of the group)")
    parser.add_argument("--encoder", choices=ENCODERS, default="nearest")
    parser.add_argument("--soft", action="store_true", help="LUT-NN's soft gradient as well")
    options = parser.parse_args()
    if options.soft and (options.group != "patch" or options.encoder != "nearest"):
        parser.error(
            "--soft is of the nearest centroid to a patch; leave --group and --encoder out"
        )
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense = ResNet().to(memory_format=torch.channels_last)
    x = torch.randn(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (options.batch,))
    v = options.v or {"patch": 9, "row": 3, "pixel": 4}[options.group]
    method = PQ(v=v, k=16, encoder=options.encoder, group=options.group)
    variants = {"lutra": method}
    if options.group == "patch":
        variants["lutra_average"] = replace(method, centroids="average")
    if options.soft:
        variants["lutra_soft"] = replace(method, gradient="soft")
    cases = {"dense": stepper(dense, x, y)}
    for name, variant in variants.items():
        model, _ = convert(dense, {"layer*.conv*": variant}, [x], rows=1024, kmeans_steps=3)
        cases[name] = stepper(model, x, y)
    times = interleaved(cases, options.runs, 3, clock=options.clock)
    milliseconds = {f"{name}_ms": spread(t)["median"] for name, t in times.items()}
    record = {
        "case": f"ResNet-20, 32x32, V={v}, K=16, Adam",
        "encoder": options.encoder,
        "group": options.group,
        "v": v,
        "batch": options.batch,
        "threads": options.threads,
        "clock": options.clock,
        **milliseconds,
        "ratio": milliseconds["lutra_ms"] / milliseconds["dense_ms"],
        "spread_ms": {name: spread(t) for name, t in times.items()},
        "machine": machine(),
    }
    for name in cases:
        print(f"{name:14s} {record[f'{name}_ms']:8.1f} ms")
    print(f"{'ratio':14s} {record['ratio']:8.2f}")
    write_json(options.json, record)


if __name__ == "__main__":
    main()

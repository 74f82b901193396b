"""Cost of a fine-tuning step of a converted ResNet-20 against the dense network's.

    python -m benchmarks.train_step [--json FILE] [--batch 64] [--threads N]

Both networks take the same batch of 32x32 images, channels last in memory (the faster layout for
PyTorch's CPU convolutions), forward, backward and an Adam step, in float32, in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.machine import interleaved, machine, spread, write_json
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
    parser.add_argument("--soft", action="store_true", help="LUT-NN's soft gradient as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense = ResNet().to(memory_format=torch.channels_last)
    x = torch.randn(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (options.batch,))
    variants = {"lutra": PQ(v=9, k=16), "lutra_average": PQ(v=9, k=16, centroids="average")}
    if options.soft:
        variants["lutra_soft"] = PQ(v=9, k=16, gradient="soft", centroids="gradient")
    cases = {"dense": stepper(dense, x, y)}
    for name, method in variants.items():
        model, _ = convert(dense, {"layer*.conv*": method}, [x], rows=1024, kmeans_steps=3)
        cases[name] = stepper(model, x, y)
    times = interleaved(cases, options.runs, 3)
    milliseconds = {f"{name}_ms": spread(t)["median"] for name, t in times.items()}
    record = {
        "case": "ResNet-20, 32x32, V=9, K=16, Adam",
        "batch": options.batch,
        "threads": options.threads,
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

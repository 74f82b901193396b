"""Distances and stages of a training that is short: ResNet-20 on CIFAR-10.

    python -m benchmarks.short_training --data FOLDER [--run TEXT] [--seeds N ...] [--json FILE]

Every run converts the same dense network (V = 9, K = 16, 1,024 images, sequential calibration),
trains it for the same steps at a batch of 128 (cosine from 1e-3, dense network as teacher) and
counts the right answers, on the first 2,000 test images after conversion and on all of them, of the
exported file in the engine, after training. Runs of one seed see the same batches. (The dense
network has seen all training images, so validation images would tell nothing.)

The distances differ in nothing else. The stages are those of LUTBoost (LUT-DLA, arXiv 2501.10658):
for a share of the steps weights are frozen and codebooks and tables are trained alone, then all is
trained. "replaced" draws the output of every replaced layer to that of its dense one, as in the
paper, and "blocks" the output of every residual block, as the examples do.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from benchmarks.calibration_networks import cifar10
from benchmarks.machine import machine, write_json
from lutra.formatting import table
from lutra.train import PQ, convert, export, finetune

BLOCKS: Final = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2))
REPLACED: Final = tuple(f"{block}.conv{i}" for block in BLOCKS for i in (1, 2))


@dataclass(frozen=True)
class Run:
    """A method and how it is trained."""

    method: PQ
    frozen_weights: float = 0.0
    features: tuple[str, ...] = BLOCKS


RUNS: Final = {
    "l2": Run(PQ(v=9)),
    "l1": Run(PQ(v=9, distance="l1")),
    "chebyshev": Run(PQ(v=9, distance="chebyshev")),
    "stages, blocks": Run(PQ(v=9), 0.3),
    "stages, replaced": Run(PQ(v=9), 0.3, REPLACED),
    "one stage, replaced": Run(PQ(v=9), 0.0, REPLACED),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of image/ and weights/")
    parser.add_argument("--run", default="", help="only runs with this text in their name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--steps", type=int, default=150, help="default: 150")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense = cifar10.ResNet(3)
    cifar10.load_checkpoint(dense, options.data / "weights" / "cifar10_resnet20.npz")
    dense = dense.eval().to(memory_format=torch.channels_last)
    images = cifar10.load_images(options.data / "image")
    records: list[dict[str, Any]] = []
    for seed in options.seeds:
        made: dict[PQ, _Converted] = {}  # runs of one method begin with the same network
        for name, run in RUNS.items():
            if options.run in name:
                if run.method not in made:
                    made[run.method] = _convert(dense, images, run.method, seed)
                result = _train(dense, images, made[run.method], run, seed, options.steps)
                records.append({"run": name, **result})
                print(records[-1], flush=True)
    print(_summary(records))
    if options.json is not None:
        write_json(options.json, {"machine": machine(), "steps": options.steps, "runs": records})


class _Converted(NamedTuple):
    """A converted network, its right answers in percent, and the CPU seconds that it took."""

    model: torch.nn.Module
    score: float
    seconds: float


def _convert(
    dense: torch.nn.Module, images: tuple[np.ndarray, ...], method: PQ, seed: int
) -> _Converted:
    x, _, x_test, y_test = images
    calibration = [cifar10.normalize(part) for part in np.array_split(x[:1024], 8)]
    begin = time.process_time()
    model = convert(dense, {"layer*.conv*": method}, calibration, seed=seed)[0]
    seconds = time.process_time() - begin
    return _Converted(model, cifar10.accuracy(model, x_test[:2000], y_test[:2000]), seconds)


def _train(
    dense: torch.nn.Module,
    images: tuple[np.ndarray, ...],
    converted: _Converted,
    run: Run,
    seed: int,
    steps: int,
) -> dict[str, Any]:
    """One run: seed, right answers in percent, CPU time."""
    x, y, x_test, y_test = images
    model = copy.deepcopy(converted.model)
    loader: Any = torch.utils.data.DataLoader(
        cifar10.Augmented(x, y), 128, shuffle=True, drop_last=True, collate_fn=cifar10.collate
    )
    start = time.process_time()
    finetune(
        model, loader, steps=steps, lr=1e-3, warmup=20, clip_norm=5.0, teacher=dense,
        distillation=1.0, feature_layers=list(run.features), frozen_weights=run.frozen_weights,
        batch_norm_batches=20, mixed_precision="bf16", seed=seed, progress=False,
    )  # fmt: skip
    trained = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "resnet20.lutra"
        export(model.eval(), file, cifar10.normalize(x_test[:2]))
        after = cifar10.engine_accuracy(file, x_test, y_test)
    return {
        "seed": seed,
        "converted": converted.score,
        "trained": after,
        "convert_cpu_s": round(converted.seconds, 1),
        "step_cpu_ms": round(1000 * (trained - start) / steps, 1),
    }


def _summary(records: list[dict[str, Any]]) -> str:
    rows: list[tuple[str, ...]] = [
        ("run", "converted %", "trained %", "each seed", "conversion CPU s", "step CPU ms")
    ]
    for name in dict.fromkeys(record["run"] for record in records):
        own = [record for record in records if record["run"] == name]
        means = {
            key: statistics.mean(record[key] for record in own) for key in own[0] if key != "run"
        }
        each = ", ".join(f"{record['trained']:.2f}" for record in own)
        rows.append(
            (
                name,
                f"{means['converted']:.2f}",
                f"{means['trained']:.2f}",
                each,
                f"{means['convert_cpu_s']:.0f}",
                f"{means['step_cpu_ms']:.0f}",
            )
        )
    return table(rows, left=1)


if __name__ == "__main__":
    main()

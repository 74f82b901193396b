"""Accuracy without any training: what calibration alone makes of a trained network.

    python -m benchmarks.calibration --data FOLDER [--images 1024] [--method TEXT] [--json FILE]

The network is the public ResNet-20 for CIFAR-10 of the folder of data (`image/`, `weights/`). Its
first layer and its classifier are int8, the others of one method. Calibration sees training images
without labels, and is done in both ways that `lutra.convert` has; the accuracy is that of the
exported file in the engine, on all test images.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.machine import machine, write_json
from lutra.formatting import table
from lutra.train import PQ, Int8, Lookup, convert, export
from lutra.train.recipe import Method

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cifar10

METHODS: Final[Mapping[str, Method]] = {
    "int8": Int8(),
    "lookup 16x15": Lookup(16, 15),
    "lookup 4x3": Lookup(4, 3),
    "nearest V=9": PQ(v=9),
    "nearest V=9, free tables": PQ(v=9, free_tables=True),
    "tree V=9": PQ(v=9, encoder="tree"),
    "nearest V=3": PQ(v=3),
    "nearest V=3, free tables": PQ(v=3, free_tables=True),
    "tree V=3": PQ(v=3, encoder="tree"),
}
KINDS: Final = ("parallel", "sequential")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of image/ and weights/")
    parser.add_argument("--images", type=int, default=1024, help="of calibration (default: 1024)")
    parser.add_argument("--rows", type=int, default=8192, help="of a layer (default: 8192)")
    parser.add_argument("--method", help="only methods with this text in their name")
    parser.add_argument("--calibration", choices=KINDS, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense = cifar10.ResNet(3)
    cifar10.load_checkpoint(dense, options.data / "weights" / "cifar10_resnet20.npz")
    x, _, x_test, y_test = cifar10.load_images(options.data / "image")
    rows: list[tuple[str, ...]] = [
        ("method", "calibration", "top-1 %", "under dense", "last error", "seconds", "CPU s")
    ]
    top = cifar10.accuracy(dense, x_test, y_test)
    records = []
    for name, method in METHODS.items():
        if options.method is not None and options.method not in name:
            continue
        for kind in KINDS if options.calibration is None else (options.calibration,):
            record = measure(dense, method, kind, x, x_test, y_test, options)
            records.append({"method": name, "calibration": kind, **record})
            shown = f"{record['top1']:.2f}", f"{top - record['top1']:.2f}"
            times = f"{record['seconds']:.0f}", f"{record['cpu_seconds']:.0f}"
            rows.append((name, kind, *shown, f"{record['error']:.4f}", *times))
            print(table(rows[-1:], left=2), flush=True)
    print(table(rows, left=2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"dense {top:.2f} %; peak memory {peak / 1e6:.0f} MB, images and PyTorch included")
    settings = {"images": options.images, "rows": options.rows, "seed": options.seed}
    write_json(
        options.json,
        {"machine": machine(), **settings, "dense_top1": top, "peak_bytes": peak, "cases": records},
    )


def measure(
    dense: torch.nn.Module,
    method: Method,
    kind: str,
    x: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Converts, exports and evaluates once."""
    data = [cifar10.normalize(part) for part in np.array_split(x[: options.images], 8)]
    recipe = {"conv1": Int8(), "linear": Int8(), "*": method}
    start, cpu = time.perf_counter(), time.process_time()
    settings: Any = {"rows": options.rows, "seed": options.seed, "calibration": kind}
    model, report = convert(dense, recipe, data, progress=False, **settings)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rounding moved codes: the accuracy is the engine's
        file = Path(folder) / "model.lutra"
        export(model, file, data[0][:8])
        top1 = cifar10.engine_accuracy(file, x_test, y_test)
    error = report.layers[-1].error
    return {"top1": top1, "error": error, "seconds": seconds, "cpu_seconds": cpu}


if __name__ == "__main__":
    main()

"""Accuracy without any training: what calibration alone makes of trained networks.

    python -m benchmarks.calibration --data FOLDER [--network TEXT] [--method TEXT] [--json FILE]

The networks are those of `benchmarks.calibration_networks`: ResNet-20 (CIFAR-10), DS-CNN
(keywords), VDSR (super-resolution) and all-MiniLM-L6-v2 (sentences). First and last layers are
int8 or kept, the others of one method. Calibration sees training data without labels, and is done
in both ways that `lutra.convert` has; the score is that of the exported file in the engine, on test
data. "last error" is that of the last layer that was fitted, with the errors of all layers before
it in it. Memory is the peak of a conversion above what the process had.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.calibration_networks import NETWORKS, Network
from benchmarks.machine import machine, write_json
from benchmarks.memory import status
from lutra import LutraError
from lutra.formatting import table
from lutra.train import PQ, Int8, Lookup, convert, export
from lutra.train.recipe import Method

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
    "row nearest V=3": PQ(v=3, group="row"),
    "row tree V=3": PQ(v=3, group="row", encoder="tree"),
    "pixel nearest V=4": PQ(v=4, group="pixel"),
    "pixel tree V=4": PQ(v=4, group="pixel", encoder="tree"),
}
KINDS: Final = ("parallel", "sequential")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of image/, speech/, sr/, text/, weights/"
    )
    parser.add_argument("--network", default="", help="only networks with this text in their name")
    parser.add_argument("--images", type=int, default=1024, help="of calibration (default: 1024)")
    parser.add_argument("--rows", type=int, default=8192, help="of a layer (default: 8192)")
    parser.add_argument("--method", default="", help="only methods with this text in their name")
    parser.add_argument("--calibration", choices=KINDS, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    head = ("network", "method", "calibration", "score", "dense", "unit", "last error")
    rows: list[tuple[str, ...]] = [(*head, "seconds", "CPU s", "MB")]
    records: list[dict[str, Any]] = []
    for title, make in NETWORKS.items():
        if options.network not in title:
            continue
        try:
            network = make(options.data, options.images)
        except (OSError, RuntimeError) as error:
            print(f"{title}: skipped, {error}", flush=True)
            continue
        for name, method in METHODS.items():
            if options.method not in name:
                continue
            for kind in KINDS if options.calibration is None else (options.calibration,):
                try:
                    record = measure(network, method, kind, options)
                except LutraError as error:  # a method that does not fit the layers
                    print(f"{title}, {name}: {error}", flush=True)
                    break
                own = {"network": title, "method": name, "calibration": kind, "unit": network.unit}
                records.append({**own, "dense": network.dense_score, **record})
                scores = f"{record['score']:.2f}", f"{network.dense_score:.2f}", network.unit
                costs = f"{record['seconds']:.0f}", f"{record['cpu_seconds']:.0f}"
                error = f"{record['error']:.4f}"
                rows.append(
                    (title, name, kind, *scores, error, *costs, f"{record['bytes'] / 1e6:.0f}")
                )
                print(table(rows[-1:], left=3), flush=True)
    print(table(rows, left=3))
    settings = {"images": options.images, "rows": options.rows, "seed": options.seed}
    write_json(options.json, {"machine": machine(), **settings, "cases": records})


def measure(
    network: Network, method: Method, kind: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Converts, exports and evaluates once."""
    recipe = {**network.ends, "*": method}
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    held = status("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    settings: Any = {"rows": options.rows, "seed": options.seed, "calibration": kind}
    model, report = convert(network.dense, recipe, network.calibration, progress=False, **settings)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = status("VmHWM") - held
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rounding moved codes: the score is the engine's
        file = Path(folder) / "model.lutra"
        export(model, file, network.example, dynamic_axes=network.dynamic_axes)
        score = network.score(file)
    error = [layer.error for layer in report.layers if layer.error is not None][-1]
    return {
        "score": score, "error": error, "seconds": seconds, "cpu_seconds": cpu, "bytes": peak,
    }  # fmt: skip


if __name__ == "__main__":
    main()

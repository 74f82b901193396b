"""What every result records: the machine, the versions and how the time was taken."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import lutra


def machine() -> dict[str, Any]:
    """CPU, cores and versions."""
    versions = {}
    for package in ("lutra", "numpy", "torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    info = lutra.cpu_info()
    return {
        "cpu": info["model"],
        "isa": info["best"],
        "cores": info["cores"],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def interleaved(
    cases: dict[str, Callable[[], object]], runs: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each case, measured in turn so that a drifting machine is fair to all."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(warmup + runs):
        for name, run in cases.items():
            start = perf_counter()
            run()
            if i >= warmup:
                times[name].append(perf_counter() - start)
    return times


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, fastest and slowest, in milliseconds."""
    return {
        "median": 1e3 * median(seconds),
        "min": 1e3 * min(seconds),
        "max": 1e3 * max(seconds),
    }


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    """Writes the record, or prints it when there is no path."""
    text = json.dumps(record, indent=2)
    if path is None:
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        print(f"wrote {path}")

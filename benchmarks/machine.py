"""What every result records: the machine, the versions and how the time was taken."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time, sleep
from typing import Any, Final

import lutra

#: What measures a run, by name: time that passes, or time that all threads of the process compute.
CLOCKS: Final[Mapping[str, Callable[[], float]]] = {"wall": perf_counter, "cpu": process_time}


def machine() -> dict[str, Any]:
    """CPU, cores and versions."""
    versions: dict[str, str | None] = {}
    for package in ("lutra", "numpy", "torch", "onnxruntime", "openvino", "onnx"):
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


def saturates() -> bool:
    """Whether products of uint8 and int8 are added in 16 bits here, with saturation, by others.

    So `vpmaddubsw` does on x86 CPUs without VNNI. ONNX Runtime's guide has weights of 7 bits for
    them (`reduce_range`).
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not {"avx512_vnni", "avx_vnni"}.intersection(flags)


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    runs: int,
    warmup: int,
    *,
    lead_in: int = 0,
    counted: int = 1,
    settle: bool = False,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds of each case, measured in turn so that a drifting machine is fair to all.

    Who begins changes from round to round.

    Args:
        cases: What to run, by name.
        runs: Rounds that count.
        warmup: Rounds before them.
        lead_in: Runs of a case in every turn that do not count, before those that do.
        counted: Runs of a case in every turn that count.
        settle: Whether a turn waits until the threads of the case before it have gone to sleep.
        clock: One of `CLOCKS`.
    """
    now = CLOCKS[clock]
    names = list(cases)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + runs):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            run = cases[name]
            if settle:
                wait_for_idle()
            for _ in range(lead_in):
                run()
            for _ in range(counted):
                start = now()
                run()
                if i >= warmup:
                    times[name].append(now() - start)
    return times


def wait_for_idle(step: float = 0.002, most: float = 0.2) -> None:
    """Sleeps until this process has stopped computing: idle threads of some runtimes spin a while.

    Args:
        step: Seconds between two looks.
        most: Seconds after which it returns anyway.
    """
    end = perf_counter() + most
    while perf_counter() < end:
        before = process_time()
        sleep(step)
        if process_time() - before < step / 4:
            return


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, fastest, slowest and interquartile range, in milliseconds."""
    low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else (0.0, 0.0, 0.0)
    return {
        "median": 1e3 * median(seconds),
        "min": 1e3 * min(seconds),
        "max": 1e3 * max(seconds),
        "iqr": 1e3 * (high - low),
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

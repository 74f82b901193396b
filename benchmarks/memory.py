"""Resident memory that a model takes, counted in a fresh process.

    python -m benchmarks.memory NAME FILE INPUTS.npz THREADS ISA

What the runtime itself takes after its import does not count: only what loading the model and three
runs add, at their peak.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.peers import load_runtime, open_model


def peak_memory(name: str, path: Path, sample: Path, threads: int, isa: str) -> int:
    """Bytes of a contestant, measured in a child process.

    Raises:
        RuntimeError: If the child fails.
    """
    words = [name, str(path), str(sample), str(threads), isa]
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *words],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if child.returncode:
        text = " ".join(child.stderr.split())[-300:]
        raise RuntimeError(f"memory of {name} not counted: {text or child.returncode}")
    return int(child.stdout.split()[-1])


def status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    name, path, sample, threads, isa = sys.argv[1:]
    with np.load(sample) as archive:
        feeds = dict(archive)
    load_runtime(name)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of the imports
    before = status("VmRSS")
    opened = open_model(name, Path(path), int(threads), isa)
    for _ in range(3):
        opened.run(feeds)
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main()

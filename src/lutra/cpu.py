"""What this machine can run: instruction sets and the number of cores that are ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, TypedDict

from lutra import _engine
from lutra.errors import UnsupportedCpuError

__all__ = ["CpuInfo", "choose_isa", "choose_threads", "cpu_info", "runnable_isas", "usable_cores"]

#: More threads than this are a mistake, and a machine may not survive it.
MAX_THREADS: Final = 1024


class CpuInfo(TypedDict):
    """What ``cpu_info`` returns."""

    model: str
    features: list[str]
    compiled: list[str]
    runnable: list[str]
    best: str
    cores: int


def runnable_isas() -> list[str]:
    """The instruction sets whose kernels this CPU can run, slowest first; never empty."""
    return _engine.runnable_isas()


def cpu_info() -> CpuInfo:
    """Describes the CPU and the kernels.

    Returns:
        model: Name of the CPU.
        features: Those of its features that kernels ask for.
        compiled: Instruction sets in this build.
        runnable: Those of them that run here.
        best: The one that a session takes by itself.
        cores: Cores that this process may use: CPU affinity and cgroup quota.
    """
    runnable = runnable_isas()
    return {
        "model": _engine.cpu_model(),
        "features": _engine.cpu_features(),
        "compiled": _engine.compiled_isas(),
        "runnable": runnable,
        "best": runnable[-1],
        "cores": usable_cores(),
    }


def choose_isa(isa: str | None = None) -> str:
    """The instruction set to use: the argument, else LUTRA_ISA, else the best.

    Args:
        isa: A name, or "auto" or None to choose.

    Raises:
        UnsupportedCpuError: If its kernels cannot run here.
    """
    runnable = runnable_isas()
    source = "isa"
    if isa is None:
        isa, source = os.environ.get("LUTRA_ISA") or "auto", "LUTRA_ISA"
    if isa == "auto":
        return runnable[-1]
    if isa not in runnable:
        raise UnsupportedCpuError(
            f"{source}={isa!r} cannot run on this machine with this build; "
            f"choose one of: auto, {', '.join(runnable)}"
        )
    return isa


def choose_threads(threads: int | None = None) -> int:
    """The number of threads to use: the argument, else LUTRA_NUM_THREADS, else all usable cores.

    Raises:
        ValueError: If it is not a number from 1 to 1024.
    """
    if threads is not None:
        if isinstance(threads, bool) or not isinstance(threads, int):
            raise ValueError(f"threads={threads!r} is not an int; give a number of threads")
        return _checked_threads("threads", threads)
    text = os.environ.get("LUTRA_NUM_THREADS")
    if not text:
        return min(usable_cores(), MAX_THREADS)
    try:
        number = int(text)
    except ValueError:
        raise ValueError(
            f"LUTRA_NUM_THREADS={text!r} is not a number; set it to a number of threads"
        ) from None
    return _checked_threads("LUTRA_NUM_THREADS", number)


def _checked_threads(source: str, number: int) -> int:
    if not 1 <= number <= MAX_THREADS:
        raise ValueError(f"{source}={number} is out of range; it must be in 1..{MAX_THREADS}")
    return number


def usable_cores() -> int:
    """Cores that this process may use: CPU affinity, limited by the quota of its cgroups."""
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        cores = os.cpu_count() or 1
    quota = cgroup_quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


def cgroup_quota(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """The cores that the cgroups of this process grant; None without a limit.

    Args:
        groups: The file that lists the cgroups of the process.
        root: Where cgroups are mounted.
    """
    try:
        lines = groups.read_text().splitlines()
    except (OSError, ValueError):
        return None
    limits: list[float] = []
    for line in lines:
        fields = line.split(":", 2)
        if len(fields) != 3:
            continue
        number, controllers, path = fields
        if number == "0":  # version 2; some systems mount both
            for mount in (root, root / "unified"):
                limits += _quotas(mount, path, "cpu.max")
        elif "cpu" in controllers.split(","):
            for mount in {root / controllers, root / "cpu"}:
                limits += _quotas(mount, path, "cpu.cfs_quota_us")
    return min(limits, default=None)


def _quotas(mount: Path, path: str, file: str) -> list[float]:
    """The limits of a cgroup and of all above it, which bind it too."""
    place = mount / path.lstrip("/")
    places = [p for p in (place, *place.parents) if p == mount or mount in p.parents]
    found = []
    for folder in places:
        try:
            words = (folder / file).read_text().split()
            if file == "cpu.cfs_quota_us":
                words += (folder / "cpu.cfs_period_us").read_text().split()
            quota, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):  # no limit, or "max"
            continue
        if quota > 0 and period > 0:
            found.append(quota / period)
    return found

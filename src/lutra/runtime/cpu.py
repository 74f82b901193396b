"""What this machine can run: instruction sets and the number of cores that are ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypedDict

from lutra._engine import compiled_isas, cpu_features, cpu_model
from lutra._engine import runnable_isas as engine_isas
from lutra.errors import UnsupportedCpuError

__all__ = ["CpuInfo", "choose_isa", "choose_threads", "cpu_info", "runnable_isas", "usable_cores"]

#: More threads than this are a mistake, and a machine may not survive it.
MAX_THREADS: Final = 1024
_CGROUPS: Final = Path("/proc/self/cgroup")
_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")


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
    return engine_isas()


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
        "model": cpu_model(),
        "features": cpu_features(),
        "compiled": compiled_isas(),
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


def usable_memory(groups: Path = _CGROUPS, root: Path = _CGROUP_ROOT) -> int | None:
    """Bytes of memory that this process may have: the machine's, limited by its cgroups.

    Args:
        groups: The file that lists the cgroups of the process.
        root: Where cgroups are mounted.

    Returns:
        None where the system does not say.
    """
    limits: list[int] = []
    try:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # another system
        return None
    for version, folder in _cgroup_folders("memory", groups, root):
        try:
            file = "memory.max" if version == 2 else "memory.limit_in_bytes"
            limits.append(int((folder / file).read_text()))
        except (OSError, ValueError):  # no limit, or "max"
            continue
    return min(limit for limit in limits if limit > 0)


def cgroup_quota(groups: Path = _CGROUPS, root: Path = _CGROUP_ROOT) -> float | None:
    """The cores that the cgroups of this process grant; None without a limit.

    Args:
        groups: The file that lists the cgroups of the process.
        root: Where cgroups are mounted.
    """
    limits: list[float] = []
    for version, folder in _cgroup_folders("cpu", groups, root):
        try:
            if version == 2:
                words = (folder / "cpu.max").read_text().split()
            else:
                files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                words = [(folder / file).read_text() for file in files]
            quota, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):  # no limit, or "max"
            continue
        if quota > 0 and period > 0:
            limits.append(quota / period)
    return min(limits, default=None)


def _cgroup_folders(controller: str, groups: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of the cgroups of this process and of all above them: they bind it too."""
    try:
        lines = groups.read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        fields = line.split(":", 2)
        if len(fields) != 3:
            continue
        number, controllers, path = fields
        if number == "0":  # version 2; some systems mount both
            version, mounts = 2, {root, root / "unified"}
        elif controller in controllers.split(","):
            version, mounts = 1, {root / controllers, root / controller}
        else:
            continue
        for mount in mounts:
            place = mount / path.lstrip("/")
            for folder in (place, *place.parents):
                if folder == mount or mount in folder.parents:
                    yield version, folder

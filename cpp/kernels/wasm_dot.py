"""Puts dot products of bytes into a WebAssembly module: ``python wasm_dot.py MODULE WASM_DIS``.

``wasm_dot.h`` stands ``f32x4.relaxed_min`` in for ``i16x8.relaxed_dot_i8x16_i7x16_s``: the same
operands, numbers of the same length, and nothing else uses it. The older number of it is what
emscripten 3.1 writes. The disassembler says how many there must be.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STAND_IN, DOT = b"\xfd\xb4\x01", b"\xfd\x92\x02"


def main(module: Path, disassembler: str) -> None:
    command = [disassembler, "--all-features", str(module)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    there = text.count("f32x4.relaxed_min")
    data = module.read_bytes()
    found = data.count(STAND_IN)
    if found != there or DOT in data:
        raise SystemExit(
            f"{module}: {found} places look like one of its {there} f32x4.relaxed_min; a constant "
            "has the same bytes, or emscripten writes another number: mend wasm_dot.py"
        )
    module.write_bytes(data.replace(STAND_IN, DOT))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

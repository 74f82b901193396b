"""Products with matrices of low-bit weights: lutra's kernels, ONNX Runtime's, llama.cpp's, float32.

    python -m benchmarks.lowbit [--rows N] [--isa avx2] [--threads N] [--json FILE]

Shapes are those of language models, rows those of decoding and of prompts. All contestants of a
case take turns.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

import lutra
from benchmarks import llama_peer
from benchmarks.lowbit_peers import BLOCK, PEERS, open_peer
from benchmarks.machine import CLOCKS, interleaved, machine, spread, write_json
from benchmarks.peers import Array, reason
from lutra.lowbit import REGISTER_ROWS
from lutra.ops.lowbit_storage import BITS, TERNARY, levels_of

#: (outputs, inputs): BitNet 2B, Llama 8B, and one that no tile divides.
SHAPES: Final = (
    (2560, 2560), (6912, 2560), (2560, 6912), (4096, 4096), (14336, 4096), (641, 2563)
)  # fmt: skip
ROWS: Final = (1, 4, 32, 256)
KERNELS: Final = ("dense", "tables", "registers")
WARMUP: Final = 1
#: Runs of a turn that do not count and that do: of few rows, which take as long as their weights
#: take to come, the contestant before must not decide where they are.
_TURN: Final = {False: (1, 3), True: (8, 16)}
METHOD: Final = (
    "One process; float32 rows in, float32 rows out, quantising included. All contestants of a "
    "case take turns, who begins changes. Times are medians of runs of which the first of a turn "
    "(of up to four rows the first eight) does not count; ms has their spread. lutra has random "
    "codes and a scale for each output, or for groups of --group; ONNX Runtime has "
    f"MatMulNBits with a scale for {BLOCK} weights and "
    "int8 activations (accuracy_level 4), and runs on the best instruction set that it finds, "
    "whatever --isa is: it cannot be kept at another. llama.cpp has one ggml_mul_mat in the buffer "
    "that it chooses for the format, and runs on what its libraries were built for (field "
    "llama_cpp). speedup_peer compares with the fastest peer whose weights have at least as many "
    "bits. kernels_ms has the kernels of lutra."
)


def codes(rng: np.random.Generator, outputs: int, depth: int, bits: float) -> Array:
    """Random codes as `LowBitMatrix.pack` takes them."""
    made = rng.integers(0, levels_of(bits), (outputs, depth), dtype=np.int8)
    return made - np.int8(1) if bits == TERNARY else made


def measure(
    shape: tuple[int, int], rows: int, bits: tuple[float, ...], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A record for each number of bits."""
    outputs, depth = shape
    rng = np.random.default_rng(0)
    pool = itertools.cycle([rng.normal(size=(rows, depth)).astype(np.float32) for _ in range(3)])
    matrices: dict[float, lutra.LowBitMatrix] = {}
    cases: dict[str, Any] = {}
    for b in bits:
        matrix = lutra.LowBitMatrix.pack(
            codes(rng, outputs, depth, b), b, options.group, scales=0.01, isa=options.isa,
            threads=options.threads,
        )  # fmt: skip
        matrices[b] = matrix
        for kernel in KERNELS:
            few = kernel == "registers"
            if kernel == "dense" or few == (rows <= REGISTER_ROWS):
                cases[f"{b} {kernel}"] = lambda m=matrix, k=kernel: m.matmul(next(pool), kernel=k)
    failed: dict[str, str] = {}
    for name in () if options.kernels else PEERS:
        try:
            run = open_peer(name, outputs, depth, options.threads)
            if run(next(pool)).shape != (rows, outputs):
                raise ValueError("its output has another shape")
            cases[name] = lambda run=run: run(next(pool))
        except Exception as error:  # whatever a runtime raises becomes a line in the record
            failed[name] = reason(error)
    lead_in, counted = _TURN[rows <= REGISTER_ROWS]
    times = interleaved(
        cases, options.runs, WARMUP, lead_in=lead_in, counted=counted,
        settle=options.threads > 1, clock=options.clock,
    )  # fmt: skip
    ms = {name: spread(seconds) for name, seconds in times.items()}
    return [_record(matrices[b], rows, ms, failed, options) for b in bits]


def _record(
    matrix: lutra.LowBitMatrix,
    rows: int,
    ms: dict[str, dict[str, float]],
    failed: dict[str, str],
    options: argparse.Namespace,
) -> dict[str, Any]:
    choice = matrix.explain(rows)
    name = f"{matrix.bits} {choice.kernel}"
    own = {k: ms[f"{matrix.bits} {k}"] for k in KERNELS if f"{matrix.bits} {k}" in ms}
    peers_ms = {peer: ms[peer]["median"] for peer in PEERS if peer in ms}
    # A peer of fewer bits could not hold these weights.
    able = [peers_ms[peer] for peer in peers_ms if PEERS[peer] >= matrix.bits]
    fastest = min(able, default=None)
    outputs, depth = matrix.shape
    lutra_ms = ms[name]["median"]
    return {
        "bits": matrix.bits,
        "shape": [outputs, depth],
        "rows": rows,
        "group": matrix.group,
        "isa": matrix.isa,
        "threads": options.threads,
        "clock": options.clock,
        "kernel": choice.kernel,
        "reason": choice.reason,
        "lutra_ms": lutra_ms,
        "kernels_ms": {kernel: spread["median"] for kernel, spread in own.items()},
        "peers_ms": peers_ms,
        "speedup_peer": None if fastest is None else fastest / lutra_ms,
        "gmacs": outputs * depth * rows / lutra_ms / 1e6,
        "bytes": matrix.nbytes,
        "ms": {"lutra": ms[name], **{peer: ms[peer] for peer in peers_ms}},
        "peers_failed": failed,
    }


def _print(record: dict[str, Any]) -> None:
    outputs, depth = record["shape"]
    own = "  ".join(f"{kernel} {ms:8.3f}" for kernel, ms in record["kernels_ms"].items())
    peers = "  ".join(
        f"{name.removeprefix('onnxruntime ')} {ms:.3f}" for name, ms in record["peers_ms"].items()
    )
    ratio = "" if record["speedup_peer"] is None else f"{record['speedup_peer']:5.2f} x"
    print(
        f"{outputs:6d} x {depth:5d} {record['rows']:4d} rows {record['bits']:4g} bits: {own} ms, "
        f"{record['kernel']:6s} {record['gmacs']:4.0f} GMAC/s {ratio} [{peers}]",
        flush=True,
    )


def main() -> None:
    """Parses the arguments, measures the cases and writes the records."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=int, action="append",
                        help=f"only so many rows; may be repeated (default: {ROWS})")  # fmt: skip
    parser.add_argument("--isa", choices=lutra.runnable_isas(), default=lutra.runnable_isas()[-1])
    parser.add_argument("--threads", type=int, default=1, help="of everybody (default: 1)")
    parser.add_argument("--bits", type=float, choices=BITS, action="append",
                        help="only so many bits; may be repeated")  # fmt: skip
    parser.add_argument("--group", type=int, choices=(32, 64, 128), help="weights of a scale")
    parser.add_argument("--shape", metavar="MxK", action="append", help="only these shapes, "
                        "such as 2560x2560")  # fmt: skip
    parser.add_argument("--kernels", action="store_true", help="only lutra's kernels")
    parser.add_argument("--runs", type=int, default=15, help="turns that count (default: 15)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall",
                        help="cpu: time that the process computes, for a machine that does other "
                             "things too (default: wall)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the records go")
    options = parser.parse_args()
    if min(options.threads, options.runs, *(options.rows or ROWS)) < 1:
        parser.error("--threads, --runs and --rows must be at least 1")
    shapes = []
    for text in options.shape or ():
        sizes = text.split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
            parser.error(f"--shape {text}: give it as MxK, such as 2560x2560")
        shapes.append((int(sizes[0]), int(sizes[1])))
    records: list[dict[str, Any]] = []
    bits = tuple(options.bits or BITS)
    for shape in shapes or SHAPES:
        if options.group and shape[1] % options.group:
            continue
        for rows in options.rows or ROWS:
            made = measure(shape, rows, bits, options)
            for record in made:
                _print(record)
            records += made
        if options.json is not None:  # what is measured is kept, should the command be ended
            _write(options.json, records)
    if options.json is None or not records:
        _write(options.json, records)


def _write(path: Path | None, records: list[dict[str, Any]]) -> None:
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.lowbit", *sys.argv[1:]]),
        "method": METHOD,
        "machine": machine(),
        "llama_cpp": llama_peer.features(),
        "load_average": os.getloadavg()[0],
        "records": records,
    }
    write_json(path, report)


if __name__ == "__main__":
    main()

"""``lutra hardware``: a layer of a file as a circuit, with answers to check it against."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, Final

from lutra.cli.common import UserError, add_file, at_least, plain, print_json
from lutra.format import load_graph
from lutra.hardware.bundle import Bundle, make_bundle
from lutra.hardware.tools import SIMULATORS, Outcome, find_simulator, run_verilog

_FAILED: Final = 1
#: Parameters of a design by their flags.
_SIZES: Final = {
    "tile": "outputs that are added in one cycle",
    "elements": "distance elements of the encoder",
    "beat": "table entries that are loaded in one cycle",
    "scratchpad": "rows of one pass",
    "fifo": "codes that may wait between encoder and tables",
    "sum-bits": "bits of a sum",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_file(parser)
    parser.add_argument("--layer", required=True, metavar="NAME", help="see lutra inspect")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--rows", type=at_least(1), default=64, metavar="N", help="rows to check with (64)"
    )
    for flag, text in _SIZES.items():
        parser.add_argument(f"--{flag}", type=at_least(1), metavar="N", help=text)
    parser.add_argument(
        "--two-clocks", action="store_true", help="a clock of its own for the encoder"
    )
    parser.add_argument(
        "--simulate", action="store_true", help="run the circuit and compare every answer"
    )
    parser.add_argument(
        "--simulator",
        choices=(*SIMULATORS, "amaranth"),
        help="default: the first of them that is installed",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    given: dict[str, Any] = {
        {"scratchpad": "rows"}.get(flag, flag.replace("-", "_")): getattr(
            args, flag.replace("-", "_")
        )
        for flag in _SIZES
    }
    parameters = {name: value for name, value in given.items() if value is not None}
    if args.two_clocks:
        parameters["two_clocks"] = True
    if args.simulator and not args.simulate:
        raise UserError("--simulator is for --simulate; give both, or leave it out")
    bundle = make_bundle(load_graph(args.file), args.layer, rows=args.rows, **parameters)
    folder = Path(args.output)
    bundle.write(folder)
    report: dict[str, Any] = {"folder": str(folder), **bundle.facts}
    lines = [f"wrote {plain(str(folder))}: {_summary(bundle)}"]
    passed = True
    if args.simulate:
        simulator = "amaranth"
        if args.simulator != "amaranth":
            simulator = find_simulator(args.simulator) or "amaranth"
        outcome = _simulate(bundle, folder, simulator)
        passed = outcome.passed
        report["simulation"] = {"simulator": simulator, **vars(outcome)}
        lines.append(_verdict(simulator, outcome))
    if args.json:
        print_json(report)
    else:
        print("\n".join(lines))
    return 0 if passed else _FAILED


def _simulate(bundle: Bundle, folder: Path, simulator: str) -> Outcome:
    if simulator == "amaranth":
        return _in_python(bundle)
    # Built elsewhere, so that the folder holds what was written and nothing else.
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for file in folder.iterdir():
            if file.suffix in (".v", ".mem"):
                (copy / file.name).write_bytes(file.read_bytes())
        return run_verilog(copy, simulator)


def _in_python(bundle: Bundle) -> Outcome:
    """The circuit in Amaranth's own simulator, which is slow."""
    from lutra.hardware.simulate import simulate_streams

    bench = bundle.bench
    inputs = {name: words for name, (_, words) in bench.inputs.items()}
    expected, codes = bench.sums[1], [] if bench.codes is None else bench.codes[1]
    found = simulate_streams(bundle.circuit(), inputs, len(expected), slow=bench.slow)
    wrong = sum(a != b for a, b in zip(found.sums, expected, strict=True))
    wrong += sum(a != b for a, b in zip(found.code, codes, strict=False))
    model = -1 if bench.cycles is None else bench.cycles
    right = not wrong and len(found.code) == len(codes) and model in (-1, found.cycles)
    return Outcome(right, len(found.code), len(found.sums), wrong, found.cycles, model)


def _summary(bundle: Bundle) -> str:
    facts = bundle.facts
    cycles = facts["cycles"]
    time = "two clocks" if cycles is None else f"{cycles:,} cycles"
    return (
        f"{facts['op']} {facts['layer']!r}, {facts['inputs']} inputs, {facts['outputs']} outputs, "
        f"{facts['rows']} rows, {time}"
    )


def _verdict(simulator: str, outcome: Outcome) -> str:
    compared = f"{outcome.codes:,} codes and {outcome.sums:,} words of sums"
    model = "" if outcome.model < 0 else f", the model says {outcome.model:,}"
    verdict = "equal" if not outcome.wrong else f"{outcome.wrong:,} WRONG"
    end = "" if outcome.passed else ": FAILED"
    return f"{simulator}: {compared} {verdict}; {outcome.cycles:,} cycles{model}{end}"

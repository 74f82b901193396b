"""The command line of `benchmarks.layers` and `benchmarks.models`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import lutra
from benchmarks.lookups import FAMILIES, Method
from benchmarks.machine import CLOCKS, machine, write_json
from benchmarks.measure import METHOD, Case, Setting, measure
from benchmarks.peers import CAPS, PEERS
from benchmarks.table import markdown

#: Variables that begin like this change how somebody runs, and are recorded.
_SWITCHES: Final = ("ONEDNN_", "DNNL_", "ATEN_", "MKL_", "OMP_", "GOMP_", "KMP_", "OV_", "LUTRA_")


def run_command(module: str, purpose: str, cases: Sequence[Case]) -> None:
    """Parses the arguments, measures the cases and writes the records.

    Args:
        module: Name of the module that is run, for the record.
        purpose: One sentence for `--help`.
        cases: What can be measured.
    """
    options = _options(purpose, cases)
    setting = Setting(
        threads=options.threads,
        isa=options.isa or lutra.runnable_isas()[-1],
        capped=options.isa is not None,
        runs=options.runs,
        dense=options.dense,
        memory=options.memory,
        profile=options.profile,
        clock=options.clock,
    )
    cap = CAPS.get(options.isa, {})
    if not cap.items() <= os.environ.items():
        # The libraries read these variables when they are loaded, so begin again with them.
        words = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, words, os.environ | cap)
    chosen = _chosen(cases, options)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "method": METHOD,
        "runs": options.runs,
        "machine": machine(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(_SWITCHES)},
        "load_average": [os.getloadavg()[0]],
        "lutra_failed": {},
        "records": [],
    }
    for case in chosen:
        records, broken = measure(case, setting)
        title = f"{case.network.name}, batch {case.batch}"
        print(f"{title}, threads {setting.threads}, {setting.isa}")
        for record in records:
            _print(record)
        for name, text in broken.items():
            print(f"  {name} failed: {text}")
            report["lutra_failed"][f"{title}, {name}"] = text
        sys.stdout.flush()
        report["records"] += records
    report["load_average"].append(os.getloadavg()[0])
    if options.markdown:
        print(markdown(report["records"]))
    if options.json:
        write_json(options.json, report)
    if report["lutra_failed"]:
        raise SystemExit("lutra could not run every case; see above")


def _options(purpose: str, cases: Sequence[Case]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--threads", type=int, default=1, help="of everybody (default: 1)")
    parser.add_argument("--isa", choices=list(CAPS), help="keep everybody at this instruction set")
    parser.add_argument("--runs", type=int, default=50, help="turns that count (default: 50)")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases with it in the name")
    parser.add_argument("--batch", type=int, metavar="N", help="only cases of this batch")
    parser.add_argument("--method", choices=[family.family for family in FAMILIES],
                        action="append", help="of lookups (default: all)")  # fmt: skip
    for family in FAMILIES:
        every = [x for case in cases for x in case.methods if x.family == family.family]
        for option in family.options:
            values = dict.fromkeys(method.choices[option] for method in every)
            parser.add_argument(f"--{option}", choices=values, action="append",
                                help=f"of {family.family} (default: all)")  # fmt: skip
    parser.add_argument("--dense", choices=["float32", "int8"], default="float32",
                        help="what lutra's dense layers are (default: float32)")  # fmt: skip
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall",
                        help="cpu: time that the process computes, for a machine that does other "
                             "things too (default: wall)")  # fmt: skip
    parser.add_argument("--memory", action="store_true", help="peak memory too, after the timing")
    parser.add_argument("--profile", action="store_true", help="where the time of lutra goes too")
    parser.add_argument("--markdown", action="store_true", help="print a table at the end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the records go")
    options = parser.parse_args()
    if options.threads < 1 or options.runs < 1:
        parser.error("--threads and --runs must be at least 1")
    if options.isa not in (None, *lutra.runnable_isas()):
        parser.error(f"--isa {options.isa}: this machine runs {', '.join(lutra.runnable_isas())}")
    return options


def _chosen(cases: Sequence[Case], options: argparse.Namespace) -> list[Case]:
    """The cases to measure, with the lookups to measure them with."""
    named = [case for case in cases if options.case in case.network.name]
    if not named:
        names = sorted({case.network.name for case in cases})
        raise SystemExit(f"no case has {options.case!r} in its name; there are {', '.join(names)}")
    batches = sorted({case.batch for case in named})
    named = [case for case in named if options.batch in (None, case.batch)]
    if not named:
        raise SystemExit(
            f"these cases have no batch of {options.batch}; there are "
            f"{', '.join(map(str, batches))}"
        )

    def wanted(method: Method) -> bool:
        if options.method and method.family not in options.method:
            return False
        chosen = {option: getattr(options, option) for option in method.options}
        return all(not chosen[option] or is_ in chosen[option]
                   for option, is_ in method.choices.items())  # fmt: skip

    chosen = [replace(case, methods=tuple(filter(wanted, case.methods))) for case in named]
    chosen = [case for case in chosen if case.methods]
    if not chosen:
        names = sorted({str(method) for case in named for method in case.methods})
        raise SystemExit(
            f"these cases have none of the chosen lookups; there are {', '.join(names)}"
        )
    return chosen


def _print_profile(profile: dict[str, Any]) -> None:
    """Where the time of one way of looking up goes."""
    total = profile["total_ms"]
    for what, step in profile["steps"].items():
        share = step["ms"] / total
        print(f"    {step['steps']:3d} x {what:44s} {step['ms']:8.4f} ms {share:6.1%}")


def _print(record: dict[str, Any]) -> None:
    """A few lines about one record."""
    ms, title = record["lutra_ms"], record["lookups"]
    print(f"  lutra {title:18s} {ms:9.3f} ms {record['gmac_per_s']:7.0f} GMAC/s")
    for name in PEERS:
        if name in record["peers_ms"]:
            peer_ms = record["peers_ms"][name]
            print(f"    {name:22s} {peer_ms:9.3f} ms {peer_ms / ms:7.2f} x")
        elif name in record["peers_failed"]:
            print(f"    {name:22s} failed: {record['peers_failed'][name]}")
    if "profile" in record:
        _print_profile(record["profile"])

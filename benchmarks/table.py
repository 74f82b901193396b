"""A markdown table of the records of `benchmarks.layers` and `benchmarks.models`.

python -m benchmarks.table FILE.json [FILE.json ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HEADS = (
    "case",
    "batch",
    "lookups",
    "isa, threads",
    "lutra ms",
    "best fp32 ms",
    "best int8 ms",
    "fp32 / lutra",
    "int8 / lutra",
)


def fastest(peers_ms: Mapping[str, float], precision: str) -> tuple[str, float] | None:
    """Name and time of the fastest peer of a precision."""
    times = [(ms, name) for name, ms in peers_ms.items() if name.split()[-1] == precision]
    if not times:
        return None
    ms, name = min(times)
    return name, ms


def markdown(records: Iterable[Mapping[str, Any]]) -> str:
    """One row a record; a ratio below 1 is a loss."""
    lines = [f"| {' | '.join(HEADS)} |", "|---|---:|---|---|---:|---:|---:|---:|---:|"]
    for record in records:
        cells = [
            record["case"],
            str(record["batch"]),
            _title(record) + (", int8 ends" if record["dense"] == "int8" else ""),
            f"{record['isa']}, {record['threads']}",
            _number(record["lutra_ms"]),
        ]
        for precision in ("fp32", "int8"):
            best = fastest(record["peers_ms"], precision)
            cells.append("-" if best is None else f"{_number(best[1])} ({best[0].split()[0]})")
        for precision in ("fp32", "int8"):
            ratio = record[f"speedup_{precision}"]
            cells.append("-" if ratio is None else f"{ratio:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _title(record: Mapping[str, Any]) -> str:
    """How lutra looked up."""
    if "lookups" in record:
        return str(record["lookups"])
    # Records from before there was more than one family.
    return f"{record['encoder']} V={record['v']} K={record['k']}"


def _number(ms: float) -> str:
    """Three digits."""
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}"


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    records = []
    for name in sys.argv[1:]:
        records += json.loads(Path(name).read_text())["records"]
    print(markdown(records))


if __name__ == "__main__":
    main()

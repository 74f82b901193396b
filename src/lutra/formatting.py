"""Plain text for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows in columns, the first of them a head.

    Args:
        rows: Cells of equal number.
        left: How many columns are text, flush left; the others are numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def counted(number: int, what: str) -> str:
    """A number of things."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def shape_text(shape: Sequence[int | None]) -> str:
    """A shape with N for a batch of any size and ? for any other axis of any size."""
    sizes = ["?" if size is None else str(size) for size in shape]
    if shape and shape[0] is None:
        sizes[0] = "N"
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the closest of the known names; empty where none is close."""
    lower = {other.lower(): other for other in known}
    close = get_close_matches(str(name).lower(), lower, n=1, cutoff=0.6)
    return f"did you mean {lower[close[0]]!r}? " if close else ""

"""A page about a search: chart and table of the front, in one HTML file without scripts."""

from __future__ import annotations

import math
from html import escape

from lutra.hardware.explore import Candidate, Exploration, as_rows

__all__ = ["exploration_page"]

_WIDTH, _HEIGHT, _EDGE = 640, 360, 56
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; max-width: 60rem; margin: 2rem auto; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; text-align: right; }
th { border-bottom: 1px solid #9aa3ad; } tr:nth-child(even) td { background: #f4f6f8; }
svg text { font-size: 12px; fill: #24292f; }
"""


def exploration_page(name: str, found: Exploration) -> str:
    """The page as text; ``lutra.reporting.page.write_page`` writes it.

    Args:
        name: What was searched for.
        found: What ``explore`` gave.
    """
    rows = as_rows(found)
    heads = (
        "".join(f"<th>{escape(head.replace('_', ' '))}</th>" for head in rows[0]) if rows else ""
    )
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(_number(value))}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(name)}: accelerators</title>
<style>{_STYLE}</style>
<h1>{escape(name)}: accelerators</h1>
<p>{found.combinations:,} combinations, {len(found.measured):,} counted, {found.pruned:,} left out
by bounds. {len(rows):,} are beaten by no other in error, cycles and cells. Cells are gates of two
inputs that Yosys counts, without memories; cycles are those of one sample.</p>
{_chart(found)}
<table><tr>{heads}</tr>
{body}
</table>
</html>
"""


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _chart(found: Exploration) -> str:
    """Error against cycles, the area of a point for its cells; the front is blue."""
    points = found.measured
    if not points:
        return ""
    front = set(found.front)
    cycles = [math.log10(one.cycles) for one in points]
    errors = [one.error for one in points]
    most = max(one.cells for one in points)

    def place(value: float, low: float, high: float, size: int) -> float:
        return _EDGE + (size - 2 * _EDGE) * ((value - low) / (high - low) if high > low else 0.5)

    def circle(one: Candidate) -> str:
        x = place(math.log10(one.cycles), min(cycles), max(cycles), _WIDTH)
        y = _HEIGHT - place(one.error, min(errors), max(errors), _HEIGHT)
        radius = 3 + 9 * math.sqrt(one.cells / most)
        colour = "#1f6feb" if one in front else "#9aa3ad"
        note = f"{one.cells:,} cells, {one.cycles:,} cycles, error {one.error:.4g}"
        return (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}" '
            f'fill-opacity=".6"><title>{note}</title></circle>'
        )

    drawn = "\n".join(circle(one) for one in sorted(points, key=lambda one: one in front))
    return f"""<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="error against cycles">
<line x1="{_EDGE}" y1="{_HEIGHT - 30}" x2="{_WIDTH - 20}" y2="{_HEIGHT - 30}" stroke="#9aa3ad"/>
<line x1="30" y1="20" x2="30" y2="{_HEIGHT - _EDGE}" stroke="#9aa3ad"/>
<text x="{_WIDTH // 2}" y="{_HEIGHT - 10}">cycles, {min(one.cycles for one in points):,} to
 {max(one.cycles for one in points):,} (logarithmic); area: cells</text>
<text x="36" y="32">error, {min(errors):.4g} to {max(errors):.4g}</text>
{drawn}
</svg>"""

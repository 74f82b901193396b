"""Charts as SVG, and images as PNG, to stand inside of a page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from lutra.node import Array

_GREY: Final = "#9aa3ad"
_BLUE: Final = "#1f6feb"
_RED: Final = "#c9302c"
_INK: Final = "#24292f"
_CHANNELS: Final = (1, 3)
_LEAST_PIXELS: Final = 4


def front_chart(study: Mapping[str, Any]) -> str:
    """Quality against cost of all trials as an SVG element: the front, the choice, the peers.

    Args:
        study: what `Study.to_dict` gives.
    """
    import matplotlib
    from matplotlib.figure import Figure

    size = study["target"] == "size"
    measure = study["measure"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lutra", "font.size": 9}):
        figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        axes = figure.add_subplot()
        trials = [t for t in study["trials"] if not t["failed"]]
        xs = [t["bytes"] / 1024 if size else t["ms"] for t in trials]
        ys = [t["quality"] for t in trials]
        axes.scatter(xs, ys, s=18, color=_GREY, label="tried", zorder=2)
        ends: list[tuple[float, float]] = []  # the choice may lie behind them
        for x, y in sorted((x, y) for x, y, t in zip(xs, ys, trials, strict=True) if t["front"]):
            if not ends or y > ends[-1][1]:
                ends.append((x, y))
        line = ([x for x, _ in ends], [y for _, y in ends])
        axes.step(*line, where="post", color=_BLUE, lw=1.4, zorder=1)
        axes.scatter(line[0], line[1], s=30, color=_BLUE, label="front", zorder=3)
        for trial, x, y in zip(trials, xs, ys, strict=True):
            if trial["label"] in ("dense", "int8 everywhere"):
                axes.annotate(
                    trial["label"], (x, y), xytext=(6, -16), textcoords="offset points",
                    ha="left" if x < max(xs) else "right", fontsize=8, color=_INK,
                )  # fmt: skip
        choice = study["choice"]
        axes.scatter(
            [choice["bytes"] / 1024 if size else choice["ms"]], [choice["quality"]], s=150,
            marker="*", color=_RED, label="choice", zorder=5,
        )  # fmt: skip
        for peer in [] if size else study["peers"]:
            axes.scatter([peer["ms"]], [peer["quality"]], s=34, marker="s", color=_INK, zorder=4)
            axes.annotate(
                peer["name"], (peer["ms"], peer["quality"]), xytext=(0, 8), ha="center",
                textcoords="offset points", fontsize=8, color=_INK,
            )  # fmt: skip
        unit = f", {measure['unit']}" if measure["unit"] else ""
        axes.axhline(measure["dense"] - study["max_drop"], color=_RED, lw=0.9, ls=":", zorder=0)
        axes.set_xlabel("size of the file, KiB" if size else "time of one sample, ms")
        axes.set_ylabel(f"{measure['name']}{unit}")
        axes.margins(0.1, 0.14)
        axes.grid(color="#e4e7eb", lw=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _element(text.getvalue(), f"{measure['name']} of every recipe against its cost")


def _element(text: str, label: str) -> str:
    """The SVG element alone, of any width."""
    element = text[text.index("<svg") :]
    head, _, rest = element.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    return f'{head} role="img" aria-label="{label}">{rest}'


def image_of(sample: Sequence[Array]) -> str | None:
    """The first input that is an image as a data URL of a PNG; None where none is.

    Args:
        sample: the inputs of a model, each (1, ...).
    """
    for array in sample:
        if (
            array.ndim == 4
            and array.dtype.kind == "f"
            and array.shape[1] in _CHANNELS
            and min(array.shape[2:]) >= _LEAST_PIXELS
        ):
            return _png(np.asarray(array[0], np.float64))
    return None


def _png(image: Array) -> str:
    """A data URL of (C, H, W); its smallest value is black, its largest white."""
    from matplotlib.image import imsave

    low, high = float(image.min()), float(image.max())
    shown = (image - low) / ((high - low) or 1.0)
    pixels = np.rint(255 * shown).astype(np.uint8).transpose(1, 2, 0)
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(pixels), format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"

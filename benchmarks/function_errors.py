"""Errors of function tables against float64: the tables of docs/functions.md.

    python -m benchmarks.function_errors [--method NAME ...] [--json FILE]

Everything is deterministic; it does not depend on the machine but for the trained networks, whose
sums PyTorch may order differently.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lutra.functions import (
    ENTRIES,
    KNOWN,
    Piecewise,
    fit,
    fit_exp,
    fit_reciprocal,
    fit_rsqrt,
)

FUNCTIONS = ("gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "erf", "exp")
#: Where the mean error is taken, and the largest error of networks without asymptotes.
RANGE = (-5.0, 5.0)
METHODS = ("minimax", "continuous", "dp", "uniform", "exponential", "relu_net", "relu_net_bare")


def table(function: str, entries: int, method: str) -> Piecewise:
    """A table of a function; exp is for -10..0 and 0 on the left of it."""
    low, high = (-10.0, 0.0) if function == "exp" else (None, None)
    if method == "continuous":
        return fit(function, low, high, entries, continuous=True)
    if method.startswith("relu_net"):
        from lutra.train import fit_relu_net

        bare = method == "relu_net_bare"
        return fit_relu_net(function, low, high, entries, asymptotes=not bare)
    return fit(function, low, high, entries, method)  # type: ignore[arg-type]


def errors(function: str, made: Piecewise, method: str) -> tuple[float, float]:
    """The largest absolute error over all floats, and the mean one between -5 and 5.

    exp is compared up to 0 only, and networks without asymptotes between -5 and 5 only.
    """
    inside = np.linspace(*RANGE, 200_001)
    every = np.concatenate([made.probes(), every_float(4099)])
    if function == "exp":
        inside, every = inside[inside <= 0], every[every <= 0]
    exact = KNOWN[function]
    if method == "relu_net_bare":
        every = inside.astype(np.float32)
    return made.errors(exact, every).largest, made.errors(exact, inside).mean


def every_float(stride: int) -> np.ndarray[Any, Any]:
    """Every stride-th finite float32, of both signs."""
    bits = np.arange(0, 1 << 32, stride, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    return x[np.isfinite(x)]


def reduced(entries: int) -> dict[str, float]:
    """Largest relative errors of the range-reduced tables, and of what is made of them."""
    rng = np.random.default_rng(0)
    x = every_float(499)
    positive = x[(x >= 2.0**-120) & (x <= 2.0**120)].astype(np.float64)
    low = x[(x <= 0) & (x >= -86)].astype(np.float64)
    exp, reciprocal, root = fit_exp(entries), fit_reciprocal(entries), fit_rsqrt(entries)
    found = {
        "exp": _relative(exp, np.exp, low),
        "reciprocal": _relative(reciprocal, np.reciprocal, positive),
        "rsqrt": _relative(root, lambda v: v**-0.5, positive),
    }
    worst = {"softmax": 0.0, "row sum": 0.0, "layer norm": 0.0}
    for spread in (0.1, 1.0, 3.0, 10.0, 50.0):
        for size in (2, 16, 128, 1024):
            z = (rng.normal(size=(500, size)) * spread).astype(np.float32)
            shifted = z - z.max(1, keepdims=True)
            p = exp(shifted)
            got = p * reciprocal(p.sum(1, keepdims=True))
            want = np.exp(shifted.astype(np.float64))
            want /= want.sum(1, keepdims=True)
            worst["softmax"] = max(worst["softmax"], float(np.abs(got - want).max()))
            worst["row sum"] = max(worst["row sum"], float(np.abs(got.sum(1) - 1).max()))
            variance = z.astype(np.float64).var(1) + 1e-5
            worst["layer norm"] = max(
                worst["layer norm"], _relative(root, lambda v: v**-0.5, variance)
            )
    return {**found, **worst}


def _relative(
    made: Callable[[Any], Any], exact: Callable[[Any], Any], x: np.ndarray[Any, Any]
) -> float:
    x = x.astype(np.float32).astype(np.float64)
    return float(np.abs(made(x) / exact(x) - 1).max())


def number(value: float) -> str:
    """Two digits."""
    if not math.isfinite(value) or value == 0:
        return str(value)
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if digits < 6 else f"{value:.1e}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--json", type=Path, help="write the figures")
    args = parser.parse_args()
    methods = args.method or METHODS
    records = []
    for name, column in (("largest error over all floats", 0), ("mean error in -5..5", 1)):
        print(f"\n{name}\n")
        print("| function | entries | " + " | ".join(methods) + " |")
        print("|---" * (2 + len(methods)) + "|")
        for function in FUNCTIONS:
            for entries in ENTRIES:
                cells = []
                for method in methods:
                    found = _cached(function, entries, method)
                    cells.append(number(found[column]))
                    if not column:
                        records.append([function, entries, method, *found])
                print(f"| {function} | {entries} | " + " | ".join(cells) + " |", flush=True)
    parts = [reduced(entries) for entries in ENTRIES]
    print("\nrange-reduced tables\n\n| entries | " + " | ".join(parts[0]) + " |")
    print("|---" * (1 + len(parts[0])) + "|")
    for entries, part in zip(ENTRIES, parts, strict=True):
        print(f"| {entries} | " + " | ".join(f"{value:.2e}" for value in part.values()) + " |")
    if args.json:
        args.json.write_text(json.dumps({"functions": records, "reduced": parts}, indent=1))


_found: dict[tuple[str, int, str], tuple[float, float]] = {}


def _cached(function: str, entries: int, method: str) -> tuple[float, float]:
    key = (function, entries, method)
    if key not in _found:
        _found[key] = errors(function, table(function, entries, method), method)
    return _found[key]


if __name__ == "__main__":
    main()

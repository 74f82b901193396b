"""Function tables against exact functions in the engine's kernels: nanoseconds for a value.

    python -m benchmarks.function_speed [--values 65536] [--turns 400] [--entries 16]

Kernels alone, on one thread and values that stay in the L2 cache; the two take turns, and the
shortest time counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lutra import _engine
from lutra.functions import fit, fit_exp, fit_reciprocal, fit_rsqrt

_REDUCED = {"exp": fit_exp, "reciprocal": fit_reciprocal, "rsqrt": fit_rsqrt}
_PIECEWISE = ("gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "erf")


def contestants(isa: str, name: str, x: Any, entries: int) -> list[Callable[[], Any]]:
    """The exact function of x, and its table."""
    if name in _REDUCED:
        kernel = getattr(_engine, f"table_{name}")
        table = [array.copy() for array in _REDUCED[name](entries).tensors.values()]
    else:
        kernel = _engine.piecewise
        table = [array.copy() for array in fit(name, entries=entries).tensors.values()]
    return [lambda: _engine.function(isa, name, x), lambda: kernel(isa, x, *table)]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=65536)
    parser.add_argument("--turns", type=int, default=400)
    parser.add_argument("--entries", type=int, default=16)
    args = parser.parse_args()
    normal = np.random.default_rng(0).normal(size=args.values).astype(np.float32) * 2
    isas = _engine.runnable_isas()
    print("| function | " + " | ".join(f"{isa} exact | {isa} table" for isa in isas) + " |")
    print("|---" * (1 + 2 * len(isas)) + "|")
    for name in (*_PIECEWISE, *_REDUCED):
        x = -np.abs(normal) if name == "exp" else np.abs(normal) + 1e-3
        x = normal if name in _PIECEWISE else x.astype(np.float32)
        cells = []
        for isa in isas:
            runs = contestants(isa, name, x, args.entries)
            best = [float("inf")] * 2
            for _ in range(args.turns):
                for i, run in enumerate(runs):
                    start = time.perf_counter()
                    run()
                    best[i] = min(best[i], time.perf_counter() - start)
            cells += [f"{1e9 * seconds / args.values:.3f}" for seconds in best]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

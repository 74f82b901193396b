"""Functions, softmax, norms and attention in the engine: computed, and by tables.

    python -m benchmarks.functions [--json FILE] [--isa avx2] [--runs N]

Each step stands alone in a plan of one thread and reads a value that the nearest caches hold. Times
are those of the step alone, of runs that take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import numpy as np

import lutra
from benchmarks.machine import machine, write_json
from benchmarks.peers import Array
from lutra import functions
from lutra._engine import Plan

ENTRIES: Final = (8, 16, 32)
#: Runs of a turn, of which the first do not count.
TURN: Final = 12
LEAD_IN: Final = 4

Build = Callable[[Plan, int], int]


NO_TABLES: Final[Mapping[str, Array]] = {}


def add(
    plan: Plan, op: str, inputs: list[int], tensors: Mapping[str, Array] = NO_TABLES, **attrs: Any
) -> int:
    """The step of an operator on values of any shape."""
    shapes = [(-1,)] * len(inputs)
    return plan.add(op, inputs, attrs, tensors, input_shapes=shapes, output_shape=(-1,))


@dataclass(frozen=True)
class Operation:
    """A step with a computed form and a form for each size of table.

    Attributes:
        name: What it computes.
        x: Its input.
        exact: Adds the computed step to a plan.
        table: Adds the step that uses tables of so many entries, or None: there is none.
    """

    name: str
    x: Array
    exact: Build
    table: Callable[[int], Build] | None


def operations() -> list[Operation]:
    """Everything that is measured, on normal values."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 32, 512)).astype(np.float32) * np.float32(2)

    def function(name: str) -> Operation:
        def exact(plan: Plan, value: int) -> int:
            if name in ("gelu", "gelu_tanh"):
                approximate = "tanh" if name == "gelu_tanh" else "none"
                return add(plan, "gelu", [value], approximate=approximate)
            return add(plan, name, [value])

        def table(entries: int) -> Build:
            made = functions.fit(name, entries=entries)
            tensors = {
                "breakpoint": made.breakpoint, "slope": made.slope, "intercept": made.intercept
            }  # fmt: skip
            return lambda plan, value: add(plan, "piecewise", [value], tensors)

        return Operation(name, x, exact, table)

    smooth = [function(name) for name in ("gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "erf")]
    others = [
        Operation(name, np.abs(x) + np.float32(0.1), function(name).exact, None)
        for name in ("exp", "sqrt", "rsqrt", "reciprocal")
    ]
    scores = rng.normal(size=(1, 12, 128, 128)).astype(np.float32)
    tokens = rng.normal(size=(1, 128, 384)).astype(np.float32)
    weight, bias = np.ones(384, np.float32), np.zeros(384, np.float32)

    def table(name: str, made: functions.Reduced) -> dict[str, Array]:
        return {f"{name}_slope": made.slope, f"{name}_intercept": made.intercept}

    def both(entries: int) -> dict[str, Array]:
        return {
            **table("exp", functions.fit_exp(entries)),
            **table("reciprocal", functions.fit_reciprocal(entries)),
        }

    def norm(plan: Plan, value: int, tables: Mapping[str, Array] = NO_TABLES) -> int:
        tensors = {"weight": weight, "bias": bias, **tables}
        return add(plan, "layer_norm", [value], tensors, eps=1e-5)

    def attention(plan: Plan, value: int, tables: Mapping[str, Array] = NO_TABLES) -> int:
        settings = {"heads": 12, "scale": 32**-0.5, "causal": False}
        return add(plan, "attention", [value] * 3, tables, **settings)

    return [
        *smooth,
        *others,
        Operation(
            "softmax 12x128x128",
            scores,
            lambda plan, value: add(plan, "softmax", [value], axis=3),
            lambda entries: (
                lambda plan, value: add(plan, "softmax", [value], both(entries), axis=3)
            ),
        ),
        Operation(
            "layer_norm 128x384",
            tokens,
            norm,
            lambda entries: (
                lambda plan, value: norm(plan, value, table("rsqrt", functions.fit_rsqrt(entries)))
            ),
        ),
        Operation(
            "attention 128x12x32",
            tokens,
            attention,
            lambda entries: lambda plan, value: attention(plan, value, both(entries)),
        ),
    ]


def step_timer(isa: str, x: Array, build: Build) -> Callable[[], list[float]]:
    """A function that runs a plan of one step some times and gives the seconds of the step."""
    plan = Plan(isa, 1)
    plan.finish([build(plan, plan.input())])

    def turn() -> list[float]:
        return [seconds[1] for seconds in plan.profile([x], TURN)[1][LEAD_IN:]]

    return turn


def measure(operation: Operation, isa: str, turns: int) -> dict[str, Any]:
    """A record of one operation: nanoseconds for each of its elements, exact and by table."""
    timers = {"exact": step_timer(isa, operation.x, operation.exact)}
    if operation.table is not None:
        timers |= {f"table{n}": step_timer(isa, operation.x, operation.table(n)) for n in ENTRIES}
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    names = list(timers)
    for turn in range(turns):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            seconds[name] += timers[name]()
    scale = 1e9 / operation.x.size
    record: dict[str, Any] = {"operation": operation.name, "isa": isa, "elements": operation.x.size}
    for name, times in seconds.items():
        low, _, high = quantiles(times, n=4)
        record[name] = {
            "ns": scale * median(times),
            "min": scale * min(times),
            "max": scale * max(times),
            "iqr": scale * (high - low),
            "us": 1e6 * median(times),
        }
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--isa", choices=lutra.runnable_isas(), default=lutra.runnable_isas()[-1])
    parser.add_argument("--runs", type=int, default=60, help="turns of each contestant")
    options = parser.parse_args()
    records = []
    columns = ("exact", *(f"table{n}" for n in ENTRIES))
    print(f"{'ns an element, ' + options.isa:24s}", *(f"{name:>9s}" for name in columns))
    for operation in operations():
        record = measure(operation, options.isa, options.runs)
        made = (record[name]["ns"] for name in columns if name in record)
        print(f"{operation.name:24s}", *(f"{ns:9.3f}" for ns in made))
        records.append(record)
    write_json(options.json, {"machine": machine(), "threads": 1, "records": records})


if __name__ == "__main__":
    main()

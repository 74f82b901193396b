"""Where the time of a model goes: every step of its plan, timed by the engine itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lutra._engine import Plan
from lutra.errors import InputError
from lutra.formatting import counted, shape_text, table
from lutra.graph import Graph, Sizes
from lutra.inputs import id_ranges, place_inputs, random_ints
from lutra.node import Array
from lutra.runtime.shared_codes import SHARED_LABEL

__all__ = ["Profile", "StepProfile"]

#: Different random inputs that take turns, and the most bytes that they may take.
_INPUT_SETS: Final = 8
_INPUT_BYTES: Final = 2**28
_QUANTIZE: Final = "quantize"


@dataclass(frozen=True)
class StepProfile:
    """One step: a node with all that is fused into it, or a conversion to a grid of integers.

    Attributes:
        name: Name of the node. A step of the operator ``quantize`` has the name of the node that
            makes what it quantises, or ``input``.
        op: Operator of the node, or ``quantize``.
        method: What the engine chose for it, such as ``nearest, shuffled tables``.
        isa: Instruction set of the kernels.
        milliseconds: Median over the runs.
        share: Of the median time of a whole run, 0 to 1.
        dense_gmacs: Multiply-adds of the dense layer that the step computes or stands for, per
            second, in thousands of millions; None where there are none.
        bytes: Bytes of the values and parameters that the step reads and writes.
        gbytes: Those bytes per second, in thousands of millions; None where no time was measured.
    """

    name: str
    op: str
    method: str
    isa: str
    milliseconds: float
    share: float
    dense_gmacs: float | None
    bytes: int
    gbytes: float | None


@dataclass(frozen=True)
class Profile:
    """What ``Session.profile`` measured. ``print`` it for a table.

    Attributes:
        steps: In the order in which they run.
        isa: Instruction set of the kernels.
        threads: Of the session, the caller's included.
        batch: Samples per run.
        runs: How many runs the medians are of.
        input_ms: Median milliseconds of copying the inputs into the order of the engine.
        output_ms: Median milliseconds of copying the outputs back.
        total_ms: Median milliseconds of a whole run. Medians do not add up exactly.
    """

    steps: tuple[StepProfile, ...]
    isa: str
    threads: int
    batch: int
    runs: int
    input_ms: float
    output_ms: float
    total_ms: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        head = ("step", "op", "method", "ms", "share", "dense GMAC/s", "bytes", "GB/s")
        rows: list[tuple[str, ...]] = [head, self._copy("copy of the inputs", self.input_ms)]
        for step in self.steps:
            gmacs = "-" if step.dense_gmacs is None else f"{step.dense_gmacs:.1f}"
            gbytes = "-" if step.gbytes is None else f"{step.gbytes:.1f}"
            rows.append(
                (_short(step.name), step.op, step.method, f"{step.milliseconds:.4f}",
                 f"{step.share:.1%}", gmacs, f"{step.bytes:,}", gbytes)
            )  # fmt: skip
        rows.append(self._copy("copy of the outputs", self.output_ms))
        rows.append(self._copy("whole run", self.total_ms))
        settings = f"{self.isa}, {counted(self.threads, 'thread')}, batch {self.batch}"
        return f"{settings}, medians of {counted(self.runs, 'run')}\n{table(rows, left=3)}"

    def _copy(self, name: str, milliseconds: float) -> tuple[str, ...]:
        share = milliseconds / self.total_ms if self.total_ms else 0.0
        return (name, "", "", f"{milliseconds:.4f}", f"{share:.1%}", "", "", "")


def _short(name: str) -> str:
    """The names of a step's nodes; of all but the first only what follows their common path."""
    first, *others = name.split(SHARED_LABEL)
    path = first.split(".")
    shown = [first]
    for other in others:
        parts = other.split(".")
        same = 0
        while same < min(len(path), len(parts)) - 1 and path[same] == parts[same]:
            same += 1
        shown.append(".".join(parts[same:]))
    return SHARED_LABEL.join(shown)


def random_inputs(
    graph: Graph, batch: int, rng: np.random.Generator, sizes: Sizes | None = None
) -> dict[str, Array]:
    """Random inputs by name: normal floats, and of integers ids that exist, masks, or places 0.

    Args:
        graph: What they are for.
        batch: Samples; a batch that the graph fixes wins.
        rng: Where they come from.
        sizes: Shapes by input name, which win over ``batch``; by default
            ``graph.nominal_sizes(batch)``.

    Raises:
        InputError: If the graph takes samples of any size and nothing says which to take.
    """
    sizes = graph.nominal_sizes(batch) if sizes is None else sizes
    if sizes is None:
        shapes = ", ".join(f"{v.name!r} {shape_text(v.shape)}" for v in graph.inputs)
        raise InputError(
            f"the model takes inputs of any size ({shapes}) and holds no golden data, so there is "
            "no size to choose; give the shapes"
        )
    ranges = id_ranges(graph)
    places = place_inputs(graph)
    return {
        value.name: np.zeros(tuple(sizes[value.name]), np.int32)
        if value.name in places
        else random_ints(value, ranges, tuple(sizes[value.name]), rng)
        if value.dtype == "int32"
        else rng.standard_normal(tuple(sizes[value.name]), np.float32)
        for value in graph.inputs
    }


def input_pool(
    graph: Graph, batch: int, seed: int = 0, sizes: Sizes | None = None
) -> list[dict[str, Array]]:
    """Random inputs that take turns, so that no run finds its data where the last one left them.

    Args:
        graph: What they are for.
        batch: Samples; a batch that the graph fixes wins.
        seed: Of the inputs.
        sizes: Shapes by input name, see ``random_inputs``.

    Returns:
        Two to eight sets, fewer where they are large.

    Raises:
        InputError: As ``random_inputs`` does.
    """
    rng = np.random.default_rng(seed)
    pool = [random_inputs(graph, batch, rng, sizes)]
    size = sum(array.nbytes for array in pool[0].values())
    while len(pool) < _INPUT_SETS and (len(pool) < 2 or len(pool) * size < _INPUT_BYTES):
        pool.append(random_inputs(graph, batch, rng, sizes))
    return pool


def measure(
    graph: Graph, plan: Plan, pool: Sequence[Sequence[Array]], runs: int, warmup: int
) -> Profile:
    """Runs a plan and times its steps.

    Args:
        graph: What the plan was built from.
        plan: The plan.
        pool: Sets of checked inputs in the order of the graph; they take turns.
        runs: Timed runs.
        warmup: Runs before, not timed.
    """
    for index in range(warmup):
        plan.run(pool[index % len(pool)])
    described: list[tuple[str, str, int]] = []
    seconds: list[list[float]] = []
    for index in range(runs):
        described, laps = plan.profile(pool[index % len(pool)], 1)
        seconds += laps
    sizes = {value.name: x.shape for value, x in zip(graph.inputs, pool[0], strict=True)}
    batch = pool[0][0].shape[0]
    return summarise(
        graph, described, seconds, isa=plan.isa, threads=plan.threads, batch=batch, sizes=sizes
    )


def summarise(
    graph: Graph,
    described: Sequence[tuple[str, str, int]],
    seconds: Sequence[Sequence[float]],
    *,
    isa: str,
    threads: int,
    batch: int,
    sizes: Sizes | None = None,
) -> Profile:
    """The profile of measured times.

    Args:
        graph: What ran.
        described: Label, method and bytes of every step.
        seconds: Of every run: the copy of the inputs, every step, the copy of the outputs.
        isa: Instruction set.
        threads: Number of threads.
        batch: Samples per run.
        sizes: Shapes of the inputs by name, where samples may have different sizes.
    """
    laps = np.asarray(seconds, np.float64)
    medians = [float(lap) for lap in np.median(laps, axis=0)]
    total = float(np.median(laps.sum(axis=1)))
    ops = {node.name: node.op for node in graph.nodes}
    macs = {name: cost.dense_macs * batch for name, cost in graph.cost(sizes).items()}
    steps = tuple(
        _step(entry, lap, total, ops, macs, isa)
        for entry, lap in zip(described, medians[1:-1], strict=True)
    )
    return Profile(
        steps, isa, threads, batch, len(laps), 1e3 * medians[0], 1e3 * medians[-1], 1e3 * total
    )


def _step(
    entry: tuple[str, str, int],
    seconds: float,
    total: float,
    ops: Mapping[str, str],
    macs: Mapping[str, int],
    isa: str,
) -> StepProfile:
    name, method, size = entry
    quantizes = method == _QUANTIZE
    nodes = name.split(SHARED_LABEL)  # siblings share a step
    work = 0 if quantizes else sum(macs.get(node, 0) for node in nodes)
    return StepProfile(
        name=name,
        op=_QUANTIZE if quantizes else ops.get(nodes[0], ""),
        method=method,
        isa=isa,
        milliseconds=1e3 * seconds,
        share=seconds / total if total else 0.0,
        dense_gmacs=work / seconds / 1e9 if work and seconds else None,
        bytes=size,
        gbytes=size / seconds / 1e9 if seconds else None,
    )

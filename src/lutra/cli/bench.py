"""``lutra bench``: the speed of a model."""

from __future__ import annotations

import argparse
import time
from typing import Any, Final

import numpy as np

from lutra.cli.common import (
    UserError,
    add_file,
    add_isa,
    add_shape,
    at_least,
    check_writable,
    counts,
    json_text,
    new_session,
    plain,
    print_json,
    read_sizes,
    seconds,
    with_batch,
    write_file,
)
from lutra.format import load_graph
from lutra.formatting import table
from lutra.graph import Graph, Sizes
from lutra.runtime.cpu import cpu_info
from lutra.runtime.profile import Profile, input_pool

_DEFAULT_SECONDS: Final = 2.0
_LEAST_RUNS: Final = 5
_PROFILE_RUNS: Final = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_file(parser)
    parser.add_argument(
        "--threads", type=counts, metavar="N,...", help="numbers of threads (default: all cores)"
    )
    parser.add_argument(
        "--batch", type=counts, metavar="N,...", help="batch sizes (default: that of --shape, or 1)"
    )
    add_shape(parser, "to measure with")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--runs", type=at_least(1), metavar="N", help="timed runs")
    length.add_argument(
        "--seconds", type=seconds, metavar="S", help=f"time to run (default: {_DEFAULT_SECONDS:g})"
    )
    parser.add_argument(
        "--warmup", type=at_least(0), default=3, metavar="N", help="runs before (default: 3)"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help=f"show the time of every step (default: medians of {_PROFILE_RUNS} runs)",
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON to a file, or - to print it")
    add_isa(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    graph = load_graph(args.file)
    args.sizes = read_sizes(args.shape, graph)
    if args.sizes is None and graph.nominal_sizes() is None:
        raise UserError(
            f"{args.file!r} takes inputs of any size and holds no golden data; give --shape"
        )
    if args.batch is None:
        args.batch = [1 if args.sizes is None else next(iter(args.sizes.values()))[0]]
    _check_batches(graph, args.batch)
    if args.json not in (None, "-"):
        check_writable(args.json)
    report: dict[str, Any] = {"file": args.file, "cpu": cpu_info()["model"]}
    if args.profile:
        profiles = _profiles(graph, args)
        report["profiles"] = [profile.to_json() for profile in profiles]
        lines = "\n\n".join(map(str, profiles)).split("\n")
        text = "\n".join(map(plain, lines))
    else:
        report["results"] = _results(graph, args)
        text = _text(report["results"])
    if args.json == "-":
        print_json(report)
        return 0
    print(f"{plain(args.file)} on {report['cpu']}, random inputs\n{text}")
    if args.json:
        write_file(args.json, json_text(report).encode())
    return 0


def _profiles(graph: Graph, args: argparse.Namespace) -> list[Profile]:
    if args.seconds is not None:
        raise UserError("--profile counts its runs; give --runs N instead of --seconds")
    return [
        new_session(graph, threads, args.isa).profile(
            batch=batch,
            sizes=with_batch(graph, args.sizes, batch),
            runs=args.runs or _PROFILE_RUNS,
            warmup=args.warmup,
        )
        for threads in args.threads or [None]
        for batch in args.batch
    ]


def _results(graph: Graph, args: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        measure(
            graph,
            threads=threads,
            batch=batch,
            sizes=with_batch(graph, args.sizes, batch),
            isa=args.isa,
            runs=args.runs,
            limit=args.seconds or _DEFAULT_SECONDS,
            warmup=args.warmup,
        )
        for threads in args.threads or [None]
        for batch in args.batch
    ]


def measure(
    graph: Graph,
    *,
    threads: int | None = None,
    batch: int = 1,
    sizes: Sizes | None = None,
    isa: str | None = None,
    runs: int | None = None,
    limit: float = _DEFAULT_SECONDS,
    warmup: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Times runs of a model on random inputs that change from run to run.

    Args:
        graph: The model.
        threads: Of the session.
        batch: Samples per run; a batch that the model fixes wins.
        sizes: Shapes of the inputs by name, see ``lutra.runtime.profile.random_inputs``.
        isa: Kernels of the session.
        runs: Number of timed runs; None to run for ``limit``.
        limit: Seconds to run, at least 5 runs.
        warmup: Runs before, not timed.
        seed: Of the inputs.

    Returns:
        ``min_ms``, ``median_ms``, ``p95_ms``, ``max_ms``, ``images_per_second`` (from the median),
        ``runs`` and the settings.
    """
    session = new_session(graph, threads, isa)
    pool = input_pool(graph, batch, seed, sizes)
    for index in range(warmup):
        session.run(None, pool[index % len(pool)])
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < (_LEAST_RUNS if runs is None else runs) or (
        runs is None and time.perf_counter() - begin < limit
    ):
        feeds = pool[len(times) % len(pool)]
        start = time.perf_counter()
        session.run(None, feeds)
        times.append(1000 * (time.perf_counter() - start))
    samples = next(iter(pool[0].values())).shape[0]
    median = float(np.median(times))
    return {
        "isa": session.isa,
        "threads": session.threads,
        "batch": samples,
        "runs": len(times),
        "warmup": warmup,
        "min_ms": min(times),
        "median_ms": median,
        "p95_ms": float(np.percentile(times, 95)),
        "max_ms": max(times),
        "images_per_second": 1000 * samples / median,
    }


def _check_batches(graph: Graph, batches: list[int]) -> None:
    for value in graph.inputs:
        fixed = value.shape[0]
        if fixed is not None and any(batch not in (1, fixed) for batch in batches):
            raise UserError(
                f"the input {value.name!r} has a fixed batch of {fixed}; give --batch {fixed}"
            )


def _text(results: list[dict[str, Any]]) -> str:
    names = ("kernels", "threads", "batch", "runs", "min ms", "median ms", "p95 ms", "max ms")
    rows: list[tuple[str, ...]] = [(*names, "images/s")]
    for result in results:
        whole = (str(result[key]) for key in ("threads", "batch", "runs"))
        times = (f"{result[key]:.3f}" for key in ("min_ms", "median_ms", "p95_ms", "max_ms"))
        rows.append((result["isa"], *whole, *times, f"{result['images_per_second']:,.0f}"))
    return table(rows)

"""``lutra doctor``: what this machine is, what would run on it, and whether it works."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from typing import Any, Final

import numpy as np
from numpy.random import Generator

from lutra.cli.common import new_session, pairs, print_json
from lutra.errors import LutraError
from lutra.graph import Graph, make_node
from lutra.node import Array, AttrValue, Node, Value
from lutra.ops.lookup import pack_weights
from lutra.reference import run_reference
from lutra.runtime.cpu import cpu_info

_PACKAGES: Final = ("lutra", "numpy", "safetensors", "torch")
_FAILED: Final = 1
#: Attributes of the layers of the self test.
_PQ: Final[dict[str, AttrValue]] = {"act_scale": 0.05, "act_zero": 64, "act_bits": 7}
_ZERO: Final = 8
_LOOKUP: Final[dict[str, AttrValue]] = {
    "act_scale": 0.25,
    "act_zero": _ZERO,
    "act_bits": 4,
    "weight_bits": 4,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command; 1 where the self test fails or LUTRA_ISA cannot be obeyed."""
    report = collect()
    if args.json:
        print_json(report)
    else:
        print(_text(report))
    sound = report["chosen"] is not None and all(v == "ok" for v in report["self_test"].values())
    return 0 if sound else _FAILED


def collect() -> dict[str, Any]:
    """Everything that the command shows."""
    info = cpu_info()
    asked = os.environ.get("LUTRA_ISA", "")
    chosen, threads, why = _chosen(asked)
    start = time.perf_counter()
    tests = self_test(list(info["runnable"]))
    return {
        "cpu": info["model"],
        "platform": f"{platform.system()} {platform.machine()}",
        "features": list(info["features"]),
        "compiled": list(info["compiled"]),
        "runnable": list(info["runnable"]),
        "chosen": chosen,
        "why": why,
        "cores": info["cores"],
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "self_test": tests,
        "self_test_seconds": round(time.perf_counter() - start, 3),
    }


def self_test(isas: list[str]) -> dict[str, str]:
    """Runs a small network of lookup layers with each of the kernels.

    Returns:
        By name of the kernels ``ok``, or what is wrong.
    """
    graph = _small_graph()
    x = np.random.default_rng(1).standard_normal((3, 5, 9, 9), np.float32)
    want = run_reference(graph, [x])[graph.outputs[0]]
    results: dict[str, str] = {}
    for isa in isas:
        try:
            got = new_session(graph, threads=2, isa=isa)(x)
            wrong = int((got != want).sum()) if got.shape == want.shape else want.size
            results[isa] = "ok" if not wrong else f"{wrong} of {want.size} outputs are wrong"
        except LutraError as error:
            results[isa] = str(error)
    return results


def _chosen(asked: str) -> tuple[str | None, int | None, str]:
    """The kernels and threads that a session takes by default, and why."""
    try:
        session = new_session(_small_graph())
    except LutraError as error:
        return None, None, str(error)
    why = f"LUTRA_ISA={asked}" if asked else "the fastest that this CPU runs"
    return session.isa, session.threads, why


def _small_graph() -> Graph:
    """Lookup layers of odd sizes, (N, 5, 9, 9) to (N, 7): every loop has a remainder."""
    rng = np.random.default_rng(0)
    nodes: list[Node] = []
    tensors: dict[str, Array] = {}

    def add(
        op: str, attrs: dict[str, AttrValue] | None = None, arrays: dict[str, Array] | None = None
    ) -> None:
        name = f"{op}_{len(nodes)}"
        roles = {role: f"{name}.{role}" for role in arrays or {}}
        tensors.update({roles[role]: array for role, array in (arrays or {}).items()})
        source = nodes[-1].output if nodes else "x"
        nodes.append(make_node(op, name, [source], f"{name}.out", attrs or {}, roles))

    conv: dict[str, AttrValue] = {"kernel": (3, 3), "padding": (1, 1)}
    add("pq_conv2d", {**_PQ, **conv, "in_channels": 5, "stride": (2, 2)}, _nearest(rng, 45, 19, 9))
    add("relu")
    add("lookup_conv2d", {**_LOOKUP, **conv, "in_channels": 19}, _response(rng, 171, 19))
    add("flatten", {"start_axis": 1})
    add("pq_linear", {**_PQ, "in_features": 475}, _nearest(rng, 475, 11, 4))
    add("lookup_linear", {**_LOOKUP, "in_features": 11}, _response(rng, 11, 11))
    add("pq_linear", {**_PQ, "in_features": 11, "encoder": "tree"}, _tree(rng, 11, 7, 6))
    return Graph(
        (Value("x", "float32", (None, 5, 9, 9)),), (nodes[-1].output,), tuple(nodes), tensors
    )


def _nearest(rng: Generator, length: int, outputs: int, width: int) -> dict[str, Array]:
    books = -(-length // width)
    centroids = rng.integers(0, 128, (books, 16, width), dtype=np.uint8)
    centroids[-1, :, length - (books - 1) * width :] = 0
    return {"centroids": centroids, **_tables(rng, books, outputs)}


def _tree(rng: Generator, length: int, outputs: int, books: int) -> dict[str, Array]:
    return {
        "splits": rng.integers(0, length, (books, 4), dtype=np.int32),
        "thresholds": rng.integers(0, 129, (books, 15), dtype=np.uint8),
        **_tables(rng, books, outputs),
    }


def _tables(rng: Generator, books: int, outputs: int) -> dict[str, Array]:
    tables = rng.integers(-128, 128, (books, 16, outputs)).astype(np.int8)
    return {"tables": tables, **_ends(rng, outputs)}


def _response(rng: Generator, length: int, outputs: int) -> dict[str, Array]:
    table = rng.integers(-127, 128, (16, 15)).astype(np.int8)
    table[_ZERO] = 0
    weight = rng.integers(0, 15, (outputs, length), dtype=np.uint8)
    return {"weight": pack_weights(weight, 4), "table": table, **_ends(rng, outputs)}


def _ends(rng: Generator, outputs: int) -> dict[str, Array]:
    return {
        "scale": rng.uniform(0.001, 0.01, outputs).astype(np.float32),
        "bias": rng.standard_normal(outputs, np.float32),
    }


def _version(package: str) -> str:
    """The version of a package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _text(report: dict[str, Any]) -> str:
    tests = ", ".join(f"{isa}: {result}" for isa, result in report["self_test"].items())
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return pairs(
        {
            "CPU": f"{report['cpu']} ({report['platform']})",
            "features": ", ".join(report["features"]) or "none that lutra uses",
            "compiled kernels": ", ".join(report["compiled"]),
            "runnable kernels": ", ".join(report["runnable"]),
            "chosen": f"{report['chosen'] or 'none'}: {report['why']}",
            "threads": f"{report['threads'] or '-'} (this process may use {report['cores']} cores)",
            "versions": versions,
            "self test": f"{tests} ({report['self_test_seconds']:.2f} s)",
        }
    )

"""``lutra doctor``: what this machine is, what would run on it, and whether it works."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from typing import Any, Final

import numpy as np

from lutra.cli.common import new_session, pairs, print_json
from lutra.cpu import cpu_info
from lutra.errors import LutraError
from lutra.graph import Graph, Node, Value, make_node
from lutra.ops.registry import Array, AttrValue
from lutra.reference import run_reference

_PACKAGES: Final = ("lutra", "numpy", "safetensors", "torch")
_FAILED: Final = 1


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
    for op, name, length, outputs, width in (
        ("pq_conv2d", "conv", 45, 19, 9),
        ("pq_linear", "fc", 475, 11, 4),
        ("pq_linear", "tree", 11, 7, 2),
    ):
        books = -(-length // width)
        codebooks: dict[str, Array]
        if name == "tree":
            codebooks = {
                "splits": rng.integers(0, length, (books, 4), dtype=np.int32),
                "thresholds": rng.integers(0, 129, (books, 15), dtype=np.uint8),
            }
        else:
            centroids = rng.integers(0, 128, (books, 16, width), dtype=np.uint8)
            centroids[-1, :, length - (books - 1) * width :] = 0
            codebooks = {"centroids": centroids}
        tensors |= {f"{name}.{role}": array for role, array in codebooks.items()}
        tensors[f"{name}.tables"] = rng.integers(-128, 128, (books, 16, outputs)).astype(np.int8)
        tensors[f"{name}.scale"] = rng.uniform(0.001, 0.01, outputs).astype(np.float32)
        tensors[f"{name}.bias"] = rng.standard_normal(outputs, np.float32)
        roles = {r: f"{name}.{r}" for r in (*codebooks, "tables", "scale", "bias")}
        encoder = "tree" if name == "tree" else "nearest"
        attrs: dict[str, AttrValue] = {"act_scale": 0.05, "act_zero": 64, "act_bits": 7}
        attrs["encoder"] = encoder
        if op == "pq_conv2d":
            window = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
            nodes.append(
                make_node(op, name, ["x"], "a", {**attrs, **window, "in_channels": 5}, roles)
            )
            nodes.append(make_node("relu", "relu", ["a"], "b"))
            nodes.append(make_node("flatten", "flatten", ["b"], "c", {"start_axis": 1}))
        else:
            ends = ("d", "y") if name == "tree" else ("c", "d")
            nodes.append(
                make_node(op, name, ends[:1], ends[1], {**attrs, "in_features": length}, roles)
            )
    return Graph((Value("x", "float32", (None, 5, 9, 9)),), ("y",), tuple(nodes), tensors)


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

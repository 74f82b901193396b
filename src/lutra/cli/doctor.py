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
from lutra.errors import LutraError
from lutra.graph import Graph, make_node
from lutra.node import Array, AttrValue, Node, Value
from lutra.ops import OPS
from lutra.reference import run_reference
from lutra.runtime.cpu import cpu_info

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
    """The examples of every layer in a chain, images (N, 5, 9, 9) first: odd sizes, so that every
    loop has a remainder."""
    rng = np.random.default_rng(0)
    nodes: list[Node] = []
    tensors: dict[str, Array] = {}
    x = value = Value("x", "float32", (None, 5, 9, 9))

    def add(op: str, attrs: dict[str, AttrValue], arrays: dict[str, Array]) -> Value:
        name = f"{op}_{len(nodes)}"
        roles = {role: f"{name}.{role}" for role in arrays}
        tensors.update({roles[role]: array for role, array in arrays.items()})
        node = make_node(op, name, [value.name], f"{name}.out", attrs, roles)
        nodes.append(node)
        return OPS[op].infer(node, [value], arrays)

    for axis in (1, -1):
        if axis == -1:
            value = add("flatten", {"start_axis": 1}, {})
        for spec in OPS.values():
            if spec.examples is None or spec.output_axis != axis:
                continue
            for index in range(len(spec.examples(rng, 1))):
                inputs = value.shape[axis]
                assert inputs is not None  # channels or features
                value = add(spec.name, *spec.examples(rng, inputs)[index])
    return Graph((x,), (nodes[-1].output,), tuple(nodes), tensors)


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

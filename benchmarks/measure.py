"""Measures one case: everybody opens, is checked, takes turns, and becomes a record."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

import lutra
from benchmarks.graphs import lutra_graph
from benchmarks.lookups import Method, Pq
from benchmarks.machine import interleaved, spread
from benchmarks.memory import peak_memory
from benchmarks.networks import Network
from benchmarks.networks_text import Sentences, TabledPq, encoder_graph
from benchmarks.peers import (
    NOT_CAPPED,
    PEERS,
    Array,
    Feeds,
    Opened,
    open_model,
    peer_files,
    random_input,
    reason,
    write_models,
)
from benchmarks.table import fastest
from lutra.format import save_graph
from lutra.graph import Graph

POOL: Final = 17  # different inputs that take turns; prime, so that everybody meets them all
WARMUP: Final = 3  # rounds that do not count
LEAD_IN: Final = 4  # runs of a turn that do not count: the caches are the others' when it begins
COUNTED: Final = 8  # runs of a turn that do
METHOD: Final = (
    "All contestants of a case run in one process, arrays in and a float32 array out, in "
    f"turns whose order rotates; a turn is {LEAD_IN} runs that do not count and {COUNTED} that do. "
    "With more than one thread a turn begins when no thread of the one before it spins any more. "
    f"Inputs are {POOL} arrays of normal values, or of token ids without padding, that take turns. "
    "Times are medians; ms has the fastest and slowest run and the interquartile range of each "
    "contestant. Models of the peers have a fixed input shape; int8 is ONNX Runtime's static QDQ "
    "quantisation (uint8 activations, int8 weights, per channel), run by ONNX Runtime and by "
    "OpenVINO; of sentence encoders OpenVINO runs that, and ONNX Runtime its dynamic quantisation "
    "of the operators that it has for them. Batch norms are folded for "
    "everybody. lutra runs random codebooks, or tables of exact products with random weights, in "
    "sessions as users get them (inputs are checked)."
)


@dataclass(frozen=True)
class Case:
    """A network at a batch size, and the families and sizes of lookup layers to run it with."""

    network: Network | Sentences
    batch: int
    methods: tuple[Method, ...]

    def graph(self, method: Method, dense: str = "float32") -> Graph:
        """The lutra graph with lookup layers of this method."""
        if isinstance(self.network, Network):
            return lutra_graph(self.network, method, dense)
        if not isinstance(method, Pq):
            raise ValueError(
                f"sentence encoders are measured with product quantisation, not {method}"
            )
        entries = method.entries if isinstance(method, TabledPq) else 0
        # The rows of the words in int8, as the examples export them.
        encoder = self.network.encoder
        return encoder_graph(encoder, method, dense=dense, entries=entries, words="int8")

    def macs(self, graph: Graph) -> int:
        """Multiply-adds of one run of the dense network."""
        if isinstance(self.network, Network):
            return graph.total_cost().dense_macs * self.batch
        shape = (self.batch, self.network.tokens)
        costs = graph.cost(dict.fromkeys(("ids", "mask"), (1, *shape[1:])))
        return sum(cost.dense_macs for cost in costs.values()) * self.batch


@dataclass(frozen=True)
class Setting:
    """What the command line asks for.

    Attributes:
        threads: Of everybody.
        isa: What lutra runs on.
        capped: Whether everybody is kept there.
        runs: Turns that count.
        dense: What lutra's dense layers are.
        memory: Whether peak memory is measured too.
        profile: Whether the steps of lutra are measured too.
        clock: One of `benchmarks.machine.CLOCKS`.
    """

    threads: int = 1
    isa: str = field(default_factory=lambda: lutra.runnable_isas()[-1])
    capped: bool = False
    runs: int = 50
    dense: str = "float32"
    memory: bool = False
    profile: bool = False
    clock: str = "wall"


@dataclass
class _Sitting:
    """The contestants of a case, by name.

    Attributes:
        methods: Those that are lutra.
        paths: The file of each.
        opened: Those that run.
        failed: Why the others do not.
        macs: Multiply-adds of one run of the dense network.
    """

    methods: dict[str, Method] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    opened: dict[str, Opened] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    macs: int = 0

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Around what a contestant does; one that fails is out, with the reason."""
        try:
            yield
        except Exception as error:  # whatever a runtime raises becomes a line in the record
            self.failed[name] = reason(error)
            self.opened.pop(name, None)


def measure(case: Case, setting: Setting) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measures one case.

    Returns:
        A record for every way of looking up; and why lutra could not run others, by name.
    """
    with TemporaryDirectory(prefix="lutra-bench-") as folder:
        pool = [random_input(case.network, case.batch, seed) for seed in range(POOL)]
        sitting = _open(case, setting, Path(folder))
        _check(sitting, pool)
        inputs = itertools.cycle(pool)
        times = interleaved(
            {name: _turn(opened, inputs) for name, opened in sitting.opened.items()},
            setting.runs,
            WARMUP,
            lead_in=LEAD_IN,
            counted=COUNTED,
            settle=setting.threads > 1,
            clock=setting.clock,
        )
        spreads = {name: spread(seconds) for name, seconds in times.items()}
        memory = _memory(sitting, setting, pool[0]) if setting.memory else {}
        profiles = _profiles(sitting, setting, pool[0]) if setting.profile else {}
        records = [
            {**_record(case, setting, sitting, name, spreads, memory), **profiles.get(name, {})}
            for name in sitting.methods
            if name in spreads
        ]
    return records, {name: text for name, text in sitting.failed.items() if name not in PEERS}


def _open(case: Case, setting: Setting, folder: Path) -> _Sitting:
    """Writes the models of everybody and loads them."""
    sitting = _Sitting()
    for method in case.methods:
        name = f"lutra {method}"
        sitting.methods[name] = method
        sitting.paths[name] = folder / f"{name.replace(' ', '_')}.lutra"
        with sitting.attempt(name):
            graph = case.graph(method, setting.dense)
            sitting.macs = case.macs(graph)
            save_graph(graph, sitting.paths[name])
    unwritten = write_models(case.network, case.batch, folder)
    for name, file in peer_files(case.network).items():
        if name in PEERS and not (setting.capped and name in NOT_CAPPED):
            sitting.paths[name] = folder / file
            if file in unwritten:
                sitting.failed[name] = unwritten[file]
    for name, path in sitting.paths.items():
        if name not in sitting.failed:
            with sitting.attempt(name):
                sitting.opened[name] = open_model(name, path, setting.threads, setting.isa)
    return sitting


def _check(sitting: _Sitting, pool: Sequence[Feeds]) -> None:
    """Runs everybody on every input: finite, of one shape, and equal where both are fp32."""
    outputs: dict[str, list[Array]] = {}
    for name, opened in list(sitting.opened.items()):
        with sitting.attempt(name):
            outputs[name] = [np.array(opened.run(x)) for x in pool]
    judge = next((name for name in outputs if name.endswith("fp32")), None)
    for name, made in outputs.items():
        with sitting.attempt(name):
            for y, known in zip(made, outputs[judge or name], strict=True):
                _compare(y, known, exact=name.endswith("fp32"))


def _compare(y: Array, known: Array, exact: bool) -> None:
    """Raises ValueError where an output is not sound; `exact` is for those that compute alike."""
    if y.dtype != np.float32 or y.shape != known.shape:
        raise ValueError(f"its output is {y.dtype} {y.shape}, not float32 {known.shape}")
    if not np.isfinite(y).all():
        raise ValueError("its output has values that are not finite")
    error = float(np.abs(y - known).max() / np.abs(known).max())
    if exact and error > 1e-3:
        raise ValueError(f"its output differs by {error:.1e} from another fp32 runtime's")


def _turn(opened: Opened, inputs: Iterator[Feeds]) -> Callable[[], object]:
    run = opened.run
    return lambda: run(next(inputs))


def _memory(sitting: _Sitting, setting: Setting, sample: Feeds) -> dict[str, int]:
    """Bytes by contestant."""
    memory: dict[str, int] = {}
    for name in list(sitting.opened):
        path = sitting.paths[name]
        file = path.with_name("sample.npz")
        np.savez(file, **sample)  # type: ignore[arg-type]
        with sitting.attempt(name):
            memory[name] = peak_memory(name, path, file, setting.threads, setting.isa)
    return memory


def _profiles(
    sitting: _Sitting, setting: Setting, sample: Feeds
) -> dict[str, dict[str, dict[str, Any]]]:
    """Where the time of lutra goes: steps of one operator and method together, by contestant."""
    profiles = {}
    for name in sitting.methods:
        if name in sitting.opened:
            made = sitting.opened[name].session.profile(dict(sample), runs=max(20, setting.runs))
            groups: dict[str, list[float]] = {}
            for step in made.steps:
                groups.setdefault(f"{step.op}, {step.method}", []).append(step.milliseconds)
            steps = {what: {"steps": len(ms), "ms": sum(ms)} for what, ms in groups.items()}
            steps = dict(sorted(steps.items(), key=lambda item: -item[1]["ms"]))
            ends = {"input_ms": made.input_ms, "output_ms": made.output_ms}
            profiles[name] = {"profile": {"total_ms": made.total_ms, **ends, "steps": steps}}
    return profiles


def _record(
    case: Case,
    setting: Setting,
    sitting: _Sitting,
    name: str,
    spreads: Mapping[str, Mapping[str, float]],
    memory: Mapping[str, int],
) -> dict[str, Any]:
    """What is known of one way of looking up, beside all peers."""
    method, ms = sitting.methods[name], spreads[name]["median"]
    names = {"lutra": name} | {peer: peer for peer in PEERS if peer in spreads}
    peers_ms = {peer: spreads[peer]["median"] for peer in PEERS if peer in spreads}
    ratios = {}
    for precision in ("fp32", "int8"):
        best = fastest(peers_ms, precision)
        ratios[f"speedup_{precision}"] = None if best is None else best[1] / ms
    folder = sitting.paths[name].parent
    files = {"lutra": sitting.paths[name]}
    files |= {f"onnx {stem}": folder / f"{stem}.onnx" for stem in ("fp32", "int8")}
    return {
        "case": case.network.name,
        "batch": case.batch,
        "isa": setting.isa,
        "threads": setting.threads,
        "clock": setting.clock,
        "method": method.family,
        "lookups": str(method),
        **method.columns(),
        "dense": setting.dense,
        "lutra_ms": ms,
        "peers_ms": peers_ms,
        **ratios,
        "macs": sitting.macs,
        "gmac_per_s": sitting.macs / ms / 1e6,
        "ms": {short: spreads[long] for short, long in names.items()},
        "file_bytes": {
            short: path.stat().st_size for short, path in files.items() if path.exists()
        },
        "peak_memory": {short: memory[long] for short, long in names.items() if long in memory},
        "peers_failed": {peer: text for peer, text in sitting.failed.items() if peer in PEERS},
        "peers_left_out": NOT_CAPPED if setting.capped else {},
        "openvino_kernels": {
            peer: dict(Counter(opened.kernels))
            for peer, opened in sitting.opened.items()
            if opened.kernels
        },
    }

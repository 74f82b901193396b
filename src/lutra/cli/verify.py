"""``lutra verify``: the engine against the NumPy reference, on this machine.

The engine gives the same bits with all kernels, but the reference rounds its dense operators in
another order, and a last bit can move an activation to another code. So each node is checked alone,
on the values that the engine itself gave it:

1. every value of the network is fetched from the engine, and each node of the reference, run on
   the engine's inputs, must give the engine's output: the same bits for integer layers and for
   softmax, whose exponential the reference computes as the engine does;
2. the network as users run it (fused, whole batch) must give the same bits as those values;
3. all kernels must give the same bits as the first;
4. the outputs must be the golden ones of the file, to the bit. Files that early versions wrote of
   a network with a softmax may hold other last bits; they are named, and are no failure.

How far the outputs are from a reference run of the whole network is reported too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Final

import numpy as np

from lutra.cli.common import (
    UserError,
    add_file,
    add_shape,
    at_least,
    new_session,
    plain,
    print_json,
    read_sizes,
    with_batch,
)
from lutra.format import load_graph
from lutra.formatting import table
from lutra.graph import Graph, Sizes
from lutra.node import Array
from lutra.ops import OPS
from lutra.reference import run_node, run_reference
from lutra.reference.compare import difference, same_bits, unequal
from lutra.runtime.cpu import runnable_isas
from lutra.runtime.profile import random_inputs
from lutra.runtime.session import Session

_FAILED: Final = 1
#: Golden outputs of networks with a softmax may differ by so much: the last bits of a float32.
LAST_BITS: Final = 2.0**-19
#: Largest difference allowed to dense operators, as a share of the largest value.
TOLERANCE: Final = 1e-4
_MOST_PROBLEMS: Final = 5


@dataclass(frozen=True)
class Case:
    """Inputs, and what is known about their outputs.

    Attributes:
        name: ``golden`` or ``random``.
        feeds: Inputs by name.
        golden: Outputs in the file by name; empty where there are none.
        reference: Every value of the reference by name.
    """

    name: str
    feeds: Mapping[str, Array]
    golden: Mapping[str, Array]
    reference: Mapping[str, Array]


@dataclass
class Result:
    """What one set of kernels did.

    Attributes:
        isa: Its name.
        problems: One sentence for each thing that is wrong.
        notes: One sentence for each thing that is right and yet worth a look.
        reference_difference: Of the outputs, as a share of the largest.
        golden_difference: The same, to the golden outputs; None without golden data.
        moved: Values of integer layers that differ from the reference run of the whole network
            because rounding upstream moved an activation to another code there.
    """

    isa: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reference_difference: float = 0.0
    golden_difference: float | None = None
    moved: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_file(parser)
    parser.add_argument(
        "--isa", default="all", metavar="NAME", help="kernels to check (default: all)"
    )
    parser.add_argument(
        "--samples",
        type=at_least(0),
        default=4,
        metavar="N",
        help="random samples besides the golden data (default: 4)",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the random samples")
    add_shape(parser, "for the random samples")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command; 1 where anything differs."""
    graph = load_graph(args.file)
    if graph.golden is None and not args.samples:
        raise UserError(f"{args.file!r} holds no golden data{_why(graph)}; give --samples above 0")
    isas = runnable_isas() if args.isa == "all" else [args.isa]
    sizes = with_batch(graph, read_sizes(args.shape, graph), args.samples)
    if args.samples and sizes is None and graph.nominal_sizes() is None:
        raise UserError(
            f"{args.file!r} takes inputs of any size and holds no golden data; give --shape"
        )
    results = verify(graph, isas, samples=args.samples, seed=args.seed, sizes=sizes)
    sound = not any(result.problems for result in results)
    golden = 0 if graph.golden is None else graph.golden[0][0].shape[0]
    if args.json:
        print_json(
            {
                "file": args.file,
                "ok": sound,
                "golden_samples": golden,
                "random_samples": args.samples,
                "seed": args.seed,
                "tolerance": TOLERANCE,
                "results": [{**asdict(r), "ok": not r.problems} for r in results],
            }
        )
    else:
        print(_text(args.file, graph, results, golden, args.samples))
    return 0 if sound else _FAILED


def verify(
    graph: Graph,
    isas: Sequence[str],
    *,
    samples: int = 4,
    seed: int = 0,
    sizes: Sizes | None = None,
) -> list[Result]:
    """Checks the engine on the golden data of a graph and on random inputs.

    Args:
        graph: The model.
        isas: Names of the kernels to check, each against the first.
        samples: Random samples besides the golden ones.
        seed: Of the random samples.
        sizes: Shapes of the random inputs by name, see ``lutra.runtime.profile.random_inputs``.

    Returns:
        One result for each of the kernels.

    Raises:
        UnsupportedCpuError: If this machine cannot run one of them.
    """
    cases = list(_cases(graph, samples, seed, sizes))
    results: list[Result] = []
    first: list[dict[str, Array]] | None = None
    for isa in isas:
        result = Result(isa)
        session, tracer = new_session(graph, isa=isa), new_session(_traced(graph), isa=isa)
        values = [_run_case(result, graph, case, session, tracer) for case in cases]
        if first is None:
            for case, got in zip(cases, values, strict=True):
                _check_nodes(result, graph, case, got)
            first = values
        else:
            for got, want in zip(values, first, strict=True):
                _compare_kernels(result, graph, got, want, isas[0])
        for case, got in zip(cases, values, strict=True):
            _check_outputs(result, graph, case, got)
        result.problems = list(dict.fromkeys(result.problems))
        results.append(result)
    return results


def _cases(graph: Graph, samples: int, seed: int, sizes: Sizes | None) -> Iterator[Case]:
    given: list[tuple[str, Mapping[str, Array], Mapping[str, Array]]] = []
    if graph.golden is not None:
        names = [value.name for value in graph.inputs]
        inputs, outputs = (
            dict(zip(keys, arrays, strict=True))
            for keys, arrays in zip((names, graph.outputs), graph.golden, strict=True)
        )
        given.append(("golden", inputs, outputs))
    if samples:
        rng = np.random.default_rng(seed)
        given.append(("random", random_inputs(graph, samples, rng, sizes), {}))
    for name, feeds, golden in given:
        yield Case(name, feeds, golden, run_reference(graph, feeds, intermediates=True))


def _traced(graph: Graph) -> Graph:
    """The graph with every value that a node makes as an output."""
    return replace(graph, outputs=tuple(node.output for node in graph.nodes), golden=None)


def _run_case(
    result: Result, graph: Graph, case: Case, session: Session, tracer: Session
) -> dict[str, Array]:
    """Every value of the engine by name; notes where the fused network differs from them."""
    whole = dict(zip(graph.outputs, session.run(None, case.feeds), strict=True))
    names = [node.output for node in graph.nodes]
    parts = [dict(zip(names, tracer.run(None, part), strict=True)) for part in _parts(graph, case)]
    values = {name: np.concatenate([part[name] for part in parts]) for name in names}
    for name in graph.outputs:
        if not same_bits(whole[name], values[name]):
            result.problems.append(
                f"{case.name}: the output {plain(name)!r} of the whole network differs from the "
                f"same value fetched node by node, by {difference(whole[name], values[name]):.2g}"
            )
    values.update(whole)
    return {**case.feeds, **values}


def _parts(graph: Graph, case: Case) -> Iterator[Mapping[str, Array]]:
    """The inputs sample by sample, which bounds memory; whole where the batch is fixed."""
    if any(value.shape[0] is not None for value in graph.inputs):
        yield case.feeds
        return
    count = next(iter(case.feeds.values())).shape[0]
    for index in range(count):
        yield {name: array[index : index + 1] for name, array in case.feeds.items()}


def _check_nodes(result: Result, graph: Graph, case: Case, values: Mapping[str, Array]) -> None:
    """Runs each node of the reference on the engine's own values."""
    for node in graph.nodes:
        inputs = [values[name] for name in node.inputs]
        if all(same_bits(values[name], case.reference[name]) for name in node.inputs):
            want = case.reference[node.output]
        else:
            with np.errstate(all="ignore"):
                want = run_node(node, inputs, graph.node_tensors(node))
        got, spec = values[node.output], OPS[node.op]
        if (spec.has_grid or spec.exact_floats) and difference(got, want):
            wrong = int(unequal(got, want).sum()) if got.shape == want.shape else want.size
            what = "integer layer" if spec.has_grid else "node"
            result.problems.append(
                f"{case.name}: the {what} {plain(node.name)!r} ({node.op}) gives {wrong} of "
                f"{want.size} values that are not those of the reference for the same input"
            )
        elif difference(got, want) > TOLERANCE:
            result.problems.append(
                f"{case.name}: the node {plain(node.name)!r} ({node.op}) differs from the "
                f"reference for the same input by {difference(got, want):.2g} of the largest value"
            )


def _compare_kernels(
    result: Result,
    graph: Graph,
    got: Mapping[str, Array],
    want: Mapping[str, Array],
    first: str,
) -> None:
    for node in graph.nodes:
        if not same_bits(got[node.output], want[node.output]):
            result.problems.append(
                f"the node {plain(node.name)!r} ({node.op}) gives other bits than with {first}, "
                f"by {difference(got[node.output], want[node.output]):.2g} of the largest value"
            )
            return  # the nodes after it follow


def _check_outputs(result: Result, graph: Graph, case: Case, values: Mapping[str, Array]) -> None:
    """Compares whole outputs with the golden data, and notes how far the reference is."""
    for node in graph.nodes:
        got, want = values[node.output], case.reference[node.output]
        if OPS[node.op].has_grid and got.shape == want.shape:
            result.moved += int(unequal(got, want).sum())
    for name in graph.outputs:
        amount = difference(values[name], case.reference[name])
        result.reference_difference = max(result.reference_difference, amount)
    for name, want in case.golden.items():
        amount = difference(values[name], want)
        result.golden_difference = max(result.golden_difference or 0.0, amount)
        if same_bits(values[name], want):
            continue
        if amount <= LAST_BITS and any(node.op == "softmax" for node in graph.nodes):
            result.notes.append(
                f"the output {plain(name)!r} differs from the golden output in the last bits, by "
                f"{amount:.2g} of the largest value; {_written_by(graph)}"
            )
        else:
            result.problems.append(
                f"the output {plain(name)!r} differs from the golden data in the file by "
                f"{amount:.2g} of the largest value"
            )


def _written_by(graph: Graph) -> str:
    producer = graph.metadata.get("producer")
    return f"written by {plain(producer)}" if producer else "the file does not say what wrote it"


def _why(graph: Graph) -> str:
    return f" ({plain(graph.no_golden)})" if graph.no_golden else ""


def _share(amount: float) -> str:
    return f"{amount:.1e}" if amount else "equal"


def _text(path: str, graph: Graph, results: Sequence[Result], golden: int, samples: int) -> str:
    rows: list[tuple[str, ...]] = [
        ("kernels", "result", "to reference", "to golden data", "moved codes")
    ]
    for result in results:
        to_golden = result.golden_difference
        rows.append(
            (
                result.isa,
                "FAILED" if result.problems else "ok",
                _share(result.reference_difference),
                "-" if to_golden is None else _share(to_golden),
                str(result.moved),
            )
        )
    lookups = sum(OPS[node.op].is_table_layer for node in graph.nodes)
    lines = [
        f"{plain(path)}: {len(graph.nodes)} nodes, {lookups} of them lookup layers; "
        f"{golden} golden and {samples} random samples",
        table(rows, left=2),
    ]
    if not golden:
        lines.append(
            f"note: the file holds no golden data{_why(graph)}, so only random inputs were checked"
        )
    for result in results:
        lines += [f"{result.isa}: {problem}" for problem in result.problems[:_MOST_PROBLEMS]]
        if len(result.problems) > _MOST_PROBLEMS:
            lines.append(f"{result.isa}: and {len(result.problems) - _MOST_PROBLEMS} more")
    lines += dict.fromkeys(f"note: {note}" for result in results for note in result.notes)
    if any(result.moved and not result.problems for result in results):
        lines.append(
            "note: moved codes are outputs of integer layers that differ from the reference "
            "because it rounds a dense operator before them differently; each layer alone gives "
            "the same bits"
        )
    good = "the engine agrees with the reference" + (
        " and all kernels give the same bits" if len(results) > 1 else ""
    )
    lines.append("FAILED" if any(result.problems for result in results) else f"ok: {good}")
    return "\n".join(lines)

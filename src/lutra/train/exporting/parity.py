"""Whether a graph computes what the torch model computes, and which node does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree

from lutra.errors import InputError, LutraError, UnsupportedModelError
from lutra.graph import Graph
from lutra.node import Array, Node
from lutra.reference import run_reference
from lutra.reference.compare import difference
from lutra.runtime.session import Session
from lutra.train.exporting.lowering import Lowered
from lutra.train.layers.attention import plain_attention

#: Nodes that only move values.
_HELPERS: Final = ("pad", "reshape", "flatten", "transpose", "slice", "concat", "expand", "cast")
_NOISE: Final = 2.0**-21
_ROUNDING_RUNS: Final = 2
#: Outputs may differ by so many times what noise in the last bits moves them.
ROUNDING_FACTOR: Final = 4.0
#: The reference runs as many samples as make so many products and lookups, and at least one.
_REFERENCE_WORK: Final = 2**28
#: Runs a graph on inputs by name and returns its outputs by name.
Runner = Callable[[Graph, Mapping[str, Array]], Mapping[str, Array]]


def runners() -> dict[str, Runner]:
    """Return what can run a graph: the reference and the engine."""
    return {"the reference executor": run_reference, "the engine": run_engine}


#: Says how far outputs move with the last bits of values, as a share of the largest.
Rounding = Callable[[], float]


def no_rounding() -> float:
    """Values are what they are."""
    return 0.0


@dataclass(frozen=True)
class Check:
    """What the outputs of a graph must be.

    Attributes:
        example: Inputs.
        expected: The outputs of the torch model for them, one array each.
        rounding: Says how far these outputs move with the last bits of the values on their way,
            see `rounding_share`; asked only where outputs differ by more than the tolerance.
    """

    example: tuple[Tensor, ...]
    expected: list[Array]
    rounding: Rounding = no_rounding


def check_graph(
    lowered: Lowered,
    program: ExportedProgram,
    check: Check,
    *,
    tolerance: float,
    runs: Mapping[str, Runner] | None = None,
) -> None:
    """Compare a graph with the torch program it comes from, in every way it can be run here.

    Args:
        lowered: The graph and the torch node behind each value.
        program: What it was lowered from; runs again to find a node that differs.
        check: Inputs and expected outputs.
        tolerance: The largest difference allowed, as a share of the largest expected value.
        runs: What runs the graph, by name; by default `runners()`.

    Raises:
        LutraError: An output differs by more; names the first node that does.

    A last-bit difference of an operator can move an activation over the border between two steps
    or codes of an integer layer, or grow in a norm of nearly equal values, so whole outputs may
    differ although nothing is wrong. That is a warning, if every node agrees on the inputs that
    torch gave it and the outputs differ by no more than `check.rounding` explains.
    """
    example, expected = check.example, check.expected
    feeds = feeds_of(lowered.graph, example)
    for name, array in zip(lowered.graph.outputs, expected, strict=True):
        if not np.isfinite(array).all():
            raise LutraError(
                f"export: output '{name}' of the torch model holds NaN or infinity on "
                "example_input; give an example (and weights) with finite results."
            )
    for name, run in (runners() if runs is None else runs).items():
        part, expected = _samples_for(run, lowered.graph, feeds, check.expected)
        results = run(lowered.graph, part)
        for output, want in zip(lowered.graph.outputs, expected, strict=True):
            _check_kind(name, output, results[output], want)
        differences = [
            difference(results[output], want)
            for output, want in zip(lowered.graph.outputs, expected, strict=True)
        ]
        worst = max(differences)
        if worst <= tolerance:
            continue
        output = lowered.graph.outputs[differences.index(worst)]
        what = (
            f"export: {name} differs from torch by {worst:.3g} of the largest value in output "
            f"'{output}' (tolerance {tolerance:.3g})"
        )
        recorded = _record(program, example)
        _judge(what, lowered, recorded, run, worst, tolerance, check.rounding)


def _samples_for(
    run: Runner, graph: Graph, feeds: dict[str, Array], expected: list[Array]
) -> tuple[dict[str, Array], list[Array]]:
    """As many samples, and what is expected of them, as something runs in reasonable time: the
    reference is slow."""
    if run is not run_reference:
        return feeds, expected
    cost = graph.total_cost({name: (1, *array.shape[1:]) for name, array in feeds.items()})
    count = max(1, _REFERENCE_WORK // max(1, cost.macs + cost.lookups))
    return {n: array[:count] for n, array in feeds.items()}, [array[:count] for array in expected]


def _check_kind(name: str, output: str, got: Array, want: Array) -> None:
    """Raise LutraError where an output has another shape, or is not finite."""
    if got.shape != want.shape:
        raise LutraError(
            f"export: {name} gives output '{output}' of shape {got.shape}, and torch gives "
            f"{want.shape}: please report it with the model."
        )
    if not np.isfinite(got).all():
        raise LutraError(
            f"export: {name} gives NaN or infinity in output '{output}', and torch gives finite "
            "values: please report it with the model."
        )


def _judge(
    what: str,
    lowered: Lowered,
    recorded: Mapping[str, Array],
    run: Runner,
    worst: float,
    tolerance: float,
    rounding: Rounding,
) -> None:
    """Raise LutraError about outputs that differ, or warn where rounding explains it."""
    first = _first_difference(lowered, recorded, run, tolerance)
    if first is not None:
        node, amount = first
        raise LutraError(
            f"{what}; the first node that differs on the same inputs is '{node.name}' "
            f"({node.op}), by {amount:.3g}: please report it with this node's settings "
            f"{dict(node.attrs)}."
        )
    share = rounding()
    if share == 0.0:
        raise LutraError(
            f"{what}, although each node alone agrees: rounding grows from node to node; raise "
            "the tolerance if that is acceptable."
        )
    moved = (
        f"where last bits move (activations go to other steps or codes, or norms enlarge them), "
        f"outputs move by {share:.3g} in torch too"
    )
    if worst > tolerance + ROUNDING_FACTOR * share:
        raise LutraError(
            f"{what}, although each node alone agrees; {moved}, which is less than this: please "
            "report it with the model."
        )
    warnings.warn(f"{what}, although each node alone agrees: {moved}.", stacklevel=5)


def check_other_size(
    lowered: Lowered,
    program: ExportedProgram,
    model: nn.Module,
    example: tuple[Tensor, ...],
    *,
    tolerance: float,
    rounding: Rounding = no_rounding,
) -> None:
    """Compare a graph with the torch model on inputs of another size than those it was traced with.

    Tracing may take a size for a constant without a word, where a model computes with it, so it is
    the model that is asked and not the program.

    Args:
        lowered: The graph and the torch node behind each value.
        program: What it was lowered from.
        model: The model.
        example: Inputs of the other size, see `other_size`.
        tolerance: The largest difference allowed, as a share of the largest expected value.
        rounding: Of `Check`.

    Raises:
        UnsupportedModelError: The model fails on that size, or computes something else there.
        LutraError: As `check_graph` does.
    """
    shapes = [tuple(tensor.shape) for tensor in example]
    advice = (
        "use operators that know sizes by themselves, such as F.adaptive_avg_pool2d(x, 1) in "
        "place of F.avg_pool2d(x, x.shape[2:]), or take the axes out of dynamic_axes"
    )
    try:
        expected = outputs_of(model, example)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"export: {type(model).__name__} fails on inputs of shapes {shapes} ({reason}); "
            f"{advice}."
        ) from error
    got = run_engine(lowered.graph, feeds_of(lowered.graph, example))
    traced = _traced(program, example)
    for name, want, other in zip(lowered.graph.outputs, expected, traced, strict=True):
        moved = np.inf if got[name].shape != want.shape else difference(other, want)
        if moved > tolerance and moved > tolerance + ROUNDING_FACTOR * rounding():
            raise UnsupportedModelError(
                f"export: {type(model).__name__} works for one size only: on inputs of shapes "
                f"{shapes} its output '{name}' of shape {want.shape} is not what was traced, which "
                f"gives {got[name].shape}; {advice}."
            )
    runs = {"the engine": run_engine}
    check = Check(example, expected, rounding)
    check_graph(lowered, program, check, tolerance=tolerance, runs=runs)


def rounding_share(
    program: ExportedProgram, example: Sequence[Tensor], expected: Sequence[Array]
) -> float:
    """How far outputs move when the values of a program move by some of their last bits.

    Integer layers make steps or codes of their input, and a value near a border goes to the other
    side of it; a norm of nearly equal values makes rounding large. A graph that is right may so
    differ from torch, which adds up in another order.

    Args:
        program: What was traced.
        example: Inputs.
        expected: The outputs for them.

    Returns:
        The largest difference as a share of the largest value.
    """
    return max(
        difference(got, want)
        for seed in range(_ROUNDING_RUNS)
        for got, want in zip(_traced(program, example, seed), expected, strict=True)
    )


def feeds_of(graph: Graph, example: Sequence[Tensor]) -> dict[str, Array]:
    """Inputs of a torch model as those of its graph, by name; integers become int32."""
    return {
        value.name: array_of(tensor) for value, tensor in zip(graph.inputs, example, strict=True)
    }


def array_of(tensor: Tensor) -> Array:
    """An input as an array of its own: float32, or int32 for integers and bool.

    Raises:
        InputError: Integers that int32 does not hold.
    """
    array = tensor.detach().contiguous().numpy()
    if array.dtype.kind == "f":
        return array.copy()
    if array.size and array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        if low < -(2**31) or high >= 2**31:
            raise InputError(
                f"export: example_input holds integers in {low}..{high}; lutra computes with int32."
            )
    return array.astype(np.int32)


def other_size(
    program: ExportedProgram,
    example: Sequence[Tensor],
    axes: Sequence[tuple[int, ...]],
    longest: int | None = None,
) -> tuple[Tensor, ...]:
    """One sample of an example, of another size on some axes of each tensor.

    Args:
        program: What was traced.
        example: Inputs.
        axes: Those that may have any size.
        longest: The largest size of axes but the batch; None: any.

    Returns:
        Tensors that are twice as long there, or as long as the program allows; of half the size
        where it allows no more.
    """
    limits = dict(program.range_constraints)
    names = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT
    }
    places = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    result = []
    for tensor, mine, place in zip(example, axes, places, strict=True):
        made = tensor[:1]
        for axis in mine:
            old = tensor.shape[axis]
            new = _another(old, limits, place.meta["val"].shape[axis], longest if axis else None)
            made = made.repeat_interleave(2, axis) if new > old else made
            made = made.narrow(axis, 0, new)
        result.append(made.contiguous())
    return tuple(result)


def _another(size: int, limits: Mapping[Any, Any], symbol: Any, longest: int | None) -> int:
    """Twice a size, or what is allowed instead."""
    allowed = limits.get(symbol.node.expr) if isinstance(symbol, torch.SymInt) else None
    least, most = 1, 2 * size
    if allowed is not None:
        least = int(allowed.lower)
        most = min(most, int(allowed.upper)) if allowed.upper.is_Integer else most
    if longest is not None:
        most = min(most, longest)
    return most if most > size else max(least, size // 2)


def outputs_of(model: nn.Module, example: Sequence[Tensor]) -> list[Array]:
    """Return the outputs of a torch model in float32, integers and masks too.

    PyTorch's fast path for attention gives 0 for tokens that a mask leaves out, and is not taken.
    """
    with torch.no_grad(), plain_attention():
        # Copies, because a model may work in place on its input.
        leaves = _pytree.tree_leaves(model(*(tensor.clone() for tensor in example)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return [(x.real if x.is_complex() else x).float().numpy() for x in tensors]  # complex: refused


def check_engine(
    graph: Graph, feeds: Mapping[str, Array], *, tolerance: float, rounding: Rounding = no_rounding
) -> None:
    """Compare the engine with the reference, for a graph that no torch program computes.

    Args:
        graph: The graph.
        feeds: Inputs by name.
        tolerance: The largest difference allowed, as a share of the largest value.
        rounding: Of `Check`.

    Raises:
        LutraError: A node differs on the same inputs, or whole outputs do by more than rounding
            explains; a smaller difference of whole outputs is a warning.
    """
    few, _ = _samples_for(run_reference, graph, dict(feeds), [])
    want = run_reference(graph, few, intermediates=True)
    got = run_engine(graph, few)
    for name in graph.outputs:
        _check_kind("the engine", name, got[name], want[name])
    worst = max(difference(got[name], want[name]) for name in graph.outputs)
    if worst <= tolerance:
        return
    what = (
        f"export: the engine differs from the reference by {worst:.3g} of the largest value "
        f"(tolerance {tolerance:.3g})"
    )
    same = Lowered(graph, {name: name for name in graph.values})
    _judge(what, same, want, run_engine, worst, tolerance, rounding)


def _first_difference(
    lowered: Lowered, recorded: Mapping[str, Array], run: Runner, tolerance: float
) -> tuple[Node, float] | None:
    """The first node that differs on inputs that torch recorded.

    A node whose input torch did not record, such as one behind several torch operators that became
    one node, cannot be judged.
    """
    graph = lowered.graph
    values = {value.name: recorded[lowered.origins[value.name]] for value in graph.inputs}
    known = set(values)  # recorded, or moved from a recorded value without arithmetic
    for value in graph.inputs:
        values[value.name] = values[value.name].astype(value.dtype, copy=False)
    for node in graph.nodes:
        single = Graph(
            inputs=tuple(graph.values[name] for name in dict.fromkeys(node.inputs)),
            outputs=(node.output,),
            nodes=(node,),
            tensors={name: graph.tensors[name] for name in node.tensors.values()},
        )
        got = run(single, {name: values[name] for name in node.inputs})[node.output]
        want = recorded.get(lowered.origins.get(node.output, ""))
        judged = known.issuperset(node.inputs)
        if want is None:  # a helper node (such as a pad put before a convolution)
            values[node.output] = got
            if judged and node.op in _HELPERS:
                known.add(node.output)
            continue
        amount = difference(got, want)
        if judged and amount > tolerance:
            return node, amount
        values[node.output] = want.astype(got.dtype, copy=False)
        known.add(node.output)
    return None


class _Noisy(fx.Interpreter):
    """Runs a program and moves every float value by about a last bit of its tensor's largest."""

    def __init__(self, module: fx.GraphModule, seed: int) -> None:
        super().__init__(module)
        self.generator = torch.Generator().manual_seed(seed)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        moves = n.op == "call_function" and isinstance(result, Tensor)
        if not moves or not result.is_floating_point() or not result.numel():
            return result
        step = _NOISE * float(result.detach().abs().max())
        noise = torch.randn(result.shape, generator=self.generator, dtype=result.dtype)
        return result + noise * step


class _Recorder(fx.Interpreter):
    """Runs a program and keeps every tensor it computes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.recorded: dict[str, Array] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            values = result.detach().numpy()
            # what holds or not is 1 or 0 in graphs
            is_bool = n.op == "call_function" and result.dtype == torch.bool
            self.recorded[n.name] = values.astype(np.float32) if is_bool else values.copy()
        return result


def _record(program: ExportedProgram, example: Sequence[Tensor]) -> dict[str, Array]:
    recorder = _Recorder(program.graph_module)
    with torch.no_grad():
        recorder.run(*_arguments(program, example))
    return recorder.recorded


def _traced(
    program: ExportedProgram, example: Sequence[Tensor], noise: int | None = None
) -> list[Array]:
    """What a program computes, without its own checks of the sizes of its inputs; with noise of
    some seed in the last bits of its values."""
    module = program.graph_module
    with torch.no_grad():
        interpreter = fx.Interpreter(module) if noise is None else _Noisy(module, noise)
        results = interpreter.run(*_arguments(program, example))
    specs = program.graph_signature.output_specs
    return [
        result.float().numpy()
        for result, spec in zip(results, specs, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT
    ]


def _arguments(program: ExportedProgram, example: Sequence[Tensor]) -> list[Any]:
    given = iter(example)
    arguments: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            arguments.append(next(given).clone())
        else:
            assert spec.target is not None  # lowering took nothing but tensors
            state = program.state_dict
            arguments.append(state.get(spec.target, program.constants.get(spec.target)))
    return arguments


def run_engine(graph: Graph, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """Run a graph in the engine, inner values as inputs too; outputs by name."""
    session = Session(graph, check_finite=False)
    return dict(zip(graph.outputs, session.run(None, feeds), strict=True))

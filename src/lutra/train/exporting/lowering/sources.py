"""What of a torch program depends on activations, and what on integer inputs and sizes alone.

Attention masks, positions and the like are computed from token ids, from masks and from sizes, in
as many ways as there are libraries. Nothing is lowered of that: it stays a `Deferred`, a piece of
the torch program that can be run, until an operator says what it needs to know of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from lutra.train.exporting.lowering.values import UnsupportedUse

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
#: What makes activations of integer inputs.
_EMBEDS = (
    "aten.embedding.default",
    "aten.embedding_bag.default",
    "aten.embedding_bag.padding_idx",
    "lutra.int8_embedding.default",
)
#: What looks at the shape of an activation or of integers only, and the number that it fills in.
_FILLS: dict[str, int | None] = {
    "aten.zeros_like.default": 0,
    "aten.ones_like.default": 1,
    "aten.full_like.default": None,
    "aten.new_zeros.default": 0,
    "aten.new_ones.default": 1,
    "aten.new_full.default": None,
    "aten.fill.Scalar": None,
}


@dataclass(frozen=True)
class Deferred:
    """A tensor that torch computes from integer inputs and from sizes only.

    Attributes:
        node: What computes it.
        inputs: The integer inputs whose values it depends on; none where sizes are enough.
    """

    node: fx.Node
    inputs: frozenset[fx.Node]


@dataclass(frozen=True)
class _Source:
    activation: bool = False
    inputs: frozenset[fx.Node] = frozenset()
    sizes: bool = False


def value_of(node: Any) -> Tensor:
    """The tensor, without its values, that a node of a program makes."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


class Sources:
    """Where every result of a program comes from."""

    def __init__(self, program: ExportedProgram) -> None:
        self._graph = program.graph
        self._ranges = dict(program.range_constraints)
        self._constants: dict[fx.Node, Tensor] = {}
        self._sources: dict[fx.Node, _Source] = {}
        self.inputs: list[fx.Node] = []
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            self._sources[node] = _Source()
            if spec.kind == InputKind.USER_INPUT:
                self.inputs.append(node)
                value = node.meta.get("val")
                floating = isinstance(value, Tensor) and value.is_floating_point()
                self._sources[node] = (
                    _Source(activation=True) if floating else _Source(inputs=frozenset({node}))
                )
            elif spec.kind in CONSTANT_KINDS and spec.target is not None:
                self._constants[node] = constant_of(program, spec.target)
        for node in program.graph.nodes:
            if node.op == "call_function":
                self._sources[node] = self._of_call(node)

    def deferred(self, node: fx.Node) -> Deferred | None:
        """Return what a node computes as a `Deferred`; None for an activation or a constant."""
        source = self._sources.get(node)
        if source is None or source.activation or not (source.inputs or source.sizes):
            return None
        if not any(isinstance(leaf, Tensor) for leaf in _leaves(node.meta.get("val"))):
            return None
        return Deferred(node, source.inputs)

    def is_activation(self, node: fx.Node) -> bool:
        """Whether a node computes with an input that is not of integers."""
        source = self._sources.get(node)
        return source is not None and source.activation

    @property
    def batch(self) -> Any:
        """torch's expression for the size of the batch; 1 where it is fixed."""
        return next(iter(self._symbols()), 1)

    def sizes(self, *, shift: int = 0, first: int | None = None) -> dict[Any, int]:
        """Return a size for every axis that has none before the model runs.

        Args:
            shift: Another number gives other sizes, where the program allows that.
            first: The size of the batch.
        """
        chosen: dict[Any, int] = {}
        for count, symbol in enumerate(self._symbols()):
            low, high = self.range_of(symbol)
            size = first if first is not None and count == 0 else 3 + 2 * count + shift
            chosen[symbol] = max(low, size if high is None else min(size, high))
        return chosen

    def range_of(self, symbol: Any) -> tuple[int, int | None]:
        """The smallest and the largest size that the program allows for an axis."""
        limits = self._ranges.get(symbol)
        if limits is None:
            return 1, None
        high = limits.upper
        finite = high.is_Integer and int(high) < 2**31
        return max(1, int(limits.lower)), int(high) if finite else None

    def random(
        self, sizes: Mapping[Any, int], high: int, generator: torch.Generator
    ) -> dict[fx.Node, Tensor]:
        """Return integer inputs of random numbers below `high`."""
        given: dict[fx.Node, Tensor] = {}
        for node in self.inputs:
            if self._sources[node].inputs:
                value = node.meta["val"]
                shape = [size_at(size, sizes) for size in value.shape]
                numbers = torch.randint(0, high, shape, generator=generator)
                given[node] = numbers.to(value.dtype)
        return given

    def number(self, x: Any) -> float | None:
        """The number that a constant is; None for anything else."""
        if isinstance(x, (int, float)):
            return float(x)
        if not isinstance(x, fx.Node) or self.is_activation(x) or self.deferred(x) is not None:
            return None
        value = x.meta.get("val")
        if not isinstance(value, Tensor) or value.numel() != 1:
            return None
        return float(self.evaluate(x, {}, {}))

    def evaluate(
        self, node: fx.Node, sizes: Mapping[Any, int], given: Mapping[fx.Node, Tensor]
    ) -> Tensor:
        """Compute what is deferred.

        Args:
            node: What to compute.
            sizes: From `sizes`.
            given: Integer inputs of these sizes, from `random`.

        Raises:
            UnsupportedUse: torch cannot compute it for these sizes.
        """
        results: dict[fx.Node, Any] = {**self._constants, **given}
        try:
            with torch.no_grad():
                for each in self._needed(node):
                    results[each] = self._compute(each, sizes, results)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise UnsupportedUse(
                f"what it computes from sizes fails for {sorted(sizes.values())} ({reason}); "
                "compute it from the sizes of the inputs alone"
            ) from error
        result = results[node]
        assert isinstance(result, Tensor)
        return result

    def _compute(
        self, node: fx.Node, sizes: Mapping[Any, int], results: Mapping[fx.Node, Any]
    ) -> Any:
        value = node.meta.get("val")
        if isinstance(value, SYMBOLIC) or not _leaves(value):
            number = _number(value, sizes)
            return int(number) if isinstance(value, torch.SymInt) else number
        if isinstance(value, (int, float, bool)):
            return value
        if str(node.target) in _FILLS:
            shape = [size_at(size, sizes) for size in node.meta["val"].shape]
            return torch.full(shape, _filled(node), dtype=node.meta["val"].dtype)
        given: Any = fx.map_arg((node.args, node.kwargs), lambda n: results[n])
        args, kwargs = given
        if node.target is operator.getitem:
            return args[0][args[1]]
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _needed(self, node: fx.Node) -> list[fx.Node]:
        """What has to be computed for a node, in order; sizes stand for themselves."""
        wanted: set[fx.Node] = set()
        stack = [node]
        while stack:
            each = stack.pop()
            if each in wanted or each.op != "call_function":
                continue
            wanted.add(each)
            fills = str(each.target) in _FILLS
            if not fills and not isinstance(each.meta.get("val"), SYMBOLIC):
                stack.extend(each.all_input_nodes)
        return [each for each in self._graph.nodes if each in wanted]

    def _symbols(self) -> list[Any]:
        """The symbols of the sizes of inputs, that of the batch first."""
        found: dict[Any, None] = {}
        for node in self.inputs:
            value = node.meta.get("val")
            shape: Any = value.shape if isinstance(value, Tensor) else ()
            for size in shape:
                if isinstance(size, torch.SymInt):
                    symbols = sorted(size.node.expr.free_symbols, key=str)
                    found.update(dict.fromkeys(symbols))
        return list(found)

    def _of_call(self, node: fx.Node) -> _Source:
        if isinstance(node.meta.get("val"), SYMBOLIC):
            return _Source(sizes=True)
        if str(node.target) in _FILLS and isinstance(_filled(node), (int, float, bool)):
            return _Source(sizes=True)
        sources = [self._sources.get(each, _Source()) for each in node.all_input_nodes]
        inputs: frozenset[fx.Node] = frozenset().union(*(source.inputs for source in sources))
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        embeds = bool(inputs) and str(node.target) in _EMBEDS
        return _Source(
            activation=random or embeds or any(source.activation for source in sources),
            inputs=inputs,
            sizes=any(source.sizes for source in sources),
        )


def _filled(node: fx.Node) -> Any:
    """The number that one of `_FILLS` fills in."""
    number = _FILLS[str(node.target)]
    return node.args[-1] if number is None else number


def constant_of(program: ExportedProgram, target: str) -> Tensor:
    """Return a parameter, a buffer or a constant of a program."""
    # Non-persistent buffers and tensors made in forward live in `constants`.
    state = program.state_dict
    tensor = state[target] if target in state else program.constants[target]
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def size_at(size: Any, sizes: Mapping[Any, int]) -> int:
    """The number that a size of torch's, or its expression, is at some sizes of the inputs."""
    return int(_number(size, sizes))


def _number(value: Any, sizes: Mapping[Any, int]) -> Any:
    expression = value.node.expr if isinstance(value, SYMBOLIC) else value
    number = expression.subs(sizes) if hasattr(expression, "subs") else expression
    if isinstance(value, torch.SymBool):
        return bool(number)
    return float(number) if isinstance(value, torch.SymFloat) else number


def _leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [] if value is None else [value]


def largest_size(at: Callable[[int], object], low: int, high: int) -> int:
    """The largest size up to `high` for which `at` does not refuse: tables may end before it.

    Args:
        at: Computes something for a size, or raises UnsupportedUse.
        low: A size that is taken as it is.
        high: The largest size that is tried.
    """

    def works(size: int) -> bool:
        try:
            at(size)
        except UnsupportedUse:
            return False
        return True

    if works(high):
        return high
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low

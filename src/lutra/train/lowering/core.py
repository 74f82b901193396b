"""The walk from a `torch.export` program to a lutra graph; its siblings hold the operators.

A lowering is a small function that gets one torch operator's arguments by name and emits graph
nodes:

    @lowers("aten.relu.default")
    def _relu(ctx: Lowering, self: Ref) -> Ref:
        return ctx.emit("relu", self)

Operators that only touch constants (weights) are computed right away, so a lowering meets either
a `Ref` (an activation) or a finished `torch.Tensor`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from lutra.errors import LutraError, UnsupportedModelError
from lutra.graph import AttrValue, Graph, Node, Value
from lutra.train.capture import node_module
from lutra.train.lowering.hints import hint_for

_FLOAT32 = "float32"

#: Sizes of axes, see ``Ref``.
Sizes: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Ref:
    """An activation: the name of a graph value and its shape.

    A size is an int, None for the batch, or else an expression of torch's in the sizes of the
    inputs, where those are known at run time only.
    """

    name: str
    shape: Sizes

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class Unlowered:
    """Stands for a result that could not be lowered, so that the walk can go on."""


@dataclass(frozen=True)
class UnsupportedOp:
    """One operator that lutra cannot run: what it is, where it is and what to do about it."""

    op: str
    module: str
    hint: str

    def __str__(self) -> str:
        return f"{self.op} in {self.module or 'the model itself'}: {self.hint}"


class UnsupportedUse(Exception):
    """Raised by a lowering when it knows the operator but not this use of it; holds the hint."""


@dataclass(frozen=True)
class Lowered:
    """A graph, and where its values come from.

    Attributes:
        graph: The graph, not yet validated.
        origins: Graph value name -> name of the torch node that computes it; lets a check compare
            the two node by node.
    """

    graph: Graph
    origins: Mapping[str, str]


#: See `Lowering.run`.
Simplify: TypeAlias = Callable[
    [Sequence[Node], dict[str, Sizes], set[str], Callable[[str], str]], list[Node]
]
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_F = TypeVar("_F", bound=Callable[..., Any])
_REGISTRY: dict[str, Callable[..., Any]] = {}
_TAKING_SIZES: set[str] = set()


def lowers(*targets: str, takes_sizes: bool = False) -> Callable[[_F], _F]:
    """Register a function as the lowering of torch operators such as `"aten.relu.default"`.

    Args:
        targets: The operators.
        takes_sizes: Whether it can do with arguments that are computed from sizes known at run
            time only; they are refused otherwise.

    The function is called as `fn(ctx, **arguments)`, the arguments named as in the operator's
    schema (only those the function takes). It returns a `Ref`, or a tuple for operators with
    several results (None for a result lutra does not have), or raises `UnsupportedUse`.
    """

    def register(function: _F) -> _F:
        for target in targets:
            if target in _REGISTRY:
                raise LutraError(
                    f"lowers: {target} has a lowering already "
                    f"({_REGISTRY[target].__qualname__}); remove one of the two."
                )
            _REGISTRY[target] = function
            if takes_sizes:
                _TAKING_SIZES.add(target)
        return function

    return register


class Lowering:
    """The state of one walk: what every torch node became, and the graph so far."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._results: dict[fx.Node, Any] = {}
        self._nodes: list[Node] = []
        self._shapes: dict[str, Sizes] = {}
        self._origins: dict[str, str] = {}
        self._names: set[str] = set()
        self._tensors: dict[str, np.ndarray] = {}
        # Where a tensor lives in memory -> its name, so that tied weights are written once.
        self._tensor_names: dict[tuple[Any, ...], str] = {}
        self._parameter_names: dict[tuple[Any, ...], str] = {}
        self._alive: list[Tensor] = []  # so that no freed temporary lends its address to another
        self._unsupported: dict[UnsupportedOp, None] = {}  # an ordered set
        self._current: fx.Node | None = None
        paths = {node_module(node) for node in program.graph.nodes}
        self._leaves = {p for p in paths if p and not any(q.startswith(p + ".") for q in paths)}
        self._batch: object = None

    # ---- what lowerings use -------------------------------------------------------------------

    @property
    def result_shape(self) -> Sizes:
        """The shape of the (first) result of the operator that is being lowered."""
        assert self._current is not None
        value = self._current.meta["val"]
        return self._shape_of(value[0] if isinstance(value, (tuple, list)) else value)

    def emit(
        self,
        op: str,
        inputs: Ref | Sequence[Ref],
        shape: Sizes | None = None,
        *,
        attrs: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        suffix: str = "",
    ) -> Ref:
        """Append a node to the graph.

        Args:
            op: Graph op.
            inputs: The activations it reads.
            shape: Of its result; the result shape of the torch operator when left out.
            attrs: Attributes of the op; lists become tuples.
            tensors: Constants by role. Tensors that are one in torch are stored once.
            suffix: Added to the module path, for helper nodes put before the main one.

        Returns:
            The node's result.
        """
        assert self._current is not None
        shape = self.result_shape if shape is None else shape
        inputs = (inputs,) if isinstance(inputs, Ref) else tuple(inputs)
        module = node_module(self._current)
        parts = [module] if module in self._leaves and not suffix else [module, suffix or op]
        name = self._unique(".".join(part for part in parts if part), self._names)
        stored = {role: self._store(name, role, t) for role, t in (tensors or {}).items()}
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in (attrs or {}).items()}
        if any(is_dynamic(leaf) for leaf in _flatten(plain)):
            raise UnsupportedUse(
                "it needs the size of an axis that is known at run time only; pool over that axis "
                "first, or take it out of dynamic_axes"
            )
        value = self._unique(name, self._shapes)
        self._nodes.append(
            Node(
                op=op,
                name=name,
                inputs=tuple(ref.name for ref in inputs),
                output=value,
                attrs=plain,
                tensors=stored,
            )
        )
        self._names.add(name)
        self._shapes[value] = shape
        return Ref(value, shape)

    def find(self, fits: Callable[[Ref], bool]) -> Ref | None:
        """Return the first activation so far that fits, or None."""
        refs = (Ref(name, shape) for name, shape in self._shapes.items() if shape)
        return next((ref for ref in refs if fits(ref)), None)

    # ---- the walk ------------------------------------------------------------------------------

    def run(
        self,
        input_names: Sequence[str],
        output_names: Sequence[str] | None,
        metadata: Mapping[str, Any],
        simplify: Simplify,
    ) -> Lowered:
        """Lower the whole program; see `lower`.

        `simplify(nodes, shapes, kept, new_name)` returns nodes that compute the same kept values.
        """
        inputs = self._bind_inputs(input_names)
        output_node = next(n for n in self._program.graph.nodes if n.op == "output")
        outputs = [
            argument
            for argument, spec in zip(
                output_node.args[0], self._program.graph_signature.output_specs, strict=True
            )
            if spec.kind == OutputKind.USER_OUTPUT
        ]
        names = self._output_names(output_names, len(outputs))
        for name in names:
            self._shapes.setdefault(name, ())  # keeps inner values off the names of the outputs
        needed = _ancestors([node for node in outputs if isinstance(node, fx.Node)])
        for node in self._program.graph.nodes:
            if node.op in ("call_function", "get_attr") and node in needed:
                self._results[node] = self._lower_node(node)
        results = [
            self._output(argument, name) for argument, name in zip(outputs, names, strict=True)
        ]
        self._raise_unsupported()
        kept = {result.name for result in results if result is not None}
        self._nodes = simplify(self._nodes, self._shapes, kept, self._new_name)
        nodes = self._rename_outputs(results, names, inputs)
        graph = Graph(
            inputs=inputs,
            outputs=tuple(names),
            nodes=tuple(nodes),
            tensors=self._tensors,
            metadata=dict(metadata),
            golden=None,
        )
        return Lowered(graph, self._origins)

    def _bind_inputs(self, input_names: Sequence[str]) -> tuple[Value, ...]:
        signature = self._program.graph_signature
        placeholders = [n for n in self._program.graph.nodes if n.op == "placeholder"]
        values: list[Value] = []
        names = iter(input_names)
        for node, spec in zip(placeholders, signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                name = next(names)
                fake = node.meta["val"]
                if self._batch is None and not isinstance(fake.shape[0], int):
                    self._batch = fake.shape[0].node.expr
                if fake.dtype != torch.float32:
                    self._add_unsupported(
                        "input", "", f"input '{name}' is {fake.dtype} but lutra reads float32 only"
                    )
                    self._results[node] = Unlowered()
                    continue
                shape = self._shape_of(fake)
                self._shapes[name] = shape
                self._results[node] = Ref(name, shape)
                self._origins[name] = node.name
                sizes = tuple(size if isinstance(size, int) else None for size in shape)
                values.append(Value(name=name, dtype=_FLOAT32, shape=sizes))
            elif spec.target is not None and spec.kind in (
                InputKind.PARAMETER,
                InputKind.BUFFER,
                InputKind.CONSTANT_TENSOR,
            ):
                tensor = self._constant(spec.target)
                self._results[node] = tensor
                self._parameter_names.setdefault(_identity(tensor), spec.target)
            else:
                self._add_unsupported(
                    "input", "", f"constant '{node.name}' is no tensor; make it a buffer"
                )
                self._results[node] = Unlowered()
        return tuple(values)

    def _constant(self, target: str) -> Tensor:
        state, constants = self._program.state_dict, self._program.constants
        # Non-persistent buffers and tensors made in forward live in `constants`.
        tensor = state[target] if target in state else constants[target]
        assert isinstance(tensor, Tensor)
        return tensor.detach()

    def _lower_node(self, node: fx.Node) -> Any:
        self._current = node
        if node.target is operator.getitem:
            return self._getitem(node)
        args = fx.map_arg((node.args, node.kwargs), lambda n: self._results[n])
        leaves = list(_flatten(args))
        if callable(node.target) and _is_constant(node, leaves):
            with torch.no_grad():
                return node.target(*args[0], **args[1])
        if not isinstance(_first(node.meta.get("val")), Tensor):
            return node.meta.get("val")  # sizes: shapes of results say all that is needed
        target = str(node.target)
        lowering = _REGISTRY.get(target)
        if lowering is None:
            return self._fail(target, hint_for(target))
        if any(isinstance(leaf, Unlowered) for leaf in leaves):
            return Unlowered()
        before = len(self._nodes)
        try:
            first = _first(node.meta["val"])
            if first.dtype != torch.float32:
                raise UnsupportedUse(
                    f"its result is {first.dtype}, but activations are float32; remove the cast"
                )
            shape = self.result_shape
            arguments = _bind(node, args, lowering)
            if target not in _TAKING_SIZES:
                self._check_sizes(arguments)
            result = lowering(self, **arguments)
            first_result = result[0] if isinstance(result, tuple) else result
            assert _alike(first_result.shape, shape), (target, first_result.shape, shape)
        except UnsupportedUse as reason:
            del self._nodes[before:]
            return self._fail(target, str(reason))
        if isinstance(result, Ref):
            self._origins.setdefault(result.name, node.name)
        return result

    def _getitem(self, node: fx.Node) -> Any:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value = self._results[source]
        if isinstance(value, Unlowered):
            return value
        item = value[node.args[1]]
        if item is None:
            return self._fail(
                str(source.target),
                f"result {node.args[1]} (indices or statistics) is used, but lutra has only the "
                "first one; do without it",
            )
        if isinstance(item, Ref):
            self._origins.setdefault(item.name, node.name)
        return item

    def _output(self, argument: Any, name: str) -> Ref | None:
        result = self._results.get(argument) if isinstance(argument, fx.Node) else argument
        if isinstance(result, Ref):
            return result
        if not isinstance(result, Unlowered):
            self._add_unsupported(
                "output", "", f"output '{name}' does not depend on the inputs; return tensors only"
            )
        return None

    def _rename_outputs(
        self, results: Sequence[Ref | None], names: Sequence[str], inputs: Sequence[Value]
    ) -> list[Node]:
        renamed: dict[str, str] = {}
        taken = {value.name for value in inputs}
        for result, name in zip(results, names, strict=True):
            assert result is not None
            if result.name in taken:
                # An output that is an input, or the same value twice: it gets a value of its own.
                source = renamed.get(result.name, result.name)
                self._nodes.append(self._copy(result, source, name))
                self._names.add(self._nodes[-1].name)
                continue
            taken.add(result.name)
            renamed[result.name] = name
        for old, new in renamed.items():
            if old in self._origins:
                self._origins[new] = self._origins.pop(old)
        return [
            replace(
                node,
                inputs=tuple(renamed.get(i, i) for i in node.inputs),
                output=renamed.get(node.output, node.output),
            )
            for node in self._nodes
        ]

    def _output_names(self, given: Sequence[str] | None, count: int) -> list[str]:
        if given is None:
            spec = self._program.call_spec.out_spec
            tree = spec.unflatten(list(range(count))) if spec is not None else None
            if isinstance(tree, dict) and list(tree.values()) == list(range(count)):
                keys = [str(key) for key in tree]
            else:
                keys = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
            taken = set(self._shapes)  # an output may be called like an input, a value may not
            for i, key in enumerate(keys):
                keys[i] = self._unique(key, taken)
                taken.add(keys[i])
            return keys
        names = list(given)
        if len(names) != count:
            raise LutraError(
                f"export: output_names {names} has {len(names)} names but the model has {count} "
                "outputs; give one name per output."
            )
        for i, name in enumerate(names):
            if name in self._shapes or name in names[:i]:
                raise LutraError(
                    f"export: output name {name!r} is used twice (inputs {list(self._shapes)}, "
                    f"outputs {names}); choose others with input_names and output_names."
                )
        return names

    # ---- helpers --------------------------------------------------------------------------------

    def _copy(self, value: Ref, source: str, name: str) -> Node:
        """A node that changes nothing: a reshape, or a pad where that would need to know sizes."""
        fixed = not any(map(is_dynamic, value.shape))
        attrs: dict[str, AttrValue] = {"shape": value.shape[1:]}
        if not fixed:
            attrs = {"pads": (0, 0) * value.rank, "value": 0.0}
        return Node(
            op="reshape" if fixed else "pad",
            name=self._unique(name, self._names),
            inputs=(source,),
            output=name,
            attrs=attrs,
            tensors={},
        )

    def _shape_of(self, value: Any) -> Sizes:
        sizes: list[Any] = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                sizes.append(size)
            elif axis == 0 and size.node.expr == self._batch:
                sizes.append(None)
            elif self._uses_batch(size):
                raise UnsupportedUse(
                    f"it mixes the batch into axis {axis} of its result; keep samples apart, for "
                    "example with x.flatten(1)"
                )
            else:
                sizes.append(size.node.expr)
        if not sizes or sizes[0] is not None:
            raise UnsupportedUse(
                f"its result of shape {tuple(value.shape)} has no batch axis in front; keep axis 0"
            )
        return tuple(sizes)

    def _uses_batch(self, size: Any) -> bool:
        return self._batch in size.node.expr.free_symbols

    def _check_sizes(self, arguments: Mapping[str, Any]) -> None:
        """Refuses arguments that are computed from sizes known at run time only."""
        for leaf in _flatten(arguments):
            if not isinstance(leaf, _SYMBOLIC):
                continue
            if self._uses_batch(leaf):
                raise UnsupportedUse(
                    "it computes with the batch size, which differs from run to run; use constants"
                )
            raise UnsupportedUse(
                "it computes with the size of an axis that is known at run time only; use "
                "constants, or take that axis out of dynamic_axes"
            )

    def _store(self, node: str, role: str, tensor: Tensor) -> str:
        """Add a constant to the graph and return its name; a constant met before keeps its own."""
        key = _identity(tensor)
        if key not in self._tensor_names:
            self._alive.append(tensor)
            name = self._unique(self._parameter_names.get(key, f"{node}.{role}"), self._tensors)
            self._tensors[name] = np.array(tensor.numpy(), order="C")
            self._tensor_names[key] = name
        return self._tensor_names[key]

    def _new_name(self, name: str) -> str:
        name = self._unique(name, {*self._shapes, *self._names})
        self._names.add(name)
        return name

    @staticmethod
    def _unique(name: str, taken: Mapping[str, Any] | set[str]) -> str:
        candidate, count = name, 1
        while candidate in taken:
            count += 1
            candidate = f"{name}_{count}"
        return candidate

    def _fail(self, op: str, hint: str) -> Unlowered:
        assert self._current is not None
        self._add_unsupported(op, node_module(self._current), hint)
        return Unlowered()

    def _add_unsupported(self, op: str, module: str, hint: str) -> None:
        self._unsupported.setdefault(UnsupportedOp(op, module, hint))

    def _raise_unsupported(self) -> None:
        if self._unsupported:
            lines = [str(item) for item in self._unsupported]
            count = "an operator" if len(lines) == 1 else f"{len(lines)} operators"
            raise UnsupportedModelError(
                f"export: lutra has no counterpart for {count} of the model; change or remove:\n"
                + "\n".join(f"  - {line}" for line in lines),
                lines,
            )


def is_dynamic(size: Any) -> bool:
    """Whether a size of a Ref is known at run time only, the batch aside."""
    return hasattr(size, "free_symbols")  # an expression of sympy


def _alike(a: Sizes, b: Sizes) -> bool:
    """Whether two shapes can be the same; torch may write one size in several ways."""
    return len(a) == len(b) and all(
        x == y or (is_dynamic(x) and is_dynamic(y)) for x, y in zip(a, b, strict=True)
    )


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _flatten(args: Any) -> list[Any]:
    if isinstance(args, (tuple, list)):
        return [leaf for item in args for leaf in _flatten(item)]
    if isinstance(args, Mapping):
        return [leaf for item in args.values() for leaf in _flatten(item)]
    return [args]


def _is_constant(node: fx.Node, leaves: list[Any]) -> bool:
    tags = getattr(node.target, "tags", ())
    dynamic = (Ref, Unlowered, *_SYMBOLIC)
    return torch.Tag.nondeterministic_seeded not in tags and not any(
        isinstance(leaf, dynamic) for leaf in leaves
    )


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) and value else value


def _bind(node: fx.Node, args: Any, function: Callable[..., Any]) -> dict[str, Any]:
    """Name a torch operator's arguments after its schema; keep those the lowering takes."""
    schema = node.target._schema  # type: ignore[union-attr]
    values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values.update({a.name: value for a, value in zip(schema.arguments, args[0], strict=False)})
    values.update(args[1])
    code = function.__code__
    wanted = code.co_varnames[1 : code.co_argcount]
    return {name: values[name] for name in wanted}


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)

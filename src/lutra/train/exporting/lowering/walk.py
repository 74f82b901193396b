"""The walk from a `torch.export` program to a lutra graph, operator by operator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from lutra.graph import Graph
from lutra.node import Node, Value
from lutra.train.exporting.lowering import folded, views
from lutra.train.exporting.lowering.core import LOWERINGS, Entry, Lowered, Lowering
from lutra.train.exporting.lowering.deferred import computed
from lutra.train.exporting.lowering.emitter import flatten, identity
from lutra.train.exporting.lowering.hints import hint_for
from lutra.train.exporting.lowering.sources import (
    CONSTANT_KINDS,
    SYMBOLIC,
    Deferred,
    constant_of,
)
from lutra.train.exporting.lowering.values import (
    Ref,
    Sizes,
    Unlowered,
    UnsupportedUse,
    View,
    is_dynamic,
)
from lutra.train.exporting.outputs import names_of

_INTEGERS = (torch.int64, torch.int32, torch.bool)
#: Steps that a model takes in float64 are taken in float32; the check says whether that is enough.
_FLOATS = (torch.float32, torch.float64)

#: See `Walk.run`.
Simplify: TypeAlias = Callable[
    [Sequence[Node], dict[str, Sizes], set[str], Callable[[str], str]], list[Node]
]


class _Reported(Exception):
    """Something that an operator reads could not be lowered, and is in the list already."""


class Walk(Lowering):
    """The state of one walk: what every torch node became, and the graph so far."""

    def __init__(self, program: ExportedProgram, longest: int | None = None) -> None:
        super().__init__(program)
        self.longest = longest or self.longest
        self._program = program
        self._realised: dict[View, Ref] = {}
        self._shown: dict[View, fx.Node] = {}  # views that are results of torch nodes
        self._forced: dict[fx.Node, Any] = {}

    # ---- what lowerings use -------------------------------------------------------------------

    def realise(self, x: Ref | View) -> Ref:
        if isinstance(x, Ref):
            return x
        if x not in self._realised:
            with self.at(x.node):
                try:
                    made = views.realise(self, x)
                except UnsupportedUse as reason:
                    self._fail(str(x.node.target), str(reason))
                    raise _Reported from reason
                if x in self._shown:
                    self._origins.setdefault(made.name, self._shown[x].name)
            self._realised[x] = made
        return self._realised[x]

    def force(self, node: fx.Node, lower: Callable[[fx.Node], Any]) -> Any:
        if node not in self._forced:
            with self.at(node):
                made = lower(node)
            self._note(made, node)
            self._forced[node] = made
        return self._forced[node]

    def apply(self, node: fx.Node, arguments: Sequence[Any]) -> Any:
        target = str(node.target)
        entry = LOWERINGS.get(target)
        if entry is None:
            raise UnsupportedUse(f"{target} of integers cannot be computed; {hint_for(target)}")
        return self._apply(entry, _bind(node, (arguments, node.kwargs), entry.function))

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
        self._nodes = self._without_dead(kept)
        self._nodes = simplify(self._nodes, self._shapes, kept, self._new_name)
        nodes = self._rename_outputs(results, names, inputs)
        used = {name for node in nodes for name in node.tensors.values()}
        graph = Graph(
            inputs=inputs,
            outputs=tuple(names),
            nodes=tuple(nodes),
            tensors={name: array for name, array in self._tensors.items() if name in used},
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
                value = self._bind_input(node, next(names))
                values += [] if value is None else [value]
            elif spec.target is not None and spec.kind in CONSTANT_KINDS:
                tensor = constant_of(self._program, spec.target)
                self._results[node] = tensor
                self._parameter_names.setdefault(identity(tensor), spec.target)
            else:
                self._add_unsupported(
                    "input", "", f"constant '{node.name}' is no tensor; make it a buffer"
                )
                self._results[node] = Unlowered()
        return tuple(values)

    def _bind_input(self, node: fx.Node, name: str) -> Value | None:
        fake = node.meta["val"]
        if self._batch is None and not isinstance(fake.shape[0], int):
            self._batch = fake.shape[0].node.expr
        if fake.dtype != torch.float32 and fake.dtype not in _INTEGERS:
            self._add_unsupported(
                "input",
                "",
                f"input '{name}' is {fake.dtype} but lutra reads float32, int32, int64 and bool",
            )
            self._results[node] = Unlowered()
            return None
        sizes = tuple(s if isinstance(s, int) else s.node.expr for s in fake.shape)
        dtype = "int32" if fake.dtype in _INTEGERS else "float32"
        ref = Ref(name, self.shape_of_sizes(sizes), dtype)
        self._shapes[name] = ref.shape
        self._origins[name] = node.name
        self._results[node] = ref
        if dtype == "int32":
            self._integers[node] = ref
            self._results[node] = self.sources.deferred(node)
        known = tuple(size if isinstance(size, int) else None for size in ref.shape)
        return Value(name=name, dtype=dtype, shape=known)

    def _lower_node(self, node: fx.Node) -> Any:
        self._current = node
        deferred = self.sources.deferred(node)
        if deferred is not None:
            return deferred
        empty = _empty(node)
        if empty is not None:
            return empty
        if node.target is operator.getitem:
            return self._getitem(node)
        args = fx.map_arg((node.args, node.kwargs), lambda n: self._results[n])
        leaves = flatten(args)
        if callable(node.target) and _is_constant(node, leaves):
            with torch.no_grad():
                return node.target(*args[0], **args[1])
        if not isinstance(_first(node.meta.get("val")), Tensor):
            return node.meta.get("val")  # sizes: shapes of results say all that is needed
        target = str(node.target)
        entry = LOWERINGS.get(target)
        if entry is None:
            return self._fail(target, hint_for(target))
        if any(isinstance(leaf, Unlowered) for leaf in leaves):
            return Unlowered()
        before = len(self._nodes)
        try:
            first = _first(node.meta["val"])
            if first.dtype not in (*_FLOATS, *_INTEGERS):
                raise UnsupportedUse(
                    f"its result is {first.dtype}, but activations are float32; remove the cast"
                )
            if not (entry.takes or entry.works or entry.axes):
                _ = self.result_shape  # which says what is wrong with the batch
            result = self._apply(entry, _bind(node, args, entry.function))
        except _Reported:
            del self._nodes[before:]
            return Unlowered()
        except UnsupportedUse as reason:
            del self._nodes[before:]
            return self._fail(target, str(reason))
        self._note(result, node)
        return result

    def _note(self, result: Any, node: fx.Node) -> None:
        """Remember that a value, or a view, is the result of a torch node."""
        if isinstance(result, Ref):
            self._origins.setdefault(result.name, node.name)
        elif isinstance(result, View):
            self._shown.setdefault(result, node)

    def _apply(self, entry: Entry, arguments: dict[str, Any]) -> Any:
        if not entry.takes_sizes:
            self._check_sizes(arguments)
        tensors = {
            name: value
            for name, value in arguments.items()
            if name not in entry.takes and isinstance(value, (Ref, View))
        }
        if entry.works and not all(views.is_sample(self, x) for x in tensors.values()):
            return self._apply_to_bases(entry, arguments, tensors)
        apart = folded.applied(self, entry, arguments)
        if apart is not None:
            return apart
        if entry.axes:
            turned = self._apply_turned(entry, arguments)
            if turned is not None:
                return turned
        plain = {
            name: value if name in entry.takes else self._plain(value)
            for name, value in arguments.items()
        }
        result = entry.function(self, **plain)
        first = result[0] if isinstance(result, tuple) else result
        assert first is None or isinstance(first, (Ref, View)), entry.function
        if isinstance(first, Ref):
            shape = self.result_shape
            assert _alike(first.shape, shape), (entry.function, first.shape, shape)
        return result

    def _apply_to_bases(
        self, entry: Entry, arguments: Mapping[str, Any], tensors: Mapping[str, Ref | View]
    ) -> Ref | View:
        def make(*bases: Ref) -> Ref:
            last = bases[0].shape[-1] if entry.works == "each" else self.result_sizes[-1]
            with self.making((*bases[0].shape[:-1], last)):
                given = dict(zip(tensors, bases, strict=True))
                result = entry.function(self, **{**arguments, **given})
            assert isinstance(result, Ref), entry.function
            return result

        if entry.works == "each":
            return views.on_each(self, tuple(tensors.values()), make)
        (x,) = tensors.values()
        return views.on_last(self, x, make)

    def _apply_turned(self, entry: Entry, arguments: Mapping[str, Any]) -> Any:
        """Call a lowering with the batch in front; None where it is there already."""
        seen = [leaf for leaf in flatten(arguments) if isinstance(leaf, View)]
        first = next((x for x in seen if not views.is_sample(self, x)), None)
        if first is None:
            return None
        order = views.batch_first(self, first)

        def turn(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return [turn(each) for each in value]
            value = computed(self, value) if isinstance(value, Deferred) else value
            if isinstance(value, (Ref, View)):
                return self.realise(views.permuted(self, value, order))
            is_alike = isinstance(value, Tensor) and value.ndim == len(order)
            return value.permute(order) if is_alike else value

        def renumber(dim: Any) -> Any:
            if isinstance(dim, (tuple, list)):
                return [renumber(each) for each in dim]
            return order.index(dim % len(order))

        given = {
            name: renumber(value) if name in entry.axes else turn(value)
            for name, value in arguments.items()
        }
        with self.making(self.shape_of_sizes(tuple(self.result_sizes[i] for i in order))):
            made = entry.function(self, **given)
        if isinstance(made, tuple):
            return tuple(None if x is None else views.put_back(self, x, order) for x in made)
        return views.put_back(self, made, order)

    def _plain(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [self._plain(item) for item in value]
        if isinstance(value, View):
            return self.realise(value)
        if isinstance(value, Deferred):
            return self._plain(computed(self, value))
        return value

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
        self._note(item, node)
        return item

    def _output(self, argument: Any, name: str) -> Ref | None:
        result = self._results.get(argument) if isinstance(argument, fx.Node) else argument
        place = views.batch_first(self, result)[0] if isinstance(result, View) else 0
        if place:
            self._add_unsupported(
                "output",
                "",
                f"output '{name}' has the batch in axis {place}, and a file has it in axis 0; "
                f"return x.transpose(0, {place})",
            )
            return None
        try:
            result = self._plain(result)
        except _Reported:
            return None
        except UnsupportedUse as reason:
            self._add_unsupported("output", "", f"output '{name}': {reason}")
            return None
        dtype = argument.meta["val"].dtype if isinstance(argument, fx.Node) else None
        if isinstance(result, Ref) and dtype in (*_FLOATS, *_INTEGERS):
            return result
        if not isinstance(result, Unlowered):
            what = (
                f"is {dtype}; return float32, integers or bool"
                if isinstance(result, Ref)
                else "does not depend on the inputs; leave it out, or keep it beside the file"
            )
            self._add_unsupported("output", "", f"output '{name}' {what}")
        return None

    def _output_names(self, given: Sequence[str] | None, count: int) -> list[str]:
        if given is not None:
            return self._given_names(given, count)
        spec = self._program.call_spec.out_spec
        keys = names_of(list(range(count)) if spec is None else spec.unflatten(list(range(count))))
        taken = set(self._shapes)  # an output may be called like an input, a value may not
        for i, key in enumerate(keys):
            keys[i] = self._unique(key, taken)
            taken.add(keys[i])
        return keys

    # ---- helpers --------------------------------------------------------------------------------

    def _check_sizes(self, arguments: Mapping[str, Any]) -> None:
        """Refuses arguments that are computed from sizes known at run time only."""
        for leaf in flatten(arguments):
            if not isinstance(leaf, SYMBOLIC):
                continue
            if self._batch in leaf.node.expr.free_symbols:
                raise UnsupportedUse(
                    "it computes with the batch size, which differs from run to run; use constants"
                )
            raise UnsupportedUse(
                "it computes with the size of an axis that is known at run time only; use "
                "constants, or take that axis out of dynamic_axes"
            )


def _alike(a: Sizes, b: Sizes) -> bool:
    """Whether two shapes can be the same; torch may write one size in several ways."""
    return len(a) == len(b) and all(
        x == y or is_dynamic(x) or is_dynamic(y) for x, y in zip(a, b, strict=True)
    )


def _empty(node: fx.Node) -> Tensor | None:
    """The value of a node that holds nothing for any input, such as `x[..., 8:]` of eight features;
    with 1 for sizes that are known at run time."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not any(
        isinstance(size, int) and size == 0 for size in value.shape
    ):
        return None
    sizes = [size if isinstance(size, int) else 1 for size in value.shape]
    return torch.zeros(sizes, dtype=value.dtype)


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _is_constant(node: fx.Node, leaves: list[Any]) -> bool:
    tags = getattr(node.target, "tags", ())
    dynamic = (Ref, View, Unlowered, Deferred, *SYMBOLIC)
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

"""The graph that a walk builds up: nodes, names and tensors, and what could not be lowered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, fx

from lutra.errors import LutraError, UnsupportedModelError
from lutra.graph import make_node
from lutra.node import AttrValue, Node, Value
from lutra.train.exporting.capture import node_module
from lutra.train.exporting.lowering.values import Ref, Sizes, Unlowered, UnsupportedUse, is_dynamic


@dataclass(frozen=True)
class UnsupportedOp:
    """One operator that lutra cannot run: what it is, where it is and what to do about it."""

    op: str
    module: str
    hint: str

    def __str__(self) -> str:
        return f"{self.op} in {self.module or 'the model itself'}: {self.hint}"


def _is_layer(node: fx.Node) -> bool:
    """Whether a torch operator is all that a frozen layer does, or most of it."""
    return str(node.target) == "lutra.frozen.default"


class Emitter:
    """The graph so far."""

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes: list[Node] = []
        self._makers: dict[str, Node] = {}  # the node that makes a value
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
        self._made_shape: Sizes | None = None
        paths = {node_module(node) for node in graph.nodes}
        self._leaves = {p for p in paths if p and not any(q.startswith(p + ".") for q in paths)}
        # The node of a frozen layer has the layer's name, whatever else the layer does.
        self._layers = {node_module(node) for node in graph.nodes if _is_layer(node)}
        self._batch: Any = None

    # ---- what lowerings use -------------------------------------------------------------------

    @property
    def node(self) -> fx.Node:
        """The torch operator that is being lowered."""
        assert self._current is not None
        return self._current

    @property
    def batch(self) -> Any:
        """torch's expression for the size of the batch."""
        return self._batch

    @property
    def result_shape(self) -> Sizes:
        """The shape of the (first) result of the operator that is being lowered."""
        if self._made_shape is not None:
            return self._made_shape
        return self.shape_of_sizes(self.result_sizes)

    @property
    def result_sizes(self) -> Sizes:
        """The same with torch's expression for the batch, which may be in any axis."""
        if self._made_shape is not None:
            return tuple(self._batch if size is None else size for size in self._made_shape)
        value = self.node.meta["val"]
        first = value[0] if isinstance(value, (tuple, list)) else value
        return expressions(first.shape)

    def shape_of_sizes(self, sizes: Sizes) -> Sizes:
        """The shape of a graph value of these sizes.

        Raises:
            UnsupportedUse: The batch is not in axis 0 and nowhere else.
        """
        shape: list[Any] = []
        for axis, size in enumerate(sizes):
            if axis == 0 and self._batch is not None and size == self._batch:
                shape.append(None)
            elif is_dynamic(size) and self._batch in size.free_symbols:
                raise UnsupportedUse(
                    f"it mixes the batch into axis {axis} of its result; keep samples apart, for "
                    "example with x.flatten(1)"
                )
            else:
                shape.append(size)
        if not shape or shape[0] is not None:
            shown = tuple(size if isinstance(size, int) else str(size) for size in sizes)
            raise UnsupportedUse(
                f"its result of shape {shown} has no batch axis in front; keep axis 0"
            )
        return tuple(shape)

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
        shape = self.result_shape if shape is None else shape
        inputs = (inputs,) if isinstance(inputs, Ref) else tuple(inputs)
        module = node_module(self.node)
        alone = module in self._leaves and (module not in self._layers or _is_layer(self.node))
        parts = [module] if alone and not suffix else [module, suffix or op]
        name = self._unique(".".join(part for part in parts if part), self._names)
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in (attrs or {}).items()}
        if any(is_dynamic(leaf) for leaf in flatten(plain)):
            raise UnsupportedUse(
                "it needs the size of an axis that is known at run time only; pool over that axis "
                "first, or take it out of dynamic_axes"
            )
        stored = {role: self._store(name, role, t) for role, t in (tensors or {}).items()}
        value = self._unique(name, self._shapes)
        node = make_node(op, name, [ref.name for ref in inputs], value, plain, stored)
        self._nodes.append(node)
        self._makers[value] = node
        self._names.add(name)
        self._shapes[value] = shape
        return Ref(value, shape)

    def find(self, fits: Callable[[Ref], bool]) -> Ref | None:
        """Return the first activation so far that fits, or None."""
        refs = (Ref(name, shape) for name, shape in self._shapes.items() if shape)
        return next((ref for ref in refs if fits(ref)), None)

    def maker(self, value: Ref) -> Node | None:
        """Return the node that makes a value; None for an input."""
        return self._makers.get(value.name)

    def reference(self, name: str) -> Ref:
        """Return a value of the graph by name."""
        return Ref(name, self._shapes[name])

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor of the graph."""
        return self._tensors[name]

    @contextmanager
    def at(self, node: fx.Node) -> Iterator[None]:
        """Work on another torch operator for a while."""
        before = self._current, self._made_shape
        self._current, self._made_shape = node, None
        try:
            yield
        finally:
            self._current, self._made_shape = before

    @contextmanager
    def making(self, shape: Sizes | None) -> Iterator[None]:
        """Take another shape for that of results, for operators on the base of a view."""
        before, self._made_shape = self._made_shape, shape
        try:
            yield
        finally:
            self._made_shape = before

    # ---- the end of a walk --------------------------------------------------------------------

    def _without_dead(self, kept: set[str]) -> list[Node]:
        """The nodes that a kept value depends on."""
        read = set(kept)
        result = []
        for node in reversed(self._nodes):
            if node.output in read:
                read.update(node.inputs)
                result.append(node)
        return result[::-1]

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

    def _given_names(self, given: Sequence[str], count: int) -> list[str]:
        """Check names of outputs."""
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

    def _store(self, node: str, role: str, tensor: Tensor) -> str:
        """Add a constant to the graph and return its name; a constant met before keeps its own."""
        key = identity(tensor)
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
        self._add_unsupported(op, node_module(self.node), hint)
        return Unlowered()

    def _add_unsupported(self, op: str, module: str, hint: str) -> None:
        self._unsupported.setdefault(UnsupportedOp(op, module, hint))

    def _raise_unsupported(self) -> None:
        if self._unsupported:
            raise unsupported_model(self._unsupported)


def unsupported_model(found: Collection[UnsupportedOp]) -> UnsupportedModelError:
    """The error that lists operators without a counterpart."""
    lines = [str(item) for item in found]
    count = "an operator" if len(lines) == 1 else f"{len(lines)} operators"
    return UnsupportedModelError(
        f"export: lutra has no counterpart for {count} of the model; change or remove:\n"
        + "\n".join(f"  - {line}" for line in lines),
        lines,
    )


def expressions(shape: Sequence[Any]) -> Sizes:
    """Sizes of a torch tensor, as numbers and torch's expressions."""
    return tuple(size if isinstance(size, int) else size.node.expr for size in shape)


def flatten(args: Any) -> list[Any]:
    """The leaves of nested tuples, lists and mappings."""
    if isinstance(args, (tuple, list)):
        return [leaf for item in args for leaf in flatten(item)]
    if isinstance(args, Mapping):
        return [leaf for item in args.values() for leaf in flatten(item)]
    return [args]


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that are one in memory."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)

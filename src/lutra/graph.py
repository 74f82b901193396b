"""The graph: what a model computes, with nothing of how.

Frozen dataclasses that know nothing of PyTorch, of files or of the engine. A graph is made by the
exporter or by the loader, checked by ``Graph.validate`` and read by everybody else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np

from lutra.errors import GraphError
from lutra.ops import OPS, op_spec
from lutra.ops.registry import Array, AttrValue, Cost

__all__ = ["AttrValue", "Cost", "Golden", "Graph", "Node", "Shape", "Value", "make_node", "sized"]

#: Sizes of the axes; None is an axis of any size. Only axis 0, the batch, may be None.
Shape: TypeAlias = tuple[int | None, ...]
#: Example inputs and the outputs that belong to them.
Golden: TypeAlias = tuple[tuple[Array, ...], tuple[Array, ...]]

#: Names of tensors that begin like this belong to the golden data of the file.
RESERVED_PREFIX: Final = "golden."
TENSOR_DTYPES: Final = ("float32", "int32", "int8", "uint8")
_MAX_RANK: Final = 8
_MAX_ELEMENTS: Final = 2**31 - 1  # of one sample; the engine counts in 32 bits
_MAX_NAME: Final = 512


def sized(shape: Shape, batch: int) -> tuple[int, ...]:
    """A shape with a batch in the place of None."""
    return tuple(batch if size is None else size for size in shape)


@dataclass(frozen=True)
class Value:
    """An array that flows through the graph: its name, dtype and shape."""

    name: str
    dtype: str
    shape: Shape

    def with_shape(self, name: str, shape: Shape) -> Value:
        """A value of the same dtype with another name and shape."""
        return replace(self, name=name, shape=shape)


@dataclass(frozen=True)
class Node:
    """One operator of the graph.

    Attributes:
        op: Name of the operator, see ``lutra.ops``.
        name: Unique name, the module path in the model where there is one.
        inputs: Names of the values that it reads.
        output: Name of the value that it makes.
        attrs: Its settings; lists become tuples.
        tensors: Name of a tensor of the graph for each role.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attrs: Mapping[str, AttrValue] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: Mapping[str, Any] = self.attrs
        attrs = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "attrs", attrs)
        object.__setattr__(self, "tensors", dict(self.tensors))


def make_node(
    op: str,
    name: str,
    inputs: Iterable[str],
    output: str,
    attrs: Mapping[str, AttrValue] | None = None,
    tensors: Mapping[str, str] | None = None,
) -> Node:
    """Makes a node and fills in the attributes that have a default.

    Raises:
        GraphError: If there is no such operator.
    """
    return Node(op, name, tuple(inputs), output, op_spec(op).complete(attrs or {}), tensors or {})


@dataclass(frozen=True, eq=False)
class Graph:
    """A model: inputs, nodes in the order in which they run, tensors, outputs.

    Attributes:
        inputs: The values that a caller gives.
        outputs: Names of the values that a caller gets; each is made by a node.
        nodes: Operators in topological order.
        tensors: Arrays by name; a name may be used by several nodes (tied weights).
        metadata: Anything JSON can hold: recipe, seed, metrics, preprocess, classes, producer.
        golden: Example inputs and outputs, in the order of ``inputs`` and ``outputs``, or None.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    tensors: Mapping[str, Array] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    golden: Golden | None = None

    @cached_property
    def values(self) -> dict[str, Value]:
        """All values by name, checked once; raises GraphError like ``validate``."""
        return self.validate()

    def validate(self) -> dict[str, Value]:
        """Checks every rule and infers every shape.

        Returns:
            All values by name, in the order in which they come to exist.

        Raises:
            GraphError: On the first rule that is broken.
        """
        self._check_tensors()
        values: dict[str, Value] = {}
        for value in self.inputs:
            _check_new_name("input", value.name, values)
            _check_value(value)
            values[value.name] = value
        names: set[str] = set()
        used: set[str] = set()
        for node in self.nodes:
            _check_new_name("node", node.name, names)
            _check_new_name("value", node.output, values)
            names.add(node.name)
            used.update(node.tensors.values())
            values[node.output] = self._infer(node, values)
        unused = sorted(set(self.tensors) - used)
        if unused:
            raise GraphError(f"no node uses the tensors {_listed(unused)}; remove them")
        self._check_ends(values)
        self._check_metadata()
        if self.golden is not None:
            self._check_golden(self.golden, values)
        return values

    def node_tensors(self, node: Node) -> dict[str, Array]:
        """The arrays of a node by role; tables are built where the graph holds their factors.

        Raises:
            GraphError: If the node names a tensor that the graph does not have, or factors that
                make no tables.
        """
        known = self._expanded.get(node.name)
        if known is not None and known[0] is node:
            return dict(known[1])
        for role, name in node.tensors.items():
            if name not in self.tensors:
                raise GraphError(
                    f"node {node.name!r} ({node.op}) names the tensor {name!r} as its {role}, "
                    "which the graph does not have; add it to tensors"
                )
        stored = {role: self.tensors[name] for role, name in node.tensors.items()}
        tensors = op_spec(node.op, f"node {node.name!r}").expanded(node, stored)
        if tensors.keys() != stored.keys():
            self._expanded[node.name] = (node, tensors)
        return tensors

    @cached_property
    def _expanded(self) -> dict[str, tuple[Node, dict[str, Array]]]:
        """Nodes whose tensors were built, and these tensors; filled by ``node_tensors``."""
        return {}

    def cost(self) -> dict[str, Cost]:
        """Work and bytes of every node for one sample, by node name."""
        values = self.values
        result: dict[str, Cost] = {}
        for node in self.nodes:
            arrays = self.node_tensors(node)
            inputs = [values[name] for name in node.inputs]
            cost = OPS[node.op].cost(node, inputs, values[node.output], arrays)
            size = sum(self.tensors[tensor].nbytes for tensor in node.tensors.values())
            result[node.name] = replace(cost, weight_bytes=size)
        return result

    def total_cost(self) -> Cost:
        """Sum of the costs of all nodes; tied tensors count once for each node."""
        return sum(self.cost().values(), Cost())

    def parameter_bytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        return sum(array.nbytes for array in self.tensors.values())

    def __str__(self) -> str:
        """A table of the nodes with shapes, bytes, lookups and multiply-adds per sample."""
        rows: list[tuple[str, ...]] = [("node", "op", "output shape", "bytes", "lookups", "macs")]
        costs = self.cost()
        for node in self.nodes:
            cost = costs[node.name]
            shape = _shape_text(self.values[node.output].shape)
            numbers = (f"{n:,}" for n in (cost.weight_bytes, cost.lookups, cost.macs))
            rows.append((node.name, node.op, shape, *numbers))
        total = self.total_cost()
        numbers = (f"{n:,}" for n in (self.parameter_bytes(), total.lookups, total.macs))
        rows.append(("total", "", "", *numbers))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = []
        for row in rows:
            cells = [
                text.ljust(width) if column < 3 else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        heads = ", ".join(f"{v.name} {_shape_text(v.shape)}" for v in self.inputs)
        tails = ", ".join(f"{n} {_shape_text(self.values[n].shape)}" for n in self.outputs)
        return "\n".join((f"inputs: {heads}", f"outputs: {tails}", *lines))

    def __repr__(self) -> str:
        return (
            f"Graph({len(self.nodes)} nodes, inputs {[v.name for v in self.inputs]}, "
            f"outputs {list(self.outputs)}, {self.parameter_bytes():,} bytes)"
        )

    def _infer(self, node: Node, values: Mapping[str, Value]) -> Value:
        spec = op_spec(node.op, f"node {node.name!r}")
        for name in node.inputs:
            if name not in values:
                raise GraphError(
                    f"node {node.name!r} ({node.op}) reads the value {name!r}, which no input and "
                    "no earlier node makes; order the nodes so that values exist before their use"
                )
        tensors = self.node_tensors(node)
        spec.check_node(node, tensors)
        value = spec.infer(node, [values[name] for name in node.inputs], tensors)
        _check_value(value)
        return value

    def _check_tensors(self) -> None:
        for name, array in self.tensors.items():
            _check_name("tensor", name)
            if name.startswith(RESERVED_PREFIX):
                raise GraphError(
                    f"tensor {name!r} begins with {RESERVED_PREFIX!r}, which is kept for golden "
                    "data; give it another name"
                )
            _check_array(f"tensor {name!r}", array, TENSOR_DTYPES)

    def _check_ends(self, values: Mapping[str, Value]) -> None:
        if not self.inputs:
            raise GraphError("the graph has no inputs; give it at least one")
        if not self.outputs:
            raise GraphError("the graph has no outputs; give it at least one")
        if len(set(self.outputs)) != len(self.outputs):
            raise GraphError(f"the outputs {list(self.outputs)} repeat a name; name each once")
        made = {node.output for node in self.nodes}
        for name in self.outputs:
            if name not in made:
                kind = "is an input" if name in values else "does not exist"
                raise GraphError(f"the output {name!r} {kind}; an output must be made by a node")

    def _check_metadata(self) -> None:
        try:
            json.dumps(dict(self.metadata), allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise GraphError(
                f"the metadata cannot be written as JSON ({error}); "
                "use only str, finite numbers, bool, None, lists and dicts"
            ) from error

    def _check_golden(self, golden: Golden, values: Mapping[str, Value]) -> None:
        inputs, outputs = golden
        ends = ([v.name for v in self.inputs], list(self.outputs))
        batch: int | None = None
        for kind, names, arrays in zip(("input", "output"), ends, (inputs, outputs), strict=True):
            if len(names) != len(arrays):
                raise GraphError(
                    f"the golden data have {len(arrays)} {kind}s for a graph with {len(names)}; "
                    f"give one array for each {kind}"
                )
            for name, array in zip(names, arrays, strict=True):
                where = f"golden {kind} {name!r}"
                _check_array(where, array, ("float32",))
                want = values[name].shape
                if want[0] is None and array.ndim:
                    batch = array.shape[0] if batch is None else batch
                    want = (batch, *want[1:])
                if array.shape != want:
                    raise GraphError(f"{where} has shape {array.shape}; it must be {want}")


def _check_name(kind: str, name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        shown = repr(name)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise GraphError(f"{kind} has the name {shown}; use 1 to {_MAX_NAME} printable characters")


def _check_new_name(kind: str, name: str, taken: Iterable[str]) -> None:
    _check_name(kind, name)
    if name in taken:
        raise GraphError(f"two {kind}s have the name {name!r}; names must be unique")


def _check_value(value: Value) -> None:
    where = f"value {value.name!r}"
    if value.dtype != "float32":
        raise GraphError(f"{where} has dtype {value.dtype!r}; only float32 values are supported")
    if not 1 <= len(value.shape) <= _MAX_RANK:
        raise GraphError(f"{where} has {len(value.shape)} axes; values have 1 to {_MAX_RANK} axes")
    for axis, size in enumerate(value.shape):
        if size is None and axis == 0:
            continue
        if type(size) is not int or size < 1:
            raise GraphError(
                f"{where} has shape {value.shape}; every axis must be an int of at least 1, "
                "and axis 0 may be None"
            )
    if math.prod(size for size in value.shape if size is not None) > _MAX_ELEMENTS:
        raise GraphError(
            f"{where} has shape {value.shape}; one sample may hold {_MAX_ELEMENTS} elements"
        )


def _check_array(where: str, array: object, dtypes: tuple[str, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise GraphError(f"{where} is a {type(array).__name__}; give a numpy array")
    if array.dtype.name not in dtypes or not array.dtype.isnative:
        raise GraphError(
            f"{where} has dtype {array.dtype.str}; it must be {' or '.join(dtypes)} "
            "in native byte order"
        )
    if array.size == 0 or not 1 <= array.ndim <= _MAX_RANK:
        raise GraphError(
            f"{where} has shape {array.shape}; it must have 1 to {_MAX_RANK} axes, none empty"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = array.size - int(np.isfinite(array).sum())
        raise GraphError(f"{where} holds {bad} values that are NaN or infinite; remove them")


def _listed(names: list[str], most: int = 5) -> str:
    text = ", ".join(repr(name) for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def _shape_text(shape: Shape) -> str:
    return "(" + ", ".join("N" if size is None else str(size) for size in shape) + ")"

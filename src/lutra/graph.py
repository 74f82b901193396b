"""The graph: what a model computes, with nothing of how.

Frozen dataclasses that know nothing of PyTorch, of files or of the engine. A graph is made by the
exporter or by the loader, checked by ``Graph.validate`` and read by everybody else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np

from lutra.errors import GraphError
from lutra.formatting import shape_text
from lutra.node import Array, AttrValue, Node, Shape, Value
from lutra.ops import OPS, op_spec
from lutra.ops.limits import MAX_ELEMENTS, MAX_NAME, MAX_RANK
from lutra.ops.spec import Cost

__all__ = [
    "AttrValue",
    "Cost",
    "Golden",
    "Graph",
    "Node",
    "Shape",
    "Sizes",
    "Value",
    "fits",
    "make_node",
    "sized",
]

#: Shapes of arrays by value name.
Sizes: TypeAlias = Mapping[str, Sequence[int]]
#: Example inputs and the outputs that belong to them.
Golden: TypeAlias = tuple[tuple[Array, ...], tuple[Array, ...]]

#: Names of tensors that begin like this belong to the golden data of the file.
RESERVED_PREFIX: Final = "golden."
TENSOR_DTYPES: Final = ("float32", "int32", "int8", "uint8")
#: Values are float32; inputs may be int32, token ids and masks.
VALUE_DTYPES: Final = ("float32", "int32")


def sized(shape: Shape, batch: int) -> tuple[int, ...]:
    """A shape with a batch in the place of None on axis 0; no other axis may be None."""
    sizes = shape if shape[0] is not None else (batch, *shape[1:])
    if None in sizes:
        raise ValueError(f"the shape {shape} has a size that is not known")
    return tuple(size for size in sizes if size is not None)


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
    def is_dynamic(self) -> bool:
        """Whether samples may have different sizes: an input has a dynamic axis besides axis 0."""
        return any(value.is_dynamic for value in self.inputs)

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

    def infer(self, sizes: Sizes) -> dict[str, Value]:
        """The values of one run: those of a valid graph with all sizes known.

        Args:
            sizes: Shapes of the inputs by name.

        Returns:
            All values by name, none of them with a dynamic axis.

        Raises:
            GraphError: If a shape does not fit its input, or an operator cannot work on the sizes
                that come to it, with the node, the value and its shape.
        """
        return self._infer_run(self.values, sizes)

    def _infer_run(self, known: Mapping[str, Value], sizes: Sizes) -> dict[str, Value]:
        """The same with the values of the graph, which may be dynamic."""
        values: dict[str, Value] = {}
        batch: int | None = None
        for value in self.inputs:
            if value.name not in sizes:
                raise GraphError(f"the input {value.name!r} has no shape; give one for each input")
            shape = tuple(sizes[value.name])
            wanted = value.shape if batch is None else (value.shape[0] or batch, *value.shape[1:])
            if len(shape) != len(wanted) or any(
                size < 1 or want not in (None, size)
                for size, want in zip(shape, wanted, strict=True)
            ):
                raise GraphError(
                    f"the input {value.name!r} takes {shape_text(wanted)} and not "
                    f"{shape_text(shape)}"
                )
            if value.shape[0] is None:
                batch = shape[0]
            values[value.name] = value.with_shape(value.name, shape)
        for node in self.nodes:
            inputs = [values[name] for name in node.inputs]
            spec = OPS[node.op]
            spec.check_sizes(node, [known[name] for name in node.inputs], inputs)
            made = spec.infer(node, inputs, self.node_tensors(node))
            if math.prod(size for size in made.shape[1:] if size is not None) > MAX_ELEMENTS:
                raise GraphError(
                    f"node {node.name!r} ({node.op}) makes the value {made.name!r} of shape "
                    f"{made.shape}; one sample may hold {MAX_ELEMENTS} elements"
                )
            values[node.output] = made
        return values

    def nominal_sizes(self, batch: int = 1) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the inputs for a look at the cost or speed.

        Args:
            batch: Samples, where the batch is dynamic.

        Returns:
            Shapes by input name: those of the golden data where samples may have different sizes;
            None if there are no golden data then.
        """
        shapes = [value.shape for value in self.inputs]
        if self.is_dynamic:
            if self.golden is None:
                return None
            shapes = [
                (shape[0], *array.shape[1:])
                for shape, array in zip(shapes, self.golden[0], strict=True)
            ]
        return {
            value.name: sized(shape, batch)
            for value, shape in zip(self.inputs, shapes, strict=True)
        }

    def node_tensors(self, node: Node) -> dict[str, Array]:
        """The arrays of a node by role; tables are built where the graph holds compact ones.

        Raises:
            GraphError: If the node names a tensor that the graph does not have, or compact tables
                that make no tables.
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

    @property
    def no_golden(self) -> str:
        """Why there are no golden data, as the exporter noted it; empty where it noted nothing."""
        entry = self.metadata.get("golden")
        reason = entry.get("reason") if isinstance(entry, Mapping) else None
        return reason if self.golden is None and isinstance(reason, str) else ""

    def cost(self, sizes: Sizes | None = None) -> dict[str, Cost]:
        """Work and bytes of every node for one sample, by node name.

        Of layers that make the same codes of the same value, the first has the work of that.

        Args:
            sizes: Shapes of the inputs by name; by default ``nominal_sizes``.

        Raises:
            GraphError: If the graph is not valid, if the shapes do not fit it, or if the cost
                depends on sizes and none are given.
        """
        values = self.values
        if sizes is None and self.is_dynamic:
            sizes = self.nominal_sizes()
            if sizes is None:
                names = [value.name for value in self.inputs if value.is_dynamic]
                raise GraphError(
                    f"the work depends on the size of {_listed(names)}, which is known at run time "
                    "only; give sizes={name: shape}"
                )
        return self._cost(values if sizes is None else self.infer(sizes))

    def unit_cost(self) -> dict[str, Cost]:
        """The same with a size of 1 for every axis whose size is known at run time only.

        It tells what depends on no size: bytes, and which nodes look up.
        """
        ones = {
            name: value.with_shape(name, tuple(size or 1 for size in value.shape))
            for name, value in self.values.items()
        }
        return self._cost(ones)

    def _cost(self, values: Mapping[str, Value]) -> dict[str, Cost]:
        result: dict[str, Cost] = {}
        encoders: list[tuple[Node, dict[str, Array]]] = []
        for node in self.nodes:
            arrays = self.node_tensors(node)
            inputs = [values[name] for name in node.inputs]
            cost = OPS[node.op].cost(node, inputs, values[node.output], arrays)
            if cost.encode_ops:
                if any(same_codes(node, arrays, *other) for other in encoders):
                    cost = replace(cost, encode_ops=0, comparisons=0, quantised=0)
                else:
                    encoders.append((node, arrays))
            size = sum(self.tensors[tensor].nbytes for tensor in node.tensors.values())
            result[node.name] = replace(cost, weight_bytes=size)
        return result

    def total_cost(self, sizes: Sizes | None = None) -> Cost:
        """Sum of the costs of all nodes, see ``cost``; tied tensors count once for each node."""
        return sum(self.cost(sizes).values(), Cost())

    def parameter_bytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        return sum(array.nbytes for array in self.tensors.values())

    def __str__(self) -> str:
        """A table of the nodes with shapes, bytes, lookups and multiply-adds per sample.

        Where they depend on sizes that are known at run time only, they are those of the golden
        data, or left out where there are none.
        """
        rows: list[tuple[str, ...]] = [("node", "op", "output shape", "bytes", "lookups", "macs")]
        sizes = self.nominal_sizes()
        costs = None if sizes is None else self.cost(sizes)

        def numbers(size: int, cost: Cost | None) -> tuple[str, ...]:
            work = ("?", "?") if cost is None else (f"{cost.lookups:,}", f"{cost.macs:,}")
            return (f"{size:,}", *work)

        for node in self.nodes:
            cost = None if costs is None else costs[node.name]
            size = sum(self.tensors[tensor].nbytes for tensor in node.tensors.values())
            shape = shape_text(self.values[node.output].shape)
            rows.append((node.name, node.op, shape, *numbers(size, cost)))
        total = None if costs is None else sum(costs.values(), Cost())
        rows.append(("total", "", "", *numbers(self.parameter_bytes(), total)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = []
        for row in rows:
            cells = [
                text.ljust(width) if column < 3 else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        dtypes = {v.name: "" if v.dtype == "float32" else f"{v.dtype} " for v in self.inputs}
        heads = ", ".join(f"{v.name} {dtypes[v.name]}{shape_text(v.shape)}" for v in self.inputs)
        tails = ", ".join(f"{n} {shape_text(self.values[n].shape)}" for n in self.outputs)
        if self.is_dynamic and sizes is not None:
            lines.append(f"work for {', '.join(f'{n} {shape_text(s)}' for n, s in sizes.items())}")
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
        inputs = [values[name] for name in node.inputs]
        spec.check_node(node, tensors)
        spec.check_inputs(node, inputs)
        value = spec.infer(node, inputs, tensors)
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
        shapes: dict[str, Shape] = {name: value.shape for name, value in values.items()}
        batch: int | None = None
        for kind, names, arrays in zip(("input", "output"), ends, (inputs, outputs), strict=True):
            if len(names) != len(arrays):
                raise GraphError(
                    f"the golden data have {len(arrays)} {kind}s for a graph with {len(names)}; "
                    f"give one array for each {kind}"
                )
            for name, array in zip(names, arrays, strict=True):
                where = f"golden {kind} {name!r}"
                _check_array(where, array, (values[name].dtype,))
                want = shapes[name]
                if want[0] is None and array.ndim:
                    batch = array.shape[0] if batch is None else batch
                    want = (batch, *want[1:])
                if not fits(array.shape, want):
                    raise GraphError(
                        f"{where} has shape {array.shape}; it must be {shape_text(want)}"
                    )
            if kind == "input" and self.is_dynamic:
                given = {name: x.shape for name, x in zip(names, arrays, strict=True)}
                try:
                    shapes = {
                        name: value.shape for name, value in self._infer_run(values, given).items()
                    }
                except GraphError as error:
                    raise GraphError(f"the golden inputs do not fit: {error}") from error


def same_codes(
    node: Node, tensors: Mapping[str, Array], other: Node, others: Mapping[str, Array]
) -> bool:
    """Whether two lookup layers make the same codes: what they read and encode with is equal."""
    if (node.op, node.inputs, node.attrs) != (other.op, other.inputs, other.attrs):
        return False
    pairs = [(tensors.get(role), others.get(role)) for role in OPS[node.op].encoder_roles]
    return all(
        a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs
    )


def _check_name(kind: str, name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        shown = repr(name)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise GraphError(f"{kind} has the name {shown}; use 1 to {MAX_NAME} printable characters")


def _check_new_name(kind: str, name: str, taken: Iterable[str]) -> None:
    _check_name(kind, name)
    if name in taken:
        raise GraphError(f"two {kind}s have the name {name!r}; names must be unique")


def _check_value(value: Value) -> None:
    where = f"value {value.name!r}"
    if value.dtype not in VALUE_DTYPES:
        raise GraphError(
            f"{where} has dtype {value.dtype!r}; values are float32, inputs also int32"
        )
    if not 1 <= len(value.shape) <= MAX_RANK:
        raise GraphError(f"{where} has {len(value.shape)} axes; values have 1 to {MAX_RANK} axes")
    if any(size is not None and (type(size) is not int or size < 1) for size in value.shape):
        raise GraphError(
            f"{where} has shape {value.shape}; every axis must be an int of at least 1, or None "
            "for any size"
        )
    if math.prod(size for size in value.shape if size is not None) > MAX_ELEMENTS:
        raise GraphError(
            f"{where} has shape {value.shape}; one sample may hold {MAX_ELEMENTS} elements"
        )


def _check_array(where: str, array: object, dtypes: tuple[str, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise GraphError(f"{where} is a {type(array).__name__}; give a numpy array")
    if array.dtype.name not in dtypes or not array.dtype.isnative:
        raise GraphError(
            f"{where} has dtype {array.dtype.str}; it must be {' or '.join(dtypes)} "
            "in native byte order"
        )
    if array.size == 0 or not 1 <= array.ndim <= MAX_RANK:
        raise GraphError(
            f"{where} has shape {array.shape}; it must have 1 to {MAX_RANK} axes, none empty"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = array.size - int(np.isfinite(array).sum())
        raise GraphError(f"{where} holds {bad} values that are NaN or infinite; remove them")


def _listed(names: list[str], most: int = 5) -> str:
    text = ", ".join(repr(name) for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def fits(sizes: Sequence[int], shape: Shape) -> bool:
    """Whether an array of these sizes is one of that shape."""
    return len(sizes) == len(shape) and all(
        want in (None, size) for size, want in zip(sizes, shape, strict=True)
    )

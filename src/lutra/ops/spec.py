"""What an operator is: its attributes, its tensors, its output shape and its cost.

A family of operators is one file next to this one that lists its ``SPECS``. Nothing here runs
anything: ``lutra.reference`` says what an operator computes and the engine computes it fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Final, Literal, TypeAlias

import numpy as np

from lutra.errors import GraphError
from lutra.formatting import shape_text
from lutra.node import Array, AttrValue, Node, Value


class Required:
    """The type of ``REQUIRED``, the default of an attribute that has none."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = Required()


@dataclass(frozen=True)
class Cost:
    """Work of one node for one sample, and the bytes that it reads.

    What is neither here nor in the sums below: copies, clamps and comparisons of floats.

    Attributes:
        lookups: Table entries read and added.
        pieces: Values of functions that are read from a table: a slope, an intercept, and a
            multiply-add each.
        functions: Values of functions that are computed: exp, erf, tanh, roots and quotients. What
            they take in multiplications and additions is in ``float_muls`` and ``float_adds``.
        encode_ops: Spent on finding codes: multiply-adds, or comparisons of trees, or for distances
            without products two for each value: a difference, and a sum or a maximum.
        comparisons: Those of them that are no multiply-adds, all of bytes.
        macs: Multiply-adds of dense arithmetic that really run.
        int8_macs: Those of them that are of integers.
        quantised: Floats rounded to a grid, a multiplication and an addition each.
        scaled: Integer sums that become floats, a multiplication and an addition each.
        float_adds: Other additions of floats.
        float_muls: Other multiplications of floats.
        dense_macs: Multiply-adds that the same layer takes without tables.
        table_bytes: Bytes of the tables.
        weight_bytes: Bytes of all tensors that the graph holds for the node.
    """

    lookups: int = 0
    pieces: int = 0
    functions: int = 0
    encode_ops: int = 0
    comparisons: int = 0
    macs: int = 0
    int8_macs: int = 0
    quantised: int = 0
    scaled: int = 0
    float_adds: int = 0
    float_muls: int = 0
    dense_macs: int = 0
    table_bytes: int = 0
    weight_bytes: int = 0

    @property
    def table_reads(self) -> int:
        """Entries of tables that are read."""
        return self.lookups + 2 * self.pieces

    @property
    def int_multiplications(self) -> int:
        """Multiplications of integers that run."""
        return self.int8_macs + self.encode_ops - self.comparisons

    @property
    def int_additions(self) -> int:
        """Additions of integers that run."""
        return self.lookups + self.int_multiplications

    @property
    def float_multiplications(self) -> int:
        """Multiplications of floats that run."""
        return self._float_steps + self.float_muls

    @property
    def float_additions(self) -> int:
        """Additions of floats that run."""
        return self._float_steps + self.float_adds

    @property
    def _float_steps(self) -> int:
        return self.macs - self.int8_macs + self.quantised + self.scaled + self.pieces

    def __add__(self, other: Cost) -> Cost:
        names = (entry.name for entry in fields(self))
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class Attr:
    """One attribute of an operator.

    Attributes:
        kind: ``int``, ``float``, ``bool``, ``str`` or ``tuple`` (of ints); never a subclass.
        default: Value used where a node does not give one, or ``REQUIRED``.
        low: Smallest number allowed, for every entry of a tuple too.
        high: Largest number allowed, for every entry of a tuple too.
        length: Number of entries of a tuple; None for any.
        choices: Strings allowed; empty for any.
        since: The version of the file format that has it. Files of older versions have the default
            and do not name it.
    """

    kind: type
    default: AttrValue | Required = REQUIRED
    low: int | None = None
    high: int | None = None
    length: int | None = None
    choices: tuple[str, ...] = ()
    since: int = 1

    def complaint(self, value: object) -> str | None:
        """Says what is wrong with a value, or None when it is right."""
        if type(value) is not self.kind:
            wanted = "tuple of ints" if self.kind is tuple else self.kind.__name__
            return f"must be of type {wanted}"
        if isinstance(value, tuple):
            if self.length is not None and len(value) != self.length:
                return f"must have {self.length} entries"
            if any(type(entry) is not int for entry in value):
                return "must be a tuple of ints"
            numbers: Sequence[int | float] = value
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if isinstance(value, float) and not math.isfinite(value):
                return "must be finite"
            numbers = (value,)
        else:
            numbers = ()
        if self.low is not None and any(number < self.low for number in numbers):
            return f"must be at least {self.low}"
        if self.high is not None and any(number > self.high for number in numbers):
            return f"must be at most {self.high}"
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}"
        return None


@dataclass(frozen=True)
class TensorRole:
    """One tensor of an operator.

    Attributes:
        dtype: Its dtype, or several with ``|`` between them.
        ndim: Number of its axes.
        required: Whether a node must have it.
        since: The version of the file format that it came with.
    """

    dtype: str
    ndim: int
    required: bool = True
    since: int = 1

    @property
    def dtypes(self) -> list[str]:
        """The dtypes that it may have."""
        return self.dtype.split("|")


CheckFn: TypeAlias = "Callable[[Node, Mapping[str, Array]], None]"
InferFn: TypeAlias = "Callable[[Node, Sequence[Value], Mapping[str, Array]], Value]"
ExpandFn: TypeAlias = "Callable[[Node, Mapping[str, Array]], Mapping[str, Array]]"
SizesFn: TypeAlias = "Callable[[Node, Sequence[Value], Sequence[Value]], None]"
Example: TypeAlias = "tuple[dict[str, AttrValue], dict[str, Array]]"
ExamplesFn: TypeAlias = "Callable[[np.random.Generator, int], Sequence[Example]]"
CostFn: TypeAlias = "Callable[[Node, Sequence[Value], Value, Mapping[str, Array]], Cost]"


def no_check(node: Node, tensors: Mapping[str, Array]) -> None:
    """The check of an operator whose attributes and tensors do not depend on each other."""


def no_check_sizes(node: Node, inputs: Sequence[Value], sized: Sequence[Value]) -> None:
    """The check of an operator whose ``infer`` finds all that can be wrong with sizes."""


def no_cost(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    """The cost of an operator that neither computes nor looks up."""
    return Cost()


@dataclass(frozen=True)
class OpSpec:
    """The rules of one operator.

    Attributes:
        name: Name of the operator, as it stands in files.
        infer: ``infer(node, inputs, tensors)`` gives the output value, or raises GraphError.
            ``tensors`` maps role to array, here and below.
        attrs: Attributes by name.
        tensors: Tensors by role.
        check: ``check(node, tensors)`` raises GraphError where tensors and attributes disagree.
        cost: ``cost(node, inputs, output, tensors)`` gives the work for one sample.
        expand: ``expand(node, tensors)`` gives ``tensors`` from what a graph holds in their place;
            None where both are the same.
        min_inputs: Smallest number of inputs.
        max_inputs: Largest number of inputs; None for any.
        check_sizes: ``check_sizes(node, inputs, sized)`` raises GraphError where the inputs of one
            run, ``sized``, are not what ``inputs``, which may be dynamic, promised.
        dtypes: The dtype of each input, or several with ``|`` between them; those that are not
            named are float32. The output always is.
        places: The inputs that are places in a sequence, counted from 0; in self tests they are 0.
        remembers: Whether a run with a cache continues what earlier runs with it left.
        since: The version of the file format that the operator came with.
        output_axis: The axis of the output that holds the outputs of a layer: 1 for images, -1 for
            rows; None for operators that are no layer.
        fuses: Whether the step of the engine can add a value and clamp while it writes.
        takes_pad: How the step of the engine takes over a ``pad`` of rows and columns in front of
            it: as its own "padding", which has its own value, as a "border" of any value, or not
            (None).
        reads_planes: How many inputs, from the first on, the step can read as planes of a larger
            value where they are.
        is_table_layer: Whether products of activations and weights are read from tables.
        encoder_roles: The tensors that make codes; layers that read the same value and have equal
            ones share their codes.
        output_roles: The tensors whose last axis has one entry for each output, of layers that can
            share codes.
        table_role: The tensor of tables that compact tables can replace, see
            ``lutra.ops.compact_tables``.
        gain_role: The tensor whose axis 0 a gain for each output can be multiplied into.
        bias_role: The tensor that a shift for each output can be added to.
        exact_floats: Whether the reference executor computes floats with the bits of the engine.
        examples: ``examples(rng, inputs)`` gives attributes and tensors of small layers that take
            so many channels or features, for self tests.
    """

    name: str
    infer: InferFn
    attrs: Mapping[str, Attr] = field(default_factory=dict)
    tensors: Mapping[str, TensorRole] = field(default_factory=dict)
    check: CheckFn = no_check
    cost: CostFn = no_cost
    expand: ExpandFn | None = None
    min_inputs: int = 1
    max_inputs: int | None = 1
    check_sizes: SizesFn = no_check_sizes
    dtypes: tuple[str, ...] = ()
    places: tuple[int, ...] = ()
    remembers: bool = False
    since: int = 1
    output_axis: int | None = None
    fuses: bool = False
    takes_pad: Literal["padding", "border"] | None = None
    reads_planes: int = 0
    is_table_layer: bool = False
    encoder_roles: tuple[str, ...] = ()
    output_roles: tuple[str, ...] = ()
    table_role: str | None = None
    gain_role: str | None = None
    bias_role: str | None = None
    exact_floats: bool = False
    examples: ExamplesFn | None = None

    @property
    def has_grid(self) -> bool:
        """Whether it computes with integers on an activation grid: the same bits everywhere."""
        return "act_scale" in self.attrs

    def complete(self, attrs: Mapping[str, AttrValue]) -> dict[str, AttrValue]:
        """Adds the default of every attribute that is not given."""
        result = dict(attrs)
        for name, attr in self.attrs.items():
            if name not in result and not isinstance(attr.default, Required):
                result[name] = attr.default
        return result

    def expanded(self, node: Node, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors that a node works with.

        Args:
            node: The node.
            tensors: Those that the graph holds for it, by role.

        Raises:
            GraphError: If they cannot be expanded.
        """
        if self.expand is None:
            return dict(tensors)
        self._check_attrs(node)
        return dict(self.expand(node, tensors))

    def check_node(self, node: Node, tensors: Mapping[str, Array]) -> None:
        """Checks inputs, attributes and tensors of a node, but not the shapes of its inputs.

        Args:
            node: The node.
            tensors: Its tensors by role.

        Raises:
            GraphError: If one of them is missing, unknown, of the wrong type or out of range.
        """
        count = len(node.inputs)
        if count < self.min_inputs or (self.max_inputs is not None and count > self.max_inputs):
            least = "at least " if self.max_inputs is None else ""
            most = "" if self.max_inputs in (None, self.min_inputs) else f" to {self.max_inputs}"
            raise node_error(node, f"has {count} inputs", f"give it {least}{self.min_inputs}{most}")
        self._check_attrs(node)
        self._check_tensors(node, tensors)
        self.check(node, tensors)

    def check_inputs(self, node: Node, inputs: Sequence[Value]) -> None:
        """Checks the dtypes of the inputs of a node, whose number is right.

        Raises:
            GraphError: If an input has another dtype than the operator reads there.
        """
        for index, value in enumerate(inputs):
            wanted = self.dtypes[index] if index < len(self.dtypes) else "float32"
            if value.dtype not in wanted.split("|"):
                fix = "'cast' makes floats of it" if wanted == "float32" else "only inputs of the "
                fix += "" if wanted == "float32" else "graph have it"
                raise node_error(
                    node,
                    f"reads {value.name!r} of dtype {value.dtype} as its input {index}",
                    f"it must be {wanted}: {fix}",
                )

    def _check_attrs(self, node: Node) -> None:
        for name in node.attrs:
            if name not in self.attrs:
                known = ", ".join(self.attrs) or "none"
                raise node_error(node, f"has the unknown attribute {name!r}", f"known: {known}")
        for name, attr in self.attrs.items():
            if name not in node.attrs:
                raise node_error(node, f"lacks the attribute {name!r}", "add it")
            problem = attr.complaint(node.attrs[name])
            if problem:
                shown = repr(node.attrs[name])
                shown = shown if len(shown) <= 80 else shown[:77] + "..."
                raise node_error(node, f"has {name}={shown}", f"it {problem}")

    def _check_tensors(self, node: Node, tensors: Mapping[str, Array]) -> None:
        for role in tensors:
            if role not in self.tensors:
                known = ", ".join(self.tensors) or "none"
                raise node_error(node, f"has the unknown tensor {role!r}", f"known: {known}")
        for role, rule in self.tensors.items():
            if role not in tensors:
                if rule.required:
                    raise node_error(node, f"lacks the tensor {role!r}", "add it")
                continue
            array = tensors[role]
            known_dtype = array.dtype.name in rule.dtypes
            if not known_dtype or array.ndim != rule.ndim or array.size == 0:
                raise node_error(
                    node,
                    f"has {role} of dtype {array.dtype} and shape {array.shape}",
                    f"it must be {' or '.join(rule.dtypes)} with {rule.ndim} axes, none of them "
                    "empty",
                )


def node_error(node: Node, what: str, fix: str) -> GraphError:
    """A GraphError that names the node: what is wrong, and what to do."""
    return GraphError(f"node {node.name!r} ({node.op}) {what}; {fix}")


def inner(value: Value) -> tuple[int, ...]:
    """The sizes of all axes but the first, all of them known.

    Raises:
        GraphError: If one is dynamic.
    """
    sizes = tuple(size for size in value.shape[1:] if size is not None)
    if len(sizes) != len(value.shape) - 1:
        raise GraphError(
            f"value {value.name!r} has the shape {shape_text(value.shape)}, but the sizes of its "
            "axes must be known here; give the shapes of the inputs"
        )
    return sizes


def need_size(node: Node, value: Value, axis: int) -> int:
    """The size of an axis on which the operator cannot do without one.

    Raises:
        GraphError: If it is dynamic.
    """
    size = value.shape[axis]
    if size is None:
        raise node_error(
            node,
            f"needs the size of axis {axis % len(value.shape)} of its input {value.name!r}, whose "
            f"shape {shape_text(value.shape)} is known at run time only",
            "fix that axis of the model's input, or pool over it first",
        )
    return size


def image_sizes(node: Node, value: Value) -> tuple[int, int | None, int | None]:
    """Channels, height and width of images (N, C, H, W), of which H and W may be dynamic."""
    need_rank(node, value, 4, 4)
    return need_size(node, value, 1), value.shape[2], value.shape[3]


def pair(node: Node, name: str) -> tuple[int, int]:
    """An attribute of two ints."""
    value = node.attrs[name]
    assert isinstance(value, tuple)  # check_node saw to it, here and below
    first, second = value
    return first, second


def ints(node: Node, name: str) -> tuple[int, ...]:
    """An attribute that is a tuple of ints."""
    value = node.attrs[name]
    assert isinstance(value, tuple)
    return value


def integer(node: Node, name: str) -> int:
    """An attribute that is an int."""
    value = node.attrs[name]
    assert isinstance(value, int)
    return value


def number(node: Node, name: str) -> float:
    """An attribute that is a float."""
    value = node.attrs[name]
    assert isinstance(value, float)
    return value


def text(node: Node, name: str) -> str:
    """An attribute that is a string."""
    value = node.attrs[name]
    assert isinstance(value, str)
    return value


def flag(node: Node, name: str) -> bool:
    """An attribute that is a bool."""
    value = node.attrs[name]
    assert isinstance(value, bool)
    return value


def need_rank(node: Node, value: Value, low: int, high: int | None = None) -> None:
    """Raises GraphError unless the value has between ``low`` and ``high`` axes."""
    rank = len(value.shape)
    if rank < low or (high is not None and rank > high):
        wanted = f"{low}" if high == low else f"at least {low}" if high is None else f"{low}-{high}"
        raise node_error(
            node,
            f"takes the input {value.name!r} of shape {value.shape}",
            f"it must have {wanted} axes",
        )


def need_axis(node: Node, value: Value, name: str, axis: int) -> None:
    """Raises GraphError unless the value has that axis."""
    if not 1 <= axis < len(value.shape):
        raise node_error(
            node,
            f"has {name}={axis} for the input {value.name!r} of shape {value.shape}",
            f"it must be in 1..{len(value.shape) - 1}",
        )


def window_sizes(node: Node, x: Value, kernel: Sequence[int]) -> tuple[int | None, int | None]:
    """Height and width of what a convolution makes of images; None where theirs is dynamic.

    Args:
        node: It has the attributes ``stride``, ``padding`` and ``dilation``.
        x: The images (N, C, H, W).
        kernel: Rows and columns of the kernel.

    Raises:
        GraphError: If the kernel does not fit into the padded images even once.
    """
    sizes: list[int | None] = []
    for axis in range(2):
        size, padding = x.shape[axis + 2], pair(node, "padding")[axis]
        span = pair(node, "dilation")[axis] * (kernel[axis] - 1) + 1
        if size is None:
            sizes.append(None)
            continue
        # a size may be a symbol of PyTorch, which must be computed with and not compared
        if isinstance(size, int) and span > size + 2 * padding:
            raise node_error(
                node,
                f"slides a kernel that spans {span} over an axis of {size} plus 2*{padding} "
                f"padding of its input {x.name!r} of shape {x.shape}",
                "use a larger input or a smaller kernel",
            )
        sizes.append((size + 2 * padding - span) // pair(node, "stride")[axis] + 1)
    height, width = sizes
    return height, width

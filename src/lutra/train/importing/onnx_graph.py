"""From the graph of an ONNX file to a module, node by node."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lutra.errors import UnsupportedModelError
from lutra.train.importing.builder import Builder, Refusal, Value, identifier
from lutra.train.importing.onnx_file import OnnxModel, as_tensor, attributes, in_order, outer_names
from lutra.train.importing.onnx_ops import OPS, Op

#: What PyTorch raises about arguments that it does not take.
_RAISED = (
    ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, MemoryError,
    NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
#: Endings of weights of modules: what is in front of them names the module.
_WEIGHT = re.compile(r"(?:[._/:-](?:weight|kernel|gamma|W|w|weights?_\d+))(?:[:_]\d+)?$")
_DOMAINS = ("", "ai.onnx")
_SHOWN = 8  # nodes of an unsupported operator


@dataclass(frozen=True)
class Failed:
    """What could not be imported, or depends on it."""


@dataclass
class Imported:
    """A module and what is known of it.

    Attributes:
        module: It takes the inputs in the order of `arguments`.
        values: Name in the file of what a node of the module computes.
        ranges: The range of the integers that a value of a quantised file is rounded to.
        is_quantized: Whether the file computes with integers what the module computes in float.
        moved: Outputs whose batch was moved to the front, and the axis that it was on.
    """

    module: fx.GraphModule
    values: dict[str, str]
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    is_quantized: bool = False
    moved: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Argument:
    """An input as it is imported.

    Attributes:
        name: In the file.
        dtype: Of the tensor.
        shape: In the file's order of axes, with an example for sizes that are not fixed.
        dynamic: The axes whose size is not fixed.
        batch_axis: Where the batch is in the file. In the module it is in front.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    dynamic: tuple[int, ...]
    batch_axis: int = 0


def unsupported(model: OnnxModel, nodes: Sequence[Any]) -> list[str]:
    """Operators that are not in the table, a line for each with its nodes."""
    found: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        key = (_domain(node), node.op_type)
        if key not in OPS:
            found.setdefault(key, []).append(node.name or "/".join(node.output))
    lines = []
    for (domain, kind), names in sorted(found.items()):
        shown = ", ".join(map(repr, names[:_SHOWN]))
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(f"{domain + '.' if domain else ''}{kind} (nodes {shown}{more})")
    return lines


def _domain(node: Any) -> str:
    return "" if node.domain in _DOMAINS else node.domain


class Import:
    """One import: the builder, and what every value of the file became."""

    def __init__(
        self, model: OnnxModel, arguments: Sequence[Argument], constants: Mapping[str, Tensor],
        one_sample: bool,
    ) -> None:  # fmt: skip
        self.builder = Builder()
        self.is_quantized = False
        self.one_sample: Any = None
        self._model = model
        self._values: dict[str, Any] = {}
        self._origins: dict[str, str] = {}
        self._ranges: dict[str, tuple[float, float]] = {}
        self._failures: list[str] = []
        self._inside: dict[str, str] = {}  # a bias that is part of a product: output -> product
        self._uses: Counter[str] = Counter()
        self._readers: dict[str, Any] = {}
        self._batch: Any = None
        for name, tensor in constants.items():
            self._values[name] = tensor
            self.builder.name_constant(tensor, name)
        for argument in arguments:
            try:
                self._bind(argument)
            except Refusal as reason:
                raise UnsupportedModelError(f"{model.where}: {reason}") from reason
        self.one_sample = self._batch if one_sample else None

    def _bind(self, argument: Argument) -> None:
        at, shape = argument.batch_axis, list(argument.shape)
        dynamic = set(argument.dynamic)
        order = [at, *(i for i in range(len(shape)) if i != at)] if shape else []
        node = self.builder.input(
            argument.name,
            [shape[i] for i in order],
            [new for new, old in enumerate(order) if old in dynamic],
            argument.dtype,
        )
        if shape and at in dynamic and self._batch is None:
            self._batch = node.meta["val"].shape[0]
        value: Value = node
        if at:  # as the file has it
            back = [order.index(i) for i in range(len(shape))]
            with self.builder.named(f"{argument.name}_as_in_file"):
                value = self.builder.call(torch.permute, node, back)
        self._values[argument.name] = value
        if not at:
            self._origins[node.name] = argument.name

    # ---- what operators ask for -----------------------------------------------------------------

    def is_batch_axis(self, builder: Builder, x: Value, axis: int) -> bool:
        """Whether an axis is the batch, in a file that was made for one sample."""
        if self.one_sample is None or not isinstance(x, fx.Node):
            return False
        size = builder.example_shape(x)[axis]
        return isinstance(size, torch.SymInt) and size.node.expr == self.one_sample.node.expr

    def note_range(self, op: Op, span: tuple[float, float]) -> None:
        """Remembers what integers an operator rounds to."""
        self._ranges[op.outputs[0]] = span

    def bias_after(self, op: Op, size: int) -> Tensor | None:
        """The constant that is added to a product and to nothing else: its bias."""
        name = op.outputs[0]
        node = self._readers.get(name)
        if self._uses[name] != 1 or node is None or node.op_type != "Add" or len(node.input) != 2:
            return None
        other = self._values.get(node.input[1] if node.input[0] == name else node.input[0])
        if not isinstance(other, Tensor) or tuple(other.shape) != (size,):
            return None
        if not other.is_floating_point():
            return None
        self._inside[node.output[0]] = name
        return other

    def branch(self, graph: Any) -> Any:
        """The outputs of a branch that is imported in the place of its node."""
        self._add_tensors(graph)
        inner = [name for name in outer_names(graph) if name not in self._values]
        if inner:
            raise Refusal(f"its branch reads {inner}, which nothing makes")
        self._count(graph)
        self._run(graph, list(self._values))
        found = tuple(self._values[value.name] for value in graph.output)
        if any(isinstance(each, Failed) for each in found):
            raise _Known
        return found[0] if len(found) == 1 else found

    # ---- the walk -------------------------------------------------------------------------------

    def run(self) -> Imported:
        """Imports the whole file.

        Raises:
            UnsupportedModelError: What cannot be imported, all of it in one message.
            FormatError: The file is broken.
        """
        model, b = self._model, self.builder
        self._add_tensors(model.graph)
        self._count(model.graph)
        nodes = self._needed(in_order(model.graph.node, self._values, model.where))
        for name in model.outputs:
            if name not in self._values and not any(name in node.output for node in nodes):
                raise UnsupportedModelError(
                    f"{model.where}: no node makes the output {name!r}; the file is broken"
                )
        self._walk(nodes)
        if self._failures:
            raise _refusal(model.where, self._failures)
        outputs, moved = [], {}
        for name in model.outputs:
            value = self._values[name]
            value, axis = self._batch_first(value, name)
            if axis:
                moved[name] = axis
            outputs.append(value)
        outside: dict[str, str] = {}
        for node in nodes:
            for name in node.output:
                value = self._values.get(name)
                if isinstance(value, fx.Node) and name not in self._inside.values():
                    outside.setdefault(value.name, name)
        self._origins.update(outside)  # names inside of branches are not seen from outside
        return Imported(b.finish(outputs), self._origins, self._ranges, self.is_quantized, moved)

    def _run(self, graph: Any, known: Sequence[str]) -> None:
        self._walk(in_order(graph.node, known, self._model.where))

    def _walk(self, nodes: Sequence[Any]) -> None:
        for index, node in enumerate(nodes):
            made = self._convert(node, index)
            names = [name for name in node.output if name]
            if isinstance(made, Failed):
                self._values.update(dict.fromkeys(names, made))
                continue
            results = made if isinstance(made, tuple) else (made,)
            for position, name in enumerate(node.output):
                if name:
                    value = results[position] if position < len(results) else None
                    self._values[name] = Failed() if value is None else value
                    if value is None and self._uses[name]:
                        self._fail(
                            node, f"lutra does not make its output {position}, which is used"
                        )
                    elif isinstance(value, fx.Node) and name not in self._inside.values():
                        self._origins.setdefault(value.name, name)

    def _convert(self, node: Any, index: int) -> Any:
        if node.output and node.output[0] in self._inside:
            return self._values[self._inside[node.output[0]]]
        given = [self._values.get(name) if name else None for name in node.input]
        if any(isinstance(value, Failed) for value in given):
            return Failed()
        key = (_domain(node), node.op_type)
        if key not in OPS:
            return self._fail(node, "it is not in the table of operators")
        outputs = tuple(name if self._uses[name] else "" for name in node.output)
        outputs = (node.output[0], *outputs[1:]) if node.output else ()
        while given and given[-1] is None:
            given.pop()
        try:
            op = Op(
                node.op_type, node.name, attributes(node, self._model.where), self._model.opset,
                outputs, self._path(node, index), self,
            )  # fmt: skip
            _check_count(OPS[key], given)
            with self.builder.named(outputs[0] if outputs else node.op_type):
                return OPS[key](self.builder, op, *given)
        except _Known:
            return Failed()
        except Refusal as reason:
            return self._fail(node, str(reason))
        except _RAISED as error:
            return self._fail(node, _first_line(error))

    def _fail(self, node: Any, reason: str) -> Failed:
        name = node.name or "/".join(node.output)
        self._failures.append(f"{node.op_type} (node {name!r}): {reason}")
        return Failed()

    def _add_tensors(self, graph: Any) -> None:
        for tensor in graph.initializer:
            if tensor.name not in self._values:
                made = as_tensor(tensor, self._model.where)
                self.builder.name_constant(made, tensor.name)
                self._values[tensor.name] = made
        for sparse in graph.sparse_initializer:
            self._values[sparse.values.name] = Failed()
            self._failures.append(f"the tensor {sparse.values.name!r} is sparse; make it dense")

    def _count(self, graph: Any) -> None:
        for node in graph.node:
            for name in node.input:
                self._uses[name] += 1
                self._readers[name] = node
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    for name in outer_names(attribute.g):
                        self._uses[name] += 2
        for value in graph.output:
            self._uses[value.name] += 2

    def _needed(self, nodes: Sequence[Any]) -> list[Any]:
        """Those nodes that an output depends on."""
        wanted = set(self._model.outputs)
        kept = []
        for node in reversed(nodes):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted.update(node.input)
                for attribute in node.attribute:
                    if attribute.HasField("g"):
                        wanted |= outer_names(attribute.g)
        return kept[::-1]

    def _path(self, node: Any, index: int) -> str:
        """Where the module of a node belongs: the name of its weight says, or that of the node."""
        for name in node.input[1:2]:
            found = _WEIGHT.search(name)
            if found and not name.startswith("onnx::"):
                return _dotted(name[: found.start()])
        text = node.name.partition(";")[0]
        text = re.sub(rf"[/_.]{re.escape(node.op_type)}(_\d+)?$", "", text)
        return _dotted(text) if text.strip("/_.") else f"{node.op_type.lower()}_{index}"

    def _batch_first(self, value: Any, name: str) -> tuple[Any, int]:
        """An output with the batch in front, and the axis that it was on."""
        if not isinstance(value, fx.Node) or not isinstance(self._batch, torch.SymInt):
            return value, 0
        shape = self.builder.example_shape(value)
        here = [
            axis for axis, size in enumerate(shape)
            if isinstance(size, torch.SymInt) and size.node.expr == self._batch.node.expr
        ]  # fmt: skip
        if len(here) != 1 or here[0] == 0:
            return value, 0
        axis = here[0]
        order = [axis, *(i for i in range(len(shape)) if i != axis)]
        with self.builder.named(f"{name}_by_sample"):
            return self.builder.call(torch.permute, value, order), axis


def _check_count(entry: Callable[..., Any], given: Sequence[Any]) -> None:
    """Raises Refusal about inputs that an operator does not have, or lacks."""
    try:
        inspect.signature(entry).bind(None, None, *given)
    except TypeError as error:
        raise Refusal(f"it has {len(given)} inputs, which it does not take") from error
    parameters = list(inspect.signature(entry).parameters.values())[2:]
    for parameter, value in zip(parameters, given, strict=False):
        is_optional = "None" in str(parameter.annotation)
        if value is None and not is_optional:
            raise Refusal(f"it lacks its input {parameter.name}")


class _Known(Exception):
    """What fails is in the list of failures already."""


def _dotted(text: str) -> str:
    parts = [part for part in re.split(r"[./:]+", text) if part]
    return ".".join(identifier(part, digits=True) for part in parts) or "layer"


def _refusal(where: str, failures: Sequence[str]) -> UnsupportedModelError:
    lines = list(dict.fromkeys(failures))
    count = f"{len(lines)} of its operators" if len(lines) > 1 else "one of its operators"
    return UnsupportedModelError(
        f"{where} cannot be imported because of {count}: {'; '.join(lines)}", lines
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return f"PyTorch refuses it: {text[:240].rstrip('.')}"

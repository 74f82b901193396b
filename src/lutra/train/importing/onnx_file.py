"""Reads an ONNX file: everything that can be wrong with one is said here, in one sentence."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from lutra.errors import FormatError, InputError, LutraError
from lutra.train.importing.onnx_ops.registry import TORCH_DTYPES

#: The oldest operator set whose operators broadcast as the newer ones do.
OLDEST_OPSET: Final = 7
_TENSOR, _GRAPH = 4, 5  # onnx.AttributeProto.AttributeType
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class OnnxInput:
    """An input of a file.

    Attributes:
        name: In the file.
        dtype: In torch.
        shape: Numbers, names of sizes that differ from run to run, None for those without a name.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class OnnxModel:
    """A file that was read.

    Attributes:
        where: How errors call it.
        graph: `onnx.GraphProto`.
        opset: Version of the standard operators.
        inputs: Those that are no initialisers.
        outputs: Their names.
        proto: `onnx.ModelProto`.
    """

    where: str
    graph: Any
    opset: int
    inputs: tuple[OnnxInput, ...]
    outputs: tuple[str, ...]
    proto: Any


def onnx_package() -> Any:
    """The package `onnx`.

    Raises:
        LutraError: It is not installed.
    """
    try:
        return importlib.import_module("onnx")
    except ModuleNotFoundError as error:
        raise LutraError(
            "load_onnx needs the package onnx, which is not installed; install it with "
            "pip install 'lutra[onnx]'"
        ) from error


def read(source: str | os.PathLike[str] | Any) -> OnnxModel:
    """Reads a file, with the weights that lie in files beside it.

    Args:
        source: The path, or an `onnx.ModelProto`.

    Raises:
        FormatError: It is no ONNX file, or a broken one.
        InputError: There is no such file.
    """
    onnx = onnx_package()
    if isinstance(source, onnx.ModelProto):
        where, proto = "the model", source
    else:
        where = repr(os.fspath(source))
        if not Path(source).is_file():
            raise InputError(f"cannot read {where}: there is no such file; check the path")
        try:
            proto = onnx.load(os.fspath(source))
        except Exception as error:
            raise FormatError(
                f"cannot read {where} as ONNX: {_first_line(error)}; export or download it again"
            ) from error
    if not proto.HasField("graph") or not proto.graph.output:
        raise FormatError(
            f"{where} holds no ONNX model with outputs; give a file that torch.onnx.export or "
            "another exporter wrote"
        )
    _check_texts(proto, where)
    opset = _opset(proto, where)
    if proto.functions:
        try:
            inliner = importlib.import_module("onnx.inliner")
            proto = inliner.inline_local_functions(proto)
        except Exception as error:
            raise FormatError(
                f"{where} has functions of its own that cannot be inlined: {_first_line(error)}"
            ) from error
    graph = proto.graph
    known = {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    inputs = tuple(_input(value, where) for value in graph.input if value.name not in known)
    return OnnxModel(
        where, graph, opset, inputs, tuple(value.name for value in graph.output), proto
    )


def _check_texts(proto: Any, where: str) -> None:
    """Raises FormatError about names that are no text, which protobuf gives as bytes."""
    graph = proto.graph
    values = [*graph.input, *graph.output]
    texts: list[Any] = [each.name for each in (*values, *graph.initializer)]
    texts += [dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim]
    texts += [each.domain for each in proto.opset_import]
    for node in nodes_of(graph):
        texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
        for attribute in node.attribute:
            texts += [attribute.name, *(each.name for each in attribute.g.initializer)]
            texts += [each.name for each in (*attribute.g.input, *attribute.g.output)]
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    kinds = [f"{node.domain}.{node.op_type}" for node in nodes_of(graph)] if wrong is None else []
    wrong = next((text for text in kinds if not text.isprintable()), wrong)
    if wrong is not None:
        raise FormatError(f"{where}: the name {wrong!r} is no text; the file is broken")


def _opset(proto: Any, where: str) -> int:
    versions = [each.version for each in proto.opset_import if each.domain in _STANDARD]
    opset = int(max(versions, default=0))
    if opset < OLDEST_OPSET:
        raise FormatError(
            f"{where} is of operator set {opset}, and lutra reads {OLDEST_OPSET} and newer; "
            "convert it with onnx.version_converter.convert_version"
        )
    return opset


def _input(value: Any, where: str) -> OnnxInput:
    kind = value.type.WhichOneof("value")
    tensor = value.type.tensor_type
    if kind != "tensor_type" or tensor.elem_type not in TORCH_DTYPES:
        raise FormatError(
            f"{where}: the input {value.name!r} is no tensor of numbers or bool, but a "
            f"{kind or 'value without a type'}; lutra reads tensors only"
        )
    if not tensor.HasField("shape"):
        raise FormatError(
            f"{where}: the input {value.name!r} has no shape; give the number of its axes with "
            f"onnx.shape_inference or when it is exported"
        )
    shape: list[int | str | None] = []
    for dim in tensor.shape.dim:
        if dim.WhichOneof("value") == "dim_value" and dim.dim_value > 0:
            shape.append(int(dim.dim_value))
        else:
            shape.append(dim.dim_param or None)
    return OnnxInput(value.name, TORCH_DTYPES[tensor.elem_type], tuple(shape))


def as_tensor(proto: Any, where: str) -> Tensor:
    """The tensor in a `TensorProto`: floats are float32, as in the engine.

    Raises:
        FormatError: Its data are missing or do not fit its shape, or it holds no numbers.
    """
    onnx = onnx_package()
    if proto.data_type not in (*TORCH_DTYPES, *range(17, 30)):
        raise FormatError(
            f"{where}: the tensor {proto.name!r} has data type {proto.data_type}, and lutra reads "
            "numbers and bool; remove it from the model"
        )
    try:
        array = onnx.numpy_helper.to_array(proto)
    except Exception as error:
        raise FormatError(
            f"{where}: the tensor {proto.name!r} of shape {list(proto.dims)[:8]} cannot be read: "
            f"{_first_line(error)}; export or download the model again"
        ) from error
    return from_numpy(array)


def from_numpy(array: Any) -> Tensor:
    """An array as a tensor of the dtypes that are imported."""
    kind = array.dtype.kind
    if array.dtype in (np.uint16, np.int16):
        array = array.astype(np.int32)
    elif array.dtype in (np.uint32, np.uint64):
        array = array.astype(np.int64)
    elif kind == "f" or (kind == "V" and "float" in str(array.dtype)):
        array = array.astype(np.float32)
    elif kind == "V":  # integers of fewer bits
        array = array.astype(np.uint8 if "uint" in str(array.dtype) else np.int8)
    return torch.from_numpy(np.array(array, copy=True, order="C"))


def attributes(node: Any, where: str) -> dict[str, Any]:
    """The attributes of a node: numbers, texts, lists, tensors and graphs."""
    onnx = onnx_package()
    made: dict[str, Any] = {}
    for attribute in node.attribute:
        try:
            value = onnx.helper.get_attribute_value(attribute)
        except Exception as error:
            raise FormatError(
                f"{where}: the attribute {attribute.name!r} of node {node.name!r} "
                f"({node.op_type}) cannot be read: {_first_line(error)}"
            ) from error
        if attribute.type == _TENSOR:
            value = as_tensor(value, where)
        made[attribute.name] = _text(value)
    return made


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, (list, tuple)) or type(value).__name__.startswith("Repeated"):
        return [_text(each) for each in value]
    return value


def in_order(nodes: Sequence[Any], known: Iterable[str], where: str) -> list[Any]:
    """The nodes of a graph, each behind those that make its inputs.

    Raises:
        FormatError: There is a circle, an input that nothing makes, or a value made twice.
    """
    made = set(known)
    makers: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.output:
            if name and (name in makers or name in made):
                raise FormatError(f"{where}: the value {name!r} is made twice; the file is broken")
            if name:
                makers[name] = index
    needs = [sorted(_read(node)) for node in nodes]
    for node, names in zip(nodes, needs, strict=True):
        for name in names:
            if name not in made and name not in makers:
                raise FormatError(
                    f"{where}: node {node.name!r} ({node.op_type}) reads {name!r}, which is no "
                    "input, no tensor of the file and no output of a node; the file is broken"
                )
    state = [0] * len(nodes)
    order: list[Any] = []
    for start in range(len(nodes)):
        stack = [(start, iter(needs[start]))] if not state[start] else []
        state[start] = state[start] or 1
        while stack:
            index, names_ = stack[-1]
            for name in names_:
                maker = makers.get(name)
                if maker is None or state[maker] == 2:
                    continue
                if state[maker] == 1:
                    raise FormatError(
                        f"{where}: node {nodes[maker].name!r} ({nodes[maker].op_type}) depends on "
                        "its own output; the file is broken"
                    )
                state[maker] = 1
                stack.append((maker, iter(needs[maker])))
                break
            else:
                stack.pop()
                state[index] = 2
                order.append(nodes[index])
    return order


def _read(node: Any) -> set[str]:
    """The values that a node reads, also from inside its branches."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        if attribute.type == _GRAPH:
            names |= outer_names(attribute.g)
    return names


def outer_names(graph: Any) -> set[str]:
    """The values that a branch reads from outside."""
    own = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    for node in graph.node:
        own |= set(node.output)
    names = {name for node in graph.node for name in _read(node)}
    return (names | {value.name for value in graph.output}) - own


def nodes_of(graph: Any) -> list[Any]:
    """All nodes of a graph, those in branches too."""
    found: list[Any] = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.type == _GRAPH:
                found += nodes_of(attribute.g)
    return found


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text[:200].rstrip(".")

"""Compares an imported module with its file: ONNX Runtime where it is, the reference elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx

from lutra.errors import LutraError
from lutra.train.importing.examples import Example
from lutra.train.importing.onnx_file import OnnxModel, onnx_package
from lutra.train.importing.onnx_graph import Argument, Imported

#: The largest difference of a value, as a share of its largest entry.
TOLERANCE: Final = 1e-3
#: The same where all entries are smaller than this: approximations of functions are as exact.
_SMALL: Final = 1e-2
#: The smallest cosine of an output of a file of integers with the module in float.
_COSINE: Final = 0.9
_SAMPLES: Final = 2
_LARGEST: Final = 2**31 - 1  # bytes of a file that can be built in memory

Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def check_values(
    model: OnnxModel, imported: Imported, arguments: Sequence[Argument],
    fixed: Mapping[str, Tensor], example: Example,
) -> None:  # fmt: skip
    """Raises LutraError about the first value that differs.

    Every node of the module gets what the file computes for its inputs, so that no error adds up.
    """
    moved = set(imported.moved)
    names = [name for name in imported.values.values() if name not in moved]
    run = runner(model, list(model.outputs) if imported.is_quantized else names)
    given, wanted = _answers(model, run, arguments, fixed, example)
    if imported.is_quantized:
        _check_outputs(model, imported, given, wanted)
        return
    comparison = _Comparison(model, imported, wanted)
    try:
        with torch.no_grad():
            comparison.run(*given)
    except Exception:  # the interpreter adds lines of its own
        if comparison.found is None:
            raise
    if comparison.found is not None:
        raise LutraError(comparison.found)


def _answers(
    model: OnnxModel, run: Run, arguments: Sequence[Argument], fixed: Mapping[str, Tensor],
    example: Example,
) -> tuple[tuple[Tensor, ...], Mapping[str, Any]]:  # fmt: skip
    """Inputs and what the file computes of them: of two samples, of one where it takes one."""
    failure: Exception | None = None
    for samples in (1,) if _has_fixed_batch(model, arguments) else (_SAMPLES, 1):
        given = example.make(samples)
        feeds = {
            argument.name: _as_in_file(model, tensor, argument)
            for argument, tensor in zip(arguments, given, strict=True)
        }
        feeds |= {name: _cast(model, name, tensor.numpy()) for name, tensor in fixed.items()}
        try:
            return given, run(feeds)
        except Exception as error:
            failure = failure or error
    raise LutraError(
        f"{model.where} does not run on random inputs ({str(failure)[:200]}); give sizes that it "
        "takes with shapes=, or load it with check=False"
    ) from failure


def _check_outputs(model: OnnxModel, imported: Imported, given: Sequence[Tensor],
                   wanted: Mapping[str, Any]) -> None:  # fmt: skip
    with torch.no_grad():
        mine = dict(zip(model.outputs, _tuple(imported.module(*given)), strict=True))
    for name, array in wanted.items():
        tensor = torch.movedim(mine[name], 0, imported.moved.get(name, 0))
        got, want = tensor.double().numpy().ravel(), np.asarray(array, np.float64).ravel()
        norm = np.sqrt((got @ got) * (want @ want))
        cosine = float(got @ want / norm) if norm else 1.0
        if got.shape != want.shape or cosine < _COSINE:
            raise LutraError(
                f"{model.where}: the output {name!r} has a cosine of {cosine:.3f} with that of the "
                f"file, which computes with integers; {_COSINE} is expected"
            )


def _has_fixed_batch(model: OnnxModel, arguments: Sequence[Argument]) -> bool:
    """Whether the file itself takes one sample only."""
    shapes = {each.name: each.shape for each in model.inputs}
    return any(a.shape and isinstance(shapes[a.name][a.batch_axis], int) for a in arguments)


def differs(got: Any, want: Any) -> str:
    """How two arrays differ, for an error; empty where they do not."""
    if tuple(got.shape) != tuple(want.shape):
        return f"has shape {tuple(want.shape)} and {tuple(got.shape)}, which differ"
    if want.size == 0:
        return ""
    got, want = got.astype(np.float64), want.astype(np.float64)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    if same.all():
        return ""
    finite = np.isfinite(want)
    scale = float(np.abs(want[finite]).max()) if finite.any() else 0.0
    distance = np.where(same, 0.0, np.abs(got - want))
    most = float(np.nan_to_num(distance, nan=np.inf).max())
    share = most / max(scale, _SMALL)
    return f"differs by {share:.2g} of its largest entry" if share > TOLERANCE else ""


class _Comparison(fx.Interpreter):
    """Runs a module and compares what its nodes compute."""

    def __init__(self, model: OnnxModel, imported: Imported, wanted: Mapping[str, Any]) -> None:
        super().__init__(imported.module)
        self._model = model
        self._names = imported.values
        self._wanted = wanted
        self.found: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = self._names.get(n.name, "")
        if name not in self._wanted or not isinstance(result, Tensor):
            return result
        want = np.asarray(self._wanted[name])
        reason = differs(result.detach().numpy(), want)
        if reason:
            where = self._model.where
            node = next((n for n in self._model.graph.node if name in n.output), None)
            label = "" if node is None else f" of node {node.name!r} ({node.op_type})"
            self.found = (
                f"{where}: the value {name!r}{label} {reason} between the file and the module; "
                "load it with check=False only if that does not matter to you"
            )
            raise LutraError(self.found)
        return torch.from_numpy(np.array(want)).to(result.dtype)


def _as_in_file(model: OnnxModel, tensor: Tensor, argument: Argument) -> Any:
    if argument.batch_axis:
        tensor = torch.movedim(tensor, 0, argument.batch_axis)
    return _cast(model, argument.name, tensor.contiguous().numpy())


def _cast(model: OnnxModel, name: str, array: Any) -> Any:
    """An array of the dtype of an input of the file."""
    onnx = onnx_package()
    value = next(v for v in model.graph.input if v.name == name)
    return array.astype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def runner(model: OnnxModel, names: Sequence[str]) -> Run:
    """What runs the file and returns those of its values that have these names."""
    onnx = onnx_package()
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    outputs = {value.name for value in proto.graph.output}
    made = {name for node in proto.graph.node for name in node.output}
    names = [name for name in names if name in made]
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in names if name not in outputs
    )
    runtime = _runtime()
    if runtime is not None and proto.ByteSize() < _LARGEST:
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = runtime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception:  # newer operators than it has, or an operator set it does not know
            return _reference(proto, names)
        return lambda feeds: dict(zip(names, session.run(list(names), dict(feeds)), strict=True))
    return _reference(proto, names)


def _runtime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except Exception:  # missing, or broken
        return None


def _reference(proto: Any, names: Sequence[str]) -> Run:
    reference = importlib.import_module("onnx.reference")
    try:
        evaluator = reference.ReferenceEvaluator(proto)
    except Exception as error:  # it lacks old forms of some operators
        raise LutraError(
            f"load_onnx: the reference of onnx cannot run the file to compare it ({error}); "
            "install onnxruntime, or leave the comparison out (check=False, --no-check)"
        ) from error
    return lambda feeds: dict(zip(names, evaluator.run(list(names), dict(feeds)), strict=True))


def check_batch(
    model: OnnxModel, imported: Imported, one: Imported, arguments: Sequence[Argument]
) -> None:
    """Raises LutraError if samples of a batch get other answers than each of them alone.

    Args:
        imported: The module for any batch.
        one: The same for the one sample of the file.
    """
    generator = torch.Generator().manual_seed(0)
    given = []
    for argument in arguments:
        shape, at = argument.shape, argument.batch_axis
        size = (2, *shape[:at], *shape[at + 1 :])
        if argument.dtype.is_floating_point:
            given.append(torch.randn(size, generator=generator))
        else:
            given.append(torch.randint(0, 2, size, generator=generator).to(argument.dtype))
    try:
        with torch.no_grad():
            both = _tuple(imported.module(*given))
            each = [_tuple(one.module(*(x[i : i + 1] for x in given))) for i in range(2)]
    except Exception as error:
        raise LutraError(f"{model.where} does not run on two samples at once: {error}") from error
    for index, name in enumerate(model.outputs):
        axis = imported.moved.get(name, 0)
        alone = [result[index] for result in each]
        if alone[0].ndim == 0 or alone[0].shape[axis : axis + 1] != (1,):
            raise LutraError(f"{model.where}: the output {name!r} has no entry for each sample")
        wanted = torch.cat([torch.movedim(x, axis, 0) for x in alone])
        reason = differs(both[index].numpy(), wanted.numpy())
        if reason:
            raise LutraError(f"{model.where}: the output {name!r} {reason} in a batch")


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)

"""`load_onnx`: an ONNX file as a PyTorch module.

The operators of the file become calls of PyTorch, one by one, in a `torch.fx.GraphModule`:
convolutions, products with constant matrices, embeddings, norms and recurrent layers are ordinary
modules with the names of the file, everything else functions. So `convert`, `finetune` and `export`
take the model like any other, and the lowering of `export`, with its views, masks and dynamic
sizes, is the only way into the engine: a second one, from ONNX to the graph of the engine, would
have to repeat it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from lutra.errors import FormatError, InputError, LutraError, UnsupportedModelError
from lutra.train.importing.builder import identifier
from lutra.train.importing.examples import Example, noted
from lutra.train.importing.onnx_check import check_batch, check_values
from lutra.train.importing.onnx_file import OnnxInput, OnnxModel, nodes_of, read
from lutra.train.importing.onnx_graph import Argument, Import, Imported, unsupported

#: Sizes that are tried for axes whose size is not fixed: of images, and of anything else.
_TRIED: Final = (
    ((320, 352, 384), (67, 71, 73)),
    ((640, 672, 704), (16384 + 32, 16384 + 64, 16384 + 96)),
    ((64, 96, 128), (512, 544, 576)),
    ((48, 336, 352), (1024, 1056, 1088)),
)
_BATCH: Final = 11


def load_onnx(
    path: str | os.PathLike[str],
    check: bool = True,
    *,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
    constants: Mapping[str, Any] | None = None,
    batch_axes: Mapping[str, int] | None = None,
) -> nn.Module:
    """Reads an ONNX file as a module that can be converted, trained and exported.

    The module computes in float32 whatever floats the file has. Files that compute with integers
    (QDQ, QLinear..., ...Integer) are read as the float model that they stand for: weights are
    dequantised, and activations are clipped to the range of their integers and not rounded; the
    ranges are in `module.meta["lutra"]["ranges"]`. The batch is axis 0 of every input and output
    of the module: where the file has it on another axis it is moved. A file made for a batch of 1
    is read for any batch, if it then gives every sample the answer that it gives to it alone.

    Args:
        path: The file, or an `onnx.ModelProto`; weights in files beside it are read too.
        check: Run module and file on random inputs and compare every value, in ONNX Runtime where
            it is installed and in the reference of `onnx` elsewhere.
        shapes: Shapes of inputs by name, with None for sizes that differ from run to run. They fix
            what the file leaves open, and the first axis may stay any number of samples.
        constants: Values of inputs by name that are to be no inputs of the module, such as a rate
            or an initial state.
        batch_axes: The axis of the batch of inputs by name, where it is not the first one and the
            file does not say so by its names of sizes.

    Returns:
        A `torch.fx.GraphModule` in eval mode. It returns a tensor, or a tuple of them.

    Raises:
        InputError: There is no such file, or arguments do not fit it.
        FormatError: The file is broken, or no ONNX.
        UnsupportedModelError: Operators that cannot be imported, all of them with their nodes.
        LutraError: The package `onnx` is missing, or the module computes something else than the
            file; the first node that differs is named.
    """
    model = read(path)
    fixed = _constants(model, constants or {})
    lines = unsupported(model, nodes_of(model.graph))
    inputs = [each for each in model.inputs if each.name not in fixed]
    _check_arguments(model, inputs, shapes or {}, batch_axes or {})
    imported, arguments, any_batch = _import(
        model, inputs, fixed, shapes or {}, batch_axes or {}, lines
    )
    example = Example(
        tuple(identifier(argument.name) for argument in arguments),
        tuple(argument.name for argument in arguments),
        model.outputs,
        tuple(_turned(argument) for argument in arguments),
        tuple(argument.dtype for argument in arguments),
        tuple(_limit(imported.module, identifier(argument.name)) for argument in arguments),
        any_batch,
    )
    given = {
        "shapes": {name: list(shape) for name, shape in (shapes or {}).items()},
        "constants": {name: tensor.tolist() for name, tensor in fixed.items()},
        "batch_axes": dict(batch_axes or {}),
    }
    noted(imported.module, example, imported.ranges, given)
    if check:
        check_values(model, imported, arguments, fixed, example)
    return imported.module


def _import(
    model: OnnxModel, inputs: Sequence[OnnxInput], fixed: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int | None]], batch_axes: Mapping[str, int],
    lines: Sequence[str],
) -> tuple[Imported, list[Argument], bool]:  # fmt: skip
    """The module for the first sizes that it can be made for."""
    first: LutraError | None = None
    ones = _is_for_one_sample(inputs, shapes, batch_axes)
    for alone in (False, True) if ones else (False,):
        for images, others in _TRIED:
            arguments = _arguments(inputs, shapes, batch_axes, images, others, ones and not alone)
            try:
                imported = Import(model, arguments, fixed, ones and not alone).run()
                if ones and not alone:
                    one = _arguments(inputs, shapes, batch_axes, images, others, False)
                    check_batch(model, imported, Import(model, one, fixed, False).run(), arguments)
                return imported, arguments, not alone
            except FormatError:
                raise
            except LutraError as error:
                first = first or error
            if not any(set(a.dynamic) - {a.batch_axis} for a in arguments):
                break
    assert first is not None
    if lines and isinstance(first, UnsupportedModelError):
        raise UnsupportedModelError(
            f"{model.where} has operators that lutra cannot import: {'; '.join(lines)}; "
            "rewrite these parts, or cut them off with onnx.utils.extract_model",
            lines,
        ) from first
    raise first


def _arguments(
    inputs: Sequence[OnnxInput], shapes: Mapping[str, Sequence[int | None]],
    batch_axes: Mapping[str, int], images: Sequence[int], others: Sequence[int], widen: bool,
) -> list[Argument]:  # fmt: skip
    """The inputs with an example for every size that is not fixed."""
    batch = _batch_name(inputs)
    known: dict[str, int] = {} if batch is None else {batch: _BATCH}
    counts = {"image": 0, "other": 0}
    made = []
    for each in inputs:
        given = shapes.get(each.name, each.shape)
        alone = each.name in shapes and bool(given) and given[0] == 1  # the caller says so
        at = batch_axes.get(each.name, _batch_axis(each, batch, widen))
        sizes: list[int] = []
        dynamic: list[int] = []
        for axis, size in enumerate(given):
            named = each.shape[axis]
            if axis == at and ((not isinstance(named, int) and not alone) or widen):
                sizes.append(_BATCH)
                dynamic.append(axis)
            elif isinstance(size, int):
                sizes.append(size)
            else:
                key = size if isinstance(size, str) else f"{each.name}.{axis}"
                if key not in known:
                    kind = "image" if len(given) > 3 and axis >= 2 else "other"
                    choice = images if kind == "image" else others
                    known[key] = choice[counts[kind] % len(choice)]
                    counts[kind] += 1
                sizes.append(known[key])
                dynamic.append(axis)
        made.append(Argument(each.name, each.dtype, tuple(sizes), tuple(dynamic), at))
    return made


def _batch_name(inputs: Sequence[OnnxInput]) -> str | None:
    """The name that the file has for the size of the batch."""
    return next(
        (each.shape[0] for each in inputs if each.shape and isinstance(each.shape[0], str)), None
    )


def _batch_axis(each: OnnxInput, batch: str | None, widen: bool) -> int:
    if not each.shape:
        return 0
    if batch is not None and each.shape[0] != batch and batch in each.shape:
        return each.shape.index(batch)
    if widen and isinstance(each.shape[0], int) and each.shape[0] != 1 and 1 in each.shape:
        return each.shape.index(1)
    if batch is None and isinstance(each.shape[0], int) and each.shape[0] != 1:
        loose = [axis for axis, size in enumerate(each.shape) if size is None]
        return loose[0] if len(loose) == 1 else 0
    return 0


def _is_for_one_sample(
    inputs: Sequence[OnnxInput], shapes: Mapping[str, Sequence[int | None]],
    batch_axes: Mapping[str, int],
) -> bool:  # fmt: skip
    """Whether the file takes a batch of 1 and no other, or the caller says so."""
    for each in inputs:
        if not each.shape:
            return False
        at = batch_axes.get(each.name, _batch_axis(each, None, True))
        if shapes.get(each.name, each.shape)[at] != 1:
            return False
    return bool(inputs)


def _turned(argument: Argument) -> tuple[int, ...]:
    """The shape of an argument of the module: the batch is in front."""
    shape, at = argument.shape, argument.batch_axis
    return (shape[at], *shape[:at], *shape[at + 1 :]) if shape else shape


#: What only moves or copies the entries of a tensor.
_MOVES: Final = (
    torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.flatten, torch.Tensor.to,
    torch.Tensor.expand,
)  # fmt: skip


def _limit(module: fx.GraphModule, argument: str) -> int:
    """The number that entries of an argument of integers must stay below: the rows of a table."""
    found = next(
        (n for n in module.graph.nodes if n.op == "placeholder" and n.name == argument), None
    )
    rows, stack = [], [] if found is None else [found]
    while stack:
        for user in stack.pop().users:
            if user.op == "call_module":
                layer = module.get_submodule(str(user.target))
                rows += [layer.num_embeddings] if isinstance(layer, nn.Embedding) else []
            elif user.target in _MOVES:
                stack.append(user)
    return min(rows, default=2)


def _constants(model: OnnxModel, given: Mapping[str, Any]) -> dict[str, Tensor]:
    names = {each.name: each for each in model.inputs}
    made = {}
    for name, value in given.items():
        if name not in names:
            raise InputError(
                f"load_onnx: constants names {name!r}, which is no input of {model.where}; it has "
                f"{', '.join(map(repr, names)) or 'none'}"
            )
        made[name] = torch.as_tensor(value).to(names[name].dtype)
        if made[name].ndim != len(names[name].shape):
            raise InputError(
                f"load_onnx: the constant {name!r} has shape {tuple(made[name].shape)}, and the "
                f"input has {len(names[name].shape)} axes"
            )
    return made


def _check_arguments(
    model: OnnxModel, inputs: Sequence[OnnxInput], shapes: Mapping[str, Sequence[int | None]],
    batch_axes: Mapping[str, int],
) -> None:  # fmt: skip
    names = {each.name: each for each in inputs}
    if not inputs:
        raise UnsupportedModelError(f"{model.where} has no inputs; there is nothing to run it on")
    for what, given in (("shapes", shapes), ("batch_axes", batch_axes)):
        for name in given:
            if name not in names:
                raise InputError(
                    f"load_onnx: {what} names {name!r}, which is no input of {model.where}; it has "
                    f"{', '.join(map(repr, names))}"
                )
    for name, shape in shapes.items():
        wanted = names[name].shape
        fits = len(shape) == len(wanted) and all(
            size is None or (size > 0 and (not isinstance(own, int) or own == size))
            for size, own in zip(shape, wanted, strict=True)
        )
        if not fits:
            raise InputError(
                f"load_onnx: the shape {tuple(shape)} of {name!r} does not fit the file, which has "
                f"{wanted}"
            )
    for name, axis in batch_axes.items():
        if not 0 <= axis < len(names[name].shape):
            raise InputError(
                f"load_onnx: batch_axes has axis {axis} for {name!r} of shape {names[name].shape}"
            )

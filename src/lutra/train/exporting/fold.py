"""Batch norm folded into the layer before it, so that it costs nothing at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from lutra.train.exporting.capture import (
    FROZEN_OP,
    ExampleInput,
    capture,
    example_tensors,
    node_module,
    prepare_copy,
)
from lutra.train.layers.base import FrozenLayer
from lutra.train.layers.folded_norm import NORMS, gain_and_shift

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *_TRANSPOSED)
_NORMS = (*NORMS, nn.BatchNorm3d)
_NORM_OPS = ("aten._native_batch_norm_legit_no_training.default", "aten.batch_norm.default")
_LAYER_OPS = (
    "aten.conv1d.default",
    "aten.conv1d.padding",
    "aten.conv2d.default",
    "aten.conv2d.padding",
    "aten.conv3d.default",
    "aten.conv3d.padding",
    "aten.conv_transpose1d.default",
    "aten.conv_transpose2d.input",
    "aten.conv_transpose3d.input",
    "aten.convolution.default",
    "aten.linear.default",
    FROZEN_OP,
)


@dataclass(frozen=True)
class Fold:
    """A batch norm that can go into a layer; both are module paths."""

    layer: str
    norm: str


def fold_batch_norm(model: nn.Module, example_input: ExampleInput) -> nn.Module:
    """Return a copy of a model with its batch norms folded into the layers that feed them.

    A norm is folded when it is an `nn.BatchNorm1d`, `2d` or `3d` with running statistics
    whose only input is one convolution or transposed convolution, `nn.Linear` or frozen layer
    whose operator has a gain and a bias for each output, when nobody else reads the output of that
    layer, and when neither of them, nor their weights, is used a second time. Who feeds whom is
    read off the traced program, not off the order of the modules. Folded norms become
    `nn.Identity`; the others stay.

    Args:
        model: Any traceable module, in any mode; it is not changed.
        example_input: What the model takes, a tensor or one per argument, axis 0 the batch.

    Returns:
        The copy, in eval mode, float32, on the CPU.

    Raises:
        InputError: A bad example.
        UnsupportedModelError: The model cannot be traced.
    """
    model = with_biases(prepare_copy(model))
    fold_program(model, capture(model, example_tensors(example_input)))
    return model


def with_biases(model: nn.Module) -> nn.Module:
    """Give every dense layer of a model a bias, zero where it had none, in place: a norm that is
    folded needs a place for its shift."""
    for module in model.modules():
        dense: Any = module
        if isinstance(module, _DENSE) and dense.bias is None:
            weight = dense.weight
            outputs = weight.shape[0] if isinstance(module, nn.Linear) else dense.out_channels
            zeros = torch.zeros(outputs, dtype=weight.dtype, device=weight.device)
            dense.bias = nn.Parameter(zeros, requires_grad=False)
    return model


def fold_program(model: nn.Module, program: ExportedProgram) -> None:
    """Fold the batch norms of a traced model, in the model and in the program alike.

    Args:
        model: From `with_biases`; changed.
        program: What it was traced to; changed.
    """
    norms = {}
    for node in program.graph.nodes:
        if str(node.target) in _NORM_OPS:
            norms[node_module(node)] = node
    folds = find_folds(model, program)
    for fold in folds:
        _fold(model, fold)
        norm = norms[fold.norm]
        results = [norm]
        if isinstance(norm.meta["val"], tuple | list):  # of the results only the first is read
            results = list(norm.users)
        for result in results:
            result.replace_all_uses_with(norm.args[0])
    state: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name in program.state_dict:
        if name in state:
            program.state_dict[name] = state[name]


def find_folds(model: nn.Module, program: ExportedProgram) -> list[Fold]:
    """List the batch norms of a traced model that can be folded, in the order they run."""
    parameters = _parameters(program)
    modules = dict(model.named_modules(remove_duplicate=False))
    calls: dict[int, int] = {}  # id of a module -> how many layer and norm operators it runs
    for node in program.graph.nodes:
        if str(node.target) in (*_LAYER_OPS, *_NORM_OPS):
            key = id(modules.get(node_module(node)))
            calls[key] = calls.get(key, 0) + 1
    folds: list[Fold] = []
    for node in program.graph.nodes:
        layer = node.args[0] if str(node.target) in _NORM_OPS else None
        if isinstance(layer, fx.Node) and _leaves_line(layer):
            layer = layer.args[0]
        if not isinstance(layer, fx.Node) or str(layer.target) not in _LAYER_OPS:
            continue
        fold = Fold(node_module(layer), node_module(node))
        norm, module = modules.get(fold.norm), modules.get(fold.layer)
        if (
            len(layer.users) == 1
            and calls[id(module)] == calls[id(norm)] == 1
            and type(norm) in _NORMS  # a subclass may do more than normalise
            and isinstance(norm, nn.modules.batchnorm._BatchNorm)
            and norm.running_mean is not None
            and module is not None
            and _is_foldable(layer, module, fold.layer, parameters)
        ):
            folds.append(fold)
    return folds


def _leaves_line(node: fx.Node) -> bool:
    """Whether a node turns images of one row into lines, for a norm alone."""
    squeezes = str(node.target) == "aten.squeeze.dim" and node.args[1:] == (2,)
    return squeezes and len(node.users) == 1


def _is_foldable(
    layer: fx.Node, module: nn.Module, path: str, parameters: dict[fx.Node, str]
) -> bool:
    """Whether scaling the module's own weight and bias scales what this node computes."""
    frozen = str(layer.target) == FROZEN_OP
    linear = module.linear if isinstance(module, FrozenLayer) else "linear" in str(layer.target)
    if linear and layer.meta["val"].ndim != 2:
        return False  # the norm works on axis 1, which holds the outputs of a 2-D result only
    if not isinstance(module, FrozenLayer if frozen else _DENSE):
        return False
    gain, bias = _roles(module)
    if gain is None or bias is None:
        return False
    arguments = _arguments(layer, module)
    for name in (gain, bias):
        argument = arguments.get(name)
        # Not a reparametrised weight, not one that another layer reads too, and not a bias that a
        # forward of the module's own does not add.
        if not isinstance(argument, fx.Node) or argument not in parameters:
            return False
        if getattr(module, name, None) is None or len(argument.users) != 1:
            return False
        tied = f"{path}.{name}" if path else name
        if parameters[argument] != tied:
            return False
    return True


def _roles(module: nn.Module) -> tuple[str | None, str | None]:
    """The tensors that a gain and a shift of the outputs go into."""
    if isinstance(module, FrozenLayer):
        return module.node.spec.gain_role, module.node.spec.bias_role
    return "weight", "bias"


def _arguments(layer: fx.Node, module: nn.Module) -> dict[str, Any]:
    """The arguments of a layer's operator that are its tensors, by role."""
    if isinstance(module, FrozenLayer):
        tensors: Any = layer.args[1]
        return dict(zip(module.node.roles, tensors, strict=True))
    return dict(zip(("weight", "bias"), layer.args[1:3], strict=False))


def _parameters(program: ExportedProgram) -> dict[fx.Node, str]:
    placeholders = (node for node in program.graph.nodes if node.op == "placeholder")
    specs = program.graph_signature.input_specs
    return {
        node: spec.target for node, spec in zip(placeholders, specs, strict=True) if spec.target
    }


def _fold(model: nn.Module, fold: Fold) -> None:
    layer, norm = model.get_submodule(fold.layer), model.get_submodule(fold.norm)
    gain, shift = gain_and_shift(norm)
    with torch.no_grad():
        gain_role, _ = _roles(layer)
        factor = getattr(layer, str(gain_role))
        assert isinstance(factor, Tensor)
        factor.copy_(factor.double() * _spread(layer, gain, factor))
        if isinstance(layer.bias, Tensor):
            layer.bias.copy_(layer.bias.double() * gain + shift)
        else:
            layer.bias = nn.Parameter(shift.float(), requires_grad=False)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is norm:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())


def _spread(layer: nn.Module, gain: Tensor, factor: Tensor) -> Tensor:
    """A gain for each output in the shape of the tensor that it is multiplied into."""
    if not isinstance(layer, _TRANSPOSED):  # outputs are axis 0 of a weight, all of a scale
        return gain.reshape(-1, *[1] * (factor.ndim - 1))
    # (inputs, outputs / groups, ...): the inputs of a group, and behind them its outputs
    inputs = layer.in_channels // layer.groups
    rows = gain.reshape(layer.groups, 1, -1).expand(-1, inputs, -1).flatten(0, 1)
    return rows.reshape(*rows.shape, *[1] * (factor.ndim - 2))

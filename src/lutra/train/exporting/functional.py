"""A traced program without operators that work in place.

`ExportedProgram.run_decompositions` makes any program functional, but traces it a second time,
which takes longer than the first: in-place operators with sizes that are not known run in Python.
Most of them are plain to replace: they write into a fresh tensor that nobody else sees.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument

_ACTIVATIONS: Final = (
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "sigmoid", "tanh", "silu",
    "hardswish", "hardsigmoid", "leaky_relu", "elu", "mish",
)  # fmt: skip
_ARITHMETIC: Final = ("add", "sub", "mul", "div")
#: In-place operator -> the one that computes the same and writes elsewhere.
_PURE: Final = {
    **{f"aten.{name}_.default": f"aten.{name}.default" for name in _ACTIVATIONS},
    **{f"aten.{name}_.Tensor": f"aten.{name}.Tensor" for name in _ARITHMETIC},
}
#: Operators that decompositions leave alone and whose result shares no memory with an argument.
_FRESH: Final = frozenset(
    (
        *_PURE.values(),
        "aten.conv1d.default",
        "aten.conv1d.padding",
        "aten.conv2d.default",
        "aten.conv2d.padding",
        "aten.linear.default",
        "aten.batch_norm.default",
        "aten.max_pool2d.default",
        "aten.avg_pool2d.default",
        "aten.adaptive_avg_pool2d.default",
        "aten.mean.dim",
        "aten.cat.default",
        "aten.gelu.default",
        "aten.softmax.int",
        "aten.embedding.default",
        "aten.amax.default",
        "aten.sum.dim_IntList",
        "aten.exp.default",
        "aten.sqrt.default",
        "aten.reciprocal.default",
        "lutra.frozen.default",
    )
)
#: What a program may hold besides them to be functional: the result may be a view of an argument.
_VIEWS: Final = frozenset(
    (
        "aten.flatten.using_ints",
        "aten.view.default",
        "aten.reshape.default",
        "aten.expand.default",
        "aten.pad.default",
        "aten.permute.default",
        "aten.squeeze.dim",
        "aten.unsqueeze.default",
        "aten.dropout.default",
        "aten.sym_size.int",
    )
)


def functional(program: ExportedProgram) -> ExportedProgram:
    """A program that computes the same without writing into tensors.

    Args:
        program: What `torch.export.export` gave; changed.
    """
    replace_in_place(program)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    if called <= _FRESH | _VIEWS:
        return program
    # An empty table decomposes nothing; it only turns in-place operators into pure ones.
    made: ExportedProgram = program.run_decompositions({})
    return made


def replace_in_place(program: ExportedProgram) -> None:
    """Replace the in-place operators of a program whose target is fresh and has no view.

    Args:
        program: Changed.
    """
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    for node in list(program.graph.nodes):
        if node.op == "call_function" and _can_be_pure(node):
            name, _, overload = _PURE[str(node.target)].removeprefix("aten.").partition(".")
            node.target = getattr(getattr(torch.ops.aten, name), overload)
            written, place = node.args[0], order[node]
            written.replace_all_uses_with(
                node, delete_user_cb=lambda user, place=place: order[user] > place
            )
    (end,) = [node for node in program.graph.nodes if node.op == "output"]
    for result, spec in zip(end.args[0], program.graph_signature.output_specs, strict=True):
        if isinstance(result, fx.Node) and isinstance(spec.arg, TensorArgument):
            spec.arg.name = result.name
    program.graph.lint()
    program.graph_module.recompile()


def _can_be_pure(node: fx.Node) -> bool:
    """Whether nobody but the readers of a result can see what an operator writes."""
    if str(node.target) not in _PURE or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    written = node.args[0]
    known = _FRESH | _PURE.keys()
    if str(written.target) not in _FRESH:
        return False
    if any(user.op != "output" and str(user.target) not in known for user in written.users):
        return False
    # In place, a result has the dtype of its target.
    values = [argument.meta.get("val") for argument in node.all_input_nodes]
    return all(isinstance(value, Tensor) and value.dtype == torch.float32 for value in values)

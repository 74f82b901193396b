"""Activations that a program writes in their parts, as `x * relu6(x + 3) / 6`, as one operator.

Files in ONNX and older models write them so. They are found by their values: whatever computes a
number from one other number is run on a line of them, and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.export import ExportedProgram

from lutra.train.exporting.lowering.sources import Sources, value_of

_aten = torch.ops.aten

#: Operators that compute each value from those in the same place, all with at most two operands
#: that are no numbers.
_EACH: Final = frozenset(
    f"aten.{name}"
    for name in (
        "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "mul.Tensor",
        "mul.Scalar", "div.Tensor", "div.Scalar", "neg.default", "reciprocal.default",
        "abs.default", "pow.Tensor_Scalar", "square.default", "sqrt.default",
        "clamp.default", "clamp_min.default", "clamp_max.default", "hardtanh.default",
        "relu.default", "relu6.default", "hardsigmoid.default", "minimum.default",
        "maximum.default", "sigmoid.default", "tanh.default", "erf.default", "exp.default",
        "log.default", "log1p.default", "softplus.default",
    )
)  # fmt: skip
#: Nodes that one activation takes at most.
_PARTS: Final = 12
#: Where functions are compared. Powers of large numbers are none of an activation's business.
_LINE: Final = torch.cat([torch.linspace(-9.0, 9.0, 613), torch.tensor([-20.0, 20.0])])
#: Of 1 + |y|: rounding of a handful of operations.
_TOLERANCE: Final = 2e-6

_KNOWN: Final[tuple[tuple[Callable[[Tensor], Tensor], Any, Mapping[str, Any]], ...]] = (
    (F.hardswish, _aten.hardswish.default, {}),
    (F.silu, _aten.silu.default, {}),
    (F.gelu, _aten.gelu.default, {}),
    (
        lambda x: F.gelu(x, approximate="tanh"),
        _aten.gelu.default,
        {"approximate": "tanh"},
    ),
    (F.mish, _aten.mish.default, {}),
    (torch.sigmoid, _aten.sigmoid.default, {}),
    (torch.tanh, _aten.tanh.default, {}),
    (F.softplus, _aten.softplus.default, {}),
)


def combine_activations(program: ExportedProgram) -> None:
    """Writes activations in a captured program as one operator each, in place."""
    sources = Sources(program)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    inside: set[fx.Node] = set()
    for node in reversed(list(program.graph.nodes)):
        if node not in inside and _is_each(node) and sources.is_activation(node):
            inside |= _combine(program.graph, sources, order, node)


def _combine(
    graph: fx.Graph, sources: Sources, order: Mapping[fx.Node, int], root: fx.Node
) -> set[fx.Node]:
    """Puts the largest activation that ends in a node in its place; the nodes that it replaces.

    The nodes in front of the root are taken back to front. Wherever all that is left to compute
    starts from one value, this may be an activation of that value.
    """
    parts: list[fx.Node] = []
    open_: set[fx.Node] = {root}
    best: tuple[fx.Node, Any, Mapping[str, Any], int] | None = None
    while open_ and len(parts) < _PARTS:
        node = max(open_, key=lambda each: order.get(each, -1))
        if not _is_each(node):
            break
        open_.remove(node)
        parts.append(node)
        for value in node.args:
            if isinstance(value, fx.Node) and sources.is_activation(value):
                open_.add(value)
        if len(open_) == 1 and len(parts) > 1:
            (x,) = open_
            if value_of(x).shape == value_of(root).shape and value_of(x).dtype == torch.float32:
                known = _known(sources, parts, x)
                if known is not None:
                    best = (x, *known, len(parts))
    if best is None:
        return set()
    x, target, settings, count = best
    with graph.inserting_before(root):
        made = graph.call_function(target, (x,), dict(settings))
    made.meta = dict(root.meta)
    root.replace_all_uses_with(made)
    return set(parts[:count])


def _known(
    sources: Sources, parts: list[fx.Node], x: fx.Node
) -> tuple[Any, Mapping[str, Any]] | None:
    """The operator that computes what nodes, given back to front, compute from x."""
    values: dict[fx.Node, Tensor] = {x: _LINE}
    for node in reversed(parts):
        args: list[Any] = []
        for value in node.args:
            if isinstance(value, fx.Node):
                found = values.get(value)
                if found is None:
                    number = sources.number(value)
                    if number is None:
                        return None
                    found = torch.tensor(number)
                args.append(found)
            elif value is None or isinstance(value, (bool, int, float)):
                args.append(value)
            else:
                return None  # a size that is open
        settings = node.kwargs
        if not all(isinstance(v, (bool, int, float, type(None))) for v in settings.values()):
            return None
        target: Any = node.target
        values[node] = target(*args, **settings)
    made = values[parts[0]]
    if made.shape != _LINE.shape:
        return None
    for function, operator, options in _KNOWN:
        want = function(_LINE)
        if bool(((made - want).abs() <= _TOLERANCE * (1 + want.abs())).all()):
            return operator, options
    return None


def _is_each(node: fx.Node) -> bool:
    if node.op != "call_function" or str(node.target) not in _EACH:
        return False
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32

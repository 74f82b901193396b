"""Values picked by a mask, changed and written back, as a choice by that mask."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, fx

from lutra.train.exporting.lowering.program import caller, replace

_aten = torch.ops.aten
#: What treats every element alike, whatever their number.
_EACH: Final = frozenset(
    (
        "abs", "add", "sub", "rsub", "mul", "div", "neg", "exp", "log", "log1p", "sqrt", "rsqrt",
        "reciprocal", "square", "pow", "relu", "relu6", "sigmoid", "tanh", "clamp", "clamp_min",
        "clamp_max", "maximum", "minimum", "sin", "cos", "floor", "ceil", "round", "sign", "erf",
        "gelu", "silu", "elu", "leaky_relu", "softplus", "hardtanh", "_to_copy", "to", "clone",
        "alias", "detach", "lift_fresh_copy", "remainder", "fmod", "where", "gt", "ge", "lt", "le",
        "eq", "ne", "logical_not", "logical_and", "logical_or", "bitwise_not", "nan_to_num",
    )
)  # fmt: skip


def choose(graph: fx.Graph, node: fx.Node) -> None:
    """Write `x[mask] = f(x[mask], y[mask], ...)` as `x = where(mask, f(x, y, ...), x)`.

    How many values a mask picks is known at run time only; f of all values needs no number. It
    stays as it is where f does anything but treat every element alike.

    Args:
        graph: Changed.
        node: An `index_put`.
    """
    target, indices, values, *more = node.args
    mask: Any = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
    if any(more) or not _is_mask(mask) or not isinstance(target, fx.Node):
        return
    if not isinstance(values, fx.Node) or not _follows(values, mask):
        return
    shape = target.meta["val"].shape
    made: dict[fx.Node, Any] = {}
    with graph.inserting_before(node):
        call = caller(graph, node)
        whole = _of_all(values, mask, call, made)
        lifted = mask
        for _ in range(len(shape) - len(mask.meta["val"].shape)):
            lifted = call(_aten.unsqueeze.default, lifted, -1)
        replace(node, call(_aten.where.self, lifted, whole, target))
    graph.erase_node(node)
    for old in reversed(list(made)):
        if not old.users:
            graph.erase_node(old)


def _is_mask(x: Any) -> bool:
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _picks(x: fx.Node, mask: fx.Node) -> bool:
    """Whether a node is `y[mask]`."""
    if str(x.target) != "aten.index.Tensor":
        return False
    indices: Any = x.args[1]
    return len(indices) == 1 and _same(indices[0], mask)


def _same(a: Any, b: Any) -> bool:
    """Whether two nodes compute the same: a mask is often written twice."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return type(a) is type(b) and bool(a == b)
    if a is b:
        return True
    if a.op != "call_function" or a.target is not b.target or a.kwargs != b.kwargs:
        return False
    random = torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ())
    return not random and _same(a.args, b.args)


def _is_number(x: Any) -> bool:
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    return isinstance(value, Tensor) and value.ndim == 0


def _follows(x: fx.Node, mask: fx.Node) -> bool:
    """Whether a node is a function of picked values and of single numbers, element by element, and
    has picked values in it."""
    if _picks(x, mask):
        return True
    if x.op != "call_function" or str(x.target).split(".")[1:2] == []:
        return False
    if str(x.target).split(".")[1] not in _EACH:
        return False
    tensors = [each for each in x.all_input_nodes if not _is_number(each)]
    return bool(tensors) and all(_follows(each, mask) for each in tensors)


def _of_all(x: fx.Node, mask: fx.Node, call: Any, made: dict[fx.Node, Any]) -> Any:
    if x in made:
        return made[x]
    if _picks(x, mask):
        made[x] = x.args[0]
        return made[x]
    if _is_number(x):
        return x
    args: Any = fx.map_arg(x.args, lambda each: _of_all(each, mask, call, made))
    made[x] = call(x.target, *args, **x.kwargs)
    return made[x]

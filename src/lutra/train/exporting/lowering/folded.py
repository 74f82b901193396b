"""Operators on samples that are cut into parts, with the parts in the axis of the batch.

Windows of an image, patches and frames are often moved into axis 0: (N, W, T, D) becomes
(N W, T, D). No graph value has such a shape. An operator that works behind axis 0 only is given
(N, W, T, D) instead, with the numbers of its axes one higher, and its result is put together again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.core import (
    Deferred,
    Entry,
    Lowering,
    Ref,
    Sizes,
    UnsupportedUse,
    View,
)
from lutra.train.exporting.lowering.deferred import computed, in_parts
from lutra.train.exporting.lowering.emitter import expressions, flatten
from lutra.train.exporting.lowering.placed import pairs, placed

#: The operators that treat axis 0 like any other that they do not name.
_OPERATORS = frozenset(
    {
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "floor_divide",
        "remainder",
        "fmod",
        "pow",
        "maximum",
        "minimum",
        "clamp",
        "clamp_min",
        "clamp_max",
        "gt",
        "lt",
        "ge",
        "le",
        "eq",
        "ne",
        "logical_and",
        "logical_or",
        "logical_xor",
        "logical_not",
        "bitwise_and",
        "bitwise_or",
        "bitwise_not",
        "__and__",
        "__or__",
        "__xor__",
        "where",
        "masked_fill",
        "addcmul",
        "addcdiv",
        "lerp",
        "mean",
        "sum",
        "amax",
        "amin",
        "max",
        "min",
        "any",
        "all",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "logsumexp",
        "linalg_vector_norm",
        "norm",
        "prod",
        "cumsum",
        "softmax",
        "_softmax",
        "softmin",
        "log_softmax",
        "_log_softmax",
        "argmax",
        "argmin",
        "topk",
        "gather",
        "slice",
        "select",
        "unbind",
        "chunk",
        "split",
        "split_with_sizes",
        "cat",
        "concat",
        "stack",
        "flip",
        "roll",
        "index_select",
        "slice_scatter",
        "select_scatter",
        "glu",
        "constant_pad_nd",
        "pad",
        "repeat_interleave",
        "expand_as",
    }
)
#: Arguments that number axes.
_AXES = ("dim", "dims")


def parts_of(ctx: Lowering, x: Any) -> Any:
    """The number of parts of each sample that lie in axis 0 of a view; None where there are none.

    Args:
        ctx: The walk.
        x: Anything.
    """
    if not isinstance(x, View) or not x.axes or len(x.axes[0]) < 2:
        return None
    first, *rest = x.axes[0]
    if first.axis != 0 or first.size != ctx.batch:
        return None
    number: Any = 1
    for atom in rest:
        number = number * atom.size
    return number


def applied(ctx: Lowering, entry: Entry, arguments: Mapping[str, Any]) -> Any:
    """The result of an operator on samples in parts; None for any other use."""
    name = str(ctx.node.target).split(".")[1]
    if name not in _OPERATORS:
        return None
    leaves = flatten(list(arguments.values()))
    found = next((x for x in leaves if parts_of(ctx, x) is not None), None)
    if found is None:
        return None
    count, rank = parts_of(ctx, found), found.rank
    whole = views.sizes_of(ctx, found)[0]

    def apart(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [apart(each) for each in value]
        if isinstance(value, Deferred):
            value = _deferred(ctx, value, whole, count)
        if isinstance(value, (Ref, View)):
            return _apart(ctx, value, whole, count)
        alike = isinstance(value, Tensor) and value.ndim == rank and value.shape[0] == 1
        return value.unsqueeze(1) if alike else value

    def renumbered(dim: Any) -> Any:
        if isinstance(dim, (tuple, list)):
            return [renumbered(each) for each in dim]
        if dim is None:
            return None
        return dim + 1 if dim > 0 else 0 if dim == -rank else dim

    given = {
        key: renumbered(value) if key in _AXES else apart(value) for key, value in arguments.items()
    }
    results = ctx.node.meta["val"]
    every = [expressions(each.shape) for each in _listed(results)]
    with ctx.making(ctx.shape_of_sizes((ctx.batch, count, *every[0][1:]))):
        made = entry.function(ctx, **given)
    if isinstance(made, tuple):
        return tuple(
            None if x is None else _together(ctx, x, sizes)
            for x, sizes in zip(made, every, strict=True)
        )
    return _together(ctx, made, every[0])


def _listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _apart(ctx: Lowering, x: Ref | View, whole: Any, count: Any) -> Ref:
    sizes = views.sizes_of(ctx, x)
    if sizes[0] != whole:
        raise UnsupportedUse(
            "its operands have parts of samples in axis 0, and not as many; keep the batch in "
            "axis 0 alone"
        )
    made = views.reshaped(ctx, x, (ctx.batch, count, *sizes[1:]))
    if made is None:
        raise UnsupportedUse(
            "its operands hold their samples in different orders; keep the batch in axis 0"
        )
    return ctx.realise(made)


def _together(ctx: Lowering, x: Ref | View, sizes: Sizes) -> Ref | View:
    made = views.reshaped(ctx, x, sizes)
    assert made is not None  # axes that are put together always fit
    return made


def _deferred(ctx: Lowering, x: Deferred, whole: Any, count: Any) -> Any:
    """What comes from integers and sizes, in parts where its axis 0 is one of parts."""
    sizes = expressions(x.node.meta["val"].shape)
    if x.inputs or not sizes or sizes[0] != whole or not isinstance(count, int):
        return computed(ctx, x)
    if (made := pairs(ctx, x, count)) is not None:
        return _together(ctx, made, sizes)
    if (row := placed(ctx, x)) is not None:
        return row
    one, two = in_parts(ctx, x, 0, count)
    if not torch.equal(two, two[:1].expand_as(two)):
        raise UnsupportedUse("it computes with the number of a sample in the batch")
    if one.shape != two[:1].shape or not torch.equal(one, two[:1]):
        raise UnsupportedUse("it computes with the size of the batch")
    return one

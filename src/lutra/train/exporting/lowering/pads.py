"""Padding: by numbers, by what is at the ends of an axis, and by less than nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lutra.ops.elementwise import NO_LIMIT
from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import Number, activation
from lutra.train.exporting.lowering.arrange import cut, cut_from_end, join_along, pick, turned_over
from lutra.train.exporting.lowering.core import (
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    is_dynamic,
    lowers,
)

_POOLS = (
    "aten.max_pool1d.default",
    "aten.max_pool2d.default",
    "aten.max_pool2d_with_indices.default",
)


@lowers("aten.pad.default", takes=("self",))
def _pad(ctx: Lowering, self: Any, pad: list[int], mode: str, value: Number | None) -> Ref | View:
    if mode == "constant":
        return _constant_pad(ctx, self, pad, value or 0)
    return _mirrored(ctx, self, pad, mode)


@lowers(
    "aten.reflection_pad1d.default",
    "aten.reflection_pad2d.default",
    takes=("self",),
)
def _reflection_pad(ctx: Lowering, self: Any, padding: list[int]) -> Ref | View:
    return _mirrored(ctx, self, padding, "reflect")


@lowers(
    "aten.replication_pad1d.default",
    "aten.replication_pad2d.default",
    takes=("self",),
)
def _replication_pad(ctx: Lowering, self: Any, padding: list[int]) -> Ref | View:
    return _mirrored(ctx, self, padding, "replicate")


def _mirrored(ctx: Lowering, x: Any, pad: list[int], mode: str) -> Ref | View:
    """Padding with what is in the activation, one axis after the other."""
    view = activation(ctx, x)
    order = views.batch_first(ctx, view)
    ref = ctx.realise(views.permuted(ctx, view, order))
    for position in range(len(pad) // 2):
        before, after = pad[2 * position : 2 * position + 2]
        axis = order.index(ref.rank - 1 - position)
        if not (before or after):
            continue
        size = ref.shape[axis]
        if is_dynamic(size):
            ref = _mirrored_ends(ctx, ref, axis, before, after, mode)
            continue
        index = torch.arange(-before, size + after)
        if mode == "circular":
            index = index % size
        elif mode == "replicate":
            index = index.clamp(0, size - 1)
        else:
            index = (size - 1) - ((size - 1) - index.abs()).abs()
        ref = pick(ctx, ref, axis, index)
    return views.put_back(ctx, ref, order)


def _mirrored_ends(ctx: Lowering, x: Ref, axis: int, before: int, after: int, mode: str) -> Ref:
    """Padding of an axis whose size is known at run time only: its ends, put before and behind."""

    def end(turned: Ref, count: int) -> Ref:
        """What stands before the first entry, from the beginning on."""
        if mode == "reflect":
            return turned_over(ctx, cut(ctx, turned, axis, 1, count + 1), axis)
        row = cut(ctx, turned, axis, 0, 1)
        shape = (*row.shape[:axis], count, *row.shape[axis + 1 :])
        sizes = [count if i == axis else 0 for i in range(1, x.rank)]
        return ctx.emit("expand", row, shape, attrs={"shape": sizes}) if count > 1 else row

    parts = [x]
    if mode == "circular":
        parts = [cut_from_end(ctx, x, axis, before, 0), x] if before else parts
        parts = [*parts, cut(ctx, x, axis, 0, after)] if after else parts
        return join_along(ctx, parts, axis)
    if before:
        parts.insert(0, end(x, before))
    if after:
        parts.append(turned_over(ctx, end(turned_over(ctx, x, axis), after), axis))
    return join_along(ctx, parts, axis)


@lowers("aten.constant_pad_nd.default", takes=("self",))
def _constant_pad(ctx: Lowering, self: Any, pad: list[int], value: Number) -> Ref | View:
    view = activation(ctx, self)
    if not any(pad):
        return view
    order = views.batch_first(ctx, view)
    x = ctx.realise(views.permuted(ctx, view, order))
    x = _cropped(ctx, x, pad, order)
    pad = [max(amount, 0) for amount in pad]
    if not any(pad):
        return views.put_back(ctx, x, order)
    # torch names the last axis first; lutra goes from axis 0 on.
    ends = [(0, 0)] * x.rank
    for position in range(len(pad) // 2):
        ends[order.index(x.rank - 1 - position)] = (pad[2 * position], pad[2 * position + 1])
    if any(ends[0]):
        raise UnsupportedUse("it pads the batch (axis 0); pad other axes only")
    pads = tuple(amount for pair in ends for amount in pair)
    shape = tuple(
        size if size is None else size + before + after
        for size, (before, after) in zip(x.shape, ends, strict=True)
    )
    attrs = {"pads": pads, "value": _finite(ctx, float(value))}
    return views.put_back(ctx, ctx.emit("pad", x, shape, attrs=attrs), order)


def _cropped(ctx: Lowering, x: Ref, pad: Sequence[int], order: Sequence[int]) -> Ref:
    """An activation without what negative pads cut off."""
    for position in range(len(pad) // 2):
        axis = order.index(x.rank - 1 - position)
        first, last = (max(-amount, 0) for amount in pad[2 * position : 2 * position + 2])
        if not (first or last):
            continue
        if axis == 0:
            raise UnsupportedUse("it cuts the batch (axis 0); slice other axes only")
        size = x.shape[axis]
        if isinstance(size, int):
            x = cut(ctx, x, axis, first, size - last)
            continue
        attrs = {"axis": axis, "first": first, "last": last, "step": 1}
        shape = (*x.shape[:axis], size - first - last, *x.shape[axis + 1 :])
        x = ctx.emit("trim", x, shape, attrs=attrs, suffix="trim")
    return x


def _finite(ctx: Lowering, value: float) -> float:
    """The number to pad with; minus infinity in front of a maximum is the smallest number."""
    if math.isfinite(value):
        return value
    if value == -math.inf and all(str(user.target) in _POOLS for user in ctx.node.users):
        return -NO_LIMIT
    raise UnsupportedUse(
        f"it pads with {value}; pad with a finite number, or with -inf in front of max pooling only"
    )

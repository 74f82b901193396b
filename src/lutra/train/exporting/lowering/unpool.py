"""Max unpooling, written as a comparison of each window's entries with the largest one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
_POOL = "aten.max_pool2d_with_indices.default"

#: Adds an operator to the graph.
Call = Callable[..., fx.Node]


def unpooled(node: fx.Node, call: Call) -> fx.Node | None:
    """What a `max_unpool2d` is, in other operators; None where its indices are not those of a
    pooling whose windows lie beside each other, in an image of fixed size.

    With the entries of the windows beside the channels, the first of the largest ones gets the
    value, and the others zero: no index is needed.

    Args:
        node: The unpooling.
        call: Adds an operator.
    """
    x, indices, wanted = node.args[:3]
    pool = indices.args[0] if isinstance(indices, fx.Node) and indices.args else None
    if not isinstance(x, fx.Node) or not isinstance(pool, fx.Node) or str(pool.target) != _POOL:
        return None
    source: Any = pool.args[0]
    names = ("kernel_size", "stride", "padding", "dilation")
    given = {**dict(zip(names, pool.args[1:], strict=False)), **pool.kwargs}
    kernel, pads, spread = (_pair(given.get(name)) for name in (names[0], *names[2:]))
    steps = _pair(given.get("stride") or kernel)
    high, wide = kernel
    before, after = _shape(source), _shape(x)
    sizes = [*before[1:], *after[1:], *_list(wanted)]
    beside = steps == kernel and pads in ([], [0, 0]) and spread in ([], [1, 1])
    if len(before) != 4 or not beside or not all(isinstance(size, int) for size in sizes):
        return None
    channels, rows, columns = after[1:]
    top, left = _list(wanted)
    fits = after == _shape(indices) and left == before[3] and top >= rows * high
    if not fits or rows * high > before[2] or columns * wide > before[3]:
        return None
    for axis, end in ((2, rows * high), (3, columns * wide)):
        if before[axis] != end:
            source = call(_aten.slice.Tensor, source, axis, 0, end)
    entries = high * wide
    windows = call(_aten.reshape.default, source, [-1, channels, rows, high, columns, wide])
    windows = call(_aten.permute.default, windows, [0, 1, 3, 5, 2, 4])
    windows = call(_aten.reshape.default, windows, [-1, channels, entries, rows, columns])
    largest = call(_aten.argmax.default, windows, 2, True)
    places = call(_aten.arange.default, entries)
    places = call(_aten.reshape.default, places, [1, 1, entries, 1, 1])
    chosen = call(_aten.eq.Tensor, largest, places)
    spread_out = call(_aten.where.ScalarOther, chosen, call(_aten.unsqueeze.default, x, 2), 0.0)
    made = call(_aten.reshape.default, spread_out, [-1, channels, high, wide, rows, columns])
    made = call(_aten.permute.default, made, [0, 1, 4, 2, 5, 3])
    made = call(_aten.reshape.default, made, [-1, channels, rows * high, columns * wide])
    more = [0, left - columns * wide, 0, top - rows * high]
    return call(_aten.constant_pad_nd.default, made, more, 0.0) if any(more) else made


def _shape(node: Any) -> list[Any]:
    return list(node.meta["val"].shape)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _pair(value: Any) -> list[int]:
    values = [] if value is None else _list(value)
    return values * 2 if len(values) == 1 else values

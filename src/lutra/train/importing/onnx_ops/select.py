"""Operators that pick entries by number, or put them in their places."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lutra.train.importing.builder import Builder, Numbers, Refusal, Value
from lutra.train.importing.onnx_ops.registry import Op, axis_of, number, onnx_op


def _index(b: Builder, indices: Value, size: Any) -> Any:
    """Indices as torch wants them: int64, counted from the front."""
    made = b.tensor(indices)
    if isinstance(made, Tensor):
        made = made.long()
        if isinstance(size, int):
            if made.numel() and not (-size <= int(made.min()) and int(made.max()) < size):
                raise Refusal(f"it picks {made.tolist()} of an axis with {size} entries")
            return torch.where(made < 0, made + size, made)
        return made
    return made if b.dtype(made) == torch.int64 else b.call(torch.Tensor.to, made, torch.int64)


@onnx_op("Gather")
def _gather(b: Builder, op: Op, x: Value, indices: Value) -> Any:
    axis = axis_of(int(op.get("axis", 0)), b.ndim(x))
    if isinstance(x, Numbers) and isinstance(indices, Tensor) and indices.ndim < 2:
        picked = [_pick(x.items, int(i)) for i in indices.reshape(-1).tolist()]
        return Numbers(tuple(picked), x.dtype, scalar=indices.ndim == 0)
    size = b.sizes(x)[axis]
    if isinstance(indices, Tensor) and isinstance(x, fx.Node):
        return _at_constants(b, x, indices, axis, size)
    if isinstance(x, Tensor) and x.ndim == 2 and axis == 0 and x.is_floating_point():
        table = nn.Embedding(x.shape[0], x.shape[1], device="meta")
        table.weight = nn.Parameter(x.float().clone())
        return b.module(op.path, table, _index(b, indices, size))
    index = _index(b, indices, size)
    if isinstance(index, Tensor) and isinstance(x, Tensor):
        return b.call(_take, x, index, axis)
    if b.ndim(index) == 1:
        return b.call(torch.index_select, x, axis, index)
    return b.call(operator.getitem, x, (*(slice(None),) * axis, index))


def _pick(items: tuple[Any, ...], index: int) -> Any:
    if not -len(items) <= index < len(items):
        raise Refusal(f"it picks entry {index} of {len(items)}")
    return items[index]


def _take(x: Tensor, index: Tensor, axis: int) -> Tensor:
    picked = x.index_select(axis, index.reshape(-1))
    return picked.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _at_constants(b: Builder, x: fx.Node, indices: Tensor, axis: int, size: Any) -> Any:
    front = (slice(None),) * axis
    if indices.ndim == 0:
        index = int(indices)
        if isinstance(size, int):
            if not -size <= index < size:
                raise Refusal(f"it picks entry {index} of an axis with {size}")
            index %= size
        return b.call(torch.select, x, axis, index)
    index_ = _index(b, indices, size)
    assert isinstance(index_, Tensor)
    if indices.ndim == 1:
        order = index_.tolist()
        if order and order == list(range(order[0], order[0] + len(order))) and order[0] >= 0:
            return b.call(operator.getitem, x, (*front, slice(order[0], order[-1] + 1)))
        return b.call(torch.index_select, x, axis, index_)
    flat = b.call(torch.index_select, x, axis, index_.reshape(-1))
    shape = b.shape(x)
    return b.call(torch.reshape, flat, [*shape[:axis], *indices.shape, *shape[axis + 1 :]])


def _along_axis(b: Builder, op: Op, x: Value, indices: Value) -> tuple[int, Value]:
    """The axis of an operator, and indices of its entries that count from its beginning."""
    axis = axis_of(int(op.get("axis", 0)), b.ndim(x))
    index = _index(b, indices, b.sizes(x)[axis])
    if isinstance(index, fx.Node):
        size = b.size(x, axis)
        index = b.call(
            torch.where, b.call(torch.lt, index, 0), b.call(torch.add, index, size), index
        )
    return axis, index


@onnx_op("GatherElements")
def _gather_elements(b: Builder, op: Op, x: Value, indices: Value) -> Any:
    axis, index = _along_axis(b, op, x, indices)
    return b.call(torch.gather, x, axis, index)


@onnx_op("GatherND")
def _gather_nd(b: Builder, op: Op, x: Value, indices: Value) -> Any:
    if int(op.get("batch_dims", 0)):
        raise Refusal("its batch_dims is not 0")
    depth = b.sizes(indices)[-1]
    if depth is None:
        raise Refusal("the number of its indices is known at run time only")
    index = _index(b, indices, None)
    parts = tuple(b.call(torch.select, index, -1, i) for i in range(depth))
    return b.call(operator.getitem, x, parts)


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@onnx_op("ScatterElements", "Scatter")
def _scatter_elements(b: Builder, op: Op, x: Value, indices: Value, updates: Value) -> Any:
    axis, index = _along_axis(b, op, x, indices)
    reduction = str(op.get("reduction", "none"))
    if reduction == "none":
        return b.call(torch.scatter, x, axis, index, updates)
    kind = _REDUCTIONS[reduction]
    return b.call(torch.scatter_reduce, x, axis, index, updates, kind)


@onnx_op("ScatterND")
def _scatter_nd(b: Builder, op: Op, x: Value, indices: Value, updates: Value) -> Any:
    reduction = str(op.get("reduction", "none"))
    depth = b.sizes(indices)[-1]
    if depth is None or reduction in ("max", "min", "mul"):
        raise Refusal(f"its reduction is {reduction!r}, or its indices are known at run time only")
    index = _index(b, indices, None)
    parts = tuple(b.call(torch.select, index, -1, i) for i in range(depth))
    return b.call(torch.index_put, x, parts, updates, reduction == "add")


@onnx_op("OneHot")
def _one_hot(b: Builder, op: Op, indices: Value, depth: Value, values: Value) -> Any:
    count = int(number(depth, "depth"))
    index = b.tensor(indices)
    axis = int(op.get("axis", -1))
    axis = axis + b.ndim(index) + 1 if axis < 0 else axis
    places = torch.arange(count).reshape([-1, *[1] * (b.ndim(index) - axis)])
    if b.dtype(index) != torch.int64:
        index = b.call(torch.Tensor.to, index, torch.int64)
    wrapped = b.call(
        torch.where, b.call(torch.lt, index, 0), b.call(torch.add, index, count), index
    )
    is_hot = b.call(torch.eq, b.call(torch.unsqueeze, wrapped, axis), places)
    on, off = (b.call(torch.select, b.tensor(values), 0, i) for i in (1, 0))
    return b.call(torch.where, is_hot, on, off)


@onnx_op("TopK")
def _top_k(b: Builder, op: Op, x: Value, k: Value | None = None) -> Any:
    axis = axis_of(int(op.get("axis", -1)), b.ndim(x))
    count = int(op.get("k", 1)) if k is None else int(number(k, "k"))
    made = b.call(torch.topk, x, count, axis, bool(op.get("largest", 1)), bool(op.get("sorted", 1)))
    return tuple(made)


@onnx_op("GridSample")
def _grid_sample(b: Builder, op: Op, x: Value, grid: Value) -> Any:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(
        str(op.get("mode", "bilinear")), str(op.get("mode", "bilinear"))
    )
    return b.call(
        F.grid_sample, x, grid, mode, str(op.get("padding_mode", "zeros")),
        bool(op.get("align_corners", 0)),
    )  # fmt: skip


@onnx_op("NonZero")
def _non_zero(b: Builder, op: Op, x: Value) -> Any:
    made = b.tensor(x)
    if not isinstance(made, Tensor):
        raise Refusal("how many entries it has depends on values of the inputs")
    return torch.nonzero(made).t().contiguous()

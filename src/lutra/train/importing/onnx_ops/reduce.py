"""Sums, means and extremes along axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lutra.train.importing.builder import Builder, Numbers, Refusal, Value
from lutra.train.importing.onnx_ops.registry import Op, axis_of, number, onnx_op


def _sum(b: Builder, x: Value, axes: list[int], keep: bool) -> Any:
    made = b.call(torch.sum, x, axes, keepdim=keep)
    return made if b.dtype(made) == b.dtype(x) else b.call(torch.Tensor.to, made, b.dtype(x))


def _mean(b: Builder, x: Value, axes: list[int], keep: bool) -> Any:
    return b.call(torch.mean, x, axes, keepdim=keep)


def _extreme(function: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(b: Builder, x: Value, axes: list[int], keep: bool) -> Any:
        dtype = b.dtype(x)
        whole = b.call(torch.Tensor.to, x, torch.uint8) if dtype == torch.bool else x
        made = b.call(function, whole, axes, keepdim=keep)
        return made if b.dtype(made) == dtype else b.call(torch.Tensor.to, made, dtype)

    return reduce


def _prod(b: Builder, x: Value, axes: list[int], keep: bool) -> Any:
    dtype = b.dtype(x)
    for axis in sorted(axes, reverse=True):
        x = b.call(torch.prod, x, axis, keepdim=keep)
    return x if b.dtype(x) == dtype else b.call(torch.Tensor.to, x, dtype)


def _l1(b: Builder, x: Value, axes: list[int], keep: bool) -> Any:
    return _sum(b, b.call(torch.abs, x), axes, keep)


def _squares(b: Builder, x: Value, axes: list[int], keep: bool) -> Any:
    return _sum(b, b.call(torch.mul, x, x), axes, keep)


def _l2(b: Builder, x: Value, axes: list[int], keep: bool) -> Any:
    return b.call(torch.sqrt, _squares(b, x, axes, keep))


def _log_sum(b: Builder, x: Value, axes: list[int], keep: bool) -> Any:
    return b.call(torch.log, _sum(b, x, axes, keep))


def _log_sum_exp(b: Builder, x: Value, axes: list[int], keep: bool) -> Any:
    return b.call(torch.logsumexp, x, axes, keepdim=keep)


_REDUCE: dict[str, Callable[..., Any]] = {
    "ReduceL1": _l1,
    "ReduceL2": _l2,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": _extreme(torch.amax),
    "ReduceMean": _mean,
    "ReduceMin": _extreme(torch.amin),
    "ReduceProd": _prod,
    "ReduceSum": _sum,
    "ReduceSumSquare": _squares,
}
_EMPTY = ("ReduceMax", "ReduceMin")


@onnx_op(*_REDUCE)
def _reduce(b: Builder, op: Op, x: Value, axes: Value | None = None) -> Any:
    chosen = op.axes(axes)
    keep = bool(op.get("keepdims", 1))
    if isinstance(x, Numbers):
        counted = _of_numbers(b, op, x, keep)
        if counted is not None:
            return counted
        x = b.tensor(x)
    if not chosen:
        if op.get("noop_with_empty_axes", 0):
            return _nothing(b, op, x)
        chosen = list(range(b.ndim(x)))
    chosen = sorted({axis_of(axis, b.ndim(x)) for axis in chosen})
    if not chosen:  # a number
        return _nothing(b, op, x)
    if any(b.sizes(x)[axis] == 0 for axis in chosen) and op.type in _EMPTY:
        raise Refusal("it looks for the largest of no values")
    return _REDUCE[op.type](b, x, chosen, keep)


def _nothing(b: Builder, op: Op, x: Value) -> Any:
    """What is left of a reduction along no axis."""
    made = b.call(torch.unsqueeze, x, -1)
    return _REDUCE[op.type](b, made, [b.ndim(x)], False)


def _of_numbers(b: Builder, op: Op, x: Numbers, keep: bool) -> Numbers | None:
    import operator

    functions = {"ReduceProd": operator.mul, "ReduceSum": operator.add,
                 "ReduceMax": torch.sym_max, "ReduceMin": torch.sym_min}  # fmt: skip
    function = functions.get(op.type)
    if function is None or not x.items or x.scalar:
        return None
    total = x.items[0]
    for item in x.items[1:]:
        total = b.call(function, total, item)
    return Numbers((total,), x.dtype, scalar=not keep)


@onnx_op("ArgMax", "ArgMin")
def _arg(b: Builder, op: Op, x: Value) -> Any:
    axis, keep = axis_of(int(op.get("axis", 0)), b.ndim(x)), bool(op.get("keepdims", 1))
    function = torch.argmax if op.type == "ArgMax" else torch.argmin
    if not op.get("select_last_index", 0):
        return b.call(function, x, axis, keepdim=keep)
    size = b.sizes(x)[axis]
    if size is None:
        raise Refusal("it looks from behind along an axis whose size is known at run time only")
    last = b.call(function, b.call(torch.flip, x, [axis]), axis, keepdim=keep)
    return b.call(torch.rsub, last, size - 1)


@onnx_op("CumSum", "CumProd")
def _cumulative(b: Builder, op: Op, x: Value, axis: Value) -> Any:
    at = axis_of(int(number(axis, "axis")), b.ndim(x))
    dtype = b.dtype(x)
    if op.get("reverse", 0):
        x = b.call(torch.flip, x, [at])
    function = torch.cumsum if op.type == "CumSum" else torch.cumprod
    made = b.call(function, x, at)
    if b.dtype(made) != dtype:
        made = b.call(torch.Tensor.to, made, dtype)
    if op.get("exclusive", 0):
        made = _moved(b, made, at, 0.0 if op.type == "CumSum" else 1.0)
    return b.call(torch.flip, made, [at]) if op.get("reverse", 0) else made


def _moved(b: Builder, x: Value, axis: int, first: float) -> Any:
    from lutra.train.importing.onnx_ops.shape import padded

    sides: list[tuple[Any, Any]] = [(0, 0)] * b.ndim(x)
    sides[axis] = (1, -1)
    return padded(b, x, sides, fill=first)

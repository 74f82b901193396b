"""Convolutions: modules where the weight is a constant."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lutra.train.importing.builder import Builder, Refusal, Value
from lutra.train.importing.onnx_ops.registry import Op, onnx_op
from lutra.train.importing.onnx_ops.shape import padded

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_CALL = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED_CALL = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def window_pads(
    b: Builder, op: Op, x: Value, kernel: list[int], strides: list[int], dilations: list[int]
) -> list[tuple[Any, Any]]:
    """What is padded in front of and behind each axis of an image.

    Raises:
        Refusal: It depends on a size in a way that cannot be computed.
    """
    auto = str(op.get("auto_pad", "NOTSET")) or "NOTSET"
    rank = len(kernel)
    if auto in ("NOTSET", "VALID"):
        pads = [int(p) for p in op.get("pads", ())] if auto == "NOTSET" else []
        pads = pads or [0] * (2 * rank)
        if len(pads) != 2 * rank:
            raise Refusal(f"its pads {pads} do not fit {rank} axes")
        return [(pads[i], pads[i + rank]) for i in range(rank)]
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise Refusal(f"its auto_pad is {auto!r}")
    sides = []
    for i in range(rank):
        reach = (kernel[i] - 1) * dilations[i] + 1
        size = b.size(x, 2 + i)
        if strides[i] == 1:
            total: Any = reach - 1
        elif isinstance(size, int):
            total = max((-(-size // strides[i]) - 1) * strides[i] + reach - size, 0)
        else:
            total = _same(b, size, strides[i], reach)
        small: Any = total // 2 if isinstance(total, int) else b.call(operator.floordiv, total, 2)
        large: Any = total - small if isinstance(total, int) else b.call(operator.sub, total, small)
        sides.append((small, large) if auto == "SAME_UPPER" else (large, small))
    return sides


def _same(b: Builder, size: fx.Node, stride: int, reach: int) -> Any:
    """The padding of an axis whose size is known at run time only."""
    count = b.call(operator.floordiv, b.call(operator.add, size, stride - 1), stride)
    whole = b.call(
        operator.add, b.call(operator.mul, b.call(operator.sub, count, 1), stride), reach
    )
    return b.call(torch.sym_max, b.call(operator.sub, whole, size), 0)


def each(op: Op, name: str, rank: int, default: int = 1) -> list[int]:
    """An attribute with an entry for each axis of an image."""
    given = op.get(name)
    values = [default] * rank if not given else [int(v) for v in given]
    if len(values) != rank or any(v < default for v in values):
        raise Refusal(f"its {name} {values} do not fit {rank} axes")
    return values


@onnx_op("Conv")
def conv(b: Builder, op: Op, x: Value, weight: Value, bias: Value | None = None) -> Any:
    """A convolution, as `nn.Conv1d` to `nn.Conv3d` where its weight is a constant."""
    rank = b.ndim(x) - 2
    if rank not in (1, 2, 3) or b.ndim(weight) != rank + 2:
        raise Refusal(
            f"it convolves {rank} axes with a weight of {b.ndim(weight) - 2}; 1 to 3 exist"
        )
    kernel = [size or 0 for size in b.sizes(weight)[2:]]
    strides, dilations = each(op, "strides", rank), each(op, "dilations", rank)
    groups = int(op.get("group", 1))
    sides = window_pads(b, op, x, kernel, strides, dilations)
    if all(front == back and isinstance(front, int) and front >= 0 for front, back in sides):
        padding = [front for front, _ in sides]
    else:
        x = padded(b, x, [(0, 0), (0, 0), *sides])
        padding = [0] * rank
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        call = _CONV_CALL[rank - 1]
        return b.call(call, x, weight, bias, strides, padding, dilations, groups)
    channels = b.sizes(x)[1]
    out, per_group = weight.shape[:2]
    if groups < 1 or channels != per_group * groups or out % groups or 0 in weight.shape:
        raise Refusal(
            f"its weight of shape {tuple(weight.shape)} with {groups} groups does not fit an input "
            f"of {channels} channels"
        )
    module = _CONV[rank - 1](
        channels, out, tuple(kernel), tuple(strides), tuple(padding), tuple(dilations),  # type: ignore[arg-type]
        groups, bias=bias is not None, device="meta",
    )  # fmt: skip
    _fill(module, weight, bias)
    return b.module(op.path, module, x)


def _fill(module: nn.Module, weight: Tensor, bias: Value | None) -> None:
    module.weight = nn.Parameter(weight.float().clone())
    if isinstance(bias, Tensor):
        module.bias = nn.Parameter(bias.float().reshape(-1).clone())


@onnx_op("ConvTranspose")
def _conv_transpose(b: Builder, op: Op, x: Value, weight: Value, bias: Value | None = None) -> Any:
    rank = b.ndim(x) - 2
    if rank not in (1, 2, 3) or b.ndim(weight) != rank + 2:
        raise Refusal(f"it works on {rank} axes; 1 to 3 exist")
    kernel = [size or 0 for size in b.sizes(weight)[2:]]
    strides, dilations = each(op, "strides", rank), each(op, "dilations", rank)
    extra = each(op, "output_padding", rank, 0)
    groups = int(op.get("group", 1))
    sides = _transposed_pads(b, op, x, kernel, strides, dilations, extra)
    padding = [min(front, back) for front, back in sides]
    cut: list[tuple[int, int]] = []
    for i, (front, back) in enumerate(sides):  # what is left is cut from the result, or added
        more = back - front
        if more < 0 and -more < max(strides[i], dilations[i]) and extra[i] == 0:
            padding[i], extra[i] = front, -more
            cut.append((0, 0))
        else:
            cut.append((front - padding[i], back - padding[i]))
    if any(p < 0 for p in padding):
        raise Refusal(f"its pads {sides} are negative")
    constant = isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    if constant and all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        assert isinstance(weight, Tensor)
        channels, per_group = weight.shape[:2]
        if b.sizes(x)[1] != channels or groups < 1 or channels % groups or 0 in weight.shape:
            raise Refusal(
                f"its weight of shape {tuple(weight.shape)} with {groups} groups does not fit an "
                f"input of {b.sizes(x)[1]} channels"
            )
        module = _TRANSPOSED[rank - 1](
            channels, per_group * groups, tuple(kernel), tuple(strides), tuple(padding),  # type: ignore[arg-type]
            tuple(extra), groups, bias is not None, tuple(dilations), device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
        _fill(module, weight, bias)
        y = b.module(op.path, module, x)
    else:
        y = b.call(_TRANSPOSED_CALL[rank - 1], x, weight, bias, strides, padding, extra, groups,
                   dilations)  # fmt: skip
    for i, (front, back) in enumerate(cut):
        if (front, back) != (0, 0):
            end = None if back == 0 else -back
            y = b.call(operator.getitem, y, (slice(None),) * (2 + i) + (slice(front, end),))
    return y


def _transposed_pads(
    b: Builder, op: Op, x: Value, kernel: list[int], strides: list[int], dilations: list[int],
    extra: list[int],
) -> list[tuple[int, int]]:  # fmt: skip
    rank = len(kernel)
    auto = str(op.get("auto_pad", "NOTSET")) or "NOTSET"
    wanted = op.get("output_shape")
    if auto in ("NOTSET", "VALID") and not wanted:
        pads = [int(p) for p in op.get("pads", ())] if auto == "NOTSET" else []
        pads = pads or [0] * (2 * rank)
        if len(pads) != 2 * rank:
            raise Refusal(f"its pads {pads} do not fit {rank} axes")
        return [(pads[i], pads[i + rank]) for i in range(rank)]
    sides = []
    for i in range(rank):
        reach = (kernel[i] - 1) * dilations[i] + 1
        size = b.sizes(x)[2 + i]
        if wanted:
            if size is None:
                raise Refusal("it has an output_shape, but its input has a size known at run time")
            total = strides[i] * (size - 1) + extra[i] + reach - int(wanted[-rank:][i])
        else:
            total = extra[i] + reach - strides[i]
        half = total // 2
        sides.append((total - half, half) if auto != "SAME_UPPER" else (half, total - half))
    return sides

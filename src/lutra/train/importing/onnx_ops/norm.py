"""Normalisations: modules where scale and bias are constants."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.train.importing.builder import Builder, Refusal, Value
from lutra.train.importing.onnx_ops.registry import Op, axis_of, is_constant, onnx_op

_BATCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@onnx_op("BatchNormalization")
def _batch_norm(b: Builder, op: Op, x: Value, scale: Value, bias: Value, mean: Value,
                variance: Value) -> Any:  # fmt: skip
    if op.get("training_mode", 0) or any(op.wants(i) for i in range(1, 5)):
        raise Refusal("it uses the statistics of the batch; export the model in eval mode")
    epsilon = float(op.get("epsilon", 1e-5))
    given = (scale, bias, mean, variance)
    if not is_constant(*given) or b.ndim(x) not in _BATCH:
        flat = tuple(b.tensor(v) for v in given)
        return b.call(F.batch_norm, x, flat[2], flat[3], flat[0], flat[1], False, 0.0, epsilon)
    arrays = [v.reshape(-1).float().clone() for v in given if isinstance(v, Tensor)]
    channels = b.sizes(x)[1]
    if any(len(array) != channels for array in arrays):
        raise Refusal(f"its scales of {[len(a) for a in arrays]} entries do not fit {channels}")
    module = _BATCH[b.ndim(x)](len(arrays[0]), eps=epsilon, device="meta")
    module.weight, module.bias = nn.Parameter(arrays[0]), nn.Parameter(arrays[1])
    module.running_mean, module.running_var = arrays[2], arrays[3]
    module.num_batches_tracked = torch.tensor(0)
    return b.module(op.path, module, x)


@onnx_op("InstanceNormalization")
def _instance_norm(b: Builder, op: Op, x: Value, scale: Value, bias: Value) -> Any:
    return b.call(
        F.instance_norm, x, None, None, scale, bias, True, 0.0, float(op.get("epsilon", 1e-5))
    )


@onnx_op("GroupNormalization")
def _group_norm(b: Builder, op: Op, x: Value, scale: Value, bias: Value) -> Any:
    groups, channels = int(op.get("num_groups", 1)), b.sizes(x)[1]
    epsilon = float(op.get("epsilon", 1e-5))
    if channels is None or groups < 1 or channels % groups:
        raise Refusal(f"its {channels} channels are no multiple of {groups} groups")
    given = [scale, bias]
    if op.opset < 21 and channels != groups and b.sizes(scale)[0] == groups:  # one for each group
        given = [b.call(torch.repeat_interleave, v, channels // groups) for v in given]
    if is_constant(*given):
        module = nn.GroupNorm(groups, channels, epsilon, device="meta")
        module.weight, module.bias = (
            nn.Parameter(v.float().reshape(-1).clone()) for v in given if isinstance(v, Tensor)
        )
        return b.module(op.path, module, x)
    return b.call(F.group_norm, x, groups, *given, epsilon)


def _normalised(b: Builder, op: Op, x: Value) -> tuple[int, list[int], float]:
    """The first axis that is normalised, the sizes from it on, and epsilon."""
    axis = axis_of(int(op.get("axis", -1)), b.ndim(x))
    shape = b.sizes(x)[axis:]
    sizes = [size for size in shape if size is not None]
    if len(sizes) < len(shape):
        raise Refusal("it normalises an axis whose size is known at run time only")
    return axis, sizes, float(op.get("epsilon", 1e-5))


@onnx_op("LayerNormalization")
def _layer_norm(b: Builder, op: Op, x: Value, scale: Value, bias: Value | None = None) -> Any:
    axis, sizes, epsilon = _normalised(b, op, x)
    if any(op.wants(i) for i in (1, 2)):
        return _with_statistics(b, op, x, scale, bias, list(range(axis, b.ndim(x))), epsilon)
    if isinstance(scale, Tensor) and (bias is None or isinstance(bias, Tensor)):
        module = nn.LayerNorm(sizes, epsilon, bias=bias is not None, device="meta")
        module.weight = nn.Parameter(scale.float().expand(sizes).clone())
        if isinstance(bias, Tensor):
            module.bias = nn.Parameter(bias.float().expand(sizes).clone())
        return b.module(op.path, module, x)
    return b.call(F.layer_norm, x, sizes, scale, bias, epsilon)


def _with_statistics(b: Builder, op: Op, x: Value, scale: Value, bias: Value | None,
                     axes: list[int], epsilon: float) -> Any:  # fmt: skip
    mean = b.call(torch.mean, x, axes, keepdim=True)
    moved = b.call(torch.sub, x, mean)
    variance = b.call(torch.mean, b.call(torch.mul, moved, moved), axes, keepdim=True)
    inverse = b.call(torch.rsqrt, b.call(torch.add, variance, epsilon))
    y = b.call(torch.mul, b.call(torch.mul, moved, inverse), scale)
    return (y if bias is None else b.call(torch.add, y, bias)), mean, inverse


@onnx_op("RMSNormalization")
def _rms_norm(b: Builder, op: Op, x: Value, scale: Value) -> Any:
    _, sizes, epsilon = _normalised(b, op, x)
    if isinstance(scale, Tensor):
        module = nn.RMSNorm(sizes, epsilon, device="meta")
        module.weight = nn.Parameter(scale.float().expand(sizes).clone())
        return b.module(op.path, module, x)
    return b.call(F.rms_norm, x, sizes, scale, epsilon)


@onnx_op("LRN")
def _lrn(b: Builder, op: Op, x: Value) -> Any:
    return b.call(
        F.local_response_norm, x, int(op.get("size", 1)), float(op.get("alpha", 1e-4)),
        float(op.get("beta", 0.75)), float(op.get("bias", 1.0)),
    )  # fmt: skip


@onnx_op("LpNormalization")
def _lp_norm(b: Builder, op: Op, x: Value) -> Any:
    order, axis = int(op.get("p", 2)), int(op.get("axis", -1))
    return b.call(F.normalize, x, float(order), axis)


@onnx_op("MeanVarianceNormalization")
def _mean_variance(b: Builder, op: Op, x: Value) -> Any:
    axes = [int(a) for a in op.get("axes", (0, 2, 3))]
    moved = b.call(torch.sub, x, b.call(torch.mean, x, axes, keepdim=True))
    deviation = b.call(
        torch.sqrt, b.call(torch.mean, b.call(torch.mul, moved, moved), axes, keepdim=True)
    )
    return b.call(torch.div, moved, b.call(torch.add, deviation, 1e-9))

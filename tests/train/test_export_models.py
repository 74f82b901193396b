"""Export of ordinary torch models: the graph must compute what torch computes, for any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exported import (
    IMAGE,
    Fn,
    PreActNet,
    check_model,
    conv,
    ops,
)
from sweeps import quick_cover
from torch import Tensor, nn

MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "conv_bn_relu": (lambda: conv(3, 5, 3, padding=1, bias=False), ["conv2d", "relu"]),
    "conv_bias_stride_dilation": (
        lambda: conv(3, 5, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(2, 1)),
        ["conv2d", "relu"],
    ),
    "conv_same": (lambda: conv(3, 4, 3, padding="same"), ["conv2d", "relu"]),
    "conv_same_even": (lambda: conv(3, 4, (2, 4), padding="same"), ["pad", "conv2d", "relu"]),
    "conv_valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), ["conv2d"]),
    "grouped_depthwise": (
        lambda: nn.Sequential(conv(3, 6, 1), conv(6, 12, 3, groups=6), conv(12, 4, 1, groups=2)),
        ["conv2d", "relu"] * 3,
    ),
    "zero_pad_module": (
        lambda: nn.Sequential(nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(3, 2, 3)),
        ["pad", "conv2d"],
    ),
    "constant_pad": (lambda: nn.ConstantPad2d((1, 0, 2, 0), 1.5), ["pad"]),
    "bn_first": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)),
        ["affine", "conv2d"],
    ),
    "bn_not_affine": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
        ["conv2d"],
    ),
    "relu6_forms": (
        lambda: Fn(lambda m, x: F.hardtanh(F.relu6(x - 0.5) - 1, 0, 6).clamp(0, 6).clamp_min(0)),
        ["affine", "relu6", "affine", "relu6", "relu6", "relu"],
    ),
    "in_place_relu_is_seen_by_later_readers": (
        lambda: Fn(lambda m, x: F.relu(m.conv(x), inplace=True), conv=nn.Conv2d(3, 3, 1)),
        ["conv2d", "relu"],
    ),
    "in_place_twice_read": (
        lambda: Fn(lambda m, x: _add_after_in_place(m.conv(x)), conv=nn.Conv2d(3, 3, 1)),
        ["conv2d", "relu", "add"],
    ),
    "channel_constants": (
        lambda: Fn(
            lambda m, x: 1 - (x * m.scale + m.shift) / 3 - x,
            scale=torch.randn(3, 1, 1),
            shift=nn.Parameter(torch.randn(1, 3, 1, 1)),
        ),
        ["affine", "affine", "affine", "affine", "sub"],
    ),
    "max_pool": (lambda: nn.MaxPool2d(3, 2, 1), ["max_pool2d"]),
    "max_pool_ceil": (lambda: nn.MaxPool2d((3, 2), 2, (1, 0), 1, ceil_mode=True), ["max_pool2d"]),
    "max_pool_dilated": (lambda: nn.MaxPool2d(2, 1, dilation=2), ["max_pool2d"]),
    "max_pool_indices_unused": (
        lambda: Fn(lambda m, x: m.pool(x)[0], pool=nn.MaxPool2d(2, return_indices=True)),
        ["max_pool2d"],
    ),
    "avg_pool": (lambda: nn.AvgPool2d(3, 2, 1), ["avg_pool2d"]),
    "avg_pool_ceil": (lambda: nn.AvgPool2d(2, 2, 1, ceil_mode=True), ["avg_pool2d"]),
    "avg_pool_exclude_pad": (
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        ["avg_pool2d"],
    ),
    "adaptive_avg": (lambda: nn.AdaptiveAvgPool2d((4, 3)), ["adaptive_avg_pool2d"]),
    "adaptive_avg_keeps_axis": (lambda: nn.AdaptiveAvgPool2d((None, 3)), ["adaptive_avg_pool2d"]),
    "adaptive_max": (lambda: nn.AdaptiveMaxPool2d((4, 3)), ["adaptive_max_pool2d"]),
    "global_avg_flatten": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)),
        ["adaptive_avg_pool2d", "flatten", "linear"],
    ),
    "mean": (lambda: Fn(lambda m, x: x.mean((-1, 2))), ["mean"]),
    "mean_keepdim": (lambda: Fn(lambda m, x: x.mean([2, 3], keepdim=True)), ["mean"]),
    "flatten": (lambda: Fn(lambda m, x: x.flatten(2)), ["flatten"]),
    "view_size": (lambda: Fn(lambda m, x: x.view(x.size(0), -1)), ["flatten"]),
    "view_minus_one": (lambda: Fn(lambda m, x: x.view(-1, 216)), ["flatten"]),
    "reshape_shape": (lambda: Fn(lambda m, x: x.reshape(x.shape[0], 9, -1)), ["reshape"]),
    "reshape_same": (lambda: Fn(lambda m, x: F.relu(x.reshape(x.shape))), ["relu"]),
    "squeeze_unsqueeze": (
        lambda: Fn(lambda m, x: x.mean(2, keepdim=True).squeeze(2).unsqueeze(1)),
        ["mean", "reshape"],
    ),
    "bn1d": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(216, 5), nn.BatchNorm1d(5), nn.ReLU()),
        ["flatten", "linear", "relu"],
    ),
    "bn1d_on_rows_is_not_folded": (
        lambda: nn.Sequential(nn.Flatten(2), nn.Linear(72, 5), nn.BatchNorm1d(3)),
        ["flatten", "linear", "affine"],
    ),
    "linear_on_images": (lambda: nn.Linear(8, 5, bias=False), ["linear"]),
    "addmm_and_matmul": (
        lambda: Fn(
            lambda m, x: torch.addmm(m.b, x.flatten(1), m.w, beta=2, alpha=0.5) @ m.v,
            w=nn.Parameter(torch.randn(216, 4)),
            b=torch.randn(4),
            v=torch.randn(4, 2),
        ),
        ["flatten", "linear", "linear"],
    ),
    "concat": (
        lambda: Fn(lambda m, x: torch.cat([x, m.conv(x), x], -3), conv=nn.Conv2d(3, 2, 1)),
        ["conv2d", "concat"],
    ),
    "slices": (
        lambda: Fn(lambda m, x: x[:, -2:, 1::3, :-1][:, :, :, :100] + 0 * 1),
        ["slice", "slice", "slice", "affine"],
    ),
    "split_and_chunk": (
        lambda: Fn(lambda m, x: _swap_halves(x)),
        ["slice", "slice", "concat", "slice", "slice", "slice", "concat"],
    ),
    "select": (lambda: Fn(lambda m, x: x[:, :, -1] - x[:, :, 0]), None),
    "softmax": (
        lambda: nn.Sequential(nn.Flatten(), nn.Softmax(dim=-1)),
        ["flatten", "softmax"],
    ),
    "dropout_and_identity": (
        lambda: nn.Sequential(
            nn.Identity(), nn.Dropout2d(0.5), nn.Conv2d(3, 2, 1), nn.Dropout(0.5, inplace=True)
        ),
        ["conv2d"],
    ),
    "pass_through": (
        lambda: Fn(lambda m, x: F.relu(x.contiguous().float().clone()).detach()),
        ["relu"],
    ),
    "functional_batch_norm": (
        lambda: Fn(
            lambda m, x: F.batch_norm(m.conv(x), m.mean, m.var),
            conv=nn.Conv2d(3, 2, 1),
            mean=torch.randn(2),
            var=torch.rand(2) + 0.5,
        ),
        ["conv2d", "affine"],
    ),
    "weights_computed_from_parameters": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 3)),
        ["conv2d"],
    ),
    "no_grad_region": (lambda: Fn(lambda m, x: _no_grad(x)), ["relu"]),
    "output_is_input": (lambda: nn.Identity(), ["reshape"]),
    "preact_resnet": (PreActNet, None),
}


def _add_after_in_place(x: Tensor) -> Tensor:
    y = F.relu(x, inplace=True)
    return x + y  # x is the rectified tensor by now


def _swap_halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 3)
    a, b, c = torch.cat([b, a], 3).split(1, dim=1)
    return torch.cat([c, b, a], 1)


def _no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.relu(x)


@pytest.mark.parametrize("name", quick_cover({name: model[1] for name, model in MODELS.items()}))
def test_graph_equals_torch(tmp_path: Path, name: str) -> None:
    make, wanted = MODELS[name]
    torch.manual_seed(0)
    graph = check_model(tmp_path, make(), IMAGE)
    if wanted is not None:
        assert ops(graph) == wanted

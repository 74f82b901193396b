"""Relatives of the operators of `operator_cases`: every form that users write of each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from operator_cases import IMAGE, ROW, SIGNAL, TOKENS, Case, Recurrent, _numbers, call, module
from torch import Tensor, nn

HEADS = (2, 5, 6)

ACTIVATIONS = {
    f"functional_{name}": call(lambda m, x, f=function: f(x))
    for name, function in {
        "relu_inplace": lambda x: F.relu(x + 0, inplace=True),
        "relu6": F.relu6,
        "elu": lambda x: F.elu(x, 0.5),
        "selu": F.selu,
        "celu": F.celu,
        "leaky_relu": F.leaky_relu,
        "prelu": lambda x: F.prelu(x, torch.tensor([0.25])),
        "rrelu": F.rrelu,
        "gelu": F.gelu,
        "silu": F.silu,
        "mish": F.mish,
        "softplus": F.softplus,
        "softsign": F.softsign,
        "hardtanh": F.hardtanh,
        "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid,
        "hardshrink": lambda x: F.hardshrink(x, 0.3),
        "softshrink": lambda x: F.softshrink(x, 0.3),
        "tanhshrink": F.tanhshrink,
        "threshold": lambda x: F.threshold(x, 0.2, 1.5),
        "logsigmoid": F.logsigmoid,
        "softmin": lambda x: F.softmin(x, 1),
        "softmax": lambda x: F.softmax(x, 2),
        "log_softmax": lambda x: F.log_softmax(x, -1),
        "normalize": lambda x: F.normalize(x, p=2.0, dim=(2, 3)),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "swiglu": lambda x: F.silu(x[:, :2]) * x[:, 2:],
        "geglu": lambda x: F.gelu(x.chunk(2, 1)[1]) * x.chunk(2, 1)[0],
        "squared_relu": lambda x: F.relu(x).square(),
        "snake": lambda x: x + torch.sin(2 * x).pow(2) / 2,
        "gumbel_off": lambda x: torch.softmax(x / 0.7, 1),
    }.items()
}
FUNCTIONS = {
    name: call(lambda m, x, f=function: f(x), positive=name.startswith("positive"))
    for name, function in {
        "cos": torch.cos,
        "sin_large": lambda x: torch.sin(x * 1000),
        "tan": lambda x: torch.tan(x * 0.4),
        "sinc_of_hand": lambda x: torch.sin(x) / (x.abs() + 1),
        "remainder": lambda x: torch.remainder(x * 5, 2),
        "modulo": lambda x: (x * 5) % 1.5,
        "fmod": lambda x: torch.fmod(x * 5, 2),
        "floor_divide": lambda x: torch.floor_divide(x * 5, 2),
        "clamp_min": lambda x: x.clamp(min=-0.2),
        "clamp_max": lambda x: x.clamp(max=0.2),
        "clamp_min_method": lambda x: x.clamp_min(0.1),
        "clip": lambda x: torch.clip(x, -1, 1),
        "positive_log_sum": lambda x: torch.log(x + 1e-6),
        "positive_rsqrt": lambda x: torch.rsqrt(x + 1e-5),
        "positive_pow_negative": lambda x: x.pow(-0.5),
        "positive_entropy": lambda x: -(x * x.log()).sum(1),
        "sigmoid_of_difference": lambda x: torch.sigmoid(x[:, 1:] - x[:, :-1]),
        "heaviside": lambda x: torch.heaviside(x, torch.tensor(0.5)),
        "signbit": lambda x: torch.where(x < 0, -x, x),
        "nan_to_num_of_quotient": lambda x: torch.nan_to_num(x / x, nan=0.0),
        "double_negation": lambda x: -(-x).relu(),
        "deg2rad": torch.deg2rad,
    }.items()
}
FUNCTIONS |= {
    name: call(lambda m, x, f=function: f(x))
    for name, function in (
        ("round_decimals", lambda x: torch.round(x, decimals=1)),
        ("atan", torch.atan),
        ("atan2", lambda x: torch.atan2(x, x.flip(1))),
        ("atan2_of_zeros", lambda x: torch.atan2(x * 0, x.relu())),
        ("asin", lambda x: torch.asin(x.tanh())),
        ("acos", lambda x: torch.acos(x.tanh())),
        ("asinh", torch.asinh),
        ("acosh", lambda x: torch.acosh(x.abs() + 1)),
        ("atanh", lambda x: torch.atanh(x.tanh() * 0.9)),
        ("xlogy", lambda x: torch.xlogy(x.abs(), x.abs())),
        ("isfinite", lambda x: torch.isfinite(x / x.relu()).float() + x),
        ("isinf", lambda x: torch.isinf((x.abs() + 1) / x.relu()).float() + x),
        ("nan_to_num_of_infinity", lambda x: torch.nan_to_num(x / x.relu(), 0.0, 2.0, -3.0)),
        ("copysign", lambda x: torch.copysign(torch.ones_like(x), x)),
    )
}
COMPARISONS = {
    name: call(lambda m, x, f=function: f(x), TOKENS)
    for name, function in {
        "ge": lambda x: (x >= 0).float(),
        "le_of_row": lambda x: (x <= x.mean(-1, keepdim=True)).float(),
        "between": lambda x: ((x > -1) & (x < 1)).float(),
        "eq_of_max": lambda x: (x == x.amax(-1, keepdim=True)).float(),
        "where_scalar_tensor": lambda x: torch.where(x > 0, torch.tensor(1.0), torch.tensor(0.0)),
        "where_broadcast": lambda x: torch.where(x[:, :, :1] > 0, x, -x),
        "masked_fill_row": lambda x: x.masked_fill(x[:, :, :1] > 0, 0.0),
        "masked_fill_inplace": lambda x: (x + 0).masked_fill_(x > 1, 1.0),
        "masked_softmax_of_where": lambda x: (
            torch.where(x > 0, x, float("-inf")).amax(-1).clamp(min=0)
        ),
        "any_keepdim": lambda x: (x > 2).any(-1, keepdim=True).float() * x,
        "all": lambda x: (x > -2).all(-1).float(),
        "sum_of_bools": lambda x: (x > 0).sum(-1).float(),
        "bool_times": lambda x: (x > 0) * x,
        "not_equal": lambda x: x.round().ne(0).float(),
        "clamped_index": lambda x: x * (x.abs() < 1).to(x),
        "causal_softmax": lambda x: (
            (x @ x.transpose(1, 2))
            .masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
            .softmax(-1)
        ),
        "tril_of_ones": lambda x: torch.tril(torch.ones(5, 5)) @ x,
    }.items()
}
REDUCTIONS = {
    name: call(lambda m, x, f=function: f(x))
    for name, function in {
        "mean_of_three": lambda x: x.mean((1, 2, 3)),
        "mean_negative": lambda x: x.mean((-1, -2), keepdim=True),
        "sum_of_two": lambda x: x.sum((1, -1)),
        "sum_keepdim": lambda x: x.sum(2, keepdim=True),
        "max_keepdim": lambda x: x.max(-1, keepdim=True)[0],
        "max_indices": lambda x: x.max(1)[1].float(),
        "min_indices": lambda x: x.min(-1)[1].float(),
        "max_both": lambda x: x.max(2)[0] + x.max(2)[1],
        "argmax_keepdim": lambda x: x.argmax(2, keepdim=True).float(),
        "argmin": lambda x: x.argmin(-1).float(),
        "argmax_of_flat": lambda x: x.flatten(1).argmax(1).float(),
        "argmax_as_mask": lambda x: (x.argmax(1, keepdim=True) == 0).float(),
        "max_pool_of_all": lambda x: x.flatten(2).max(-1).values,
        "amax_keepdim": lambda x: x.amax((1, 2), keepdim=True),
        "amin_of_two": lambda x: x.amin((2, 3)),
        "std_of_two": lambda x: x.std((2, 3)),
        "std_keepdim": lambda x: x.std(1, keepdim=True),
        "std_correction": lambda x: torch.std(x, 1, correction=0),
        "std_mean": lambda x: torch.cat(torch.std_mean(x, 1), 1),
        "var_of_three": lambda x: x.var((1, 2, 3), unbiased=False),
        "var_keepdim": lambda x: x.var(-1, keepdim=True, correction=0),
        "logsumexp_keepdim": lambda x: torch.logsumexp(x, (2, 3), keepdim=True),
        "norm_default": lambda x: x.flatten(1).norm(dim=1),
        "norm_keepdim": lambda x: x.norm(p=2, dim=1, keepdim=True),
        "norm_infinity": lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1),
        "norm_3": lambda x: torch.linalg.vector_norm(x, 3, dim=1),
        "norm_half": lambda x: x.abs().norm(p=0.5, dim=1),
        "linalg_norm": lambda x: torch.linalg.norm(x.flatten(1), dim=1),
        "matrix_norm": lambda x: torch.linalg.matrix_norm(x),
        "prod_keepdim": lambda x: x.prod(1, keepdim=True),
        "cumsum_rows": lambda x: x.cumsum(2),
        "cumsum_reversed": lambda x: x.flip(-1).cumsum(-1).flip(-1),
        "softmax_2_axes": lambda x: x.flatten(2).softmax(-1).view_as(x),
        "median_of_three": lambda x: x[:, :3].sort(1)[0][:, 1],
        "count_nonzero": lambda x: (x > 0).float().sum((1, 2, 3)),
        "range": lambda x: x.amax(1) - x.amin(1),
    }.items()
}
REDUCTIONS["norm_3"] = call(
    lambda m, x: torch.linalg.vector_norm(x, 3, dim=1), refused="use 1, 2 or infinity"
)
REDUCTIONS["norm_half"] = call(
    lambda m, x: x.abs().norm(p=0.5, dim=1), refused="use 1, 2 or infinity"
)
REDUCTIONS["median_of_three"] = call(lambda m, x: x[:, :3].sort(1)[0][:, 1])
REDUCTIONS["argmax_of_all"] = call(lambda m, x: x.argmax().float(), refused="name an axis")
REDUCTIONS["mean_of_all"] = call(lambda m, x: x.mean(), refused="keep axis 0")
JOINS = {
    name: call(lambda m, x, y, f=function: f(x, y), TOKENS, TOKENS)
    for name, function in {
        "cat_last": lambda x, y: torch.cat((x, y), -1),
        "cat_three": lambda x, y: torch.cat([x, y, x], 1),
        "stack_1": lambda x, y: torch.stack((x, y), 1),
        "stack_2": lambda x, y: torch.stack((x, y), dim=-2),
        "stack_sum": lambda x, y: torch.stack((x, y)).sum(0),
        "stack_max": lambda x, y: torch.stack((x, y), 0).max(0)[0],
        "vstack_of_tokens": lambda x, y: torch.cat((x[:, :2], y[:, 3:]), 1),
        "dstack": lambda x, y: torch.dstack((x, y)),
        "column_stack": lambda x, y: torch.column_stack((x[:, 0], y[:, 0])),
        "interleave": lambda x, y: torch.stack((x, y), 2).flatten(1, 2),
        "split_sizes": lambda x, y: sum(x.split([1, 1, 3], 1)[:2]) * y[:, :1],
        "split_number": lambda x, y: torch.cat(x.split(2, 2)[::-1], 2) + y,
        "chunk_uneven": lambda x, y: x.chunk(3, 1)[2] + y[:, :1],
        "unbind_stack": lambda x, y: torch.stack(x.unbind(1)[::-1], 1) + y,
        "tile": lambda x, y: x.tile(1, 2, 1) + y.tile((2, 1)),
        "repeat_new_axis": lambda x, y: x.repeat(1, 1, 1, 1).sum(0) + y,
        "repeat_interleave_last": lambda x, y: x.repeat_interleave(2, -1) + y.repeat(1, 1, 2),
        "expand_rows": lambda x, y: x[:, :1].expand(-1, 5, -1) + y,
        "broadcast_to": lambda x, y: torch.broadcast_to(x[:, :1], x.shape) * y,
        "swap": lambda x, y: torch.where(x > y, y, x) + torch.where(x > y, x, y),
        "narrow": lambda x, y: x.narrow(1, 1, 3) + y.narrow(1, 2, 3),
        "index_select": lambda x, y: torch.index_select(x, 2, torch.tensor([5, 0, 5])) + y[..., :3],
        "take_along_dim": lambda x, y: torch.take_along_dim(x, y.argsort(-1)[..., :1], -1),
        "take_along_topk": lambda x, y: torch.take_along_dim(x, y.topk(2, -1)[1], -1),
        "gather_argmax": lambda x, y: x.gather(-1, y.argmax(-1, keepdim=True)),
        "outer": lambda x, y: x[:, 0, :, None] * y[:, 0, None, :],
        "slice_step": lambda x, y: x[:, ::2, 1::2] + y[:, ::2, ::2],
        "slice_back": lambda x, y: x[:, -2:] + y[:, -3:-1],
        "select_last": lambda x, y: x[:, -1] + y.select(1, -2),
        "unsqueeze_squeeze": lambda x, y: (x.unsqueeze(1) + y.unsqueeze(1)).squeeze(1),
        "movedim": lambda x, y: x.movedim(1, 2) + y.movedim(-1, 1),
        "swapaxes": lambda x, y: x.swapaxes(1, 2) + y.mT,
        "ravel": lambda x, y: x.reshape(x.shape[0], -1) + y.flatten(1),
        "view_as": lambda x, y: x.flatten(1).view_as(y) + y,
        "unflatten": lambda x, y: (x + y).unflatten(-1, (2, -1)),
        "roll_one": lambda x, y: torch.roll(x, 1, 1) + y,
        "rot90": lambda x, y: torch.rot90(x, 2, (1, 2)) + y,
        "one_hot": lambda x, y: F.one_hot(x.argmax(-1), 6).float() * y,
    }.items()
}
JOINS["take_along_dim"] = call(
    lambda m, x, y: torch.take_along_dim(x, y.argsort(-1)[..., :1], -1),
    TOKENS,
    TOKENS,
    refused="one batch size only",
)
JOINS["take_along_topk"] = call(
    lambda m, x, y: torch.take_along_dim(x, y.topk(2, -1)[1], -1),
    TOKENS,
    TOKENS,
    refused="one batch size only",
)
PADS: dict[str, Case] = {
    f"{mode}_{rank}d": call(
        lambda m, x, p=pads, mode=mode: F.pad(x, p, mode=mode), SIGNAL if rank == 1 else IMAGE
    )
    for mode in ("constant", "reflect", "replicate", "circular")
    for rank, pads in ((1, (2, 3)), (2, (1, 2, 3, 1)))
}
PADS |= {
    "constant_value": call(lambda m, x: F.pad(x, (1, 1, 0, 2), value=-0.5)),
    "constant_channels": call(lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2))),
    "one_side": call(lambda m, x: F.pad(x, (0, 1)), SIGNAL),
    "crop": call(lambda m, x: F.pad(x, (-1, -1)), SIGNAL),
    "crop_and_pad": call(lambda m, x: F.pad(x, (-1, 2)), SIGNAL),
    "circular_1d_module": module(lambda: nn.CircularPad1d(2), SIGNAL),
    "conv_circular": module(lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")),
    "conv_same": module(lambda: nn.Conv1d(4, 3, 4, padding="same"), SIGNAL),
}
POOLS = {
    "max_1d_stride": call(lambda m, x: F.max_pool1d(x, 3, 2, 1), SIGNAL),
    "max_1d_ceil": call(lambda m, x: F.max_pool1d(x, 2, 2, ceil_mode=True), SIGNAL),
    "max_1d_dilation": call(lambda m, x: F.max_pool1d(x, 3, 1, 0, 2), SIGNAL),
    "max_2d_ceil": call(lambda m, x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
    "max_2d_dilation": call(lambda m, x: F.max_pool2d(x, (2, 3), 1, 1, (2, 1))),
    "avg_1d": call(lambda m, x: F.avg_pool1d(x, 3, 2, 1), SIGNAL),
    "avg_1d_ceil": call(lambda m, x: F.avg_pool1d(x, 2, 2, ceil_mode=True), SIGNAL),
    "avg_1d_exclude": call(lambda m, x: F.avg_pool1d(x, 3, 2, 1, count_include_pad=False), SIGNAL),
    "avg_2d_ceil": call(lambda m, x: F.avg_pool2d(x, 3, 2, ceil_mode=True)),
    "avg_2d_exclude": call(lambda m, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    "avg_2d_divisor": call(lambda m, x: F.avg_pool2d(x, 2, padding=1, divisor_override=3)),
    "avg_2d_divisor_ceil": call(
        lambda m, x: F.avg_pool2d(x, 3, 2, ceil_mode=True, divisor_override=3),
        refused="leave one of the two out",
    ),
    "adaptive_avg_1d": call(lambda m, x: F.adaptive_avg_pool1d(x, 4), SIGNAL),
    "adaptive_max_1d": call(lambda m, x: F.adaptive_max_pool1d(x, 4), SIGNAL),
    "adaptive_avg_2d": call(lambda m, x: F.adaptive_avg_pool2d(x, (3, None))),
    "adaptive_max_2d": call(lambda m, x: F.adaptive_max_pool2d(x, 1)),
    "lp_1d": call(lambda m, x: F.lp_pool1d(x, 2, 3), SIGNAL, positive=True),
    "global_pools": call(lambda m, x: torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)),
}
RESIZES = {
    name: call(lambda m, x, a=arguments: F.interpolate(x, **a), shape)
    for name, shape, arguments in (
        ("nearest_size", IMAGE, {"size": (5, 7)}),
        ("nearest_half", IMAGE, {"scale_factor": 0.5}),
        ("nearest_two_scales", IMAGE, {"scale_factor": (2, 3)}),
        ("nearest_exact", IMAGE, {"size": (5, 7), "mode": "nearest-exact"}),
        ("bilinear_scale", IMAGE, {"scale_factor": 1.5, "mode": "bilinear"}),
        ("bilinear_corners", IMAGE, {"size": 10, "mode": "bilinear", "align_corners": True}),
        ("bilinear_down", IMAGE, {"scale_factor": 0.5, "mode": "bilinear"}),
        ("bicubic_corners", IMAGE, {"size": (9, 4), "mode": "bicubic", "align_corners": True}),
        ("area", IMAGE, {"size": (4, 3), "mode": "area"}),
        (
            "recomputed",
            IMAGE,
            {"scale_factor": 1.7, "mode": "bilinear", "recompute_scale_factor": True},
        ),
        ("linear", SIGNAL, {"scale_factor": 2, "mode": "linear"}),
        ("linear_corners", SIGNAL, {"size": 5, "mode": "linear", "align_corners": True}),
        ("nearest_1d", SIGNAL, {"size": 4}),
    )
}
RESIZES |= {
    "upsample_module": module(lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
    "pixel_shuffle_function": call(lambda m, x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle_function": call(lambda m, x: F.pixel_unshuffle(x, 2)),
    "fold": call(lambda m, x: F.fold(x, (4, 6), (2, 2), stride=2), (8, 6)),
    "fold_overlapping": call(lambda m, x: F.fold(x, (4, 4), (3, 3), padding=1), (9, 16)),
    "fold_uneven": call(
        lambda m, x: F.fold(x, (8, 7), (3, 2), padding=(1, 0), stride=(2, 3)), (12, 8)
    ),
    "fold_dilated": call(lambda m, x: F.fold(x, (8, 6), (2, 3), dilation=2), (6, 12)),
    "unfold": call(lambda m, x: F.unfold(x, 2, stride=2)),
    "unfold_dilated": call(lambda m, x: F.unfold(x, (2, 3), dilation=2)),
    "unfold_fold": call(lambda m, x: F.fold(F.unfold(x, 2, stride=2), (8, 6), 2, stride=2)),
    "affine_grid": call(
        lambda m, x, t: F.grid_sample(
            x, F.affine_grid(t, x.shape, align_corners=False), align_corners=False
        ),
        IMAGE,
        (2, 3),
    ),
    "grid_sample_border": call(
        lambda m, x, g: F.grid_sample(x, g.tanh(), padding_mode="border", align_corners=True),
        IMAGE,
        (3, 3, 2),
    ),
}
NORMS = {
    "layer_norm_function": call(lambda m, x: F.layer_norm(x, (6,)), TOKENS),
    "layer_norm_no_bias": module(lambda: nn.LayerNorm(6, bias=False), TOKENS),
    "layer_norm_channels": call(
        lambda m, x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)
    ),
    "layer_norm_of_hand": call(
        lambda m, x: (
            (x - x.mean(1, keepdim=True))
            / torch.sqrt((x - x.mean(1, keepdim=True)).pow(2).mean(1, keepdim=True) + 1e-6)
        )
    ),
    "rms_norm_function": call(lambda m, x: F.rms_norm(x, (6,), eps=1e-5), TOKENS),
    "rms_norm_of_hand": call(
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.c,
        TOKENS,
        c=_numbers(6),
    ),
    "bias_of_channels": call(lambda m, x: x + m.c, SIGNAL, c=torch.linspace(-1, 1, 4).view(4, 1)),
    "wider_channels": call(lambda m, x: x[:, :1] * m.c, c=torch.linspace(-1, 1, 3).view(3, 1, 1)),
    "wider_rows": call(lambda m, x: x[..., :1] * m.c, TOKENS, c=torch.linspace(-1, 1, 6)),
    "group_norm_function": call(lambda m, x: F.group_norm(x, 2)),
    "instance_norm_1d": module(lambda: nn.InstanceNorm1d(4, affine=True), SIGNAL),
    "local_response_norm": call(lambda m, x: F.local_response_norm(x, 3, 1e-3, 0.5, 2.0)),
    "batch_norm_1d": module(lambda: nn.BatchNorm1d(4), SIGNAL),
    "batch_norm_rows": module(lambda: nn.BatchNorm1d(6), ROW),
    "normalize_rows": call(lambda m, x: F.normalize(x), ROW),
    "cosine_channels": call(lambda m, x, y: F.cosine_similarity(x, y, 1), IMAGE, IMAGE),
    "cosine_matrix": call(
        lambda m, x, y: F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).transpose(1, 2),
        TOKENS,
        TOKENS,
    ),
    "global_response": call(
        lambda m, x: (
            x
            * (
                x.norm(dim=(2, 3), keepdim=True)
                / (x.norm(dim=(2, 3), keepdim=True).mean(1, keepdim=True) + 1e-6)
            )
        ),
    ),
    "weight_norm": module(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), ROW),
    "standardised_weight": call(
        lambda m, x: F.conv2d(x, (m.c - m.c.mean()) / m.c.std()), c=_numbers(3, 4, 2, 2)
    ),
}
PRODUCTS = {
    "cdist": call(lambda m, x, y: torch.cdist(x, y), TOKENS, (4, 6)),
    "cdist_1": call(lambda m, x, y: torch.cdist(x, y, p=1), TOKENS, (4, 6)),
    "cdist_infinity": call(lambda m, x, y: torch.cdist(x, y, p=float("inf")), TOKENS, (4, 6)),
    "cdist_codebook": call(lambda m, x: torch.cdist(x, m.c), TOKENS, c=_numbers(1, 7, 6)),
    "nearest_centroid": call(
        lambda m, x: torch.cdist(x, m.c).argmin(-1).float(), TOKENS, c=_numbers(1, 7, 6)
    ),
    "distance_of_hand": call(
        lambda m, x: (x[:, :, None] - m.c).pow(2).sum(-1).sqrt(), TOKENS, c=_numbers(7, 6)
    ),
    "bilinear": module(lambda: nn.Bilinear(6, 4, 3), ROW, (4,)),
    "bilinear_tokens": module(lambda: nn.Bilinear(6, 4, 3, bias=False), TOKENS, (5, 4)),
    "matmul_broadcast": call(lambda m, x, y: x @ y, HEADS, (1, 6, 3)),
    "matmul_heads": call(lambda m, x, y: x @ y.unsqueeze(1), HEADS, (6, 3)),
    "matmul_rows": call(lambda m, x, y: (x[:, None] @ y).squeeze(1), ROW, (6, 3)),
    "matmul_column": call(lambda m, x, y: (x @ y[..., None])[..., 0], TOKENS, ROW),
    "mv": call(lambda m, x: torch.matmul(m.c, x.transpose(1, 2)), TOKENS, c=_numbers(3, 6)),
    "linear_function": call(
        lambda m, x: F.linear(x, m.c, m.d), TOKENS, c=_numbers(3, 6), d=_numbers(3)
    ),
    "addmm": call(lambda m, x: torch.addmm(m.d, x, m.c), ROW, c=_numbers(6, 3), d=_numbers(3)),
    "dot": call(lambda m, x, y: (x * y).sum(-1, keepdim=True), ROW, ROW),
    "gram": call(lambda m, x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)) / 48),
    "outer_einsum": call(lambda m, x, y: torch.einsum("bi,bj->bij", x, y), ROW, ROW),
    "einsum_implicit": call(lambda m, x: torch.einsum("bij,jk", x, m.c), TOKENS, c=_numbers(6, 2)),
    "einsum_scale": call(lambda m, x: torch.einsum("bij,j->bij", x, m.c), TOKENS, c=_numbers(6)),
    "einsum_transpose": call(lambda m, x: torch.einsum("bij->bji", x), TOKENS),
    "einsum_attention": call(
        lambda m, x: torch.einsum(
            "bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", x, x).softmax(-1), x
        ),
        HEADS,
    ),
    "conv1d_of_weights": call(
        lambda m, x: F.conv1d(x, m.c, dilation=2), SIGNAL, c=_numbers(3, 4, 2)
    ),
    "conv_transpose_groups": module(lambda: nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, groups=2)),
    "conv2d_dilated": module(lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)),
    "kron_of_hand": call(lambda m, x, y: (x[:, :, None] * y[:, None]).flatten(1), ROW, (4,)),
}


def _attend(**settings: Any) -> Callable[..., Tensor]:
    return lambda m, x: F.scaled_dot_product_attention(x, x * 0.5, x + 1, **settings)


ATTENTION = {
    "causal": call(_attend(is_causal=True), HEADS),
    "scale": call(_attend(scale=0.3), HEADS),
    "causal_scale": call(_attend(is_causal=True, scale=1.0), HEADS),
    "mask_bool": call(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.c),
        HEADS,
        c=torch.ones(5, 5).tril().bool(),
    ),
    "mask_window": call(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.c),
        HEADS,
        c=(torch.ones(5, 5).tril(1).triu(-1)).bool(),
    ),
    "mask_numbers": call(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.c),
        HEADS,
        c=_numbers(1, 2, 5, 5),
    ),
    "mask_of_hand": call(
        lambda m, x: (x @ x.mT).masked_fill(m.c, float("-inf")).softmax(-1) @ x,
        HEADS,
        c=torch.ones(5, 5).triu(2).bool(),
    ),
    "grouped": call(
        lambda m, x, y: F.scaled_dot_product_attention(x, y, y, enable_gqa=True),
        (4, 5, 6),
        (2, 5, 6),
    ),
    "multi_query": call(
        lambda m, x, y: F.scaled_dot_product_attention(x, y, y, enable_gqa=True),
        (4, 5, 6),
        (1, 7, 6),
    ),
    "one_head_of_keys": call(
        lambda m, x, y: F.scaled_dot_product_attention(x, y, y * 2), HEADS, (1, 5, 6)
    ),
    "nothing_passes": call(
        lambda m, x: F.scaled_dot_product_attention(
            x, torch.cat([x[..., :6].neg(), x[..., 6:] + 1], -1), torch.cat([x[..., 6:], x], -1)
        ),
        HEADS,
    ),
    "cross": call(lambda m, x, y: F.scaled_dot_product_attention(x, y, y), HEADS, (2, 7, 6)),
    "other_width": call(
        lambda m, x, y: F.scaled_dot_product_attention(x, x, y),
        HEADS,
        (2, 5, 4),
        refused="repeat them",
    ),
    "without_heads": call(lambda m, x: F.scaled_dot_product_attention(x, x, x), TOKENS),
    "linear_attention": call(
        lambda m, x: x.softmax(-1) @ (x.softmax(-2).transpose(-2, -1) @ x), HEADS
    ),
}
PARTS = {
    name: call(lambda m, x, f=function: f(x))
    for name, function in {
        # (N, C, H, W) in windows or patches, which go to axis 0 and come back
        "softmax_of_windows": lambda x: x.reshape(-1, 2, 8, 6).softmax(1).reshape(x.shape),
        "mean_of_windows": lambda x: (
            x.view(-1, 8, 6) - x.view(-1, 8, 6).mean(1, keepdim=True)
        ).view(x.shape),
        "windows_add_constant": lambda x: (
            x.reshape(-1, 8, 6) + torch.arange(48.0).view(1, 8, 6)
        ).view(x.shape),
        "windows_matmul": lambda x: (x.reshape(-1, 8, 6) @ x.reshape(-1, 8, 6).mT).view(
            x.shape[0], 4, 8, 8
        ),
        "windows_slice": lambda x: x.reshape(-1, 8, 6)[:, 1:3, ::2].reshape(x.shape[0], -1),
        "windows_cat": lambda x: torch.cat(
            (x.reshape(-1, 8, 6), x.reshape(-1, 8, 6) * 2), 1
        ).reshape(x.shape[0], -1),
        "windows_max": lambda x: x.reshape(-1, 8, 6).max(1)[0].reshape(x.shape[0], -1),
        "windows_flip": lambda x: x.reshape(-1, 8, 6).flip(1).reshape(x.shape),
        "windows_chunk": lambda x: x.reshape(-1, 8, 6).chunk(2, 1)[1].reshape(x.shape[0], -1),
        "windows_where": lambda x: torch.where(x.view(-1, 6) > 0, x.view(-1, 6), 0.1).view(x.shape),
    }.items()
}
LAYERS = {
    "lstm_bidirectional": module(lambda: Bidirectional(nn.LSTM), TOKENS),
    "gru_two_layers": module(lambda: Bidirectional(nn.GRU), TOKENS),
    "identity_chain": module(
        lambda: nn.Sequential(nn.Identity(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(24, 2)),
        (4, 6),
    ),
    "encoder_layer": module(
        lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True), TOKENS
    ),
    "encoder_layer_batch_second": module(
        lambda: Turned(nn.TransformerEncoderLayer(6, 2, 8)), TOKENS
    ),
    "decoder_layer": module(
        lambda: nn.TransformerDecoderLayer(6, 2, 8, batch_first=True), TOKENS, (3, 6)
    ),
    "rnn_cell": module(lambda: nn.GRUCell(6, 6), ROW, ROW),
    "embedding_bag_of_hand": call(lambda m, x: x.softmax(-1) @ m.c, TOKENS, c=_numbers(6, 3)),
}


class Bidirectional(Recurrent):
    """Two layers, in both directions."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        nn.Module.__init__(self)
        self.layer = kind(6, 4, num_layers=2, bidirectional=True, batch_first=True)  # type: ignore[call-arg]


class Turned(nn.Module):
    """A layer that has the batch in axis 1."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x.transpose(0, 1)).transpose(0, 1)
        return made


#: Where sizes differ from run to run: the case, and the axes; see `test_operators_of_any_size`.
SIZES: dict[str, tuple[Case, tuple[int, ...]]] = {
    "drop_end": (call(lambda m, x: x[:, :, :-2], SIGNAL), (0, 2)),
    "drop_both": (call(lambda m, x: x[:, :, 1:-1], SIGNAL), (0, 2)),
    "drop_and_step": (call(lambda m, x: x[:, :, 1:-1:2], SIGNAL), (0, 2)),
    "last": (call(lambda m, x: x[:, :, -1], SIGNAL), (0, 2)),
    "last_three": (call(lambda m, x: x[:, :, -3:], SIGNAL), (0, 2)),
    "last_but_one": (call(lambda m, x: x[:, :, -3:-1], SIGNAL), (0, 2)),
    "by_size": (call(lambda m, x: x[:, :, : x.shape[2] - 1], SIGNAL), (0, 2)),
    "difference": (call(lambda m, x: x[:, 1:] - x[:, :-1], TOKENS), (0, 1)),
    "flip": (call(lambda m, x: x.flip(2), SIGNAL), (0, 2)),
    "flip_image": (call(lambda m, x: x.flip((2, 3))), (0, 2, 3)),
    "roll": (call(lambda m, x: x.roll(2, 2), SIGNAL), (0, 2)),
    "roll_image": (call(lambda m, x: x.roll((-1, 2), (2, 3))), (0, 2, 3)),
    "reflect": (call(lambda m, x: F.pad(x, (2, 1), mode="reflect"), SIGNAL), (0, 2)),
    "reflect_image": (call(lambda m, x: F.pad(x, (1, 2, 2, 0), mode="reflect")), (0, 2, 3)),
    "replicate": (call(lambda m, x: F.pad(x, (2, 1), mode="replicate"), SIGNAL), (0, 2)),
    "circular_image": (call(lambda m, x: F.pad(x, (1, 1, 1, 1), mode="circular")), (0, 2, 3)),
    "unsqueeze_image": (call(lambda m, x: x.mean(1).unsqueeze(1) * x), (0, 2, 3)),
    "shuffle_by_views": (
        call(lambda m, x: x.view(x.shape[0], 2, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)),
        (0, 2, 3),
    ),
    "groups_of_channels": (
        call(lambda m, x: x.view(x.shape[0], 2, 2, *x.shape[2:]).mean(2)),
        (0, 2, 3),
    ),
    "window_mask": (
        call(
            lambda m, x: F.scaled_dot_product_attention(
                x,
                x,
                x,
                attn_mask=(torch.arange(x.shape[2])[:, None] - torch.arange(x.shape[2])[None]).abs()
                < 3,
            ),
            HEADS,
        ),
        (0, 2),
    ),
    "argmax": (call(lambda m, x: x.argmax(1).float(), TOKENS), (0, 1)),
    "cdist": (call(lambda m, x: torch.cdist(x, m.c), TOKENS, c=_numbers(1, 7, 6)), (0, 1)),
    "response_norm": (call(lambda m, x: F.local_response_norm(x, 3)), (0, 2, 3)),
    "windows_softmax": (call(lambda m, x: x.reshape(-1, 8, 6).softmax(1).view(x.shape)), (0,)),
}
RELATIVES = {
    f"{family}-{name}": case
    for family, cases in {
        "activations": ACTIVATIONS,
        "functions": FUNCTIONS,
        "comparisons": COMPARISONS,
        "reductions": REDUCTIONS,
        "joins": JOINS,
        "pads": PADS,
        "pools": POOLS,
        "resizes": RESIZES,
        "norms": NORMS,
        "products": PRODUCTS,
        "attention": ATTENTION,
        "parts": PARTS,
        "layers": LAYERS,
    }.items()
    for name, case in cases.items()
}

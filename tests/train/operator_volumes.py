"""Operators on volumes, unpooling and small matrices, for `test_operator_sweep`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from operator_cases import Call, Case, call, module
from torch import Tensor, nn

VOLUME = (3, 5, 8, 6)
SQUARE = (3, 3)


def _positive(x: Tensor) -> Tensor:
    """Matrices that have an inverse."""
    return x @ x.transpose(-1, -2) + torch.eye(x.shape[-1])


def _normed() -> nn.Module:
    norm = nn.BatchNorm3d(4)
    nn.init.uniform_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    return nn.Sequential(nn.Conv3d(3, 4, 3, bias=False), norm, nn.ReLU(), nn.Conv3d(4, 2, 3))


def _video() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(6, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(6, 3),
    )  # fmt: skip


CONVOLUTIONS = {
    "conv": module(lambda: nn.Conv3d(3, 4, 3, padding=1), VOLUME),
    "conv_1": module(lambda: nn.Conv3d(3, 4, 1), VOLUME),
    "conv_frames": module(lambda: nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1)), VOLUME),
    "conv_time": module(lambda: nn.Conv3d(3, 4, (3, 1, 1), padding=(1, 0, 0)), VOLUME),
    "conv_strides": module(
        lambda: nn.Conv3d(3, 6, (3, 2, 3), (2, 1, 2), (1, 0, 1), groups=3), VOLUME
    ),
    "conv_wide_strides": module(lambda: nn.Conv3d(3, 4, 2, stride=(2, 3, 3)), VOLUME),
    "conv_dilated": module(lambda: nn.Conv3d(3, 4, 3, padding=2, dilation=2), VOLUME),
    "conv_same": module(lambda: nn.Conv3d(3, 4, (3, 4, 2), padding="same"), VOLUME),
    "conv_replicate": module(
        lambda: nn.Conv3d(3, 4, 3, padding=1, padding_mode="replicate"), VOLUME
    ),
    "conv_norm": module(_normed, VOLUME),
    "group_norm": module(lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.GroupNorm(2, 4)), VOLUME),
    "transposed": module(lambda: nn.ConvTranspose3d(3, 4, 2, stride=2), VOLUME),
    "transposed_groups": module(
        lambda: nn.ConvTranspose3d(4, 6, 3, 2, 1, output_padding=1, groups=2), (4, 4, 4, 3)
    ),
    "transposed_gaps": module(lambda: nn.ConvTranspose3d(3, 4, 2, stride=3, dilation=1), VOLUME),
    "transposed_dilated": module(lambda: nn.ConvTranspose3d(3, 4, 3, dilation=2), VOLUME),
    "video": module(_video, VOLUME),
}
POOLS = {
    "max": module(lambda: nn.MaxPool3d(2), VOLUME),
    "max_padded": module(lambda: nn.MaxPool3d(3, 2, 1, ceil_mode=True), VOLUME),
    "max_frames": module(lambda: nn.MaxPool3d((1, 2, 2)), VOLUME),
    "max_dilated": module(lambda: nn.MaxPool3d(2, 1, dilation=2), VOLUME),
    "avg": module(lambda: nn.AvgPool3d(2), VOLUME),
    "avg_padded": module(lambda: nn.AvgPool3d(3, 2, 1, count_include_pad=False), VOLUME),
    "avg_divisor": module(lambda: nn.AvgPool3d(2, divisor_override=3), VOLUME),
    "avg_divisor_ceil": module(
        lambda: nn.AvgPool3d(2, ceil_mode=True, divisor_override=3),
        VOLUME,
        refused="divisor_override does not go with ceil_mode",
    ),
    "adaptive_avg": module(lambda: nn.AdaptiveAvgPool3d((2, 3, 2)), VOLUME),
    "adaptive_avg_frames": module(lambda: nn.AdaptiveAvgPool3d((5, 1, 1)), VOLUME),
    "adaptive_avg_one": module(lambda: nn.AdaptiveAvgPool3d(1), VOLUME),
    "adaptive_max": module(lambda: nn.AdaptiveMaxPool3d((2, 3, 2)), VOLUME),
    "trilinear": module(lambda: nn.Upsample(scale_factor=2, mode="trilinear"), VOLUME),
    "trilinear_corners": module(
        lambda: nn.Upsample((7, 9, 8), mode="trilinear", align_corners=True), VOLUME
    ),
}


def _twice(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """As in SegNet: what is unpooled is not what was pooled, and windows of zeros are tied."""
    y, places = F.max_pool2d(x.relu(), kernel, return_indices=True)
    return F.max_unpool2d(2.0 * y + 1.0, places, kernel)


UNPOOLS = {
    "square": call(lambda m, x: _twice(x, (2, 2))),
    "oblong": call(lambda m, x: _twice(x, (2, 3))),
    "odd": call(
        lambda m, x: F.max_unpool2d(
            *F.max_pool2d(x, 2, return_indices=True), 2, output_size=x.shape[2:]
        ),
        (4, 9, 7),
    ),
    "overlapping": call(
        lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 3, 2, return_indices=True), 3, 2),
        (4, 9, 7),
        refused="stride = kernel_size",
    ),
}
MATRICES = {
    "inverse_1": call(lambda m, x: torch.inverse(_positive(x)), (1, 1)),
    "inverse_2": call(lambda m, x: torch.linalg.inv(_positive(x)), (4, 2, 2)),
    "inverse_3": call(lambda m, x: torch.inverse(_positive(x)), SQUARE),
    "inverse_4": call(lambda m, x: torch.linalg.inv(_positive(x)), (4, 4)),
    "inverse_5": call(lambda m, x: torch.linalg.inv(x), (5, 5)),
    "inverse_33": call(
        lambda m, x: torch.linalg.inv(x), (33, 33), refused="matrices of up to 32 rows work"
    ),
    "det": call(lambda m, x: torch.det(_positive(x)), SQUARE),
    "linalg_det": call(lambda m, x: torch.linalg.det(x), (4, 4)),
    "logdet": call(lambda m, x: torch.logdet(_positive(x)), SQUARE),
    "slogdet": call(lambda m, x: torch.linalg.slogdet(_positive(x))[1], SQUARE),
    "solve": call(lambda m, x: torch.linalg.solve(_positive(x), x), SQUARE),
    "solve_right": call(lambda m, x: torch.linalg.solve(_positive(x), x, left=False), SQUARE),
    "solve_vector": call(lambda m, x: torch.linalg.solve(_positive(x), x[:, 0]), SQUARE),
    "det_5": call(lambda m, x: torch.linalg.det(x), (5, 5)),
    "det_of_no_rank": call(lambda m, x: torch.linalg.det(x @ m.c), (5, 5), c=torch.zeros(5, 5)),
    "solve_5": call(lambda m, x: torch.linalg.solve(x, x[..., :2]), (5, 5)),
    "cholesky": call(lambda m, x: torch.linalg.cholesky(_positive(x)), SQUARE),
    "cholesky_upper": call(lambda m, x: torch.linalg.cholesky(_positive(x), upper=True), SQUARE),
    "cholesky_solve": call(
        lambda m, x: torch.cholesky_solve(x[..., :2], torch.linalg.cholesky(_positive(x))), SQUARE
    ),
    "triangular_right": call(
        lambda m, x: torch.linalg.solve_triangular(_positive(x), x, upper=True, left=False), SQUARE
    ),
    "eigenvalues": call(
        lambda m, x: torch.linalg.eigvalsh(_positive(x)), SQUARE, refused="factors of matrices"
    ),
}
CASES = {
    f"{family}-{name}": case
    for family, cases in (
        ("volumes", CONVOLUTIONS),
        ("volume_pools", POOLS),
        ("unpools", UNPOOLS),
        ("matrices", MATRICES),
    )
    for name, case in cases.items()
}
#: Operators whose sizes may differ from run to run: the case, and the axes.
SIZES: dict[str, tuple[Case, tuple[int, ...]]] = {
    "volumes-conv_any_depth": (CONVOLUTIONS["conv"], (0, 2)),
    "volumes-local_response": (
        Case(lambda: Call(lambda m, x: F.local_response_norm(x, 3)), ((5, 8, 6),)),
        (0, 2, 3),
    ),
}

"""Int8 weights that tables are built from: see `lutra.ops.compact_tables`.

A file with compact tables holds weights of 8 bits, and a session multiplies them with centroids.
A layer of `PQ(weight_bits=8)` has these weights and these tables from calibration on, so training
adapts to their rounding and such a file loses nothing.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from lutra.ops.limits import INT8_MAX

_MOST: Final = torch.finfo(torch.float32).max
_LEAST: Final = 1e-30  # the step of an output without weights


@torch.no_grad()
def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights (M, D) in -127..127 and their float32 steps (M), one for each output."""
    rows = rows.float()
    step = (rows.abs().amax(1) / INT8_MAX).clamp_min(_LEAST)
    return (rows / step[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), step


@torch.no_grad()
def factors(step: Tensor, grid_scale: float, table_scale: Tensor) -> Tensor:
    """What makes table entries of sums of integer products, float32 (M).

    Args:
        step: of the weights, float32 (M).
        grid_scale: the step of the activation grid.
        table_scale: float32 (M), the step of the tables.
    """
    return (step * (grid_scale / table_scale)).clamp_max(_MOST)


@torch.no_grad()
def build_tables(offsets: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """int8 tables (B, K, M), the bits of `lutra.ops.compact_tables.build_tables`.

    Args:
        offsets: float32 (B, K, V), centroids on the grid less its zero.
        weight: float32 (B, V, M), integers.
        factor: float32 (M).
    """
    sums = torch.bmm(offsets, weight)  # exact: at most 64 products of at most 127 * 127
    return (sums * factor).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)

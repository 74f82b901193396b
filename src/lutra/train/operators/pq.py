"""Product-quantised layers: native kernels on the CPU, plain PyTorch on other devices.

The functions beside `frozen_pq` are what the autograd functions of the layers call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from lutra.ops import OPS
from lutra.train.encoder import Encoder, encoder_of
from lutra.train.geometry import Geometry, Grid
from lutra.train.operators import native, portable
from lutra.train.operators.frozen import FrozenNode, frozen_kernel, frozen_native
from lutra.train.parts import Distance, Group


def _is_native(x: Tensor) -> bool:
    return x.device.type == "cpu"


@frozen_kernel("pq_conv2d", "pq_linear")
def frozen_pq(x: Tensor, node: FrozenNode, tensors: Mapping[str, Tensor]) -> Tensor:
    """Sums of int8 table rows that the codes of x choose.

    Tensors: tables (B, K, M) int8, scale (M) and bias (M) float32; with encoder "nearest" centroids
    (B, K, V) uint8, with "tree" splits (B, L) int32 and thresholds (B, K - 1) uint8.
    """
    centroids, splits, thresholds = (
        tensors.get(role) for role in ("centroids", "splits", "thresholds")
    )
    group = cast(Group, node.attrs.get("group", "patch"))
    distance = cast(Distance, node.attrs.get("distance", "l2"))
    encoder = encoder_of(str(node.attrs["encoder"]), centroids, splits, thresholds, group, distance)
    geometry, grid = Geometry.of_attrs(node.attrs, x.shape[1]), Grid.of_attrs(node.attrs)
    tables, scale, bias = (tensors[role] for role in ("tables", "scale", "bias"))
    if not _is_native(x):
        y = portable.forward(x, geometry, grid, encoder, tables, scale, bias)[0]
        return y.contiguous(memory_format=native.layout(x))
    return frozen_native(x, node, tensors)


def forward(
    x: Tensor,
    geometry: Geometry,
    grid: Grid,
    encoder: Encoder,
    tables: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Training forward, tables changing at every step: y (N, M, H', W') and codes (B, rows)."""
    bias = torch.zeros_like(scale)
    if not _is_native(x):
        return portable.forward(x, geometry, grid, encoder, tables, scale, bias)
    height, width = geometry.out_size(x.shape[2], x.shape[3])
    codes = torch.empty((tables.shape[0], x.shape[0] * height * width), dtype=torch.uint8)
    layer = native.make_layer(
        "pq_conv2d",
        {**geometry.attrs(OPS["pq_conv2d"].attrs), **grid.attrs, **encoder.attrs},
        {**encoder.tensors, "tables": tables, "scale": scale, "bias": bias},
    )
    return native.run(layer, geometry, x, tables.shape[2], codes), codes


def table_gradient(codes: Tensor, gradient: Tensor, centroids: int) -> Tensor:
    """grad (B, K, M): the output gradient (N, M, H', W') added up by code."""
    if _is_native(codes):
        return native.table_gradient(codes, gradient.float(), centroids)
    return portable.table_gradient(codes, gradient.float(), centroids)


def code_pairs(codes: Tensor, centroids: int) -> Tensor:
    """How often two codes of (B, n) meet in a row: int32 (B K, B K)."""
    if _is_native(codes):
        return native.code_pairs(codes, centroids)
    return portable.code_pairs(codes, centroids)


def cluster_sums(
    geometry: Geometry, grid: Grid, x: Tensor, codes: Tensor, centroids: int, dim: int
) -> tuple[Tensor, Tensor]:
    """Sums (B, K, V) of the quantised sub-vectors of each code, and their counts (B, K), int64."""
    if _is_native(x):
        return native.cluster_sums(geometry, grid, x, codes, centroids, dim)
    return portable.cluster_sums(geometry, grid, x, codes, centroids, dim)

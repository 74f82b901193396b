"""The lookup layers as operators: native kernels on the CPU, plain PyTorch on other devices.

`lutra::pq_conv2d` and `lutra::pq_linear` are custom operators, so that `torch.export` keeps a
lookup layer as one node. The training functions below are what the layers' autograd functions
call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lutra.train.encoder import Encoder, encoder_of
from lutra.train.geometry import Geometry, Quantization
from lutra.train.operators import native, portable


def _is_native(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _geometry(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Geometry:
    return Geometry(
        x.shape[1],
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        (dilation[0], dilation[1]),
    )


@torch.library.custom_op("lutra::pq_conv2d", mutates_args=())
def pq_conv2d(
    x: Tensor,
    centroids: Tensor | None,
    tables: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    encoder: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    splits: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """Product-quantised convolution of x (N, C, H, W) float32: int8 tables, exact integer sums.

    tables (B, K, M) int8, scale (M) and bias (M) float32; with encoder "nearest" centroids
    (B, K, V) uint8, with "tree" splits (B, L) int32 and thresholds (B, K - 1) uint8.
    """
    codebooks = encoder_of(encoder, centroids, splits, thresholds)
    geometry = _geometry(x, kernel, stride, padding, dilation)
    grid = Quantization(act_scale, act_zero, act_bits)
    if not _is_native(x):
        y = portable.forward(x, geometry, grid, codebooks, tables, scale, bias)[0]
        return y.contiguous(memory_format=native.layout(x))
    layer = native.cached_layer(geometry, grid, codebooks, tables, scale, bias)
    return native.run(layer, geometry, x.float(), tables.shape[2], None)


@pq_conv2d.register_fake
def _(
    x: Tensor,
    centroids: Tensor | None,
    tables: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    encoder: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    splits: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    height, width = _geometry(x, kernel, stride, padding, dilation).out_size(*x.shape[2:])
    return native.empty_output(x, tables.shape[2], height, width)


@torch.library.custom_op("lutra::pq_linear", mutates_args=())
def pq_linear(
    x: Tensor,
    centroids: Tensor | None,
    tables: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    encoder: str,
    splits: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """Product-quantised linear layer of x (..., D) -> (..., M). Tensors as in `pq_conv2d`."""
    rows = x.reshape(-1, x.shape[-1])[:, :, None, None]
    y: Tensor = pq_conv2d(
        rows, centroids, tables, scale, bias, act_scale, act_zero, act_bits, encoder,
        (1, 1), (1, 1), (0, 0), (1, 1), splits, thresholds,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], tables.shape[2])


@pq_linear.register_fake
def _(
    x: Tensor,
    centroids: Tensor | None,
    tables: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    encoder: str,
    splits: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], tables.shape[2]), dtype=torch.float32)


def forward(
    x: Tensor,
    geometry: Geometry,
    grid: Quantization,
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
    layer = native.make_layer(geometry, grid, encoder, tables, scale, bias)
    return native.run(layer, geometry, x, tables.shape[2], codes), codes


def table_gradient(codes: Tensor, gradient: Tensor, centroids: int) -> Tensor:
    """grad (B, K, M): the output gradient (N, M, H', W') added up by code."""
    if _is_native(codes):
        return native.table_gradient(codes, gradient.float(), centroids)
    return portable.table_gradient(codes, gradient.float(), centroids)


def cluster_sums(
    geometry: Geometry, grid: Quantization, x: Tensor, codes: Tensor, centroids: int, dim: int
) -> tuple[Tensor, Tensor]:
    """Sums (B, K, V) of the quantised sub-vectors of each code, and their counts (B, K), int64."""
    if _is_native(x):
        return native.cluster_sums(geometry, grid, x, codes, centroids, dim)
    return portable.cluster_sums(geometry, grid, x, codes, centroids, dim)

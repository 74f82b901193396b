"""Layers of response tables: native kernels on the CPU, plain PyTorch on other devices.

The functions beside `frozen_lookup` are what the autograd functions of the layers call.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lutra.ops.lookup import pack_weights, unpack_weights
from lutra.train.geometry import Geometry, Grid
from lutra.train.operators import native, portable
from lutra.train.operators.frozen import FrozenNode, frozen_kernel


def unpack(weight: Tensor, bits: int, depth: int) -> Tensor:
    """Weight indices (M, D) uint8 of packed ones (M, P)."""
    index = unpack_weights(weight.cpu().numpy(), bits, depth)
    return torch.from_numpy(index).to(weight.device)


def pack(index: Tensor, bits: int) -> Tensor:
    """Packed weights (M, P) uint8 of indices (M, D) uint8."""
    return torch.from_numpy(pack_weights(index.cpu().numpy(), bits)).to(index.device)


def portable_sums(
    x: Tensor, geometry: Geometry, grid: Grid, index: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums (N, M, H', W') as float32, and activation indices like x.

    One convolution whose channels are the columns of the table and whose weights say which column
    counts: every sum is exact.
    """
    outputs, columns = index.shape[0], table.shape[1]
    kernel = index.view(outputs, geometry.channels, *geometry.kernel)
    kinds = torch.arange(columns, dtype=torch.uint8, device=x.device).view(-1, 1, 1)
    chosen = (kernel[:, :, None] == kinds).float()  # (M, C, N_w, kh, kw)
    chosen = chosen.view(outputs, -1, *geometry.kernel)
    indices = portable.quantize(x, grid).to(torch.uint8)
    height, width = geometry.out_size(x.shape[2], x.shape[3])
    images = max(1, portable.block_size(x) // max(1, geometry.depth * columns * height * width))
    sums = []
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 sums would not be exact
        for part in torch.split(indices, images):
            values = table.float()[part.long()]  # (n, C, H, W, N_w)
            values = values.permute(0, 1, 4, 2, 3).reshape(len(part), -1, *x.shape[2:])
            sums.append(
                F.conv2d(values, chosen, None, geometry.stride, geometry.padding, geometry.dilation)
            )
    y = torch.cat(sums) if sums else x.new_zeros((0, outputs, height, width))
    return y.contiguous(memory_format=native.layout(x)), indices


def forward(
    x: Tensor,
    geometry: Geometry,
    grid: Grid,
    index: Tensor,
    table: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Training forward, tables changing at every step.

    Args:
        x: (N, C, H, W) float32, dense in memory.
        index: weight indices (M, D) uint8.
        table: (N_f, N_w) int8.
        scale: (M) float32, of the sums.

    Returns:
        y (N, M, H', W') and the activation indices, uint8, of the shape and layout of x.
    """
    if x.device.type != "cpu":
        sums, indices = portable_sums(x, geometry, grid, index, table)
        return sums * scale.view(-1, 1, 1), indices
    indices = torch.empty_like(x, dtype=torch.uint8)
    layer = native.make_layer(
        "lookup_conv2d",
        {**native.conv_attrs(geometry, grid), "weight_bits": 8},
        {"weight": index, "table": table, "scale": scale, "bias": torch.zeros_like(scale)},
    )
    return native.run(layer, geometry, x, index.shape[0], indices), indices


def input_gradient(
    x: Tensor, indices: Tensor, gradient: Tensor, low: float, high: float, levels: int
) -> tuple[Tensor, Tensor, float]:
    """What follows from the gradient of the looked-up activations.

    Args:
        x, indices, gradient: of one shape and memory layout. `gradient` is overwritten: it becomes
            zero where x is not between `low` and `high`.

    Returns:
        The sum of the gradient over each index (N_f) float64, how often each occurs (N_f) int64,
        and the sum of gradient * x where x is between the limits.
    """
    if x.device.type == "cpu":
        return native.lookup_gradient(x, indices, gradient, low, high, levels)
    flat = indices.flatten().int()
    cells = torch.zeros(levels, dtype=torch.float64, device=x.device)
    counts = torch.zeros(levels, dtype=torch.int64, device=x.device)
    for k in range(levels):  # sums in a fixed order, unlike scatter-add on a GPU
        member = flat == k
        cells[k] = (gradient.flatten() * member).sum(dtype=torch.float64)
        counts[k] = member.sum()
    gradient.mul_((x > low) & (x < high))
    return cells, counts, float((gradient * x).sum(dtype=torch.float64))


@frozen_kernel("lookup_conv2d", "lookup_linear")
def frozen_lookup(x: Tensor, node: FrozenNode, tensors: Mapping[str, Tensor]) -> Tensor:
    """Sums of reads from one table.

    Tensors: weight (M, P) packed indices uint8, table (N_f, N_w) int8, scale (M) and bias (M)
    float32.
    """
    geometry, grid = Geometry.of_attrs(node.attrs, x.shape[1]), Grid.of_attrs(node.attrs)
    weight, table, scale, bias = (tensors[role] for role in ("weight", "table", "scale", "bias"))
    if x.device.type != "cpu":
        bits = int(node.attrs["weight_bits"])  # type: ignore[arg-type]
        sums, _ = portable_sums(x, geometry, grid, unpack(weight, bits, geometry.depth), table)
        return sums * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
    layer = native.cached(
        (weight, table, scale, bias),
        node,
        lambda: native.make_layer(node.op, node.attrs, tensors),
    )
    return native.run(layer, geometry, x, weight.shape[0], None)

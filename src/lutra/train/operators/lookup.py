"""The lookup layers of response tables as operators: native kernels on the CPU, else PyTorch.

`lutra::lookup_conv2d` and `lutra::lookup_linear` are custom operators, so that `torch.export` keeps
a layer as one node. The functions below them are what training calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lutra.ops.lookup import pack_weights, unpack_weights
from lutra.train.geometry import Geometry, Quantization
from lutra.train.operators import native, portable


def unpack(weight: Tensor, bits: int, depth: int) -> Tensor:
    """Weight indices (M, D) uint8 of packed ones (M, P)."""
    index = unpack_weights(weight.cpu().numpy(), bits, depth)
    return torch.from_numpy(index).to(weight.device)


def pack(index: Tensor, bits: int) -> Tensor:
    """Packed weights (M, P) uint8 of indices (M, D) uint8."""
    return torch.from_numpy(pack_weights(index.cpu().numpy(), bits)).to(index.device)


def portable_sums(
    x: Tensor, geometry: Geometry, grid: Quantization, index: Tensor, table: Tensor
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
    grid: Quantization,
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
    layer = native.make_lookup(geometry, grid, index, table, scale, torch.zeros_like(scale))
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


def _geometry(
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Geometry:
    return Geometry(
        channels,
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        (dilation[0], dilation[1]),
    )


@torch.library.custom_op("lutra::lookup_conv2d", mutates_args=())
def lookup_conv2d(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    weight_bits: int,
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Convolution of x (N, C, H, W) float32 by reads from a table: weight (M, P) packed indices,
    table (N_f, N_w) int8, scale (M) and bias (M) float32."""
    geometry = _geometry(channels, kernel, stride, padding, dilation)
    grid = Quantization(act_scale, act_zero, act_bits)
    if x.device.type != "cpu":
        index = unpack(weight, weight_bits, geometry.depth)
        sums, _ = portable_sums(x.float(), geometry, grid, index, table)
        y: Tensor = sums * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
        return y

    def make() -> native.Layer:
        index = unpack(weight, weight_bits, geometry.depth)
        return native.make_lookup(geometry, grid, index, table, scale, bias)

    layer = native.cached((weight, table, scale, bias), (geometry, grid, weight_bits), make)
    return native.run(layer, geometry, x.float(), weight.shape[0], None)


@lookup_conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    weight_bits: int,
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    height, width = _geometry(channels, kernel, stride, padding, dilation).out_size(*x.shape[2:])
    return native.empty_output(x, weight.shape[0], height, width)


@torch.library.custom_op("lutra::lookup_linear", mutates_args=())
def lookup_linear(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    weight_bits: int,
) -> Tensor:
    """Linear layer of x (..., D) -> (..., M). Tensors as in `lookup_conv2d`."""
    rows = x.reshape(-1, x.shape[-1])[:, :, None, None]
    y: Tensor = lookup_conv2d(
        rows, weight, table, scale, bias, act_scale, act_zero, act_bits, weight_bits,
        x.shape[-1], (1, 1), (1, 1), (0, 0), (1, 1),
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], weight.shape[0])


@lookup_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    scale: Tensor,
    bias: Tensor,
    act_scale: float,
    act_zero: int,
    act_bits: int,
    weight_bits: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)

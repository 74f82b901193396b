"""Dense layers in int8: the engine's kernels on the CPU, products of PyTorch on other devices.

Both add up the same integers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lutra.ops import OPS
from lutra.ops.limits import INT8_MAX
from lutra.train.geometry import Geometry, Grid
from lutra.train.operators import native, portable
from lutra.train.operators.frozen import FrozenNode, frozen_kernel, frozen_native


@frozen_kernel("int8_conv2d", "int8_linear")
def frozen_int8(x: Tensor, node: FrozenNode, tensors: Mapping[str, Tensor]) -> Tensor:
    """Products of int8 weights and activations on a grid, summed exactly.

    Tensors: weight (M, C / G, kh, kw) or (M, D) int8, scale (M) and bias (M) float32.
    """
    weight, scale, bias = (tensors[role] for role in ("weight", "scale", "bias"))
    kernel = (weight.shape[2], weight.shape[3]) if weight.dim() == 4 else (1, 1)
    if x.device.type == "cpu":
        return frozen_native(x, node, tensors, kernel)
    geometry = Geometry.of_attrs(node.attrs, x.shape[1], kernel)
    sums = integer_sums(x, weight, geometry, Grid.of_attrs(node.attrs))
    return sums * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)


def integer_sums(x: Tensor, weight: Tensor, geometry: Geometry, grid: Grid) -> Tensor:
    """Exact sums of products, as float32 (N, M, H', W').

    Args:
        x: (N, C, H, W), real values.
        weight: int8 (M, C / G, kh, kw), or (M, C) of a kernel of 1x1.
    """
    g, outputs = geometry, weight.shape[0]
    if not x.numel():
        return native.empty_output(x, outputs, *g.out_size(x.shape[2], x.shape[3]))
    if x.device.type != "cpu":
        return portable_sums(x, weight, g, grid)
    tensors = {
        "weight": weight.reshape(outputs, g.channels // g.groups, *g.kernel),
        "scale": torch.ones(outputs),
        "bias": torch.zeros(outputs),
    }
    attrs = {**g.attrs(OPS["int8_conv2d"].attrs), **grid.attrs}
    layer = native.make_layer("int8_conv2d", attrs, tensors)
    return native.run(layer, g, x.float(), outputs, None)


def portable_sums(x: Tensor, weight: Tensor, geometry: Geometry, grid: Grid) -> Tensor:
    """`integer_sums` by the products of PyTorch."""
    g, outputs = geometry, weight.shape[0]
    height, width = g.out_size(x.shape[2], x.shape[3])
    largest = INT8_MAX * max(grid.zero, grid.qmax - grid.zero)
    matrices = weight.reshape(g.groups, outputs // g.groups, -1).float()
    images = max(1, portable.block_size(x) // max(1, g.depth * height * width))
    parts = []
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 sums would not be exact
        for part in torch.split(x, images):
            steps = portable.quantize(part, grid) - grid.zero
            rows = portable.unfold(steps, g, g.depth, 0.0).view(g.groups, g.depth // g.groups, -1)
            sums = portable.exact_products(matrices, rows, largest)
            parts.append(sums.view(outputs, len(part), height, width).transpose(0, 1))
    return torch.cat(parts).contiguous(memory_format=native.layout(x))

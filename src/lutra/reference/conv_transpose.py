"""Transposed convolutions: see ``lutra.ops.conv_transpose``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.conv_transpose import transposed_sizes
from lutra.ops.spec import integer, pair


def conv_transpose2d(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, C, H, W) to (N, M, H', W'): a kernel entry adds its products to every stride-th output.

    The sums are made on the whole plane that the kernel reaches, of which the padding is cut off.
    """
    (x,) = inputs
    weight, groups = tensors["weight"], integer(node, "groups")
    outputs, depth, *kernel = weight.shape
    samples, _, height, width = x.shape
    stride, padding, dilation = (pair(node, name) for name in ("stride", "padding", "dilation"))
    sizes = [size or 0 for size in transposed_sizes(node, x.shape[2:], kernel)]
    whole = [size + 2 * pad for size, pad in zip(sizes, padding, strict=True)]
    sums = np.zeros((samples, outputs, *whole), np.float32)
    grouped = x.reshape(samples, groups, depth, height * width)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            matrix = weight[:, :, i, j].reshape(groups, outputs // groups, depth)
            rows, columns = (
                slice(k * spread, k * spread + (size - 1) * step + 1, step)
                for k, spread, step, size in zip(
                    (i, j), dilation, stride, (height, width), strict=True
                )
            )
            made = (matrix @ grouped).reshape(samples, outputs, height, width)
            sums[:, :, rows, columns] += made
    ends = (pad + size for pad, size in zip(padding, sizes, strict=True))
    rows, columns = (slice(pad, end) for pad, end in zip(padding, ends, strict=True))
    result: Array = sums[:, :, rows, columns] + tensors["bias"][:, None, None]
    return result

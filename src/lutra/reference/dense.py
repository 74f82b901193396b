"""Dense operators in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.spec import integer, pair
from lutra.reference.windows import patches, windows


def linear(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(..., D) to (..., M)."""
    (x,) = inputs
    result: Array = x @ tensors["weight"].T + tensors["bias"]
    return result


def conv2d(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, C, H, W) to (N, M, Ho, Wo), in groups of channels."""
    (x,) = inputs
    weight = tensors["weight"]
    groups = integer(node, "groups")
    rows, columns = pair(node, "padding")
    padded = np.pad(x, ((0, 0), (0, 0), (rows, rows), (columns, columns)))
    kernel = (weight.shape[2], weight.shape[3])
    view = windows(padded, kernel, pair(node, "stride"), pair(node, "dilation"))
    outputs, (height, width) = weight.shape[0], view.shape[2:4]
    # (G, D / G, M / G): one small matrix for each group
    matrices = weight.reshape(groups, outputs // groups, -1).transpose(0, 2, 1)
    result = np.empty((x.shape[0], outputs, height, width), np.float32)
    for image, band, block in patches(view):
        grouped = block.reshape(block.shape[0], groups, -1).transpose(1, 0, 2)  # (G, R, D / G)
        made = (grouped @ matrices).transpose(0, 2, 1)  # (G, M / G, R)
        result[image, :, band] = made.reshape(outputs, -1, width)
    return result + tensors["bias"][:, None, None]

"""Norms over groups of channels: see ``lutra.ops.group_norm``. Sums are of float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.spec import integer, number


def group_norm(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, C, ...) to (N, C, ...)."""
    (x,) = inputs
    with np.errstate(all="ignore"):
        grouped = x.astype(np.float64).reshape(x.shape[0], integer(node, "groups"), -1)
        centred = grouped - grouped.mean(axis=2, keepdims=True)
        power = np.square(centred).mean(axis=2, keepdims=True) + np.float32(number(node, "eps"))
        channels = (-1,) + (1,) * (x.ndim - 2)
        made = (centred / np.sqrt(power)).reshape(x.shape)
        made = made * tensors["weight"].reshape(channels) + tensors["bias"].reshape(channels)
        result: Array = made.astype(np.float32)
    return result

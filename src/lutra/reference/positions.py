"""What depends on the positions of tokens: see ``lutra.ops.positions``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.spec import flag, integer


def rotary(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, T, H d) to (N, T, H d)."""
    (x,) = inputs
    samples, tokens, _ = x.shape
    heads, width = integer(node, "heads"), tensors["cos"].shape[1]
    apart = x.reshape(samples, tokens, heads, width)
    if flag(node, "interleaved"):
        turned = np.stack([-apart[..., 1::2], apart[..., ::2]], axis=-1).reshape(apart.shape)
    else:
        first, second = np.split(apart, 2, axis=-1)
        turned = np.concatenate([-second, first], axis=-1)
    cos, sin = (tensors[name][:tokens, None] for name in ("cos", "sin"))
    result: Array = (apart * cos + turned * sin).reshape(x.shape)
    return result


def relative_bias(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, H, T, S) to (N, H, T, S)."""
    (x,) = inputs
    weight = tensors["weight"]
    queries, keys = x.shape[2:]
    distance = np.arange(keys) - np.arange(queries)[:, None] + weight.shape[1] // 2
    result: Array = x + weight[:, distance]
    return result

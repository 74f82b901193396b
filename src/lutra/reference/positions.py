"""What depends on the positions of tokens: see ``lutra.ops.positions``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.spec import flag, integer
from lutra.reference.sequence import places_of


def rotary(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, T, H d), and perhaps starts int32 (N,), to (N, T, H d).

    Raises:
        InputError: If a sequence goes beyond the table.
    """
    x, *starts = inputs
    samples, tokens, _ = x.shape
    heads, width = integer(node, "heads"), tensors["cos"].shape[1]
    apart = x.reshape(samples, tokens, heads, width)
    if flag(node, "interleaved"):
        turned = np.stack([-apart[..., 1::2], apart[..., ::2]], axis=-1).reshape(apart.shape)
    else:
        first, second = np.split(apart, 2, axis=-1)
        turned = np.concatenate([-second, first], axis=-1)
    places = places_of(node, x, starts, len(tensors["cos"]))
    cos, sin = (tensors[name][places][..., None, :] for name in ("cos", "sin"))
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

"""Operators that treat every element alike, and softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.graph import Node
from lutra.ops.elementwise import limits
from lutra.ops.registry import Array, integer


def clamp(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Limits values, also ``relu`` and ``relu6``: NaN gives the lower limit."""
    low, high = (np.float32(limit) for limit in limits(node))
    # Not np.maximum, which keeps NaN: the engine's kernels do not.
    result: Array = np.where(inputs[0] > low, inputs[0], low)
    return np.where(result < high, result, high)


def add(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """a + b, of the same shape."""
    result: Array = inputs[0] + inputs[1]
    return result


def mul(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """a * b, of the same shape."""
    result: Array = inputs[0] * inputs[1]
    return result


def affine(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """x * scale[c] + bias[c] for each channel c, axis 1: a multiply, then an add."""
    (x,) = inputs
    channels = (-1,) + (1,) * (x.ndim - 2)
    result: Array = x * tensors["scale"].reshape(channels) + tensors["bias"].reshape(channels)
    return result


def softmax(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """exp(x - max) / sum(exp(x - max)) along an axis."""
    axis = integer(node, "axis")
    powers = np.exp(inputs[0] - inputs[0].max(axis=axis, keepdims=True))
    result: Array = powers / powers.sum(axis=axis, keepdims=True)
    return result

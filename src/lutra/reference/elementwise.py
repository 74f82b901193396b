"""Operators that treat every element alike, and softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.graph import Node
from lutra.ops.registry import Array, integer


def relu(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """max(x, 0); NaN and -0 give 0."""
    return _clamp(inputs[0], np.inf)


def relu6(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """min(max(x, 0), 6); NaN and -0 give 0."""
    return _clamp(inputs[0], 6.0)


def _clamp(x: Array, high: float) -> Array:
    # Not np.maximum, which keeps NaN: the engine's kernels do not.
    result: Array = np.minimum(np.where(x > 0, x, np.float32(0)), np.float32(high))
    return result


def add(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """a + b, of the same shape."""
    result: Array = inputs[0] + inputs[1]
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

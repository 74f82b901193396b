"""Operators that treat every element alike, and softmax."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from lutra.node import Array, Node
from lutra.ops.elementwise import limits
from lutra.ops.spec import integer, number
from lutra.reference.functions import exp_of_score, exp_table, reciprocal_table

_PAIRS: Final[dict[str, Callable[[Array, Array], Array]]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
}


def clamp(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Limits values, also ``relu`` and ``relu6``: NaN gives the lower limit."""
    low, high = (np.float32(limit) for limit in limits(node))
    # Not np.maximum, which keeps NaN: the engine's kernels do not.
    result: Array = np.where(inputs[0] > low, inputs[0], low)
    return np.where(result < high, result, high)


def pair(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """a + b, a - b, a * b or a / b; sizes of 1 are repeated."""
    with np.errstate(all="ignore"):
        result: Array = _PAIRS[node.op](*inputs)
    return result


def cast(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """int32 to float32."""
    return inputs[0].astype(np.float32)


def affine_scalar(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """x * scale + bias with two numbers: a multiply, then an add."""
    scale, bias = np.float32(number(node, "scale")), np.float32(number(node, "bias"))
    with np.errstate(all="ignore"):
        result: Array = inputs[0] * scale + bias
    return result


def affine(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """x * scale[c] + bias[c] for each entry c of an axis: a multiply, then an add."""
    (x,) = inputs
    channels = (-1,) + (1,) * (x.ndim - 1 - integer(node, "axis"))
    result: Array = x * tensors["scale"].reshape(channels) + tensors["bias"].reshape(channels)
    return result


def softmax(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """exp(x - max) / sum(exp(x - max)) along an axis; exp and the reciprocal may be tables.

    The bits are the engine's: its exponential, and sums of float32 from the first to the last.
    """
    axis = integer(node, "axis")
    with np.errstate(all="ignore"):
        distances = inputs[0] - inputs[0].max(axis=axis, keepdims=True)
        if "exp_slope" in tensors:
            powers = exp_table(distances, tensors["exp_slope"], tensors["exp_intercept"])
        else:
            powers = exp_of_score(distances)
        sums = np.add.accumulate(powers, axis=axis).take([-1], axis=axis)
        if "exp_slope" in tensors:
            slope, intercept = tensors["reciprocal_slope"], tensors["reciprocal_intercept"]
            factors = reciprocal_table(sums, slope, intercept)
        else:
            factors = np.float32(1) / sums
        result: Array = powers * factors
    return result

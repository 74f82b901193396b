"""Norms: see ``lutra.ops.norm`` for the equations. Sums are of float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lutra.node import Array, Node
from lutra.ops.spec import flag, ints, number
from lutra.reference.functions import rsqrt_table


def layer_norm(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(..., D) to (..., D)."""
    x = inputs[0].astype(np.float64)
    with np.errstate(all="ignore"):
        centred = x - x.mean(axis=-1, keepdims=True)
        made = centred * _rsqrt(node, centred, tensors) * tensors["weight"] + tensors["bias"]
        result: Array = made.astype(np.float32)
    return result


def rms_norm(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(..., D) to (..., D)."""
    x = inputs[0].astype(np.float64)
    with np.errstate(all="ignore"):
        result: Array = (x * _rsqrt(node, x, tensors) * tensors["weight"]).astype(np.float32)
    return result


def _rsqrt(node: Node, x: Array, tensors: Mapping[str, Array]) -> Array:
    """1 / sqrt(mean(x^2) + eps) of each row, exact or from the table."""
    power = np.square(x).mean(axis=-1, keepdims=True) + np.float32(number(node, "eps"))
    if "rsqrt_slope" not in tensors:
        result: Array = 1 / np.sqrt(power)
        return result
    slope, intercept = tensors["rsqrt_slope"], tensors["rsqrt_intercept"]
    return rsqrt_table(power.astype(np.float32), slope, intercept).astype(np.float64)


def l2_norm(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """The square root of the sum of squares over some axes."""
    squares = np.square(inputs[0].astype(np.float64))
    result: Array = np.sqrt(squares.sum(axis=ints(node, "axes"), keepdims=flag(node, "keepdims")))
    return result.astype(np.float32)

"""Dense operators in int8: integer activations times integer weights, summed exactly.

With the grid of ``lutra.ops.grid``, all of it exact but for the last line::

    sum[m] = sum_d weight[m, d] * (x_q[d] - act_zero)          int32; padding of images adds 0
    y[m]   = float32(sum[m]) * scale[m] + bias[m]              two roundings

(``float32(sum)`` rounds to nearest even where a sum goes beyond ``2**24``.) A convolution takes its
rows in the order (channel, kernel row, kernel column), in groups of channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from lutra.node import Array, Node, Value
from lutra.ops.dense import CONVOLUTION, check_conv, infer_conv, infer_linear
from lutra.ops.grid import GRID, check_grid
from lutra.ops.limits import INT8_MAX, MAX_INT8_DEPTH
from lutra.ops.rows import example_ends, example_rows
from lutra.ops.spec import Cost, Example, OpSpec, TensorRole, inner, node_error


def _check(node: Node, tensors: Mapping[str, Array]) -> None:
    check_grid(node)
    weight = tensors["weight"]
    for role in ("scale", "bias"):
        if tensors[role].shape != weight.shape[:1]:
            raise node_error(
                node,
                f"has {role} of shape {tensors[role].shape}",
                f"the weight of shape {weight.shape} needs ({weight.shape[0]},)",
            )
    depth = math.prod(weight.shape[1:])
    if depth > MAX_INT8_DEPTH:
        raise node_error(
            node,
            f"adds up {depth} products for each output, more than int32 holds for certain",
            f"use at most {MAX_INT8_DEPTH}, or the float32 operator",
        )
    if int(weight.min()) < -INT8_MAX:
        raise node_error(
            node,
            f"has a weight of {int(weight.min())}",
            f"weights must be in {-INT8_MAX}..{INT8_MAX}",
        )


def _check_conv(node: Node, tensors: Mapping[str, Array]) -> None:
    check_conv(node, tensors)
    _check(node, tensors)


def _cost(node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]) -> Cost:
    made = math.prod(inner(output))
    macs = made * math.prod(tensors["weight"].shape[1:])
    return Cost(
        macs=macs,
        int8_macs=macs,
        quantised=math.prod(inner(inputs[0])),
        scaled=made,
        dense_macs=macs,
    )


def _tensors(axes: int) -> dict[str, TensorRole]:
    return {
        "weight": TensorRole("int8", axes),
        "scale": TensorRole("float32", 1),
        "bias": TensorRole("float32", 1),
    }


def _examples(
    rng: np.random.Generator, inputs: int, *, kernel: tuple[int, int] | None = None
) -> list[Example]:
    """One layer without groups."""
    outputs = 13
    weight = rng.integers(-INT8_MAX, INT8_MAX + 1, (outputs, inputs, *(kernel or ())))
    padding = {} if kernel is None else {"padding": example_rows(inputs, kernel)["padding"]}
    attrs = {**padding, "act_scale": 0.05, "act_zero": 64, "act_bits": 7}
    return [(attrs, {"weight": weight.astype(np.int8), **example_ends(rng, outputs)})]


#: The rules of both operators beside those of the rows.
_LAYER: Final[dict[str, Any]] = {"fuses": True, "gain_role": "scale", "bias_role": "bias"}

SPECS: Final = (
    OpSpec(
        "int8_conv2d",
        attrs={**CONVOLUTION, **GRID},
        tensors=_tensors(4),
        check=_check_conv,
        infer=infer_conv,
        cost=_cost,
        takes_pad="padding",
        output_axis=1,
        examples=partial(_examples, kernel=(3, 3)),
        **_LAYER,
    ),
    OpSpec(
        "int8_linear",
        attrs=GRID,
        tensors=_tensors(2),
        check=_check,
        infer=infer_linear,
        cost=_cost,
        output_axis=-1,
        examples=_examples,
        **_LAYER,
    ),
)

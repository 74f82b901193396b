"""The linear layer of low-bit weights: integer codes of 1 to 4 bits, and activations in int8.

A code ``u`` has the integer level ``u - 1`` where it has three values, else ``2 u - (levels - 1)``
(see ``lutra.reference.lowbit``). Activations become int8 row by row (BitNet b1.58,
arXiv 2402.17764)::

    q[d]    = round_half_even(x[d] * (127 / max |x|))
    sum[m]  = sum over groups g, in order, of
              float32(sum over d in g of (level[m, d] - zero[m, g]) * q[d]) * scale[m, g]
    y[m]    = sum[m] * (max |x| / 127) + bias[m]

What is inside ``float32(...)`` is an exact int32; everything else is rounded operation by
operation. A row whose largest magnitude is below ``2**-120`` counts as zeros; a row that holds NaN
or an infinity gives NaN.

``weight`` has the codes of an output in a row of bytes, as ``lutra.ops.lowbit_storage`` lays them
out: five ternary codes in a byte, or one bit plane after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from lutra.node import Array, AttrValue, Node, Value
from lutra.ops.limits import LOWBIT_LEVELS, MAX_LOWBIT_DEPTH, MAX_LOWBIT_OUTPUTS
from lutra.ops.lowbit_storage import TERNARY, load_codes, store_codes, stored_shape
from lutra.ops.rows import infer_linear
from lutra.ops.spec import Attr, Cost, Example, OpSpec, TensorRole, inner, integer, node_error

_TERNARY_BYTES: Final = 3**5


def bits_of(levels: int) -> float:
    """The bits of a code of so many values, as users write them: 1.58 for 3."""
    return TERNARY if levels == 3 else float(levels.bit_length() - 1)


def store_rows(codes: Array, levels: int) -> Array:
    """Codes as the tensor ``weight``.

    Args:
        codes: uint8 (M, K), each below ``levels``.
        levels: Values of a code: 2, 3, 4, 8 or 16.

    Returns:
        uint8 (M, bytes of a row).
    """
    return store_codes(codes, bits_of(levels)).reshape(len(codes), -1)


def load_rows(weight: Array, levels: int, depth: int) -> Array:
    """The codes in a tensor ``weight``, uint8 (M, depth): the inverse of ``store_rows``."""
    bits = bits_of(levels)
    return load_codes(weight.reshape(stored_shape(bits, len(weight), depth)), bits, depth)


def _check(node: Node, tensors: Mapping[str, Array]) -> None:
    levels, depth = integer(node, "levels"), integer(node, "in_features")
    group, weight = integer(node, "group"), tensors["weight"]
    if levels not in LOWBIT_LEVELS:
        raise node_error(node, f"has levels={levels}", f"choose from {list(LOWBIT_LEVELS)}")
    if depth % group:
        raise node_error(
            node, f"has group={group} and in_features={depth}", "a group must divide the inputs"
        )
    outputs = weight.shape[0]
    if outputs > MAX_LOWBIT_OUTPUTS:
        raise node_error(node, f"has {outputs} outputs", f"use at most {MAX_LOWBIT_OUTPUTS}")
    needed = math.prod(stored_shape(bits_of(levels), 1, depth))
    if weight.shape[1] != needed:
        raise node_error(
            node,
            f"has a weight of shape {weight.shape}",
            f"{depth} codes of {levels} values take {needed} bytes for each output",
        )
    if levels == 3 and int(weight.max()) >= _TERNARY_BYTES:
        raise node_error(
            node,
            f"has a weight with the byte {int(weight.max())}",
            f"five ternary codes are below {_TERNARY_BYTES}",
        )
    shapes = {"scale": (outputs, depth // group), "zero": (outputs, depth // group)}
    for role, shape in {**shapes, "bias": (outputs,)}.items():
        if role in tensors and tensors[role].shape != shape:
            raise node_error(
                node, f"has {role} of shape {tensors[role].shape}", f"it must be {shape}"
            )
    if "zero" in tensors:
        far = int(np.abs(tensors["zero"].astype(np.int32)).max())
        if levels == 3 or far >= levels:
            raise node_error(
                node,
                f"has a zero {far} away from 0 with levels={levels}",
                "a zero is a level between the smallest and the largest; ternary codes have none",
            )


def _infer(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    return infer_linear(node, inputs, tensors["weight"].shape[0])


def _cost(node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]) -> Cost:
    made = math.prod(inner(output))
    macs = made * integer(node, "in_features")
    groups = tensors["scale"].shape[1]
    return Cost(
        macs=macs,
        int8_macs=macs,
        quantised=math.prod(inner(inputs[0])),
        scaled=made * groups,
        float_muls=made,
        float_adds=made,
        dense_macs=macs,
    )


def _examples(rng: np.random.Generator, inputs: int) -> list[Example]:
    """Layers of all widths, with one scale for an output and with zeros."""
    outputs = 13
    examples: list[Example] = []
    for levels in LOWBIT_LEVELS:
        codes = rng.integers(0, levels, (outputs, inputs)).astype(np.uint8)
        tensors: dict[str, Array] = {
            "weight": store_rows(codes, levels),
            "scale": rng.uniform(0.01, 0.1, (outputs, 1)).astype(np.float32),
            "bias": rng.standard_normal(outputs, np.float32),
        }
        if levels > 3:
            tensors["zero"] = rng.integers(1 - levels, levels, (outputs, 1)).astype(np.int8)
        attrs: dict[str, AttrValue] = {"in_features": inputs, "levels": levels, "group": inputs}
        examples.append((attrs, tensors))
    return examples


SPECS: Final = (
    OpSpec(
        "lowbit_linear",
        attrs={
            "in_features": Attr(int, low=1, high=MAX_LOWBIT_DEPTH),
            "levels": Attr(int, low=2, high=max(LOWBIT_LEVELS)),
            "group": Attr(int, low=1, high=MAX_LOWBIT_DEPTH),
        },
        tensors={
            "weight": TensorRole("uint8", 2),
            "scale": TensorRole("float32", 2),
            "zero": TensorRole("int8", 2, required=False),
            "bias": TensorRole("float32", 1),
        },
        check=_check,
        infer=_infer,
        cost=_cost,
        since=3,
        output_axis=-1,
        fuses=True,
        gain_role="scale",
        bias_role="bias",
        exact_floats=True,
        examples=_examples,
    ),
)

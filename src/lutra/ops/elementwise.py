"""Operators that treat every element alike, and softmax."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from lutra.ops.registry import (
    Array,
    Attr,
    Cost,
    OpSpec,
    TensorRole,
    inner,
    integer,
    need_axis,
    need_rank,
    need_size,
    node_error,
    number,
)

if TYPE_CHECKING:
    from lutra.graph import Node, Value

#: A limit of ``clamp`` that limits nothing: JSON has no infinity.
NO_LIMIT: Final = float(np.finfo(np.float32).max)
#: The operators that only limit values.
CLAMPS: Final = ("relu", "relu6", "clamp")


def limits(node: Node) -> tuple[float, float]:
    """The lower and upper limit of an operator of ``CLAMPS``; infinite where there is none.

    All of them compute ``low if not x > low else x``, then ``high if not y < high else y``: NaN
    gives ``low``.
    """
    if node.op != "clamp":
        return 0.0, 6.0 if node.op == "relu6" else math.inf
    low, high = number(node, "low"), number(node, "high")
    return -math.inf if low == -NO_LIMIT else low, math.inf if high == NO_LIMIT else high


def _check_clamp(node: Node, tensors: Mapping[str, Array]) -> None:
    low, high = number(node, "low"), number(node, "high")
    if not -NO_LIMIT <= low <= high <= NO_LIMIT:
        raise node_error(
            node,
            f"has low={low!r} and high={high!r}",
            f"low must not be above high, and both in {-NO_LIMIT!r}..{NO_LIMIT!r}",
        )


def _infer_same(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    return inputs[0].with_shape(node.output, inputs[0].shape)


def _infer_both(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    a, b = inputs
    if a.shape != b.shape:
        what = "adds" if node.op == "add" else "multiplies"
        raise node_error(
            node,
            f"{what} {a.name!r} of shape {a.shape} and {b.name!r} of shape {b.shape}",
            "the shapes must be the same",
        )
    return a.with_shape(node.output, a.shape)


def _check_affine(node: Node, tensors: Mapping[str, Array]) -> None:
    scale, bias = tensors["scale"].shape, tensors["bias"].shape
    if scale != bias:
        raise node_error(
            node, f"has scale of shape {scale} and bias of shape {bias}", "make them the same"
        )


def _infer_affine(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    need_rank(node, x, 2)
    if tensors["scale"].shape != (need_size(node, x, 1),):
        raise node_error(
            node,
            f"has scale of shape {tensors['scale'].shape} but its input {x.name!r} has the shape "
            f"{x.shape}",
            f"it must be ({x.shape[1]},), one for each channel",
        )
    return x.with_shape(node.output, x.shape)


def _infer_softmax(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    need_axis(node, x, "axis", integer(node, "axis"))
    return x.with_shape(node.output, x.shape)


def _cost_affine(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    macs = math.prod(inner(output))
    return Cost(macs=macs, dense_macs=macs)


def _cost_add(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    return Cost(float_adds=math.prod(inner(output)))


def _cost_mul(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    return Cost(float_muls=math.prod(inner(output)))


SPECS: Final = (
    OpSpec("relu", infer=_infer_same),
    OpSpec("relu6", infer=_infer_same),
    OpSpec(
        "clamp",
        attrs={"low": Attr(float, default=-NO_LIMIT), "high": Attr(float, default=NO_LIMIT)},
        check=_check_clamp,
        infer=_infer_same,
    ),
    OpSpec("add", infer=_infer_both, cost=_cost_add, min_inputs=2, max_inputs=2),
    OpSpec("mul", infer=_infer_both, cost=_cost_mul, min_inputs=2, max_inputs=2),
    OpSpec(
        "affine",
        tensors={"scale": TensorRole("float32", 1), "bias": TensorRole("float32", 1)},
        check=_check_affine,
        infer=_infer_affine,
        cost=_cost_affine,
    ),
    OpSpec("softmax", attrs={"axis": Attr(int, low=1, high=7)}, infer=_infer_softmax),
)

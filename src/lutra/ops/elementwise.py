"""Operators that treat every element alike, and softmax.

``add``, ``sub``, ``mul`` and ``div`` take two values with the same number of axes, and repeat the
one of size 1 along an axis behind the batch. Sizes that are known at run time only are equal: what
is to be repeated has a size of 1 in the graph. ``affine_scalar`` is ``x * scale + bias`` with two
numbers, a multiply and then an add; ``cast`` makes floats of the integers of an input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from lutra.errors import GraphError
from lutra.formatting import shape_text
from lutra.node import Array, Node, Shape, Value
from lutra.ops.functions import (
    check_tables,
    function_cost,
    has_tables,
    infer_same,
    table_bytes,
    table_roles,
)
from lutra.ops.spec import (
    Attr,
    Cost,
    OpSpec,
    TensorRole,
    inner,
    integer,
    need_axis,
    need_size,
    node_error,
    number,
)

#: A limit of ``clamp`` that limits nothing: JSON has no infinity.
NO_LIMIT: Final = float(np.finfo(np.float32).max)
#: The operators that only limit values.
CLAMPS: Final = ("relu", "relu6", "clamp")
#: The operators that put two values together element by element.
PAIRS: Final = ("add", "sub", "mul", "div")
_DOES: Final = {
    "add": "adds",
    "sub": "subtracts",
    "mul": "multiplies",
    "div": "divides",
    "matmul": "multiplies",
}


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


def broadcast(a: Shape, b: Shape) -> Shape | None:
    """The shape of two shapes of one rank where sizes of 1 are repeated; None if they do not fit.

    The batch, axis 0, must be the same; behind it a size that is known at run time only fits every
    other.
    """
    if len(a) != len(b) or a[0] != b[0]:
        return None
    sizes: list[int | None] = [a[0]]
    for size, other in zip(a[1:], b[1:], strict=True):
        if size == 1 or other == 1:
            sizes.append(other if size == 1 else size)
        elif size == other or None in (size, other):
            sizes.append(other if size is None else size)
        else:
            return None
    return tuple(sizes)


def check_dynamic(
    node: Node, inputs: Sequence[Value], sized: Sequence[Value], last: int | None = None
) -> None:
    """Checks that nothing is repeated in a run that the graph does not say is repeated.

    Args:
        node: It puts two values together by ``broadcast``.
        inputs: The two values of the graph, whose sizes may be dynamic.
        sized: The same in one run.
        last: The axis before which they are put together; None for all.

    Raises:
        GraphError: If a size and another differ, and neither is 1 in the graph.
    """
    pairs = [list(zip(*(v.shape[:last] for v in pair), strict=False)) for pair in (inputs, sized)]
    for known, run in zip(*pairs, strict=True):
        if 1 not in known and len(set(run)) > 1:
            raise _differ(node, sized)


def _differ(node: Node, inputs: Sequence[Value]) -> GraphError:
    a, b = inputs
    return node_error(
        node,
        f"{_DOES.get(node.op, 'compares')} {a.name!r} of shape {shape_text(a.shape)} and "
        f"{b.name!r} of shape {shape_text(b.shape)}",
        "the shapes must be the same, or 1 where they differ",
    )


def infer_pair(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    """The output of an operator that puts two values together by ``broadcast``."""
    a, b = inputs
    shape = broadcast(a.shape, b.shape)
    if shape is None:
        raise _differ(node, inputs)
    return a.with_shape(node.output, shape)


def _infer_cast(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    return dataclasses.replace(inputs[0], name=node.output, dtype="float32")


def _check_affine_scalar(node: Node, tensors: Mapping[str, Array]) -> None:
    scale, bias = number(node, "scale"), number(node, "bias")
    if max(abs(scale), abs(bias)) > NO_LIMIT:
        raise node_error(
            node,
            f"has scale={scale!r} and bias={bias!r}",
            f"both must be float32 numbers, in {-NO_LIMIT!r}..{NO_LIMIT!r}",
        )


def _check_affine(node: Node, tensors: Mapping[str, Array]) -> None:
    scale, bias = tensors["scale"].shape, tensors["bias"].shape
    if scale != bias:
        raise node_error(
            node, f"has scale of shape {scale} and bias of shape {bias}", "make them the same"
        )


def _infer_affine(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    axis = integer(node, "axis")
    need_axis(node, x, "axis", axis)
    if tensors["scale"].shape != (need_size(node, x, axis),):
        raise node_error(
            node,
            f"has scale of shape {tensors['scale'].shape} but its input {x.name!r} has the shape "
            f"{x.shape}",
            f"it must be ({x.shape[axis]},), one for each channel, which is axis {axis}",
        )
    return x.with_shape(node.output, x.shape)


def _infer_softmax(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    need_axis(node, x, "axis", integer(node, "axis"))
    return x.with_shape(node.output, x.shape)


def _check_softmax(node: Node, tensors: Mapping[str, Array]) -> None:
    check_tables(node, tensors, "exp", "reciprocal")


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


def _cost_div(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    return function_cost(math.prod(inner(output)), "reciprocal")


def _cost_affine_scalar(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    values = math.prod(inner(output))
    return Cost(float_adds=values, float_muls=values)


def _cost_softmax(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    values = math.prod(inner(output))
    size = inner(output)[integer(node, "axis") - 1]
    cost = Cost(float_adds=2 * values, float_muls=values)  # distances, sums; quotients
    if has_tables(tensors):
        return cost + Cost(pieces=values + values // size, table_bytes=table_bytes(tensors))
    return cost + function_cost(values, "exp") + function_cost(values // size, "reciprocal")


SPECS: Final = (
    OpSpec("relu", infer=infer_same),
    OpSpec("relu6", infer=infer_same),
    OpSpec(
        "clamp",
        attrs={"low": Attr(float, default=-NO_LIMIT), "high": Attr(float, default=NO_LIMIT)},
        check=_check_clamp,
        infer=infer_same,
    ),
    *(
        OpSpec(
            name,
            infer=infer_pair,
            cost=cost,
            min_inputs=2,
            max_inputs=2,
            check_sizes=check_dynamic,
            since=since,
        )
        for name, cost, since in (
            ("add", _cost_add, 1),
            ("sub", _cost_add, 2),
            ("mul", _cost_mul, 1),
            ("div", _cost_div, 2),
        )
    ),
    OpSpec("cast", infer=_infer_cast, dtypes=("int32",), since=2),
    OpSpec(
        "affine_scalar",
        attrs={"scale": Attr(float, default=1.0), "bias": Attr(float, default=0.0)},
        check=_check_affine_scalar,
        infer=infer_same,
        cost=_cost_affine_scalar,
        since=2,
    ),
    OpSpec(
        "affine",
        attrs={"axis": Attr(int, default=1, low=1, high=7, since=3)},
        tensors={"scale": TensorRole("float32", 1), "bias": TensorRole("float32", 1)},
        check=_check_affine,
        infer=_infer_affine,
        cost=_cost_affine,
    ),
    OpSpec(
        "softmax",
        attrs={"axis": Attr(int, low=1, high=7)},
        tensors=table_roles("exp", "reciprocal"),
        check=_check_softmax,
        infer=_infer_softmax,
        cost=_cost_softmax,
        exact_floats=True,
    ),
)

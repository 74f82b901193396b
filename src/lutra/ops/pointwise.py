"""Operators that choose, compare and bend values one by one.

``maximum``, ``minimum``, ``greater``, ``greater_equal`` and ``equal`` put two values together as
``add`` does (see ``lutra.ops.elementwise``). A comparison gives 1 where it holds and 0 where it
does not; NaN is greater than nothing and equal to nothing. ``where`` takes a condition, which holds
where it is not 0, and two values. ``constant`` gives the same numbers for every sample; of its
input it needs the size of the batch only.

``sin`` and ``cos`` are those of the nearest float32 but for 1e-7 while |x| is below 2^20; beyond
that, where neighbours of float32 lie ever further apart, they lose digits. Of infinity they are
NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from lutra.node import Array, Node, Value
from lutra.ops.elementwise import NO_LIMIT, broadcast, check_dynamic, infer_pair
from lutra.ops.functions import infer_same
from lutra.ops.limits import MAX_EXTENT
from lutra.ops.spec import Attr, Cost, OpSpec, TensorRole, inner, ints, node_error, number

#: The operators that compare two values, or take one of them.
CHOICES: Final = ("maximum", "minimum", "greater", "greater_equal", "equal")
#: The functions of one value without attributes.
BENDS: Final = ("abs", "sign", "floor", "ceil", "round", "hardswish", "sin", "cos")


def _infer_where(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    shape: tuple[int | None, ...] | None = inputs[0].shape
    for value in inputs[1:]:
        shape = None if shape is None else broadcast(shape, value.shape)
    if shape is None:
        shapes = ", ".join(str(value.shape) for value in inputs)
        raise node_error(
            node,
            f"chooses by values of the shapes {shapes}",
            "the shapes must be the same, or 1 where they differ",
        )
    return inputs[0].with_shape(node.output, shape)


def _check_where(node: Node, inputs: Sequence[Value], sized: Sequence[Value]) -> None:
    for first, second in ((0, 1), (0, 2), (1, 2)):
        check_dynamic(node, [inputs[first], inputs[second]], [sized[first], sized[second]])


def _check_constant(node: Node, tensors: Mapping[str, Array]) -> None:
    shape, count = ints(node, "shape"), tensors["value"].size
    if math.prod(shape) != count:
        raise node_error(
            node, f"has {count} numbers and shape={shape}", "give a number for each element"
        )


def _infer_constant(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    return x.with_shape(node.output, (x.shape[0], *ints(node, "shape")))


def _check_leaky_relu(node: Node, tensors: Mapping[str, Array]) -> None:
    slope = number(node, "slope")
    if abs(slope) > NO_LIMIT:
        raise node_error(node, f"has slope={slope!r}", "it must be a float32 number")


def _cost_muls(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    return Cost(float_muls=math.prod(inner(output)))


SPECS: Final = (
    *(
        OpSpec(
            name,
            infer=infer_pair,
            min_inputs=2,
            max_inputs=2,
            check_sizes=check_dynamic,
            exact_floats=True,
            since=3,
        )
        for name in CHOICES
    ),
    OpSpec(
        "where",
        infer=_infer_where,
        min_inputs=3,
        max_inputs=3,
        check_sizes=_check_where,
        exact_floats=True,
        since=3,
    ),
    OpSpec(
        "constant",
        attrs={"shape": Attr(tuple, low=1, high=MAX_EXTENT)},
        tensors={"value": TensorRole("float32", 1)},
        check=_check_constant,
        infer=_infer_constant,
        exact_floats=True,
        since=3,
    ),
    *(OpSpec(name, infer=infer_same, exact_floats=True, since=3) for name in BENDS),
    OpSpec(
        "leaky_relu",
        attrs={"slope": Attr(float, default=0.01)},
        check=_check_leaky_relu,
        infer=infer_same,
        cost=_cost_muls,
        exact_floats=True,
        since=3,
    ),
)

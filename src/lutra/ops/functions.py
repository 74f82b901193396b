"""Functions of single values: exact ones, and piecewise-linear tables (NN-LUT, DAC 2022).

A table of ``E`` entries cuts the axis at ``E - 1`` breakpoints ``d``::

    i = number of breakpoints <= x                      NaN: 0
    y = fma(slope[i], x, intercept[i])                  one rounding
    y = intercept[i] where slope[i] is 0                so infinity gives the limit; NaN stays NaN

The first and the last entry reach to infinity: they are the asymptotes of the function.

Tables for exp, 1/x and 1/sqrt(x) need no breakpoints: the range is reduced by powers of two, and
bits of what is left are the index. ``ld(x)`` stands for the exponent of ``x``, ``E = 2^e``::

    exp:         t = x * float32(log2(e))    n = floor(t)    f = t - n    i = min(floor(f E), E - 1)
                 y = fma(slope[i], f, intercept[i]) * 2^n                 the table is 2^f on [0, 1)
    reciprocal:  n = ld(x)    m = x / 2^n in [1, 2)    i = the top e bits of the mantissa
                 y = fma(slope[i], m, intercept[i]) * 2^-n                          1/m on [1, 2)
    rsqrt:       n = floor(ld(x) / 2)    m = x / 4^n in [1, 4)
                 i = (E / 2 where m >= 2) + the top e - 1 bits of the mantissa
                 y = fma(slope[i], m, intercept[i]) * 2^-n                    1/sqrt(m) on [1, 4)

``lutra.reference.functions`` says what becomes of zero, infinity and NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from lutra.node import Array, Node, Value
from lutra.ops.limits import FUNCTION_ENTRIES
from lutra.ops.spec import Attr, Cost, OpSpec, TensorRole, inner, node_error, text

#: The functions that are operators of that name, and about how many multiply-adds one value of
#: each takes when it is computed.
FUNCTIONS: Final = {
    "gelu": 14,
    "silu": 11,
    "tanh": 11,
    "sigmoid": 10,
    "exp": 8,
    "erf": 12,
    "sqrt": 1,
    "rsqrt": 2,
    "reciprocal": 1,
    "log": 14,
    "elu": 10,
    "softplus": 24,
    "mish": 14,
}
#: Those that version 3 of the file format brought.
_NEWER: Final = ("log", "elu", "softplus", "mish")


def table_roles(*functions: str) -> dict[str, TensorRole]:
    """The optional tensors of an operator that may read these functions from tables.

    Args:
        functions: Names of functions whose range is reduced: exp, reciprocal, rsqrt.
    """
    return {
        f"{name}_{part}": TensorRole("float32", 1, required=False, since=2)
        for name in functions
        for part in ("slope", "intercept")
    }


def check_tables(node: Node, tensors: Mapping[str, Array], *functions: str) -> None:
    """Checks the tables of functions whose range is reduced.

    Args:
        node: The node.
        tensors: Its tensors by role.
        functions: The functions that it may read from tables: all of them or none.

    Raises:
        GraphError: If some of them are missing, or have no size that a table may have.
    """
    roles = list(table_roles(*functions))
    given = [role for role in roles if role in tensors]
    if given and len(given) < len(roles):
        missing = ", ".join(role for role in roles if role not in given)
        raise node_error(
            node,
            f"has the table {', '.join(given)} but lacks {missing}",
            "give it all of them or none",
        )
    for name in functions if given else ():
        _check_pieces(node, tensors[f"{name}_slope"], tensors[f"{name}_intercept"], f"{name}_")


def has_tables(tensors: Mapping[str, Array]) -> bool:
    """Whether a node that ``check_tables`` approves reads its functions from tables."""
    return any(role.endswith("_slope") for role in tensors)


def _check_pieces(node: Node, slope: Array, intercept: Array, prefix: str = "") -> None:
    if slope.shape != intercept.shape or slope.shape[0] not in FUNCTION_ENTRIES:
        raise node_error(
            node,
            f"has {prefix}slope of shape {slope.shape} and {prefix}intercept of shape "
            f"{intercept.shape}",
            f"both must have {' or '.join(map(str, FUNCTION_ENTRIES))} entries",
        )
    if not (np.isfinite(slope).all() and np.isfinite(intercept).all()):
        raise node_error(
            node, f"has {prefix}slope or {prefix}intercept that is not finite", "fit it again"
        )


def _check_piecewise(node: Node, tensors: Mapping[str, Array]) -> None:
    _check_pieces(node, tensors["slope"], tensors["intercept"])
    points, entries = tensors["breakpoint"], tensors["slope"].shape[0]
    if points.shape != (entries - 1,):
        raise node_error(
            node,
            f"has {points.shape[0]} breakpoints and {entries} entries",
            f"{entries} entries need {entries - 1} breakpoints between them",
        )
    if not np.isfinite(points).all() or (np.diff(points) < 0).any():
        raise node_error(
            node, f"has the breakpoints {points.tolist()}", "they must be finite and ascending"
        )


def infer_same(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    """The output of an operator that treats every element alike."""
    return inputs[0].with_shape(node.output, inputs[0].shape)


def function_cost(values: int, function: str) -> Cost:
    """The cost of that many values of a function that is computed."""
    work = values * FUNCTIONS[function]
    return Cost(functions=values, float_adds=work, float_muls=work)


def table_bytes(tensors: Mapping[str, Array]) -> int:
    """Bytes of the tables of functions among the tensors of a node."""
    return sum(
        array.nbytes
        for role, array in tensors.items()
        if role.endswith(("slope", "intercept", "breakpoint"))
    )


def _cost(node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]) -> Cost:
    values = math.prod(inner(output))
    if node.op == "piecewise":
        return Cost(pieces=values, table_bytes=table_bytes(tensors))
    return function_cost(values, node.op)


def function_name(node: Node) -> str:
    """What the engine calls the function of a node: ``gelu_tanh`` is a GELU with tanh."""
    tanh = node.op == "gelu" and text(node, "approximate") == "tanh"
    return "gelu_tanh" if tanh else node.op


_ATTRS: Final = {"gelu": {"approximate": Attr(str, default="none", choices=("none", "tanh"))}}

SPECS: Final = (
    *(
        OpSpec(
            name,
            attrs=_ATTRS.get(name, {}),
            infer=infer_same,
            cost=_cost,
            since=3 if name in _NEWER else 2,
        )
        for name in FUNCTIONS
    ),
    OpSpec(
        "piecewise",
        tensors={
            "breakpoint": TensorRole("float32", 1),
            "slope": TensorRole("float32", 1),
            "intercept": TensorRole("float32", 1),
        },
        check=_check_piecewise,
        infer=infer_same,
        cost=_cost,
        since=2,
    ),
)

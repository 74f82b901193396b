"""Recurrent layers with matrices in int8: integer activations times integer weights.

They are ``lutra.ops.recurrent`` with other products. With ``x_q`` on the grid ``act_*`` and ``h_q``
on the grid ``state_*``, both as in ``lutra.ops.grid``::

    a = float32(sum_d weight_ih[., d] (x_q[d] - act_zero)) scale_ih + bias_ih
    b = float32(sum_d weight_hh[., d] (h_q[d] - state_zero)) scale_hh + bias_hh

Sums are exact in int32; a multiply and an add follow. ``h`` and ``c`` stay float32: only what is
multiplied is rounded. All the rest is float32 with one rounding for each operation, in the order

    lstm:  c = f c + i g        h = o tanh(c)        of sigmoid and tanh of b + a
    gru:   r, z = sigmoid(b + a);  n = tanh(a_n + r b_n);  h = (1 - z) n + z h

and with the sigmoid and the hyperbolic tangent of the engine, so that the reference has its bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from lutra.node import Array, Node
from lutra.ops.grid import GRID, check_grid
from lutra.ops.limits import INT8_MAX, MAX_ACT_BITS, MAX_INT8_DEPTH
from lutra.ops.recurrent import SPECS as FLOAT_SPECS
from lutra.ops.recurrent import check_gates
from lutra.ops.spec import Attr, OpSpec, TensorRole, node_error

#: The grid of the states, beside that of the inputs.
STATE_GRID: Final = {
    "state_scale": Attr(float),
    "state_zero": Attr(int, low=0, high=2**MAX_ACT_BITS - 1),
    "state_bits": Attr(int, low=1, high=MAX_ACT_BITS),
}
_TENSORS: Final = {
    "weight_ih": TensorRole("int8", 2),
    "weight_hh": TensorRole("int8", 2),
    "scale_ih": TensorRole("float32", 1),
    "scale_hh": TensorRole("float32", 1),
    "bias_ih": TensorRole("float32", 1),
    "bias_hh": TensorRole("float32", 1),
}


def float_op(op: str) -> str:
    """The operator of float32 that does the same with other products."""
    return op.removeprefix("int8_")


def _check(node: Node, tensors: Mapping[str, Array]) -> None:
    check_gates(node, tensors, float_op(node.op))
    check_grid(node)
    states = {name.replace("state", "act"): node.attrs[name] for name in STATE_GRID}
    check_grid(dataclasses.replace(node, attrs=states))
    for role in ("weight_ih", "weight_hh"):
        if tensors[role].shape[1] > MAX_INT8_DEPTH:
            raise node_error(
                node,
                f"adds up {tensors[role].shape[1]} products for each row of {role}",
                f"int32 holds {MAX_INT8_DEPTH} for certain; use the float32 operator",
            )
        if int(tensors[role].min()) < -INT8_MAX:
            raise node_error(
                node,
                f"has {role} of {int(tensors[role].min())}",
                f"weights must be in {-INT8_MAX}..{INT8_MAX}",
            )


SPECS: Final = tuple(
    OpSpec(
        f"int8_{spec.name}",
        attrs={**spec.attrs, **GRID, **STATE_GRID},
        tensors=_TENSORS,
        check=_check,
        infer=spec.infer,
        cost=spec.cost,
        max_inputs=spec.max_inputs,
        since=3,
    )
    for spec in FLOAT_SPECS
)

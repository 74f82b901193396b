"""Recurrent layers, each one layer in one direction, with the gates in the order of PyTorch.

Both go through the tokens of ``x`` (N, T, C), the last first with ``reverse``, and write ``h`` of
every step to the place of its token in the output (N, T, H)::

    a = weight_ih x[t] + bias_ih        b = weight_hh h + bias_hh        H rows of each for a gate

    lstm:  i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of the parts of a + b
           c = f c + i g        h = o tanh(c)
    gru:   r, z = sigmoid of the first two parts of a + b
           n = tanh(a_n + r b_n)        h = (1 - z) n + z h

``h`` and ``c`` begin as 0, or as the further inputs: ``h`` (N, H), and for an LSTM ``c`` (N, H).

A node has one output. The state after the last step is a slice of it: ``h`` is the entry of the
last token (of the first with ``reverse``). With ``cells`` an LSTM writes ``h`` and ``c`` of every
step side by side, (N, T, 2 H), so that ``c`` is a slice too. Several layers are several nodes, and
two directions are two nodes and a ``concat``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from lutra.formatting import shape_text
from lutra.node import Array, Node, Value
from lutra.ops.functions import function_cost
from lutra.ops.spec import (
    Attr,
    Cost,
    OpSpec,
    TensorRole,
    flag,
    inner,
    need_rank,
    need_size,
    node_error,
)

#: Gates of each operator.
GATES: Final = {"lstm": 4, "gru": 3}
_TENSORS: Final = {
    "weight_ih": TensorRole("float32", 2),
    "weight_hh": TensorRole("float32", 2),
    "bias_ih": TensorRole("float32", 1),
    "bias_hh": TensorRole("float32", 1),
}


def _check(node: Node, tensors: Mapping[str, Array]) -> None:
    check_gates(node, tensors, node.op)


def check_gates(node: Node, tensors: Mapping[str, Array], op: str) -> None:
    """Raises GraphError unless every tensor has a row for each gate of the operator `op`, and the
    node as many states as it takes."""
    hidden = tensors["weight_hh"].shape[1]
    rows = GATES[op] * hidden
    for role, array in tensors.items():
        if array.shape[0] != rows:
            raise node_error(
                node,
                f"has {role} of shape {array.shape} for {hidden} hidden values",
                f"it must have {rows} rows, {hidden} for each of {GATES[op]} gates",
            )
    if op == "lstm" and len(node.inputs) == 2:
        raise node_error(node, "has 2 inputs", "give it 1, or h and c beside it")


def _infer(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    x, *states = inputs
    need_rank(node, x, 3, 3)
    features, hidden = tensors["weight_ih"].shape[1], tensors["weight_hh"].shape[1]
    if need_size(node, x, 2) != features:
        raise node_error(
            node,
            f"has weight_ih of shape {tensors['weight_ih'].shape} but its input {x.name!r} has the "
            f"shape {shape_text(x.shape)}",
            f"give it an input whose last axis has {features} values",
        )
    for state in states:
        if state.shape != (x.shape[0], hidden):
            raise node_error(
                node,
                f"reads the state {state.name!r} of shape {shape_text(state.shape)} for its input "
                f"{x.name!r} of shape {shape_text(x.shape)}",
                f"it must be {shape_text((x.shape[0], hidden))}",
            )
    parts = 2 if node.op.endswith("lstm") and flag(node, "cells") else 1
    return x.with_shape(node.output, (*x.shape[:2], parts * hidden))


def _cost(node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]) -> Cost:
    steps, _ = inner(inputs[0])
    hidden = tensors["weight_hh"].shape[1]
    macs = steps * sum(math.prod(tensors[role].shape) for role in ("weight_ih", "weight_hh"))
    states = steps * hidden
    # the products of both sides are added; then the new state
    cost = Cost(macs=macs, dense_macs=macs, float_adds=5 * states, float_muls=3 * states)
    sigmoids, tanhs = (3, 2) if node.op.endswith("lstm") else (2, 1)
    return (
        cost + function_cost(sigmoids * states, "sigmoid") + function_cost(tanhs * states, "tanh")
    )


SPECS: Final = (
    OpSpec(
        "lstm",
        attrs={"reverse": Attr(bool, default=False), "cells": Attr(bool, default=False)},
        tensors=_TENSORS,
        check=_check,
        infer=_infer,
        cost=_cost,
        max_inputs=3,
        since=3,
    ),
    OpSpec(
        "gru",
        attrs={"reverse": Attr(bool, default=False)},
        tensors=_TENSORS,
        check=_check,
        infer=_infer,
        cost=_cost,
        max_inputs=2,
        since=3,
    ),
)

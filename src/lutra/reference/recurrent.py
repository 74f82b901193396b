"""Recurrent layers: see ``lutra.ops.recurrent``. Sums are of float64, states float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from lutra.node import Array, Node
from lutra.ops.recurrent import GATES
from lutra.ops.spec import flag
from lutra.reference.functions import EXACT

_Step: TypeAlias = Callable[[Array, Array, list[Array]], list[Array]]


def lstm(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, T, C), and perhaps states (N, H), to (N, T, H), or (N, T, 2 H) with ``cells``."""

    def step(a: Array, b: Array, states: list[Array]) -> list[Array]:
        i, f, g, o = _parts(a + b, 4)
        c = _float(_sigmoid(f) * states[1] + _sigmoid(i) * np.tanh(g))
        return [_float(_sigmoid(o) * np.tanh(c.astype(np.float64))), c]

    return _over_time(node, inputs, tensors, step, 2 if flag(node, "cells") else 1)


def gru(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, T, C), and perhaps a state (N, H), to (N, T, H)."""

    def step(a: Array, b: Array, states: list[Array]) -> list[Array]:
        (ar, az, an), (br, bz, bn) = _parts(a, 3), _parts(b, 3)
        update = _sigmoid(az + bz)
        fresh = np.tanh(an + _sigmoid(ar + br) * bn)
        return [_float((1 - update) * fresh + update * states[0])]

    return _over_time(node, inputs, tensors, step, 1)


def _over_time(
    node: Node,
    inputs: Sequence[Array],
    tensors: Mapping[str, Array],
    step: _Step,
    parts: int,
) -> Array:
    """Goes through the tokens.

    Args:
        node: The node.
        inputs: x (N, T, C), and perhaps states (N, H).
        tensors: Weights and biases.
        step: Makes the states after a token of the products of both weights and the states before.
        parts: How many of the states are written.
    """
    x, *given = inputs
    samples, tokens, _ = x.shape
    hidden = tensors["weight_hh"].shape[1]
    count = 2 if GATES[node.op] == 4 else 1
    states = [*given] or [np.zeros((samples, hidden), np.float32)] * count
    result = np.empty((samples, tokens, parts * hidden), np.float32)
    weights = {side: tensors[f"weight_{side}"].astype(np.float64).T for side in ("ih", "hh")}
    with np.errstate(all="ignore"):
        for t in reversed(range(tokens)) if flag(node, "reverse") else range(tokens):
            a = x[:, t].astype(np.float64) @ weights["ih"] + tensors["bias_ih"]
            b = states[0].astype(np.float64) @ weights["hh"] + tensors["bias_hh"]
            states = step(a, b, states)
            result[:, t] = np.concatenate(states[:parts], axis=1)
    return result


def _parts(gates: Array, count: int) -> list[Array]:
    return np.split(gates, count, axis=1)


def _sigmoid(x: Array) -> Array:
    return EXACT["sigmoid"](x)


def _float(x: Array) -> Array:
    result: Array = x.astype(np.float32)
    return result

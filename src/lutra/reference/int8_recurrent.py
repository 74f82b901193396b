"""Recurrent layers in int8, with the bits of the engine: see ``lutra.ops.int8_recurrent``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from lutra.node import Array, Node
from lutra.ops.int8_recurrent import float_op
from lutra.ops.spec import flag, integer, number
from lutra.reference.functions import engine_sigmoid, engine_tanh
from lutra.reference.pq import quantise

_ONE: Final = np.float32(1)


def recurrent(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """(N, T, C), and perhaps states (N, H), to (N, T, H), or (N, T, 2 H) with ``cells``."""
    x, *given = inputs
    samples, tokens, _ = x.shape
    hidden = tensors["weight_hh"].shape[1]
    lstm = float_op(node.op) == "lstm"
    states = [*given] or [np.zeros((samples, hidden), np.float32)] * (1 + lstm)
    parts = 2 if lstm and flag(node, "cells") else 1
    result = np.empty((samples, tokens, parts * hidden), np.float32)
    with np.errstate(all="ignore"):
        for t in reversed(range(tokens)) if flag(node, "reverse") else range(tokens):
            a = _products(node, "act", x[:, t], tensors, "ih")
            b = _products(node, "state", states[0], tensors, "hh")
            states = (_lstm if lstm else _gru)(a, b, states)
            result[:, t] = np.concatenate(states[:parts], axis=1)
    return result


def _lstm(a: Array, b: Array, states: list[Array]) -> list[Array]:
    i, f, g, o = np.split(b + a, 4, axis=1)
    c = engine_sigmoid(f) * states[1] + engine_sigmoid(i) * engine_tanh(g)
    return [engine_sigmoid(o) * engine_tanh(c), c]


def _gru(a: Array, b: Array, states: list[Array]) -> list[Array]:
    (ar, az, an), (br, bz, bn) = np.split(a, 3, axis=1), np.split(b, 3, axis=1)
    update = engine_sigmoid(bz + az)
    fresh = engine_tanh(an + engine_sigmoid(br + ar) * bn)
    return [(_ONE - update) * fresh + update * states[0]]


def _products(node: Node, grid: str, x: Array, tensors: Mapping[str, Array], side: str) -> Array:
    """float32 (N, G H) of x (N, D)."""
    zero = integer(node, f"{grid}_zero")
    q = quantise(x, number(node, f"{grid}_scale"), zero, integer(node, f"{grid}_bits"))
    sums = (q.astype(np.int64) - zero) @ tensors[f"weight_{side}"].astype(np.int64).T
    scaled = sums.astype(np.float32) * tensors[f"scale_{side}"]
    result: Array = scaled + tensors[f"bias_{side}"]
    return result

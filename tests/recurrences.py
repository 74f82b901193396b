"""Graphs of one recurrent layer."""

from __future__ import annotations

import numpy as np
from graphs import Array, Builder

from lutra.graph import Graph
from lutra.ops.recurrent import GATES

F = np.float32


def weights(op: str, features: int, hidden: int, seed: int = 0) -> dict[str, Array]:
    rng, rows = np.random.default_rng(seed), GATES[op] * hidden
    bound = 1 / np.sqrt(hidden)
    shapes = {
        "weight_ih": (rows, features),
        "weight_hh": (rows, hidden),
        "bias_ih": (rows,),
        "bias_hh": (rows,),
    }
    return {role: rng.uniform(-bound, bound, s).astype(F) for role, s in shapes.items()}


def recurrent(
    op: str, features: int, hidden: int, *, states: bool = False, length: int | None = None,
    **attrs: bool,
) -> Graph:  # fmt: skip
    """A graph of one node that reads x (N, T, C), and states (N, H) if asked to."""
    names = (["h", "c"] if op == "lstm" else ["h"]) if states else []
    b = Builder(("x", (None, length, features)), *((name, (None, hidden)) for name in names))
    b.add(op, "x", *names, name="node", tensors=weights(op, features, hidden), **attrs)
    return b.graph()

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


def int8_weights(op: str, features: int, hidden: int, seed: int = 0) -> dict[str, Array]:
    """Of `int8_lstm` and `int8_gru`."""
    rng, rows = np.random.default_rng(seed), GATES[op.removeprefix("int8_")] * hidden
    made: dict[str, Array] = {}
    for side, depth in (("ih", features), ("hh", hidden)):
        made[f"weight_{side}"] = rng.integers(-127, 128, (rows, depth)).astype(np.int8)
        made[f"scale_{side}"] = rng.uniform(1e-4, 3e-4, rows).astype(F)
        made[f"bias_{side}"] = rng.normal(size=rows).astype(F)
    return made


def grids(rng: np.random.Generator) -> dict[str, float | int]:
    """Random grids of an int8 recurrent layer, of inputs of about 3 and states below 1."""
    made: dict[str, float | int] = {}
    for name, reach in (("act", 3.0), ("state", 1.0)):
        bits = int(rng.integers(4, 8))
        scale = float(F(reach / 2 ** (bits - 1)))
        made |= {f"{name}_scale": scale, f"{name}_zero": 2 ** (bits - 1), f"{name}_bits": bits}
    return made


def recurrent(
    op: str, features: int, hidden: int, *, states: bool = False, length: int | None = None,
    **attrs: bool,
) -> Graph:  # fmt: skip
    """A graph of one node that reads x (N, T, C), and states (N, H) if asked to."""
    names = (["h", "c"] if op == "lstm" else ["h"]) if states else []
    b = Builder(("x", (None, length, features)), *((name, (None, hidden)) for name in names))
    b.add(op, "x", *names, name="node", tensors=weights(op, features, hidden), **attrs)
    return b.graph()

"""Layers of lookups and of integers, as ordinary modules."""

from __future__ import annotations

from lutra._moved import forward

__getattr__ = forward(
    __name__,
    "lutra.train.layers.pq",
    (
        "FrozenPQ",
        "PQConv2d",
        "PQLinear",
        "StraightThroughLookup",
        "TableSum",
        "quantize_tables",
    ),
)

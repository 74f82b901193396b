"""What a network costs in energy, estimated from its operations and a table of what each costs.

The figures are those of a 45 nm process at 0.9 V (Horowitz, "Computing's energy problem", ISSCC
2014). They price arithmetic and reads of lookup tables, nothing else: activations, weights and
weight indices come for free in every column, so do clamps, comparisons of floats, control and
leakage. The result compares ways to compute one network; it is no forecast for any device, and a
CPU, which spends far more on each instruction than on its arithmetic, is not what it describes.

Four ways are compared:

* ``fp32``: the network as it was, in float32;
* ``int8``: all its convolutions and linear layers in int8;
* ``sram``: this file, its tables in an SRAM of 8 kB, 32 kB or 1 MB, whichever holds them;
* ``registers``: this file, tables of up to ``REGISTER_BYTES`` in a register file or in logic.

Products of integers are of 8 bits, their sums and those of table entries are of 32 bits. A value
that is rounded to a grid and a sum that becomes a float take one float32 multiplication and one
addition each. A value of a function (exp, GELU, a root) takes about the multiplications and
additions of the engine's polynomial, or, from a table, the reads of a slope and an intercept in
float32, a multiplication and an addition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from lutra.errors import InputError
from lutra.graph import Graph, Sizes
from lutra.node import Node, Value
from lutra.ops import OPS
from lutra.ops.spec import Cost, inner

__all__ = ["REGISTER_BYTES", "SOURCES", "Energy", "EnergyTable", "estimate"]

#: The largest table that the column ``registers`` takes out of SRAM: 64 x 33 entries.
REGISTER_BYTES: Final = 64 * 33
_PORT_BYTES: Final = 8  # an SRAM read of Horowitz's table
_KB: Final = 1024
_PIECE_BYTES: Final = 8  # a slope and an intercept, float32

#: Where the figures come from.
SOURCES: Final = {
    "fp32_mul": "Horowitz, ISSCC 2014, 45 nm",
    "fp32_add": "Horowitz, ISSCC 2014, 45 nm",
    "int32_add": "Horowitz, ISSCC 2014, 45 nm",
    "int8_mul": "Horowitz, ISSCC 2014, 45 nm",
    "int8_add": "Horowitz, ISSCC 2014, 45 nm",
    "sram_8k": "Horowitz, ISSCC 2014, 45 nm: 64 bits from 8 kB",
    "sram_32k": "Horowitz, ISSCC 2014, 45 nm: 64 bits from 32 kB",
    "sram_1m": "Horowitz, ISSCC 2014, 45 nm: 64 bits from 1 MB",
    "register_read": "assumption: one byte costs as much as an int8 multiply-add, the ratio of a "
    "0.5 kB register file to a 16-bit one in Eyeriss (Chen, ISCA 2016)",
}


@dataclass(frozen=True)
class EnergyTable:
    """What operations cost, in picojoules; ``SOURCES`` says where the defaults come from.

    An SRAM is priced by the bytes that are read: an entry of one byte costs an eighth of a read of
    64 bits. That is right where neighbours are read together (the rows of product quantisation),
    and the least that it can be where single entries are (`lookup_conv2d`, `lookup_linear`).

    Attributes:
        fp32_mul: A float32 multiplication.
        fp32_add: A float32 addition.
        int32_add: An int32 addition.
        int8_mul: An int8 multiplication.
        int8_add: An int8 addition or comparison.
        sram_8k: A read of 64 bits from an SRAM of 8 kB.
        sram_32k: The same from 32 kB.
        sram_1m: The same from 1 MB, and from what is larger.
        register_read: A read of one byte from a register file, or from a table made of logic.

    Raises:
        InputError: If one of them is no number of at least 0.
    """

    fp32_mul: float = 3.7
    fp32_add: float = 0.9
    int32_add: float = 0.1
    int8_mul: float = 0.2
    int8_add: float = 0.03
    sram_8k: float = 10.0
    sram_32k: float = 20.0
    sram_1m: float = 100.0
    register_read: float = 0.23

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"EnergyTable: {entry.name}={value!r} is not a number")
            if not 0 <= value < math.inf:
                raise InputError(
                    f"EnergyTable: {entry.name}={value} pJ is not a finite number of at least 0"
                )

    def sram_byte(self, table_bytes: int) -> float:
        """Picojoules to read one byte of a table of that size from SRAM."""
        read = self.sram_1m
        if table_bytes <= 8 * _KB:
            read = self.sram_8k
        elif table_bytes <= 32 * _KB:
            read = self.sram_32k
        return read / _PORT_BYTES


@dataclass(frozen=True)
class Energy:
    """Picojoules for one sample.

    Attributes:
        fp32: The layer in float32.
        int8: The layer in int8; what is no convolution or linear layer stays in float32.
        sram: The layer as it is, its table in SRAM.
        registers: The layer as it is, its table in registers where it is small enough.
    """

    fp32: float = 0.0
    int8: float = 0.0
    sram: float = 0.0
    registers: float = 0.0

    def __add__(self, other: Energy) -> Energy:
        return Energy(
            self.fp32 + other.fp32,
            self.int8 + other.int8,
            self.sram + other.sram,
            self.registers + other.registers,
        )


def estimate(
    graph: Graph, table: EnergyTable | None = None, sizes: Sizes | None = None
) -> dict[str, Energy]:
    """Estimates the energy of every node for one sample.

    Args:
        graph: A graph; it is validated.
        table: What operations cost; the 45 nm figures where it is None.
        sizes: Shapes of the inputs by name, as ``Graph.cost`` takes them.

    Returns:
        By node name, in the order of the nodes; ``sum(result.values(), Energy())`` is the total.

    Raises:
        GraphError: If the graph is not valid, or the work depends on sizes that are not given.
    """
    prices = table or EnergyTable()
    costs = graph.cost(sizes)
    sizes = sizes or graph.nominal_sizes()
    values = graph.values if sizes is None else graph.infer(sizes)
    return {node.name: _energy(node, costs[node.name], values, prices) for node in graph.nodes}


def _energy(node: Node, cost: Cost, values: Mapping[str, Value], prices: EnergyTable) -> Energy:
    step = prices.fp32_mul + prices.fp32_add
    own = (  # of the node as it is, but for its table reads
        cost.int_multiplications * prices.int8_mul
        + cost.int_additions * prices.int32_add
        + cost.comparisons * prices.int8_add
        + cost.float_multiplications * prices.fp32_mul
        + cost.float_additions * prices.fp32_add
    )
    read = cost.lookups + _PIECE_BYTES * cost.pieces
    in_sram = read * prices.sram_byte(cost.table_bytes)
    small = cost.table_bytes <= REGISTER_BYTES
    in_registers = read * prices.register_read if small else in_sram
    fp32 = int8 = own
    if OPS[node.op].output_axis is not None:
        ends = math.prod(inner(values[node.inputs[0]])) + math.prod(inner(values[node.output]))
        fp32 = cost.dense_macs * step
        int8 = cost.dense_macs * (prices.int8_mul + prices.int32_add) + ends * step
    return Energy(fp32, int8, own + in_sram, own + in_registers)

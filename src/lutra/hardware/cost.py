"""What a layer costs on a design, before anything is built: cycles, memory, traffic, energy.

Cycles are those of ``lutra.hardware.cycles``, so those of the simulation. Bits of memory are those
that Yosys counts. Energy is that of ``lutra.energy``: arithmetic and table reads at 45 nm, nothing
else, and no forecast for a device. Gates come from Yosys (``lutra.hardware.synthesis``): there is
no formula for areas or watts here, because nobody measured any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Final

from lutra.energy import EnergyTable
from lutra.graph import Graph
from lutra.hardware.cycles import count_cycles, pass_commands
from lutra.hardware.design import Design
from lutra.hardware.layer import graph_shapes

__all__ = ["PUBLISHED", "LayerCost", "layer_cost", "memory_bits", "network_cost", "total_cost"]

#: Points that others published, at 28 nm, simulated and not built. They are here to be cited beside
#: counts of gates, and nothing computes with them.
PUBLISHED: Final = {
    "multiplier array, FP16, TFLOPS/mm2": (3.39, "LUT Tensor Core, arXiv 2408.06003, 28 nm"),
    "table unit, W1 A16, TFLOPS/mm2": (61.55, "LUT Tensor Core, arXiv 2408.06003, 28 nm"),
}


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs.

    Attributes:
        name: The layer.
        cycles: From its command to its last sums.
        lookups: Table rows that are read, each of ``tile`` entries.
        table_loads: Tables of a tile that are loaded.
        table_bytes: Bytes of tables that come from outside.
        codebook_bytes: Bytes of centroids or thresholds that come from outside.
        activation_bytes: Bytes of sub-vectors that come from outside.
        sum_bytes: Bytes of sums that go out.
        energy_pj: Picojoules for encoding, table reads and additions.
    """

    name: str
    cycles: int
    lookups: int
    table_loads: int
    table_bytes: int
    codebook_bytes: int
    activation_bytes: int
    sum_bytes: int
    energy_pj: float

    @property
    def utilisation(self) -> float:
        """The part of all cycles in which a table row is read."""
        return self.lookups / self.cycles

    @property
    def traffic_bytes(self) -> int:
        """All bytes from and to the memory outside."""
        return self.table_bytes + self.codebook_bytes + self.activation_bytes + self.sum_bytes


def memory_bits(design: Design) -> dict[str, int]:
    """Bits of each memory of a design.

    Args:
        design: The design.
    """
    found = {
        "partial sums": design.rows * design.tile * design.sum_bits,
        "kept codes": design.codes * (design.width * design.act_bits if design.multiply else
                                      design.levels),
    }  # fmt: skip
    if not design.multiply:
        found |= {
            "tables": 2 * design.k * design.tile * design.table_bits,
            "codebooks": 2 * design.codebook_beats * design.codebook_bits,
            "FIFO": design.fifo * design.levels,
        }
    return found


def layer_cost(
    design: Design,
    rows: int,
    codebooks: int,
    outputs: int,
    *,
    name: str = "",
    prices: EnergyTable | None = None,
) -> LayerCost:
    """The cost of a layer of given sizes.

    Args:
        design: What the accelerator is built for. It has one clock.
        rows: Rows of the layer: output pixels, or samples.
        codebooks: Tables of the layer.
        outputs: Outputs of the layer.
        name: Of the layer.
        prices: Of operations; the figures of ``lutra inspect`` where it is None.

    Example:
        >>> from lutra.hardware import Design
        >>> from lutra.hardware.cost import layer_cost
        >>> cost = layer_cost(Design(k=16, v=9, tile=16, rows=1024), 1024, 16, 16)
        >>> cost.cycles, round(cost.utilisation, 3)
        (16420, 0.998)
    """
    prices = prices or EnergyTable()
    timing = count_cycles(design, pass_commands(design, rows, codebooks, outputs))
    encoded = rows * codebooks
    table_loads = timing.table_words // design.table_beats
    entries = timing.lookups * design.tile
    read = prices.sram_byte(design.k * design.tile * design.table_bits // 8)
    energy = entries * (read * design.table_bits / 8 + prices.int32_add)
    energy += encoded * _encode_energy(design, prices)
    return LayerCost(
        name,
        timing.cycles,
        timing.lookups,
        table_loads,
        timing.table_words * design.beat * design.table_bits // 8,
        -(-timing.codebook_words * design.codebook_bits // 8),
        -(-encoded * design.width * design.act_bits // 8),
        -(-rows * -(-outputs // design.tile) * design.tile * design.sum_bits // 8),
        energy,
    )


def _encode_energy(design: Design, prices: EnergyTable) -> float:
    """Picojoules for one code; differences and comparisons are priced as additions."""
    if design.encoder == "tree":
        return design.levels * prices.int8_add
    values = design.k * design.v
    if design.encoder == "l2":
        return values * (prices.int8_mul + prices.int32_add)
    return values * 2 * prices.int8_add + design.k * prices.int8_add


def network_cost(
    graph: Graph, design: Callable[[str], Design], *, prices: EnergyTable | None = None
) -> list[LayerCost]:
    """The cost of every layer of product quantisation of a model, for one sample.

    Args:
        graph: The model.
        design: The design for a layer, by its name.
        prices: Of operations.
    """
    return [
        layer_cost(design(name), rows, b, m, name=name, prices=prices)
        for name, rows, b, m in graph_shapes(graph)
    ]


def total_cost(costs: Iterable[LayerCost], name: str = "total") -> LayerCost:
    """The sum of costs; layers run one after the other."""
    each = list(costs)
    numbers = [field.name for field in fields(LayerCost) if field.name != "name"]
    return LayerCost(
        name, **{number: sum(getattr(cost, number) for cost in each) for number in numbers}
    )

"""Generated accelerators give the codes and sums of the reference, in the cycles of the model."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lutra.hardware import Design, HardwareError, TableLayer, count_cycles, random_layer
from lutra.hardware.words import layer_words
from lutra.reference.pq import encode

amaranth = pytest.importorskip("amaranth")
from lutra.hardware.simulate import simulate  # noqa: E402

ENCODERS = ("l2", "l1", "chebyshev", "tree")


def coin(seed: int, chance: float) -> Iterator[bool]:
    """A stream that has or takes a word with that chance in each cycle."""
    numbers = random.Random(seed)
    while True:
        yield numbers.random() < chance


def random_case(seed: int) -> tuple[TableLayer, Design]:
    """A small layer and a design for it, both random."""
    rng = np.random.default_rng(seed)
    encoder = ENCODERS[seed % 4]
    k = int(rng.choice([8, 8, 8, 16, 32, 64]))
    v, rows, codebooks = (int(rng.integers(1, high)) for high in (10, 17, 5))
    tail = int(rng.integers(0, v))
    layer = random_layer(
        rng, encoder, rows, codebooks, k, v, int(rng.integers(1, 8)), tail=tail,
        act_bits=int(rng.choice([6, 7])),
    )  # fmt: skip
    tile = int(rng.choice([1, 2, 4]))
    design = layer.design(
        tile=tile,
        elements=k >> int(rng.integers(0, k.bit_length())),
        beat=int(rng.choice([1, tile])),
        fifo=int(rng.choice([2, 3, 8, 32])),
        rows=int(rng.choice([rows, max(1, rows // 2), rows + 3])),
    )
    return layer, design


def check(layer: TableLayer, design: Design, **options: Any) -> int:
    """Simulates and compares every code and every sum; returns the cycles."""
    words = layer_words(layer, design)
    run = simulate(design, words, **options)
    assert run.code == words.code
    assert run.sums == words.sums
    return run.cycles


@pytest.mark.parametrize("seed", range(12))
def test_codes_sums_and_cycles(seed: int) -> None:
    layer, design = random_case(seed)
    cycles = check(layer, design)
    assert cycles == count_cycles(design, layer_words(layer, design).commands).cycles


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12, 212))
def test_codes_sums_and_cycles_of_many_layers(seed: int) -> None:
    test_codes_sums_and_cycles(seed)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_waiting_streams(encoder: str) -> None:
    """Streams without words, sums that nobody takes, and a reset in the middle."""
    layer = random_layer(np.random.default_rng(5), encoder, 6, 3, 8, 3, 5)
    design = layer.design(tile=2, elements=4, fifo=4)
    steady = count_cycles(design, layer_words(layer, design).commands).cycles
    for seed, chance in enumerate((0.3, 0.9)):
        cycles = check(layer, design, pattern=lambda name: coin(seed, chance))  # noqa: B023
        assert cycles > steady
    check(layer, design, reset_at=70, pattern=lambda name: coin(1, 0.6))


@pytest.mark.parametrize("period", [0.61, 1.0, 1.73])
def test_two_clocks(period: float) -> None:
    layer = random_layer(np.random.default_rng(6), "l2", 6, 3, 8, 3, 5)
    design = layer.design(tile=2, elements=4, fifo=8, rows=4, two_clocks=True)
    check(layer, design, encoder_period=period)
    check(layer, design, encoder_period=period, reset_at=70, pattern=lambda name: coin(2, 0.7))


def test_multipliers_give_the_same_sums() -> None:
    """The array of multipliers: a table of products adds what they add."""
    rng = np.random.default_rng(7)
    x = rng.integers(0, 128, (9, 4, 3), dtype=np.uint8)
    weights = rng.integers(-128, 128, (4, 3, 5)).astype(np.int8)
    from lutra.hardware.words import product_words

    design = Design(multiply=True, v=3, tile=2, rows=5, codes=20, fifo=2)
    words = product_words(x, weights, design)
    run = simulate(design, words)
    expected = np.einsum("rbv,bvm->rm", x.astype(np.int64), weights.astype(np.int64))
    assert run.sums == words.sums
    mask = 2**design.sum_bits - 1
    assert [word & mask for word in run.sums[:5]] == [int(n) & mask for n in expected[:5, 0]]
    assert run.cycles == count_cycles(design, words.commands).cycles


def test_distances() -> None:
    """The lowest index wins ties, whatever the distance."""
    x = np.array([[[2, 2]]], np.uint8)
    centroids = np.array(
        [[[0, 3], [4, 3], [1, 4], [4, 3], [9, 9], [9, 9], [9, 9], [2, 4]]], np.uint8
    )
    # L1: 3 3 3 3 . . . 2; Chebyshev: 2 2 2 2 . . . 2; squares: 5 5 5 5 . . . 4
    assert encode(x[:, 0], centroids, "l1").item() == 7
    assert encode(x[:, 0], centroids, "chebyshev").item() == 0
    # half of a square is rounded down, in the engine too: 5 and 4 are equally near
    assert encode(x[:, 0], centroids, "l2").item() == 0


def test_model_skips_what_repeats_exactly() -> None:
    """The periods that the model does not walk through are those that it would walk through."""
    import lutra.hardware.cycles as cycles

    for elements, rows, fifo in ((16, 5, 8), (4, 50, 32), (1, 7, 2), (16, 300, 8)):
        design = Design(k=16, elements=elements, rows=300, codes=300 * 40, fifo=fifo)
        got = cycles.count_cycles(design, [(rows, 40, 3)]).cycles
        model = cycles._Model(design)
        for _ in range(40):
            model.first_tile(0, rows)
        for _ in range(80):
            model.later_tile(rows)
        assert got == model.taken + 3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"encoder": "cosine"}, "encoder='cosine'; choose from"),
        ({"k": 12}, r"k=12; choose from \(8, 16, 32, 64\)"),
        ({"elements": 3}, "elements=3 does not divide 16; use a divisor"),
        ({"tile": 0}, r"tile=0; it must be in 1..256"),
        ({"v": 2.0}, "v=2.0 is no int"),
        ({"fifo": 24, "two_clocks": True}, "needs a power of 2"),
        ({"speed": 1}, "no parameter 'speed'"),
    ],
)
def test_designs_that_cannot_be(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        Design.from_dict(parameters)


def test_layers_that_do_not_fit() -> None:
    layer = random_layer(np.random.default_rng(0), "l2", 4, 2, 8, 3, 5)
    for parameters, message in (
        ({"k": 16}, "codes of a codebook: 8, and the design 16"),
        ({"v": 4}, "values of a sub-vector: 3, and the design 4"),
        ({"encoder": "l1"}, "encoder: l2, and the design l1"),
        ({"codes": 7, "tile": 2}, "codes to keep: 8, and the design 7"),
        ({"sum_bits": 8}, "bits of a sum"),
        ({"table_bits": 4}, "table entries beyond 4 bits"),
    ):
        with pytest.raises(HardwareError, match=message):
            layer_words(layer, layer.design(**parameters))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_lookup_unit(seed: int) -> None:
    """A layer of one response table gives the sums of the reference."""
    from lutra.hardware.lookup_circuit import LookupUnit
    from lutra.hardware.lookup_unit import LookupDesign, lookup_cycles, lookup_words
    from lutra.hardware.simulate import simulate_streams
    from lutra.reference.lookup import responses

    rng = np.random.default_rng(seed)
    design = LookupDesign(act_bits=int(rng.integers(2, 5)), weights=(3, 15, 33, 5)[seed], tile=3)
    table = rng.integers(-127, 128, (2**design.act_bits, design.weights)).astype(np.int8)
    rows = rng.integers(0, len(table), (4, 7), dtype=np.uint8)
    weight = rng.integers(0, design.weights, (5, 7), dtype=np.uint8)
    words = lookup_words(rows, weight, table, design)
    expected = words.pop("sums")
    sums = responses(rows, weight, table).astype(np.int64)
    mask = 2**design.sum_bits - 1
    assert [word & mask for word in expected[:4]] == [int(n) & mask for n in sums[:, 0]]
    run = simulate_streams(LookupUnit(design), words, len(expected))
    assert run.sums == expected
    assert run.cycles == lookup_cycles(design, 7, 4, 5)
    again = simulate_streams(
        LookupUnit(design), words, len(expected), reset_at=40, pattern=lambda name: coin(seed, 0.6)
    )
    assert again.sums == expected


@pytest.mark.parametrize("group", [None, 5])
@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4])
def test_lmma_unit(bits: float, group: int | None) -> None:
    """Weights of 1 to 4 bits give the sums of the reference, at the extremes too."""
    from lutra.hardware.lmma import LmmaDesign, lmma_cycles, lmma_sums, lmma_words
    from lutra.hardware.lmma_circuit import LmmaUnit
    from lutra.hardware.simulate import simulate_streams
    from lutra.ops.lowbit_storage import levels_of
    from lutra.reference.lowbit import lowbit_levels, lowbit_sums

    seed, levels = int(bits * 100), levels_of(bits)
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (3, 10)).astype(np.int8)
    x[0], x[1, :4] = -128, 127
    codes = rng.integers(0, levels, (5, 10), dtype=np.uint8)
    codes[0], codes[1] = 0, levels - 1
    design = LmmaDesign(bits=math.ceil(bits), ternary=levels == 3, rows=2, columns=3, sum_bits=18)
    sums = lmma_sums(x, codes, design, group)
    assert np.array_equal(sums, lowbit_sums(lowbit_levels(codes, levels), x, group or 10))
    words = lmma_words(x, codes, design, group)
    expected = words.pop("sums")
    mask = 2**design.sum_bits - 1
    made = [expected[0] >> 18 * i & mask for i in range(3)]
    assert made == [int(n) & mask for n in sums[0, 0, :3]]
    run = simulate_streams(LmmaUnit(design), words, len(expected))
    assert run.sums == expected
    assert run.cycles == lmma_cycles(design, 3, 10, 5, group)
    again = simulate_streams(
        LmmaUnit(design), words, len(expected), reset_at=15, pattern=lambda name: coin(seed, 0.5)
    )
    assert again.sums == expected


def test_products_that_do_not_fit_a_unit() -> None:
    from lutra.hardware.lmma import LmmaDesign, lmma_words

    with pytest.raises(HardwareError, match="bits=3 with ternary=True"):
        LmmaDesign(bits=3, ternary=True)
    x, codes = np.full((1, 64), 127, np.int8), np.full((3, 64), 15, np.uint8)
    with pytest.raises(HardwareError, match="sums do not fit 16 bits"):
        lmma_words(x, codes, LmmaDesign(bits=4, sum_bits=16))
    many = np.zeros((2**16, 4), np.int8)
    with pytest.raises(HardwareError, match="the product has 65,536 tiles"):
        lmma_words(many, codes[:, :4], LmmaDesign(bits=4, rows=1, columns=4))


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
def test_memory_bits_are_those_that_yosys_counts(encoder: str) -> None:
    import shutil

    from lutra.hardware.accelerator import Accelerator
    from lutra.hardware.cost import memory_bits
    from lutra.hardware.synthesis import synthesize

    if shutil.which("yosys") is None:
        pytest.skip("needs yosys: apt-get install verilator iverilog yosys")
    design = Design(encoder=encoder, k=8, v=2, tile=2, elements=4, rows=8, codes=16, act_bits=3)
    gates = synthesize(Accelerator(design))
    assert gates.memory_bits == sum(memory_bits(design).values())
    assert gates.cells > 100
    assert gates.flip_flops > 50
    with pytest.raises(HardwareError, match="yosys did not end within 0 s"):
        synthesize(Accelerator(design), limit=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ice40", "ecp5"])
def test_cells_of_an_fpga_are_counted_and_kept(family: str, tmp_path: Path) -> None:
    import shutil

    from lutra.hardware.accelerator import Accelerator
    from lutra.hardware.synthesis import fpga_of, gates_of, known_fpga, known_gates

    if shutil.which("yosys") is None:
        pytest.skip("needs yosys: apt-get install verilator iverilog yosys")
    file = tmp_path / "gates.json"
    design = Design(k=8, v=2, tile=4, elements=4, rows=64, codes=256, act_bits=4)
    circuit = Accelerator(design)
    gates = gates_of(circuit, file)
    cells = fpga_of(circuit, family, file)
    assert cells.luts > 100
    assert cells.flip_flops > 50
    assert cells.block_memories > 0
    assert list(known_fpga(family, file).values()) == [cells]
    assert list(known_gates(file).values()) == [gates]
    assert fpga_of(circuit, family, file) == cells


def test_statistics_of_yosys() -> None:
    from lutra.hardware.synthesis import FpgaCells, parse_fpga, synthesize_fpga

    text = """
   Number of cells:                 99
     LUT4                            1
=== accelerator ===
   Number of cells:                310
     CCU2C                          20
     DP16KD                          3
     LUT4                          200
     PFUMX                          17
     TRELLIS_DPR16X4                 8
     TRELLIS_FF                     62
"""
    assert parse_fpga(text) == FpgaCells(200, 20, 62, 3, 8)
    ice = text.replace("CCU2C", "SB_CARRY").replace("DP16KD", "SB_RAM40_4K")
    ice = ice.replace(" LUT4", " SB_LUT4").replace("TRELLIS_FF", "SB_DFFESR")
    assert parse_fpga(ice) == FpgaCells(200, 20, 62, 3, 8)
    with pytest.raises(HardwareError, match="printed no statistics"):
        parse_fpga("nothing")
    with pytest.raises(HardwareError, match="no FPGA family 'max10'; choose from ice40, ecp5"):
        synthesize_fpga(None, "max10")


def test_costs_of_a_network() -> None:
    import lutra
    from lutra.hardware.cost import network_cost, total_cost

    graph = lutra.load_graph(Path(__file__).parent.parent / "zoo/resnet20_cifar10_nearest.lutra")
    design = Design(k=16, v=9, tile=16, rows=1024, codes=2**14, act_bits=6)
    costs = network_cost(graph, lambda name: design)
    assert len(costs) == 18
    total = total_cost(costs)
    # each code reads a row of a table of 16 outputs: table reads of the model over 16
    assert total.lookups * 16 == graph.total_cost().lookups
    assert 0.5 < total.utilisation < 1
    assert total.table_bytes == sum(
        graph.node_tensors(node)["tables"].nbytes for node in graph.nodes if node.op == "pq_conv2d"
    )


@pytest.mark.parametrize("module", ["design", "cycles", "cost", "explore"])
def test_examples_in_docstrings(module: str) -> None:
    import doctest
    import importlib

    tried = doctest.testmod(importlib.import_module(f"lutra.hardware.{module}"))
    assert tried.attempted > 0
    assert tried.failed == 0

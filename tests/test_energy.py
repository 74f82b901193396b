"""Operations and energy: counted and priced by hand."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from graphs import Builder, tree_tensors
from sweeps import sweep

from lutra import InputError, save_graph
from lutra.cli.inspect import describe
from lutra.energy import REGISTER_BYTES, SOURCES, Energy, EnergyTable, estimate
from lutra.graph import Cost, Graph

pytest_plugins = ["cli_support"]

FP32 = 3.7 + 0.9
INT8 = 0.2 + 0.1


def only(graph: Graph, table: EnergyTable | None = None) -> Energy:
    (energy,) = estimate(graph, table).values()
    return energy


def operations(graph: Graph) -> tuple[int, ...]:
    """Reads; additions, multiplications, comparisons of integers; those of floats."""
    (layer,) = describe(graph, 0)["layers"]
    return tuple(layer["operations"].values())


def lookup_graph(weights: int = 15, act_bits: int = 4) -> Graph:
    b = Builder(("x", (None, 3, 6, 6)))
    b.lookup_conv2d("x", 3, 5, weights=weights, act_bits=act_bits)
    return b.graph()


def test_a_lookup_layer() -> None:
    reads, ends = 16 * 5 * 27, 3 * 36 + 5 * 16
    assert operations(lookup_graph()) == (reads, reads, 0, 0, ends, ends)
    energy = only(lookup_graph())
    assert energy.fp32 == pytest.approx(reads * FP32)
    assert energy.int8 == pytest.approx(reads * INT8 + ends * FP32)
    assert energy.sram == pytest.approx(reads * (0.1 + 10 / 8) + ends * FP32)
    assert energy.registers == pytest.approx(reads * (0.1 + 0.23) + ends * FP32)


def test_reading_memory_costs_more_than_int8_multiplications() -> None:
    """What the documentation says about one table for a layer."""
    energy = only(lookup_graph())
    assert energy.int8 < energy.registers < energy.sram < energy.fp32
    cheap = only(lookup_graph(), EnergyTable(register_read=0.05))
    assert cheap.registers < cheap.int8 == energy.int8


def test_product_quantisation() -> None:
    b = Builder(("x", (None, 4)))
    b.pq_linear("x", 4, 6, count=8, width=2)
    reads, search, ends = 2 * 6, 2 * 8 * 2, 4 + 6
    assert operations(b.graph()) == (reads, reads + search, search, 0, ends, ends)
    energy = only(b.graph())
    assert energy.sram == pytest.approx(reads * (1.25 + 0.1) + search * INT8 + ends * FP32)
    assert energy.registers == pytest.approx(energy.sram - reads * (1.25 - 0.23))
    assert energy.fp32 == pytest.approx(4 * 6 * FP32)
    assert energy.int8 == pytest.approx(4 * 6 * INT8 + ends * FP32)


def test_trees_compare() -> None:
    b = Builder(("x", (None, 9)))
    grid = {"act_scale": 0.1, "act_zero": 0, "act_bits": 7, "encoder": "tree"}
    b.add("pq_linear", "x", tensors=tree_tensors(b.rng, 9, 6, codebooks=3), in_features=9, **grid)
    assert operations(b.graph()) == (18, 18, 0, 3 * 4, 15, 15)
    assert only(b.graph()).sram == pytest.approx(18 * 1.35 + 12 * 0.03 + 15 * FP32)


def test_dense_layers() -> None:
    b = Builder(("x", (None, 4, 5, 5)))
    b.int8_conv2d("x", 4, 6, groups=2)
    macs, ends = 9 * 6 * 2 * 9, 4 * 25 + 6 * 9
    assert operations(b.graph()) == (0, macs, macs, 0, ends, ends)
    energy = only(b.graph())
    assert energy.int8 == energy.sram == energy.registers
    assert energy.int8 == pytest.approx(macs * INT8 + ends * FP32)
    assert energy.fp32 == pytest.approx(macs * FP32)

    b = Builder(("x", (None, 4, 5, 5)))
    b.conv2d("x", 4, 6, groups=2)
    assert operations(b.graph()) == (0, 0, 0, 0, macs, macs)
    energy = only(b.graph())
    assert [energy.fp32, energy.sram, energy.registers] == pytest.approx([macs * FP32] * 3)
    assert energy.int8 == pytest.approx(macs * INT8 + ends * FP32)


@pytest.mark.parametrize(
    ("op", "attrs", "adds", "muls"),
    [
        ("relu", {}, 0, 0),
        ("mean", {"axes": (2, 3)}, 4 * 36, 4),
        ("adaptive_avg_pool2d", {"output_size": (2, 2)}, 4 * 36, 4 * 4),
        ("avg_pool2d", {"kernel": (3, 2), "stride": (3, 2)}, 4 * 36, 4 * 6),
        ("max_pool2d", {"kernel": (3, 2), "stride": (3, 2)}, 0, 0),
        ("flatten", {}, 0, 0),
    ],
)
def test_other_operators_are_floats_everywhere(
    op: str, attrs: dict[str, Any], adds: int, muls: int
) -> None:
    b = Builder(("x", (None, 4, 6, 6)))
    b.add(op, "x", **attrs)
    assert operations(b.graph()) == (0, 0, 0, 0, adds, muls)
    energy = only(b.graph())
    assert len(set(asdict(energy).values())) == 1
    assert energy.fp32 == pytest.approx(adds * 0.9 + muls * 3.7)


def test_add_and_affine() -> None:
    b = Builder(("x", (None, 4, 6, 6)))
    b.add("add", b.affine("x", 4), "x")
    affine, add = estimate(b.graph()).values()
    assert set(asdict(affine).values()) == {144 * FP32}
    assert set(asdict(add).values()) == {144 * 0.9}


def test_larger_tables_are_in_larger_memory() -> None:
    table = EnergyTable()
    sizes = (1, 8192, 8193, 32768, 32769, 2**20, 2**24)
    assert [table.sram_byte(size) for size in sizes] == [1.25, 1.25, 2.5, 2.5, 12.5, 12.5, 12.5]
    assert EnergyTable(sram_8k=4).sram_byte(100) == 0.5


def test_only_small_tables_are_in_registers() -> None:
    largest = only(lookup_graph(weights=33, act_bits=6))
    assert largest.registers < largest.sram
    assert REGISTER_BYTES == 64 * 33
    for outputs, same in ((16, False), (17, True)):  # 8 * 16 * 16 and 8 * 16 * 17 bytes
        b = Builder(("x", (None, 32)))
        b.pq_linear("x", 32, outputs)
        energy = only(b.graph())
        assert (energy.registers == energy.sram) == same


def test_totals_are_sums() -> None:
    b = Builder(("x", (None, 3, 6, 6)))
    b.pq_conv2d(b.add("relu", b.lookup_conv2d("x", 3, 4, padding=(1, 1))), 4, 4)
    report = describe(b.graph(), 0)
    for key in ("operations", "energy_pj"):
        for name, total in report["totals"][key].items():
            assert total == pytest.approx(sum(layer[key][name] for layer in report["layers"]))
    cost = b.graph().total_cost()
    assert report["totals"]["operations"]["int_additions"] == cost.int_additions
    assert sum(b.graph().cost().values(), Cost()) == cost


@pytest.mark.parametrize("name", SOURCES)
@sweep("price", [-1.0, float("nan"), float("inf"), True, "2"])
def test_prices_are_numbers(name: str, price: Any) -> None:
    with pytest.raises(InputError, match=f"EnergyTable: {name}="):
        EnergyTable(**{name: price})


def test_every_price_has_a_source() -> None:
    assert SOURCES.keys() == asdict(EnergyTable()).keys()


# The command line


@pytest.fixture
def lookup_model(folder: Path) -> str:
    b = Builder(("x", (None, 3, 8, 8)))
    x = b.add("relu", b.int8_conv2d("x", 3, 4, padding=(1, 1), act_zero=64))
    x = b.add("relu", b.lookup_conv2d(x, 4, 6, padding=(1, 1)))
    x = b.add("mean", b.pq_conv2d(x, 6, 8), axes=(2, 3))
    b.lookup_linear(x, 8, 10, act_bits=2, weights=3, act_zero=2)
    save_graph(b.graph(), "m.lutra")
    return "m.lutra"


def test_inspect_shows_tables_and_totals(capture: Any, lookup_model: str) -> None:
    code, out, err = capture("inspect", lookup_model)
    assert (code, err) == (0, "")
    assert "3 of them lookup layers" in out
    assert re.search(r"lookup_conv2d_2 +lookup_conv2d +\(N, 6, 8, 8\) +- +16x15 +stored", out)
    assert re.search(r"lookup_linear_6 +lookup_linear +\(N, 10\) +- +4x3 +stored", out)
    assert re.search(r"energy +\S+ [nu]J per sample with tables in SRAM, .* see --energy", out)
    assert "table reads" not in out


def test_inspect_energy(capture: Any, lookup_model: str) -> None:
    code, out, err = capture("inspect", lookup_model, "--energy")
    assert (code, err) == (0, "")
    reads = 6 * 64 * 4 * 9
    assert re.search(rf"\nlookup_conv2d_2 +lookup_conv2d +{reads:,} +{reads:,} +- +- +640 ", out)
    assert re.search(r"\nint8_conv2d_0 +int8_conv2d +- +6,912 +6,912 +- +448 +448 ", out)
    assert re.search(r"\ntotal +[\d,]+ ", out)
    assert "45 nm (Horowitz, ISSCC 2014)\n" in out
    assert "register_read one of a byte (no measurement: an assumption" in out
    assert "A table entry read from memory (1.25 pJ from 8 kB) costs more than" in out
    assert "relu" not in out.split("operations and energy")[1]


def test_inspect_takes_other_prices(capture: Any, lookup_model: str) -> None:
    code, out, _ = capture(
        "inspect", lookup_model, "--energy", "--pj", "register_read=0.05", "--pj", "sram_8k=1"
    )
    assert code == 0
    assert "45 nm (Horowitz, ISSCC 2014) but for sram_8k, register_read" in out
    assert "costs more than" not in out
    report = json.loads(capture("inspect", lookup_model, "--json", "--pj", "fp32_mul=1")[1])
    assert report["energy_table_pj"] == {**asdict(EnergyTable()), "fp32_mul": 1.0}
    assert report["energy_sources"] == SOURCES
    layer = report["layers"][2]
    assert (layer["table"], layer["v"], layer["k"]) == ([16, 15], None, None)
    assert layer["operations"]["table_reads"] == 6 * 64 * 36
    assert layer["energy_pj"]["fp32"] == pytest.approx(6 * 64 * 36 * 1.9)


@pytest.mark.parametrize("text", ["register=1", "fp32_mul", "fp32_mul=x", "fp32_mul=-1", "=1"])
def test_inspect_refuses_prices(refuse: Any, lookup_model: str, text: str) -> None:
    refuse("inspect", lookup_model, "--pj", text, match=r"is not NAME=PJ, .* sram_8k")


@pytest.mark.parametrize("text", ["fp32_mul=nan", "int8_add=inf"])
def test_inspect_refuses_numbers(refuse: Any, lookup_model: str, text: str) -> None:
    refuse("inspect", lookup_model, "--pj", text, match="finite number of at least 0")

"""Whole networks through one accelerator, layer after layer, equal to the engine."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from graphs import pq_tensors

import lutra
from lutra.graph import Graph, make_node
from lutra.node import Value

pytest.importorskip("amaranth")
from lutra.hardware import HardwareError, count_cycles
from lutra.hardware.cycles import pass_commands
from lutra.hardware.network import common_design, in_amaranth, in_tool, run_network


def small_network(v: int = 9) -> Graph:
    """Two convolutions with a pooling between them, and a classifier; K = 8."""
    rng = np.random.default_rng(3)
    tensors, nodes, before, inputs = {}, [], "x", 1
    for name, outputs in (("conv1", 3), ("conv2", 5)):
        made = pq_tensors(rng, inputs * 9, outputs, count=8, width=v, bits=6)
        tensors |= {f"{name}.{role}": array for role, array in made.items()}
        attrs = {
            "in_channels": inputs, "kernel": (3, 3), "padding": (1, 1), "act_scale": 0.05,
            "act_zero": 0, "act_bits": 6,
        }  # fmt: skip
        roles = {role: f"{name}.{role}" for role in made}
        nodes.append(make_node("pq_conv2d", name, [before], name, attrs, roles))
        nodes.append(make_node("relu", f"{name}.relu", [name], f"{name}.y"))
        before, inputs = f"{name}.y", outputs
        if name == "conv1":
            attrs = {"kernel": (2, 2), "stride": (2, 2)}
            nodes.append(make_node("max_pool2d", "pool", [before], "pooled", attrs))
            before = "pooled"
    nodes.append(make_node("mean", "mean", [before], "y", {"axes": (2, 3)}))
    return Graph((Value("x", "float32", (None, 1, 4, 4)),), ("y",), tuple(nodes), tensors)


def test_small_network() -> None:
    graph = small_network()
    x = np.random.default_rng(4).uniform(0, 3, (2, 1, 4, 4)).astype(np.float32)
    design = common_design(graph, tile=2, elements=4)
    run = run_network(graph, {"x": x}, design, in_amaranth)
    assert np.array_equal(run.outputs["y"], lutra.Session(graph)(x))
    assert [layer.rows for layer in run.layers] == [32, 8]
    for layer, (b, m) in zip(run.layers, ((1, 3), (3, 5)), strict=True):
        commands = pass_commands(design, layer.rows, b, m)
        assert layer.cycles == count_cycles(design, commands).cycles


@pytest.mark.slow
@pytest.mark.parametrize("simulator", ["verilator", "icarus"])
def test_small_network_in_verilog(simulator: str) -> None:
    for program in ("verilator", "iverilog"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}: apt-get install verilator iverilog yosys")
    graph = small_network()
    x = np.random.default_rng(5).uniform(0, 3, (3, 1, 4, 4)).astype(np.float32)
    run = run_network(graph, {"x": x}, common_design(graph, tile=2), in_tool(simulator))
    assert np.array_equal(run.outputs["y"], lutra.Session(graph)(x))


def test_networks_that_one_accelerator_cannot_run() -> None:
    graph = Graph(
        (Value("x", "float32", (None, 3)),), ("y",), (make_node("relu", "r", ["x"], "y"),)
    )
    with pytest.raises(HardwareError, match="no layer of product quantisation"):
        common_design(graph)
    mixed = small_network(v=5)
    node = mixed.nodes[3]
    rng = np.random.default_rng(0)
    other = pq_tensors(rng, 27, 5, count=16, width=9, bits=6)
    tensors = {**mixed.tensors, **{node.tensors[role]: array for role, array in other.items()}}
    with pytest.raises(HardwareError, match="the layers have 2 kinds of codebooks"):
        common_design(Graph(mixed.inputs, mixed.outputs, mixed.nodes, tensors))

"""The operator of low-bit linear layers: engine, file and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import lowbit_tensors

import lutra._engine as engine
from lutra import Session, load_graph, run_reference, runnable_isas, save_graph
from lutra.errors import GraphError
from lutra.format import file_version
from lutra.graph import Graph, make_node
from lutra.node import Value
from lutra.ops.limits import LOWBIT_LEVELS
from lutra.ops.lowbit import load_rows, store_rows

INPUTS = 96


def layer(seed: int = 0, outputs: int = 70, rows: int | None = None, **attrs: Any) -> Graph:
    """A layer, a value that is added to it, and a ReLU behind both."""
    rng = np.random.default_rng(seed)
    attrs = {"in_features": INPUTS, "levels": 3, "group": INPUTS, **attrs}
    tensors = lowbit_tensors(rng, outputs, INPUTS, attrs["levels"], attrs["group"])
    roles = {role: role for role in tensors}
    nodes = (
        make_node("lowbit_linear", "layer", ("x",), "y", attrs, roles),
        make_node("add", "sum", ("y", "r"), "s", {}, {}),
        make_node("relu", "relu", ("s",), "z", {}, {}),
    )
    inputs = (
        Value("x", "float32", (rows, INPUTS)),
        Value("r", "float32", (rows, outputs)),
    )
    return Graph(inputs, ("y", "z"), nodes, tensors)


@pytest.mark.parametrize("levels", LOWBIT_LEVELS)
@pytest.mark.parametrize("group", [32, 48, INPUTS])
def test_every_instruction_set_gives_the_bits_of_the_reference(levels: int, group: int) -> None:
    graph = layer(levels, levels=levels, group=group)
    rng = np.random.default_rng(1)
    for rows in (1, 5, 33, 481, 500):  # a row, tiles, and blocks of rows with a rest
        x = rng.normal(size=(rows, INPUTS)).astype(np.float32)
        x[rows // 2] *= np.float32(1e-38)
        r = rng.normal(size=(rows, 70)).astype(np.float32)
        want = run_reference(graph, [x, r])
        assert len(np.unique(want["z"])) > 20
        for isa in runnable_isas():
            for threads in (1, 2):
                session = Session(graph, isa=isa, threads=threads)
                y, z = session.run(None, {"x": x, "r": r})
                np.testing.assert_array_equal(y, want["y"], err_msg=isa)
                np.testing.assert_array_equal(z, want["z"], err_msg=isa)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_gives_nan_and_no_other_row_does(bad: float) -> None:
    graph = layer()
    x = np.random.default_rng(2).normal(size=(7, INPUTS)).astype(np.float32)
    r = np.zeros((7, 70), np.float32)
    fine = run_reference(graph, [x, r])["y"]
    x[3, 17] = bad
    want = run_reference(graph, [x, r])["y"]
    assert np.isnan(want[3]).all()
    np.testing.assert_array_equal(np.delete(want, 3, 0), np.delete(fine, 3, 0))
    for isa in runnable_isas():
        session = Session(graph, isa=isa, check_finite=False)
        np.testing.assert_array_equal(session.run(["y"], {"x": x, "r": r})[0], want, err_msg=isa)


def test_profiles_name_the_kernel_that_the_rows_get() -> None:
    graph = layer(outputs=64)
    for isa in runnable_isas():
        for rows in (1, 32):
            inputs = {
                "x": np.ones((rows, INPUTS), np.float32),
                "r": np.ones((rows, 64), np.float32),
            }
            steps = Session(graph, isa=isa).profile(inputs, runs=1, warmup=0).steps
            kernel, *_ = engine.choose_lowbit(isa, 64, INPUTS, 3, INPUTS, rows)
            assert [s.method for s in steps if "layer" in s.name] == [f"low-bit {kernel}"]


def test_a_file_has_the_codes_in_few_bytes_and_is_of_version_3(tmp_path: Path) -> None:
    graph = layer(rows=4)
    assert file_version(graph) == 3
    assert graph.tensors["weight"].nbytes == 70 * -(-INPUTS // 5)  # five in a byte
    save_graph(graph, tmp_path / "layer.lutra")
    read = load_graph(tmp_path / "layer.lutra")
    for role, tensor in graph.tensors.items():
        np.testing.assert_array_equal(read.tensors[role], tensor)
    for levels in LOWBIT_LEVELS:
        codes = np.random.default_rng(3).integers(0, levels, (5, 83)).astype(np.uint8)
        np.testing.assert_array_equal(load_rows(store_rows(codes, levels), levels, 83), codes)


BAD = [
    ({"levels": 5}, {}, "levels=5; choose from [2, 3, 4, 8, 16]"),
    ({"group": 36}, {}, "a group must divide the inputs"),
    ({}, {"weight": np.zeros((70, 19), np.uint8)}, "take 20 bytes for each output"),
    ({}, {"weight": np.full((70, 20), 243, np.uint8)}, "byte 243; five ternary codes are below"),
    ({}, {"scale": np.ones((70, 2), np.float32)}, "scale of shape (70, 2); it must be (70, 1)"),
    ({}, {"bias": np.ones(69, np.float32)}, "bias of shape (69,); it must be (70,)"),
    ({}, {"zero": np.ones((70, 1), np.int8)}, "ternary codes have none"),
]  # fmt: skip


@pytest.mark.parametrize(("attrs", "tensors", "reason"), BAD)
def test_what_does_not_fit_is_refused_in_one_sentence(
    attrs: dict[str, Any], tensors: dict[str, Any], reason: str
) -> None:
    good = layer()
    node = good.nodes[0]
    changed = make_node(
        node.op, node.name, node.inputs, node.output, {**node.attrs, **attrs},
        {**node.tensors, **{role: role for role in tensors}},
    )  # fmt: skip
    with pytest.raises(GraphError) as caught:
        _ = Graph(good.inputs, ("y",), (changed,), {**good.tensors, **tensors}).values
    text = str(caught.value)
    assert "layer" in text
    assert reason in text
    assert "\n" not in text


def test_the_engine_refuses_sizes_that_do_not_fit_by_itself() -> None:
    with pytest.raises(ValueError, match="does not divide the depth"):
        engine.choose_lowbit("scalar", 8, 96, 3, 36, 1)
    with pytest.raises(ValueError, match="levels must be 2, 3, 4, 8 or 16, not 5"):
        engine.choose_lowbit("scalar", 8, 96, 5, 96, 1)
    with pytest.raises(ValueError, match="rows must be at least 1"):
        engine.choose_lowbit("scalar", 8, 96, 3, 96, 0)


def test_the_reference_takes_no_rows() -> None:
    x, r = np.ones((0, INPUTS), np.float32), np.zeros((0, 70), np.float32)
    want = run_reference(layer(), {"x": x, "r": r})
    assert [want[name].shape for name in ("y", "z")] == [(0, 70)] * 2

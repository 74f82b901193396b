"""Decision trees as encoders: the specification, the engine, the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Builder, tree_tensors
from layers import Layer, run_native, same_bits
from sweeps import sweep

from lutra import GraphError, Session, _engine, run_reference
from lutra.cli import main
from lutra.cli.inspect import describe
from lutra.format import load_graph, save_graph
from lutra.graph import Graph
from lutra.reference.pq import encode_tree

Array = np.ndarray[Any, Any]
ISAS = _engine.runnable_isas()


def random_tree_layer(
    seed: int = 0,
    *,
    size: tuple[int, int, int] = (2, 7, 6),
    channels: int = 4,
    outputs: int = 5,
    codebooks: int = 3,
    count: int = 16,
    kernel: tuple[int, int] = (3, 3),
    act_bits: int = 7,
    act_zero: int = 0,
    **attrs: Any,
) -> Layer:
    """A layer whose inputs often lie right on a threshold; ``size`` is (N, H, W)."""
    rng = np.random.default_rng(seed)
    length = channels * kernel[0] * kernel[1]
    tensors = tree_tensors(rng, length, outputs, codebooks=codebooks, count=count, bits=act_bits)
    n, height, width = size
    top = 2**act_bits
    # steps of the grid, and beyond it on both sides
    steps = rng.integers(-2, top + 2, (n, channels, height, width))
    some = rng.choice(tensors["thresholds"].ravel(), steps.shape)
    steps = np.where(rng.random(steps.shape) < 0.3, some, steps) - act_zero
    x = (steps * 0.05).astype(np.float32)
    return Layer(x, tensors, kernel=kernel, act_bits=act_bits, act_zero=act_zero, **attrs)


def test_the_specification_by_hand() -> None:
    """Eight leaves, entries 2, 0 and 1, a value on its threshold goes right."""
    splits = np.array([[2, 0, 1]], np.int32)
    thresholds = np.array([[5, 3, 7, 1, 2, 4, 6]], np.uint8)
    rows = np.array(
        [
            [0, 0, 0],  # left, left, left
            [2, 1, 4],  # left, left, on the threshold 1: right
            [3, 1, 4],  # left, on 3: right, below 2: left
            [3, 2, 4],
            [6, 3, 5],  # on 5: right, below 7: left, below 4: left
            [6, 4, 9],
            [7, 5, 9],
            [8, 6, 127],
        ],
        np.uint8,
    )
    codes = encode_tree(rows, splits, thresholds)
    np.testing.assert_array_equal(codes[:, 0], np.arange(8))


def test_thresholds_at_the_ends_of_the_grid() -> None:
    """0 sends everything right, qmax + 1 everything left."""
    rows = np.arange(128, dtype=np.uint8)[:, None]
    splits = np.zeros((2, 3), np.int32)
    thresholds = np.array([[0] * 7, [128] * 7], np.uint8)
    codes = encode_tree(rows, splits, thresholds)
    np.testing.assert_array_equal(codes, np.tile([7, 0], (128, 1)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [8, 16, 32, 64])
@sweep(
    "settings",
    [
        {"size": (1, 3, 3), "padding": (0, 0)},  # one row
        {"size": (3, 9, 11), "padding": (1, 1), "act_zero": 40},  # padding is not zero
        {"size": (2, 9, 8), "stride": (2, 2), "padding": (1, 1), "codebooks": 1},
        {"size": (2, 9, 10), "stride": (1, 3), "dilation": (2, 1), "padding": (2, 0)},
        {"size": (65, 1, 1), "kernel": (1, 1), "channels": 37, "codebooks": 70, "outputs": 17},
        {"size": (64, 1, 1), "kernel": (1, 1), "channels": 1, "codebooks": 5, "outputs": 1},
        {"size": (1, 8, 16), "padding": (1, 1), "act_bits": 3, "act_zero": 2, "codebooks": 9},
    ],
)
def test_the_engine_is_exact(isa: str, count: int, settings: dict[str, Any]) -> None:
    layer = random_tree_layer(count, count=count, **settings)
    want, want_codes = layer.reference(), layer.reference_codes()
    for order in ("NCHW", "NHWC"):
        got, codes = run_native(layer, isa, order, threads=2)
        np.testing.assert_array_equal(codes, want_codes)
        assert same_bits(got, want)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_longer_than_a_block_of_patches(isa: str) -> None:
    layer = random_tree_layer(
        3, size=(70, 1, 1), channels=900, kernel=(1, 1), codebooks=400, count=8
    )
    got, codes = run_native(layer, isa)
    np.testing.assert_array_equal(codes, layer.reference_codes())
    assert same_bits(got, layer.reference())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"centroids": np.zeros((3, 16, 9), np.uint8)}, "has centroids, or splits and thresholds"),
        ({"splits": None}, "splits and thresholds"),
        ({"thresholds": None}, "splits and thresholds"),
        ({"splits": None, "thresholds": None}, "centroids"),
        ({"splits": np.zeros((3, 3), np.int32)}, "."),
        ({"splits": np.full((3, 4), 36, np.int32)}, "split"),
        ({"splits": np.full((3, 4), -1, np.int32)}, "split"),
        ({"thresholds": np.zeros((3, 14), np.uint8)}, "."),
        ({"thresholds": np.full((3, 15), 129, np.uint8)}, "threshold"),
    ],
)
def test_the_engine_refuses_what_does_not_fit(change: dict[str, Any], match: str) -> None:
    layer = random_tree_layer()
    tensors = {**layer.tensors, **change}
    tensors = {role: tensor for role, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ValueError, match=match):
        replace(layer, tensors=tensors).native(ISAS[0])


# Files


def tree_graph(**changes: Any) -> Graph:
    """A network with both encoders; changes are tensors or attributes of its first layer."""
    b = Builder(("x", (None, 4, 7, 6)), seed=4)
    tensors = tree_tensors(b.rng, 36, 8, codebooks=5, bits=6)
    attrs: dict[str, Any] = {"act_scale": 0.05, "act_zero": 3, "act_bits": 6, "encoder": "tree"}
    for name, value in changes.items():
        if name in attrs:
            attrs[name] = value
        elif value is None:
            del tensors[name]
        else:
            tensors[name] = value
    y = b.add(
        "pq_conv2d", "x", tensors=tensors, in_channels=4, kernel=(3, 3), padding=(1, 1), **attrs
    )
    y = b.add("relu", y)
    y = b.add("flatten", b.pq_conv2d(y, 8, 3, (1, 1), width=4), start_axis=1)
    tail = tree_tensors(b.rng, 126, 10, codebooks=7, count=64)
    plain = {"act_scale": 0.05, "act_zero": 64, "act_bits": 7, "encoder": "tree"}
    return b.graph(b.add("pq_linear", y, tensors=tail, in_features=126, **plain))


def noise(seed: int = 0, batch: int = 5) -> Array:
    return 3 * np.random.default_rng(seed).standard_normal((batch, 4, 7, 6), np.float32)


def test_a_file_runs_like_its_graph_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = tree_graph()
    x = noise()
    want = run_reference(graph, [x])[graph.outputs[0]]
    path = tmp_path / "tree.lutra"
    save_graph(replace(graph, golden=((x,), (want,))), path)
    assert load_graph(path).nodes == graph.nodes
    for isa in ISAS:
        assert same_bits(Session(path, isa=isa)(x), want)
    assert main(["verify", str(path), "--isa", "all"]) == 0, capsys.readouterr().out
    assert main(["inspect", str(path)]) == 0
    assert "tree" in capsys.readouterr().out


def test_inspect_shows_trees_and_their_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = tree_graph()
    path = tmp_path / "tree.lutra"
    save_graph(graph, path)
    assert main(["inspect", str(path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {words[0]: words for words in lines if len(words) > 1 and words[1].startswith("pq_")}
    first, nearest, last = (node for node in graph.nodes if node.op.startswith("pq_"))
    # V, K, tables, bytes, lookups, comparisons
    size = 5 * 4 * 4 + 5 * 15 + 5 * 16 * 8 + 2 * 4 * 8
    assert rows[first.name][-7:-1] == ["tree", "16", "stored", f"{size}", "1,680", "840"]
    size = 7 * 6 * 4 + 7 * 63 + 7 * 64 * 10 + 2 * 4 * 10
    assert rows[last.name][-7:-1] == ["tree", "64", "stored", f"{size:,}", "70", "42"]
    assert rows[nearest.name][-7:-4] == ["4", "16", "stored"]
    layers = {layer["name"]: layer for layer in describe(graph, 0)["layers"]}
    assert {layers[node.name]["bytes"] for node in (first, last)} == {859, size}


def test_inspect_and_cost_count_comparisons() -> None:
    graph = tree_graph()
    layers = {layer["name"]: layer for layer in describe(graph, 0)["layers"]}
    first, nearest, last = (node.name for node in graph.nodes if node.op.startswith("pq_"))
    assert layers[first]["encode_ops"] == 42 * 5 * 4  # rows * B * L
    assert layers[last]["encode_ops"] == 7 * 6
    assert (layers[first]["encoder"], layers[first]["v"], layers[first]["k"]) == ("tree", None, 16)
    assert (layers[nearest]["encoder"], layers[nearest]["v"]) == ("nearest", 4)
    assert layers[first]["lookups"] == 42 * 8 * 5
    assert layers[last]["k"] == 64


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"encoder": "nearest"}, "lacks the tensor 'centroids'"),
        ({"splits": None}, "lacks the tensor 'splits'; encoder 'tree' needs it"),
        ({"thresholds": None}, "lacks the tensor 'thresholds'"),
        (
            {"centroids": np.zeros((5, 16, 9), np.uint8)},
            "'centroids' with encoder 'tree'; remove it, or set the encoder to 'nearest'",
        ),
        ({"splits": np.zeros((5, 4), np.uint8)}, "must be int32"),
        ({"splits": np.zeros((5, 3), np.int32)}, r"splits of shape \(5, 3\).*need \(5, 4\)"),
        ({"splits": np.zeros((4, 4), np.int32)}, r"splits of shape \(4, 4\).*need \(5, 4\)"),
        ({"splits": np.full((5, 4), 36, np.int32)}, r"entry 36 of rows of 36.*0\.\.35"),
        ({"splits": np.full((5, 4), -1, np.int32)}, r"entry -1 of rows of 36"),
        ({"thresholds": np.zeros((5, 16), np.uint8)}, r"thresholds of shape .*need \(5, 15\)"),
        ({"thresholds": np.full((5, 15), 65, np.uint8)}, r"threshold of 65.*0\.\.64"),
        ({"thresholds": np.zeros((5, 15), np.int8)}, "must be uint8"),
        ({"tables": np.zeros((5, 12, 8), np.int8)}, "5 tables of 12 rows"),
        ({"scale": np.ones(7, np.float32)}, r"scale of shape \(7,\)"),
    ],
)
def test_bad_nodes_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(GraphError, match=match) as caught:
        tree_graph(**changes).validate()
    assert "\n" not in str(caught.value)

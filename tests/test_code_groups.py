"""Codes that belong to kernel rows and to pixels: the specification, the engine, the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Builder, pq_tensors, tree_tensors
from layers import Layer, run_native, same_bits
from sweeps import sweep

from lutra import GraphError, Session, _engine, run_reference
from lutra.cli import main
from lutra.format import file_version, graph_to_bytes, load_graph, save_graph
from lutra.graph import Graph

Array = np.ndarray[Any, Any]
ISAS = _engine.runnable_isas()
GROUPS = ["row", "pixel"]
ENCODERS = ["nearest", "tree"]


def parts_of(group: str, kernel: tuple[int, int]) -> int:
    return {"patch": 1, "row": kernel[0], "pixel": kernel[0] * kernel[1]}[group]


def encoder_tensors(
    rng: np.random.Generator, encoder: str, length: int, outputs: int, parts: int, **settings: Any
) -> dict[str, Array]:
    """Random tensors of a layer whose rows have so many parts of `length` values."""
    width, settings = settings.pop("width"), settings
    if encoder == "nearest":
        tensors = pq_tensors(rng, length, outputs, width=width, **settings)
    else:
        codebooks = -(-length // width)
        tensors = tree_tensors(rng, length, outputs, codebooks=codebooks, **settings)
    codebooks, k, _ = tensors["tables"].shape
    tables = rng.integers(-128, 128, (codebooks * parts, k, outputs)).astype(np.int8)
    return {**tensors, "tables": tables}


def grouped_layer(
    seed: int,
    group: str,
    encoder: str,
    *,
    size: tuple[int, int, int] = (2, 7, 6),
    channels: int = 4,
    outputs: int = 5,
    kernel: tuple[int, int] = (3, 3),
    width: int = 3,
    count: int = 16,
    act_bits: int = 7,
    act_zero: int = 0,
    **attrs: Any,
) -> Layer:
    """A random layer; ``size`` is (N, H, W)."""
    rng = np.random.default_rng(seed)
    parts = parts_of(group, kernel)
    length = channels * kernel[0] * kernel[1] // parts
    tensors = encoder_tensors(
        rng, encoder, length, outputs, parts, width=width, count=count, bits=act_bits
    )
    n, height, columns = size
    steps = rng.integers(-2, 2**act_bits + 2, (n, channels, height, columns)) - act_zero
    x = (steps * 0.05).astype(np.float32)
    return Layer(
        x, tensors, kernel=kernel, act_bits=act_bits, act_zero=act_zero, group=group, **attrs
    )


def by_definition(layer: Layer) -> Array:
    """The sum over codebooks and parts of table rows, one output pixel at a time."""
    rows, t = layer.quantised_rows(), layer.tensors
    channels, (kh, kw) = layer.x.shape[1], layer.kernel
    patches = rows.reshape(-1, channels, kh, kw)
    if layer.group == "row":
        parts = [patches[:, :, y, :].reshape(len(rows), -1) for y in range(kh)]
    else:
        parts = [patches[:, :, y, x] for y in range(kh) for x in range(kw)]
    sums = np.zeros((len(rows), t["tables"].shape[2]), np.int32)
    codebooks = len(t["tables"]) // len(parts)
    for r in range(len(rows)):
        for p, part in enumerate(parts):
            values = part[r].astype(np.int64)
            for g in range(codebooks):
                if "splits" in t:
                    node = 0
                    for split in t["splits"][g]:
                        node = 2 * node + 1 + int(values[split] >= t["thresholds"][g, node])
                    code = node - t["thresholds"].shape[1]
                else:
                    c = t["centroids"][g].astype(np.int64)
                    v = np.zeros(c.shape[1], np.int64)
                    mine = values[g * len(v) : (g + 1) * len(v)]
                    v[: len(mine)] = mine
                    code = int((c @ v - ((c * c).sum(1) >> 1)).argmax())
                sums[r] += t["tables"][g * len(parts) + p, code]
    y = sums.astype(np.float32) * t["scale"] + t["bias"]
    shape = layer.reference().shape
    return y.reshape(shape[0], *shape[2:], -1).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("group", GROUPS)
def test_the_specification(group: str, encoder: str) -> None:
    layer = grouped_layer(
        1, group, encoder, channels=5, stride=(2, 1), padding=(1, 2), dilation=(1, 2), act_zero=9
    )
    np.testing.assert_array_equal(layer.reference(), by_definition(layer))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_rows_are_patches_of_equal_codebooks(encoder: str) -> None:
    """Sub-vectors of a kernel row: the layer of patches that has each codebook for every row."""
    layer = grouped_layer(2, "row", encoder, padding=(1, 1), act_zero=70)
    repeated = {**layer.tensors}
    for role in ("centroids", "splits", "thresholds"):
        if role in repeated:
            repeated[role] = repeated[role].repeat(3, axis=0)
    if encoder == "tree":  # splits of a row (channel, column) as entries of the patch
        channel, column = np.divmod(layer.tensors["splits"], 3)
        entries = [9 * channel + 3 * row + column for row in range(3)]
        repeated["splits"] = np.stack(entries, 1).reshape(-1, 4).astype(np.int32)
    patch = replace(layer, tensors=repeated, group="patch")
    assert same_bits(patch.reference(), layer.reference())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", GROUPS)
@sweep("encoder", ENCODERS)
@sweep("count", [8, 16, 32, 64])
@sweep(
    "settings",
    [
        {},
        {"size": (1, 3, 3)},  # one row
        {"size": (3, 9, 11), "padding": (1, 1), "act_zero": 40},  # padding is not zero
        {"size": (2, 9, 8), "stride": (2, 2), "padding": (1, 1), "channels": 1, "width": 1},
        {"size": (2, 9, 10), "stride": (1, 3), "dilation": (2, 1), "padding": (2, 0)},
        {"size": (1, 20, 19), "stride": (3, 1), "padding": (2, 2), "channels": 17, "outputs": 33},
        {"size": (1, 8, 8), "padding": (1, 1), "channels": 64, "outputs": 64, "width": 4},
        {"size": (4, 4, 4), "padding": (1, 1), "channels": 70, "outputs": 17, "width": 8},
        {"size": (1, 8, 16), "padding": (1, 1), "act_bits": 3, "act_zero": 2, "width": 2},
        {"size": (2, 6, 6), "kernel": (5, 1), "padding": (2, 0), "channels": 7, "width": 5},
        {"size": (2, 6, 6), "kernel": (1, 5), "padding": (0, 2), "channels": 7, "width": 5},
        {"size": (2, 12, 12), "kernel": (7, 7), "padding": (3, 3), "stride": (2, 2), "width": 7},
        # four codebooks in a unit: rows that lie together, within two registers, and far apart
        {"size": (3, 30, 9), "stride": (2, 2), "padding": (1, 1), "channels": 16, "width": 4},
        {"size": (2, 9, 90), "stride": (3, 2), "dilation": (1, 2), "channels": 12, "width": 3},
        {"size": (9, 4, 4), "padding": (1, 1), "channels": 16, "width": 4, "act_zero": 21},
        {"size": (65, 1, 1), "kernel": (1, 1), "channels": 37, "outputs": 17, "width": 4},
        {"size": (2, 5, 6), "kernel": (1, 1), "channels": 9, "stride": (2, 2), "width": 4},
    ],
)
def test_the_engine_is_exact(
    isa: str, group: str, encoder: str, count: int, settings: dict[str, Any]
) -> None:
    layer = grouped_layer(count, group, encoder, count=count, **settings)
    want, want_codes = layer.reference(), layer.reference_codes()
    for order, threads in (("NCHW", 1), ("NHWC", 2), ("CNHW", 2)):
        got, codes = run_native(layer, isa, order, threads=threads)
        np.testing.assert_array_equal(codes, want_codes)
        assert same_bits(got, want)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"centroids": np.zeros((3, 16, 3), np.uint8)}, "as many tables each"),
        ({"tables": np.zeros((11, 16, 5), np.int8)}, "as many tables each"),
        ({"centroids": np.zeros((4, 16, 4), np.uint8)}, "it needs 3 codebooks"),
        ({"centroids": np.zeros((4, 8, 3), np.uint8)}, "differ in K"),
    ],
)
def test_the_engine_refuses_what_does_not_fit(change: dict[str, Array], match: str) -> None:
    layer = grouped_layer(0, "row", "nearest")
    with pytest.raises(ValueError, match=match):
        replace(layer, tensors={**layer.tensors, **change}).native(ISAS[0])
    with pytest.raises(ValueError, match="patch, row or pixel"):
        _engine.Layer("pq_conv2d", ISAS[0], {**layer.node.attrs, "group": "image"}, layer.tensors)


# Files


def grouped_graph(group: str, encoder: str) -> Graph:
    """A residual block of grouped layers of which two share their codes."""
    b = Builder(("x", (None, 6, 9, 7)), seed=5)
    attrs: dict[str, Any] = {
        "act_scale": 0.05, "act_zero": 3, "act_bits": 6, "encoder": encoder, "group": group,
        "in_channels": 6, "kernel": (3, 3), "padding": (1, 1),
    }  # fmt: skip
    parts = parts_of(group, (3, 3))

    def tensors() -> dict[str, Array]:
        return encoder_tensors(b.rng, encoder, 54 // parts, 6, parts, width=3, bits=6, count=16)

    first = tensors()
    branch = {**first, "tables": first["tables"][:, ::-1].copy()}
    y = b.add("relu", b.add("pq_conv2d", "x", tensors=first, **attrs))
    z = b.add("relu", b.add("pq_conv2d", "x", tensors=branch, **attrs))
    y = b.add("add", b.add("pq_conv2d", y, tensors=tensors(), **attrs), z)
    return b.graph(b.add("pq_conv2d", b.add("relu", y), tensors=tensors(), **attrs))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("group", GROUPS)
def test_a_file_runs_like_its_graph_everywhere(
    group: str, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = grouped_graph(group, encoder)
    x = 3 * np.random.default_rng(0).standard_normal((5, 6, 9, 7), np.float32)
    want = run_reference(graph, [x])[graph.outputs[0]]
    path = tmp_path / "grouped.lutra"
    save_graph(replace(graph, golden=((x,), (want,))), path)
    assert load_graph(path).nodes == graph.nodes
    assert file_version(graph) == 3
    for isa in ISAS:
        for threads in (1, 2):
            assert same_bits(Session(path, isa=isa, threads=threads)(x), want)
    assert main(["verify", str(path), "--isa", "all"]) == 0, capsys.readouterr().out
    assert main(["inspect", str(path)]) == 0
    methods = [step.method for step in Session(path).profile(x).steps]
    wanted = {"row": "code once a kernel row", "pixel": "code once a pixel"}[group]
    assert sum(wanted in (method or "") for method in methods) == 3  # two share a step


def test_layers_of_patches_stay_readable_for_older_versions() -> None:
    b = Builder(("x", (None, 4, 7, 6)), seed=4)
    graph = b.graph(b.pq_conv2d("x", 4, 3, (1, 1), width=4))
    assert graph.nodes[0].attrs["group"] == "patch"
    assert file_version(graph) == 1
    assert b'"group' not in graph_to_bytes(graph)


@pytest.mark.parametrize(
    ("encoder", "change", "match"),
    [
        ("nearest", {"group": "image"}, "group"),
        ("nearest", {"group": "pixel"}, "has 6 codebooks for rows of 6 in sub-vectors of 3"),
        ("tree", {"kernel": (5, 3), "padding": (2, 1)}, "18 tables for the 5 parts"),
        ("tree", {"kernel": (3, 1), "padding": (1, 0)}, "has a split at entry"),
    ],
)
def test_files_that_do_not_fit(encoder: str, change: dict[str, Any], match: str) -> None:
    graph = grouped_graph("row", encoder)
    node = graph.nodes[0]
    wrong = replace(node, attrs={**node.attrs, **change})
    with pytest.raises(GraphError, match=match):
        replace(graph, nodes=(wrong, *graph.nodes[1:])).validate()

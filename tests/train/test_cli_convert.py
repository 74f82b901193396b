"""``lutra convert``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import floats, save

import lutra

pytest_plugins = ["cli_support"]

BUILD = """
import torch

def build():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3),
        torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5),
    )

def number():
    return 1

def broken():
    raise KeyError("weights")
"""


def test_convert_without_torch(refuse: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez("d.npz", x=floats())
    monkeypatch.setitem(sys.modules, "torch", None)
    words = ["convert", "net.py:build", "--data", "d.npz", "-o", "m.lutra"]
    refuse(*words, match=r"needs torch, which is not installed; .*pip install 'lutra\[train\]'")


def test_convert(capture: Any, refuse: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "net", raising=False)
    Path("net.py").write_text(BUILD)
    np.savez("d.npz", x=floats(100), y=np.arange(100))
    words = ["--data", "d.npz", "-o", "m.lutra", "--keep", "0", "--keep", "5"]
    code, out, err = capture("convert", "net.py:build", *words)
    assert (code, err) == (0, "")
    assert "1 of 3 layers replaced" in out
    graph = lutra.load_graph("m.lutra")
    assert [node.op for node in graph.nodes].count("pq_conv2d") == 1
    assert graph.metadata["seed"] == 0
    assert graph.metadata["recipe"]["keep"] == ["0", "5"]
    first = Path("m.lutra").read_bytes()
    assert capture("convert", "net:build", *words, "--seed", "0")[0] == 0
    assert Path("m.lutra").read_bytes() == first
    assert capture("verify", "m.lutra")[0] == 0
    gate = ["--speed-gate", "-o", "g.lutra"]
    code, out, err = capture("convert", "net.py:build", *words, *gate)
    assert (code, err) == (0, "")
    assert "lookup ms" in out
    record = lutra.load_graph("g.lutra").metadata["speed_gate"]
    assert [layer["name"] for layer in record["layers"]] == ["2"]
    assert "speed gate when it was converted" in capture("inspect", "g.lutra")[1]
    factors = ["--tables", "factors", "-o", "g.lutra"]
    code, out, err = capture("convert", "net.py:build", *words, *factors)
    assert (code, err) == (0, "")
    assert "tables of 1 layer are built from int8 weights\n" in out
    code, out, err = capture("convert", "net.py:build", *words, *factors, "--encoder", "tree")
    assert (code, err) == (0, "")
    assert "pq, tree" in out
    assert "layer '2' keeps its tables: encoder 'tree': its tables are more than products" in out
    assert "built from int8" not in out
    apart = ["-o", "g.lutra", "--distance", "l1"]
    code, out, err = capture("convert", "net.py:build", *words, *apart)
    assert (code, err) == (0, "")
    assert "pq, l1" in out
    nodes = lutra.load_graph("g.lutra").nodes
    assert [n.attrs["distance"] for n in nodes if n.op.startswith("pq_")] == ["l1"]
    os.unlink("g.lutra")
    os.unlink("m.lutra")

    def bad(target: str, match: str, *more: str) -> None:
        refuse("convert", target, "--data", "d.npz", "-o", "m.lutra", *more, match=match)

    bad("net.py", "names no function")
    bad("net.py:", "names no function")
    bad("none.py:build", "no such file")
    bad("no_such_package.net:build", "no module 'no_such_package'")
    bad("net.py:missing", "has no function 'missing'")
    bad("net.py:number", "gave a int")
    bad("net.py:broken", "failed: KeyError: 'weights'")
    bad("net.py:build", "invalid choice", "--k", "7")
    bad("net.py:build", "--bits is for --method lookup", "--bits", "3")
    bad("net.py:build", "--v is for --method pq", "--v", "3", "--method", "auto")
    bad("net.py:build", "v=100", "--v", "100")
    bad("net.py:build", "leaves no layer", "--keep", "*")
    refuse("convert", "net.py:build", "--data", "d.npz", "-o", "no/m.lutra", match="does not exist")
    refuse("convert", "net.py:build", "--data", "none.npz", "-o", "m", match="No such file")
    for array, match in (
        ({"z": floats()}, "has no array 'x'"),
        ({"x": floats().astype(np.float64) * 1e39}, "beyond float32"),
        ({"x": floats()[:0]}, "not empty"),
        ({"x": np.full((4, 3, 8, 8), np.nan, np.float32)}, "NaN"),
        ({"x": np.array([{}], dtype=object)}, "allow_pickle"),
        ({"x": floats()[:, :2]}, "cannot be converted: RuntimeError"),
    ):
        np.savez("d.npz", **array)
        bad("net.py:build", match)
    save("d.npz.npy", floats())
    os.replace("d.npz.npy", "d.npz")
    bad("net.py:build", "not an archive")


NETS = """
import torch
from torch import nn

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 32)
        self.one, self.two = nn.Linear(32, 64), nn.Linear(64, 3)

    def forward(self, input_ids, attention_mask, scale=None, shift=None):
        x = self.one(self.words(input_ids)) * attention_mask.unsqueeze(-1)
        x = self.two(x.relu()).mean(1)
        return x if scale is None else x * scale

def tokens():
    return Tokens()

def layers():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=4), nn.ReLU(), nn.Conv2d(32, 32, 3),
        nn.Flatten(), nn.Linear(128, 5),
    )
"""


@pytest.fixture
def nets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    Path("nets.py").write_text(NETS)
    return folder


def ops(path: str) -> list[str]:
    return [node.op for node in lutra.load_graph(path).nodes]


def test_convert_by_every_method(capture: Any, refuse: Any, nets: Path) -> None:
    np.save("x.npy", floats(100))
    words = ["convert", "nets.py:layers", "--data", "x.npy", "-o", "m.lutra"]
    for method, want in (
        (["auto"], ["int8_conv2d", "int8_conv2d", "pq_conv2d", "int8_linear"]),
        (["int8"], ["int8_conv2d", "int8_conv2d", "int8_conv2d", "int8_linear"]),
        (
            ["lookup", "--bits", "3", "--keep", "1"],
            ["lookup_conv2d", "conv2d", "lookup_conv2d", "lookup_linear"],
        ),
        (["pq", "--v", "3", "--keep", "1"], ["pq_conv2d", "conv2d", "pq_conv2d", "pq_linear"]),
    ):
        code, _, err = capture(*words, "--method", *method)
        assert (code, err) == (0, "")
        made = ops("m.lutra")
        assert [op for op in made if "conv2d" in op or "linear" in op] == want
    entry = lutra.load_graph("m.lutra").metadata["recipe"]
    assert entry["method"] == "pq"
    assert entry["patterns"]["*"]["v"] == 3
    assert entry["patterns"]["1"]["method"] == "keep"
    refuse(*words, match="layer '1': a convolution with groups=4 cannot be looked up")


def test_convert_by_a_recipe_file(capture: Any, refuse: Any, nets: Path) -> None:
    np.save("x.npy", floats(100).astype(np.float64))
    words = ["convert", "nets.py:layers", "--data", "x.npy", "-o", "m.lutra"]
    recipe = {
        "0": "int8",
        "5": {"method": "lookup", "levels": 8, "weights": 7},
        "*": {"method": "pq", "v": 3, "otherwise": {"method": "int8"}},
    }
    Path("r.json").write_text(json.dumps(recipe))
    code, out, err = capture(*words, "--recipe", "r.json")
    assert (code, err) == (0, "")
    assert "1: int8 in place of pq: a convolution with groups=4 cannot be looked up" in out
    kinds = [op for op in ops("m.lutra") if "conv2d" in op or "linear" in op]
    assert kinds == ["int8_conv2d", "int8_conv2d", "pq_conv2d", "lookup_linear"]
    entry = lutra.load_graph("m.lutra").metadata["recipe"]
    again = lutra.recipe_from_json(entry["patterns"])
    assert again == lutra.recipe_from_json(recipe)
    assert capture(*words, "--recipe", "r.json", "--keep", "5")[0] == 0
    assert ops("m.lutra")[-1] == "linear"
    os.unlink("m.lutra")

    def bad(content: str, match: str, *more: str) -> None:
        Path("r.json").write_text(content)
        refuse(*words, "--recipe", "r.json", *more, match=match)

    bad("{", "cannot read 'r.json' as JSON")
    bad("[1]", "'r.json': recipe: it is a list; give an object")
    bad("{}", "holds no pattern")
    bad('{"*": {"method": "nine"}}', r"'r.json': recipe: pattern '\*' has the method 'nine'")
    bad('{"*": {"method": "pq", "v": 0}}', r"'r.json': PQ: v=0 is not in 1")
    bad('{"*": {"method": "pq", "vv": 2}}', "unexpected keyword argument 'vv'")
    bad('{"stem": "int8"}', "pattern 'stem' matches no")
    bad('{"*": "pq"}', "leave out --v", "--v", "3")
    bad('{"*": "pq"}', "leave out --method", "--method", "pq")
    refuse(*words, "--recipe", "none.json", match="cannot read 'none.json': No such file")


def test_convert_takes_several_and_integer_inputs(capture: Any, refuse: Any, nets: Path) -> None:
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 40, (90, 6)), np.ones((90, 6), bool)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": np.array(["a"] * 90)}
    np.savez("d.npz", **arrays)  # type: ignore[arg-type]
    words = ["convert", "nets.py:tokens", "--data", "d.npz", "-o", "m.lutra"]
    code, _, err = capture(*words, "--method", "auto", "--dynamic-axes", "1")
    assert (code, err) == (0, "")
    session = lutra.Session("m.lutra")
    assert [(v.name, v.dtype, v.shape) for v in session.inputs] == [
        ("input_ids", "int32", (None, None)),
        ("attention_mask", "int32", (None, None)),
    ]
    assert "pq_linear" in ops("m.lutra")
    got = session.run(None, {"input_ids": ids[:3, :4], "attention_mask": mask[:3, :4]})
    assert got[0].shape == (3, 3)
    np.savez("d.npz", **arrays, scale=np.ones((90, 3)))  # type: ignore[arg-type]
    assert capture(*words, "--method", "int8")[0] == 0
    assert [v.name for v in lutra.Session("m.lutra").inputs] == [*list(arrays)[:2], "scale"]
    os.unlink("m.lutra")
    one = {"input_ids": ids, "attention_mask": mask}
    for held, match in (
        (
            {"input_ids": ids},
            r"lacks attention_mask, which forward needs; it holds .*ids",
        ),
        ({"input_id": ids, **{"attention_mask": mask}}, "did you mean 'input_id'"),
        ({"x": ids}, "one input, but forward takes input_ids, attention_mask"),
        ({"ids": ids}, "no array 'x' and no argument of forward .input_ids, attention_mask"),
        ({**one, "shift": ids}, "lacks scale, which forward takes before shift"),
        ({**one, "input_ids": ids[:80]}, "of different length"),
        ({**one, "input_ids": ids[:, 0]}, "cannot be converted: RuntimeError"),
        ({**one, "input_ids": ids + 2**40}, "which is no int32"),
        ({**one, "input_ids": ids.astype(complex)}, "must hold numbers"),
        ({**one, "input_ids": ids + 40}, "cannot be converted: IndexError"),
    ):
        np.savez("d.npz", **held)  # type: ignore[arg-type]
        refuse(*words, match=match)
    np.save("x.npy", ids)
    refuse("convert", "nets.py:tokens", "--data", "x.npy", "-o", "m", match="one input, but")


def test_compact_tables_are_those_of_calibration(
    capture: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights have 8 bits from calibration on, so that building the tables changes no entry."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "net", raising=False)
    Path("net.py").write_text(BUILD)
    np.save("x.npy", floats(32))
    recipe = {"0": "int8", "2": {"method": "pq", "v": 3}, "5": {"method": "pq", "encoder": "tree"}}
    recipe["*"] = {"method": "pq", "v": 16}  # no smaller as weights
    Path("r.json").write_text(json.dumps(recipe))
    words = ["convert", "net.py:build", "--data", "x.npy", "--recipe", "r.json"]
    code, out, err = capture(*words, "-o", "small.lutra", "--tables", "compact")
    assert (code, err) == (0, "")
    assert "tables of 1 layer are built from int8 weights\n" in out
    assert "layer '5' keeps its tables: encoder 'tree'" in out
    metadata = lutra.load_graph("small.lutra").metadata
    assert [entry["changed_entries"] for entry in metadata["tables"]["layers"]] == [0.0]
    patterns = metadata["recipe"]["patterns"]
    assert [patterns[name]["weight_bits"] for name in ("2", "5", "*")] == [8, None, None]
    assert capture(*words, "-o", "large.lutra")[0] == 0
    assert Path("small.lutra").stat().st_size < Path("large.lutra").stat().st_size

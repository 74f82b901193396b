"""``lutra convert``."""

from __future__ import annotations

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
    assert "tables of 1 layer are built from int8 weights: outputs of the examples differ" in out
    code, out, err = capture("convert", "net.py:build", *words, *factors, "--encoder", "tree")
    assert (code, err) == (0, "")
    assert "pq, tree" in out
    assert "layer '2' keeps its tables: encoder 'tree': its tables are more than products" in out
    assert "built from int8" not in out
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
    bad("net.py:build", "v=100", "--v", "100")
    bad("net.py:build", "leaves no layer", "--keep", "*")
    refuse("convert", "net.py:build", "--data", "d.npz", "-o", "no/m.lutra", match="does not exist")
    refuse("convert", "net.py:build", "--data", "none.npz", "-o", "m", match="No such file")
    for array, match in (
        ({"z": floats()}, "has no array 'x'"),
        ({"x": floats().astype(np.float64)}, "dtype float64"),
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

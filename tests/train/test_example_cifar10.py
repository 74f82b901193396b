"""CIFAR-10 of the examples: networks, augmentation, and both scripts on a handful of images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cifar10
import cifar10_resnet9
import cifar10_resnet20
import cifar10_vgg
import numpy as np
import pytest
import torch

import lutra


def few_images() -> Any:
    """Images of one colour each, which is their class."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (10, 3))
    labels = np.arange(96) % 10
    noise = rng.integers(-20, 21, (96, 32, 32, 3))
    images = np.clip(colours[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
    parts = [slice(0, 48), slice(48, 72), slice(72, 96)]
    return cifar10.Data(*(part for s in parts for part in (images[s], labels[s])))


def run(script: Any, monkeypatch: pytest.MonkeyPatch, file: Path, *words: str) -> Any:
    """Runs a script on those images; what it writes as JSON."""
    monkeypatch.setattr(script, "load_data", lambda options: few_images())
    common = ["--epochs", "1", "--batch", "16", "--threads", "1", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", [script.__file__, *common, *words])
    threads = torch.get_num_threads()
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)
    return json.loads(file.with_suffix(".json").read_text())


@pytest.mark.slow
def test_resnet20_with_lookups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    state = {f"module.{k}": v.numpy() for k, v in cifar10.ResNet().state_dict().items()}
    np.savez(tmp_path / "w.npz", **state)
    file, weights = tmp_path / "r.lutra", str(tmp_path / "w.npz")
    words = ["--method", "lookup", "--bits", "2", "--weights", weights]
    result = run(cifar10_resnet20, monkeypatch, file, *words)
    assert result["engine_validation"] == result["validation"]
    assert (result["steps"], result["test_images"]) == (3, 24)
    graph = lutra.load_graph(file)
    ops = [node.op for node in graph.nodes]
    assert ops.count("lookup_conv2d") == 18
    assert (ops.count("int8_conv2d"), ops.count("int8_linear")) == (1, 1)
    assert "affine" not in ops  # batch norms are folded
    assert graph.metadata["recipe"]["layer*.conv*"]["levels"] == 4
    assert graph.metadata["classes"][3] == "cat"


@pytest.mark.slow
def test_resnet9_begins_with_a_dense_network_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, dense = tmp_path / "r.lutra", tmp_path / "dense.safetensors"
    words = ["--width", "4", "--dense-epochs", "1", "--dense-cycles", "1", "--dense", str(dense)]
    words += ["--group", "pixel", "--v", "4"]
    first = run(cifar10_resnet9, monkeypatch, file, *words)
    assert "dense: validation" in capsys.readouterr().out
    ops = [node.op for node in lutra.load_graph(file).nodes]
    assert (ops.count("pq_conv2d"), ops.count("int8_conv2d"), ops.count("int8_linear")) == (7, 1, 1)
    second = run(cifar10_resnet9, monkeypatch, file, *words)
    assert "dense: validation" not in capsys.readouterr().out
    assert second["steps"] == first["steps"] == 3


@pytest.mark.slow
def test_vgg_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "v.lutra"
    words = ["--method", "lookup", "--width", "4", "--dense-epochs", "1", "--dense-too"]
    words += ["--checkpoints", str(tmp_path / "checkpoints")]
    first = run(cifar10_vgg, monkeypatch, file, *words)
    assert {"dense_test", "dense_longer_test", "engine_test"} <= set(first)
    content = file.read_bytes()
    capsys.readouterr()
    assert run(cifar10_vgg, monkeypatch, file, *words) == first
    assert "min in this process" not in capsys.readouterr().out
    assert file.read_bytes() == content
    ops = [node.op for node in lutra.load_graph(file).nodes]
    assert ops.count("lookup_conv2d") == 5


def test_methods() -> None:
    from tasks import TABLES, lookup_method

    assert {bits: (lookup_method(bits).levels, lookup_method(bits).weights) for bits in TABLES} == {
        4: (16, 15), 3: (8, 7), 2: (4, 3),
    }  # fmt: skip
    assert lookup_method(4, rank=2).rank == 2


def test_augmentation_is_a_crop_or_its_mirror_image() -> None:
    images = np.arange(2 * 32 * 32 * 3, dtype=np.uint32).reshape(2, 32, 32, 3) % 251
    data = cifar10.Augmented(images.astype(np.uint8), np.array([3, 5]))
    torch.manual_seed(0)
    batch = data.__getitems__([1, 0, 1])
    assert [int(y) for _, y in batch] == [5, 3, 5]
    scale = torch.tensor(cifar10.STD)[:, None, None]
    mean = torch.tensor(cifar10.MEAN)[:, None, None]
    for (x, _), source in zip(batch, [1, 0, 1], strict=True):
        pixels = ((x * scale + mean) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        padded = np.pad(images[source].astype(np.uint8), ((4, 4), (4, 4), (0, 0)))
        crops = [padded[i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any((pixels == crop).all() or (pixels == crop[:, ::-1]).all() for crop in crops)
    torch.manual_seed(0)
    assert torch.equal(data.__getitems__([1, 0, 1])[0][0], batch[0][0])

"""Super-resolution of the examples: luminance, pairs, patches, PSNR, one short training."""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import packed
import pytest
import sr
import super_resolution as script
import torch
from examples_support import DATA
from PIL import Image

import lutra
from lutra.cli.metrics import Psnr

SET5 = DATA / "sr"


def smooth(height: int, width: int, seed: int = 0) -> Any:
    """A picture uint8 (H, W, 3) with soft edges."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def test_luminance() -> None:
    colours = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
    y = sr.luminance(np.array([colours], np.uint8))
    wanted = [16, 235, 16 + 65.481, 16 + 128.553, 16 + 24.966]
    np.testing.assert_allclose(y[0], wanted, rtol=1e-6)
    assert y.dtype == np.float32
    for bad in (np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2, 3), np.float32)):
        with pytest.raises(ValueError, match="give uint8"):
            sr.luminance(bad)


def test_psnr_by_hand() -> None:
    target = np.full((6, 5), 100 / 255)
    output = target + 2 / 255
    assert sr.psnr(output, target, 2) == pytest.approx(10 * math.log10(255**2 / 4))
    output[2:4, 2] = 100.4 / 255  # rounded away; what is left inside the border is exact
    assert sr.psnr(output, target, 2) == math.inf
    output[2, 2] = 103 / 255
    assert sr.psnr(output, target, 2) == pytest.approx(10 * math.log10(255**2 / (9 / 2)))
    for border in (3, 4):
        with pytest.raises(ValueError, match="border"):
            sr.psnr(output, target, border)
    with pytest.raises(ValueError, match="one size"):
        sr.psnr(output[1:], target, 1)


def test_psnr_is_that_of_the_command() -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(16, 236, (9, 11)) / 255
    output = (target + rng.normal(0, 0.02, target.shape)).astype(np.float32)
    metric = Psnr([np.rint(target * 255).astype(np.uint8)], ["t"], border=2)
    metric.add(output[None, None])
    assert metric.entries()["psnr"] == pytest.approx(sr.psnr(output, target, 2), rel=1e-9)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_pairs(scale: int) -> None:
    image = smooth(38, 50)
    height, width = 38 // scale * scale, 50 // scale * scale
    (small,) = sr.make_pairs([image], [scale], enlarge=False)
    (large,) = sr.make_pairs([image], [scale], enlarge=True)
    assert small.input.shape == (height // scale, width // scale)
    assert small.target.shape == large.target.shape == large.input.shape == (height, width)
    np.testing.assert_array_equal(small.target, large.target)
    np.testing.assert_allclose(large.target, sr.luminance(image[:height, :width]) / 255)
    assert 15 < sr.psnr(large.input, large.target, scale) < 60  # blurred, and in place
    shifted = np.roll(large.input, scale, axis=0)
    assert sr.psnr(shifted, large.target, 2 * scale) < sr.psnr(large.input, large.target, 2 * scale)
    assert len(sr.make_pairs([image, image], [2, 3, 4], enlarge=True)) == 6


@pytest.mark.parametrize("factor", [1, 3])
def test_patches_are_pieces_of_their_images(factor: int) -> None:
    pairs = []
    for i, (height, width) in enumerate([(9, 12), (8, 8), (20, 7), (5, 30)]):
        x = 1000.0 * i + np.arange(height)[:, None] * 30 + np.arange(width)
        target = np.kron(x, np.ones((factor, factor))).astype(np.float32)
        pairs.append(sr.Pair(x.astype(np.float32), target))
    patches = sr.Patches(pairs, 7, 400)
    assert len(patches) == 400
    torch.manual_seed(0)
    x, y = patches.__getitems__(list(range(400)))
    assert x.shape == (400, 1, 7, 7)
    assert y.shape == (400, 1, 7 * factor, 7 * factor)
    corners, kinds = set(), set()
    for a, b in zip(x[:, 0].numpy(), y[:, 0].numpy(), strict=True):
        np.testing.assert_array_equal(b, np.kron(a, np.ones((factor, factor))))
        down, right = a[1, 0] - a[0, 0], a[0, 1] - a[0, 0]
        assert sorted([abs(down), abs(right)]) == [1, 30]
        np.testing.assert_array_equal(
            a, a[0, 0] + down * np.arange(7)[:, None] + right * np.arange(7)
        )
        kinds.add((down, right))
        corners.add(a.min())
    assert len(kinds) == 8  # every symmetry of a square
    wanted = {
        1000.0 * i + top * 30 + left
        for i, (height, width) in enumerate([(9, 12), (8, 8), (20, 7)])
        for top in range(height - 6)
        for left in range(width - 6)
    }
    assert corners <= wanted  # none of the last image, which is too low
    assert len(corners) > 0.9 * len(wanted)
    torch.manual_seed(0)
    again = patches.__getitems__(list(range(400)))
    assert torch.equal(again[0], x)
    assert torch.equal(again[1], y)


def test_patches_refuse() -> None:
    pair = sr.Pair(np.zeros((9, 9), np.float32), np.zeros((18, 18), np.float32))
    with pytest.raises(ValueError, match="as large as a patch of 10"):
        sr.Patches([pair], 10, 1)
    with pytest.raises(ValueError, match="one whole number"):
        sr.Patches([pair, sr.Pair(pair.input, pair.input)], 4, 1)
    with pytest.raises(ValueError, match="one whole number"):
        sr.Patches([sr.Pair(pair.input, np.zeros((12, 12), np.float32))], 4, 1)


def test_packed_images(tmp_path: Path) -> None:
    import lzma

    images = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    red, green, blue = (images[..., c].astype(np.int16) for c in range(3))
    residuals = []
    for plane in (green, red - green, blue - green):
        result = np.zeros(plane.shape, np.int16)
        for y in range(plane.shape[1]):
            for x in range(plane.shape[2]):
                zero = 0 * plane[:, 0, 0]
                up = plane[:, y - 1, x] if y else plane[:, y, x - 1] if x else zero
                left = plane[:, y, x - 1] if x else up
                corner = plane[:, y - 1, x - 1] if x and y else left
                guess = np.median([left, up, left + up - corner], axis=0).astype(np.int16)
                result[:, y, x] = plane[:, y, x] - guess
        residuals.append((result & 255).astype(np.uint8))
    with lzma.open(tmp_path / "x.npy.xz", "wb") as file:
        np.save(file, np.stack(residuals))
    np.testing.assert_array_equal(packed.undo_median(tmp_path / "x.npy.xz"), images)


def _public_weights(path: Path, net: str) -> str:
    rng = np.random.default_rng(0)

    def kernel(*shape: int) -> Any:
        fan_in = np.prod(shape[1:]) if net == "vdsr" else np.prod(shape[:3])
        return (rng.normal(size=shape) * np.sqrt(1.0 / fan_in)).astype(np.float32)

    if net == "vdsr":
        arrays = {"input.weight": kernel(64, 1, 3, 3), "output.weight": kernel(1, 64, 3, 3)}
        for i in range(18):
            arrays[f"residual_layer.{i}.conv.weight"] = kernel(64, 64, 3, 3)
    else:
        arrays = {
            "x2/f1": kernel(5, 5, 1, 64), "x2/f2": kernel(3, 3, 64, 32),
            "x2/f3": kernel(3, 3, 32, 4),
            **{f"x2/b{i}": np.zeros(n, np.float32) for i, n in ((1, 64), (2, 32), (3, 4))},
        }  # fmt: skip
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["vdsr", "espcn"])
def test_super_resolution_from_training_to_engine(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, count in (("T91", 3), ("Set5", 2)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            Image.fromarray(smooth(34 + i, 29)).save(tmp_path / folder / f"{i}.png")
    file = tmp_path / "s.lutra"
    words = ["--net", net, "--data", str(tmp_path), "--threads", "1", "--output", str(file)]
    words += ["--weights", _public_weights(tmp_path / "w.npz", net)]
    words += ["--float-steps", "1", "--steps", "2", "--batch", "2", "--patch", "12"]
    words += ["--checkpoints", str(tmp_path / "checkpoints")]
    monkeypatch.setattr(sys, "argv", ["super_resolution.py", *words])
    threads = torch.get_num_threads()
    try:
        script.main()
        first = json.loads(file.with_suffix(".json").read_text())
        content = file.read_bytes()
        capsys.readouterr()
        script.main()
    finally:
        torch.set_num_threads(threads)
    assert "min in this process" not in capsys.readouterr().out
    assert file.read_bytes() == content
    ops = [node.op for node in lutra.load_graph(file).nodes]
    assert ops.count("lookup_conv2d") == (18 if net == "vdsr" else 1)
    assert ops.count("int8_conv2d") == 1
    assert set(first["set5_x2"]) == {"float_before", "float", "engine"}
    assert script.engine_quality(
        file, sr.load_set5(tmp_path, 2, enlarge=net == "vdsr"), 2
    ) == pytest.approx(first["set5_x2"]["engine"])
    session = lutra.Session(file)
    enlarged = 1 if net == "vdsr" else 2
    for height, width in ((24, 17), (9, 31)):
        x = np.random.default_rng(0).random((1, 1, height, width), np.float32)
        assert session(x).shape == (1, 1, height * enlarged, width * enlarged)


@pytest.mark.slow
@pytest.mark.skipif(
    not (SET5 / "set5_hr.npy.xz").exists(),
    reason="needs Set5: set LUTRA_TEST_DATA to the folder that holds sr/",
)
def test_bicubic_set5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sr, "undo_median", functools.cache(sr.undo_median))  # large ones are slow
    for scale, decibels in ((2, 33.65), (3, 30.39), (4, 28.42)):
        pairs = sr.load_set5(SET5, scale, enlarge=True)
        found = [sr.psnr(x, y, scale) for x, y in pairs]
        assert sum(found) / 5 == pytest.approx(decibels, abs=0.02)

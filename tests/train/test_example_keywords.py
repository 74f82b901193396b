"""Keyword spotting of the examples: networks, augmentation, and the script on a few clips."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import keywords as script
import numpy as np
import pytest
import speech as data
import torch
from examples_support import DATA

import lutra
from lutra.stream import Stream

NUMBERS = np.array([10, 11, 9, 3, 8, 1, 2, 6, 5, 4, 7, 0])  # MLPerf's, of the classes of data


def few_clips() -> Any:
    """Clips whose class is the band that is loud, by 12 speakers."""
    rng = np.random.default_rng(0)
    y = np.arange(144) % 12
    x = rng.integers(20, 60, (144, 49, 40))
    x[np.arange(144), 10:40, 3 * y] += 120
    clips = data.Clips(x.astype(np.uint8), y, np.arange(144) // 12 % 12)
    return clips.subset(np.arange(96)), clips.subset(np.arange(96, 144))


def few_inputs() -> Any:
    """MFCCs of the first training clips, and of some that are no training clips."""
    rng = np.random.default_rng(1)
    y = NUMBERS[np.arange(48) % 12]
    x = rng.integers(-5, 5, (48, 49, 10)) + 83
    x[:, :, 1] += y[:, None]
    row = np.where(np.arange(48) < 36, np.arange(48), -1)
    names = ["Down", "Go", "Left", "No", "Off", "On", "Right", "Stop", "Up", "Yes"]
    classes = (*names, "Silence", "Unknown")
    return data.Kws01(x.astype(np.int8), y, classes, row, row < 0, NUMBERS)


def public_weights(path: Path) -> str:
    """Random weights under the names of the public network."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}

    def norm(layer: int) -> None:
        for name in ("gamma", "moving_variance"):
            arrays[f"l{layer:02}.{name}"] = rng.uniform(0.5, 1.5, 64)
        for name in ("beta", "moving_mean"):
            arrays[f"l{layer:02}.{name}"] = rng.normal(size=64) / 4

    def weights(layer: int, name: str, *shape: int) -> None:
        fan_in = np.prod(shape[:2]) if name != "kernel" else np.prod(shape[:-1])
        arrays[f"l{layer:02}.{name}"] = rng.normal(size=shape) / np.sqrt(fan_in)
        outputs = shape[-2] if name != "kernel" else shape[-1]
        arrays[f"l{layer:02}.bias"] = rng.normal(size=outputs) / 4

    weights(0, "kernel", 10, 4, 1, 64)
    norm(1)
    for first in (2, 6, 10, 14):
        weights(first, "depthwise_kernel", 3, 3, 64, 1)
        norm(first + 1)
        weights(first + 2, "kernel", 1, 1, 64, 64)
        norm(first + 3)
    weights(18, "kernel", 64, 12)
    np.savez(path, **{name: array.astype(np.float32) for name, array in arrays.items()})
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, file: Path, *words: str) -> Any:
    """Runs the script on those clips; what it writes as JSON."""
    monkeypatch.setattr(script, "load_clips", lambda options: few_clips())
    monkeypatch.setattr(script, "load_inputs", lambda options: few_inputs())
    monkeypatch.setattr(
        script, "milliseconds", lambda runs: [float(run() is not None) for run in runs]
    )
    common = ["--epochs", "1", "--batch", "16", "--threads", "1", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["keywords.py", *common, *words])
    threads = torch.get_num_threads()
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)
    return json.loads(file.with_suffix(".json").read_text())


def answers_sound(file: Path, width: int) -> None:
    """The file says all that is needed to go from sound to a class."""
    stream = Stream(file)
    assert (stream.preprocess.frames, stream.preprocess.width) == (49, width)
    clip = np.random.default_rng(0).normal(size=16000).astype(np.float32) / 10
    answer = stream(clip)
    assert answer is not None
    np.testing.assert_array_equal(
        answer.scores, lutra.Session(file)(stream.preprocess.apply(clip[None]))[0]
    )
    assert answer.label in stream.session.graph.metadata["classes"]


@pytest.mark.slow
def test_resnet_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.lutra"
    words = ["--net", "resnet", "--widths", "8", "16", "--float-epochs", "2"]
    words += ["--checkpoints", str(tmp_path / "checkpoints")]
    first = run(monkeypatch, file, *words)
    assert {"dense_test", "engine_test", "torch_dense_ms", "engine_dense_ms"} <= set(first)
    assert first["test_clips"] == 48
    content = file.read_bytes()
    capsys.readouterr()
    again = run(monkeypatch, file, *words)
    assert "min in this process" not in capsys.readouterr().out
    assert file.read_bytes() == content
    same = [name for name in first if not name.endswith("_ms")]
    assert [again[name] for name in same] == [first[name] for name in same]
    ops = [node.op for node in lutra.load_graph(file).nodes]
    assert (ops.count("int8_conv2d"), ops.count("pq_conv2d")) == (2, 4)  # the shortcut is int8
    assert ops.count("int8_linear") == 1
    answers_sound(file, 40)


@pytest.mark.slow
def test_dscnn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, weights = tmp_path / "d.lutra", public_weights(tmp_path / "w.npz")
    result = run(monkeypatch, file, "--net", "dscnn", "--weights", weights, "--compact")
    counts = [result[f"{name}_clips"] for name in ("test", "all", "made_up")]
    assert counts == [12, 48, 48]
    graph = lutra.load_graph(file)
    ops = [node.op for node in graph.nodes]
    assert (ops.count("pq_conv2d"), ops.count("int8_conv2d"), ops.count("conv2d")) == (4, 4, 1)
    assert graph.metadata["classes"][10] == "Silence"
    assert result["bytes"] < 100_000
    answers_sound(file, 10)


def test_the_public_network_is_padded_like_tensorflow(tmp_path: Path) -> None:
    path = public_weights(tmp_path / "w.npz")
    plain, scaled = script.DSCNN(), script.DSCNN(data.MFCC.std)
    for model in (plain, scaled):
        script.load_public(model.eval(), Path(path))
    x = torch.randn(3, 1, 49, 10)
    with torch.no_grad():
        torch.testing.assert_close(scaled(x / data.MFCC.std), plain(x), rtol=1e-3, atol=1e-3)
        weights = np.load(path)
        kernel = torch.from_numpy(weights["l00.kernel"]).permute(3, 2, 0, 1)
        # SAME: ceil(49 / 2) = 25 rows need 9 more, of which the smaller half comes first.
        padded = torch.zeros(3, 1, 58, 12)
        padded[:, :, 4:53, 1:11] = x
        want = torch.nn.functional.conv2d(
            padded, kernel, torch.from_numpy(weights["l00.bias"]), stride=2
        )
        norm = [weights[f"l01.{n}"] for n in ("moving_mean", "moving_variance", "gamma", "beta")]
        want = torch.nn.functional.batch_norm(want, *map(torch.from_numpy, norm), eps=1e-3)
        assert want.shape == (3, 64, 25, 5)
        seen = []
        plain.conv1.register_forward_hook(lambda *a: seen.append(a[2]))
        plain(x)
        torch.testing.assert_close(seen[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "weights" / "mlperf_dscnn_kws_fp32.npz").exists(),
    reason="needs the public DS-CNN: set LUTRA_TEST_DATA to the folder that holds weights/",
)
def test_accuracy_of_the_public_network() -> None:
    model = script.DSCNN(data.MFCC.std)
    script.load_public(model, DATA / "weights" / "mlperf_dscnn_kws_fp32.npz")
    kws = data.load_kws01(DATA / "speech")
    part = script.Part(data.MFCC.values(kws.x), kws.y)
    assert round(script.accuracy(model, part), 1) == 90.8
    assert int(kws.test.sum()) == 173
    train, _ = data.load_speech_commands(DATA / "speech")
    known = kws.row >= 0
    np.testing.assert_array_equal(kws.numbers[train.y[kws.row[known]]], kws.y[known])


def test_no_speaker_is_on_both_sides() -> None:
    clips = few_clips()[0]
    used, valid = data.split(clips, 0.3, 0)
    assert len(used) + len(valid) == len(clips)
    spoken = [set(part.speaker[part.y != data.SILENCE]) for part in (used, valid)]
    assert spoken[0]
    assert spoken[1]
    assert not spoken[0] & spoken[1]
    np.testing.assert_array_equal(data.split(clips, 0.3, 0)[1].x, valid.x)


def test_warp() -> None:
    x = torch.arange(10.0).expand(2, 3, 10)
    one = torch.ones(2)
    torch.testing.assert_close(data.warp(x, one, 0 * one, 2), x)
    moved = data.warp(x, one, torch.tensor([2.0, -2.0]), 2)
    assert moved[0, 0].tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 9, 9]
    assert moved[1, 0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7]
    wide = data.warp(x, 0.5 * one, 0 * one, 2)  # half as fast about the middle
    torch.testing.assert_close(wide[0, 0], 4.5 + (torch.arange(10.0) - 4.5) / 2)
    torch.testing.assert_close(data.warp(x.transpose(1, 2), one, one, 1).transpose(1, 2),
                               data.warp(x, one, one, 2))  # fmt: skip


def test_masks_hide_bars() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 49, 40)
    made = data.masked(x, 1, 8, 2)
    hidden = made != x
    assert torch.equal(hidden.any(2), hidden.all(2))  # whole frames
    assert 0 < int(hidden.any(2).sum(1).max()) <= 16
    torch.testing.assert_close(made[hidden], x.mean((1, 2), keepdim=True).expand(x.shape)[hidden])


def test_augmentation_depends_on_the_seed_alone() -> None:
    clips = few_clips()[0]
    made = data.Augmented(clips)
    torch.manual_seed(0)
    x, y = made.__getitems__([0, 5, 12, 0])
    torch.manual_seed(0)
    again = made.__getitems__([0, 5, 12, 0])
    assert torch.equal(x, again[0])
    assert x.shape == (4, 1, 49, 40)
    assert not torch.equal(x[0], x[3])
    torch.testing.assert_close(y.sum(1), torch.ones(4))
    assert [int(row.argmax()) for row in y] == [0, 5, 0, 0]


def test_made_up_mfccs() -> None:
    torch.manual_seed(0)
    values = torch.randn(30, 49, 40) - 5
    weight = torch.randn(40, 10)
    mapping = data.MfccMap(values, values @ weight)
    torch.testing.assert_close(mapping(values[:3]), values[:3] @ weight, rtol=1e-3, atol=1e-3)

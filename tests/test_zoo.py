"""The trained files are sound on every instruction set, and as good as zoo/README.md says."""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples_support import DATA, ROOT

import lutra
from lutra.cli import main
from lutra.preprocess.audio import AudioPreprocess

FILES = sorted((ROOT / "zoo").glob("*.lutra"))


def files(part: str) -> Any:
    """Parametrises a test with the files whose names hold this."""
    found = [file for file in FILES if part in file.name]
    return pytest.mark.parametrize("file", found, ids=lambda p: p.stem)


def needs(path: str) -> Any:
    """Skips a test where the data are absent."""
    folder = Path(path).parent
    return pytest.mark.skipif(
        not (DATA / path).exists(),
        reason=f"needs {path}: set LUTRA_TEST_DATA to the folder that holds {folder}/",
    )


def stated(name: str, what: str) -> float:
    """A number of the table of a file in zoo/README.md."""
    text = (ROOT / "zoo" / "README.md").read_text()
    section = text[text.index(f"`{name}`") :]
    found = re.search(rf"{what} \| ([\d.]+) ", section)
    assert found, name
    return float(found[1])


def evaluate(capsys: pytest.CaptureFixture[str], file: Path, *words: Any) -> Any:
    """What ``lutra eval`` says."""
    assert main(["eval", str(file), *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def top1(capsys: pytest.CaptureFixture[str], file: Path, folder: Path, x: Any, y: Any) -> float:
    """Percent of right labels, to two digits."""
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    result = evaluate(capsys, file, "--inputs", folder / "x.npy", "--labels", folder / "y.npy")
    assert result["images"] == len(y)
    return round(100.0 * result["correct"] / len(y), 2)


def test_there_are_files() -> None:
    assert FILES


@files("")
def test_verify(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(file), "--isa", "all"]) == 0, capsys.readouterr().out


@pytest.mark.slow
@needs("image/cifar10_test.npy.xz")
@files("cifar10")
def test_cifar10_accuracy_is_as_stated(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="the example's image reader needs PyTorch")
    from cifar10 import load_test_images

    images, labels = load_test_images(DATA / "image")
    assert top1(capsys, file, tmp_path, images, labels) == stated(file.name, "engine accuracy")


@pytest.mark.slow
@needs("points/modelnet10_vox24_test.npy.xz")
@files("modelnet10")
def test_modelnet10_accuracy_is_as_stated(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="the example's reader needs PyTorch")
    import points

    entries = lutra.load_graph(file).metadata
    tests = points.load_modelnet10(DATA / "points")[1]
    x, y = points.fixed(tests, entries["training"]["points"], entries["seed"])
    assert top1(capsys, file, tmp_path, x, y) == stated(file.name, "engine accuracy")


def speech_commands(front: AudioPreprocess) -> tuple[Any, Any, Any]:
    """Features and labels to test with, and for each the row of the test clips."""
    folder = DATA / "speech"
    if front.coefficients:
        with np.load(folder / "kws01_mfcc_int8.npz") as kws:
            test = kws["speechcmd_split"] == 1
            return kws["x"][test], kws["y"][test], kws["speechcmd_row"][test]
    with lzma.open(folder / "speechcmd_test_logmel.npy.xz") as file:
        x = np.load(file)
    with np.load(folder / "speechcmd_test_meta.npz") as meta:
        return x, meta["label"], np.arange(len(x))


@pytest.mark.slow
@needs("text/tinyshakespeare.txt")
def test_perplexity_is_as_stated() -> None:
    file = ROOT / "zoo" / "shakespeare_ternary.lutra"
    symbols = np.frombuffer((DATA / "text/tinyshakespeare.txt").read_bytes(), np.uint8)
    ids = np.unique(symbols, return_inverse=True)[1]
    found = lutra.Generator(file).perplexity(ids[int(0.95 * len(ids)) :], context=256)
    assert round(found, 3) == stated(file.name, "engine perplexity")


@needs("speech/kws01_mfcc_int8.npz")
@files("speech_commands")
def test_speech_commands_accuracy_is_as_stated(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    front = AudioPreprocess.from_metadata(lutra.load_graph(file).metadata)
    assert front is not None
    x, y, _ = speech_commands(front)
    assert top1(capsys, file, tmp_path, x, y) == stated(file.name, "engine accuracy")


@needs("speech/kws01_mfcc_int8.npz")
@files("speech_commands")
def test_sound_gives_the_answers_of_the_features(file: Path) -> None:
    session = lutra.Session(file, threads=1)
    front = AudioPreprocess.from_metadata(session.graph.metadata)
    assert front is not None
    x, _, row = speech_commands(front)
    with lzma.open(DATA / "speech" / "speechcmd_test_pcm.npy.xz") as packed:
        planes = np.load(packed)
    zigzag = (planes[0].astype(np.int32) << 8) | planes[1]
    clips = np.cumsum((zigzag >> 1) ^ -(zigzag & 1)).astype(np.int16).reshape(-1, 16000)
    known = np.load(DATA / "speech" / "speechcmd_test_pcm_rows.npz")["row"]
    pairs = [(i, int(np.flatnonzero(row == r)[0])) for i, r in enumerate(known) if r in row]
    assert len(pairs) > 20
    heard = session(front.apply(clips[[i for i, _ in pairs]]))
    stored = session(front.apply(x[[j for _, j in pairs]]))
    assert (heard.argmax(1) == stored.argmax(1)).mean() > 0.96  # MFCCs may differ by a level
    if not front.coefficients:
        np.testing.assert_array_equal(heard, stored)
    for i, _ in pairs[:5]:
        answer = lutra.Stream(session)(clips[i])
        assert answer is not None
        np.testing.assert_array_equal(answer.scores, session(front.apply(clips[i : i + 1]))[0])


@pytest.mark.slow
@needs("sr/set5_hr.npy.xz")
@files("sr_x2")
def test_set5_psnr_is_as_stated(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="the example's reader needs PyTorch")
    pytest.importorskip("PIL", reason="the example's reader needs Pillow")
    import sr

    enlarge = "enlarged" in lutra.load_graph(file).metadata["super_resolution"]["input"]
    pairs = sr.load_set5(DATA / "sr", 2, enlarge=enlarge)
    np.savez(tmp_path / "x.npz", **{f"{i:04}": pair.input for i, pair in enumerate(pairs)})
    np.savez(
        tmp_path / "y.npz",
        **{f"{i:04}": np.rint(255 * pair.target).astype(np.uint8) for i, pair in enumerate(pairs)},
    )
    words = ["--metric", "psnr", "--images", tmp_path / "x.npz", "--targets", tmp_path / "y.npz"]
    result = evaluate(capsys, file, *words, "--border", 2)
    assert len(result["psnr_of"]) == 5
    assert round(result["psnr"], 2) == stated(file.name, "engine PSNR")

"""``lutra run --wav`` and ``lutra eval --wav``: sound in, classes out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audio_support import CLASSES, SMALL, audio_graph, sound, windows, write_wav
from cli_support import image_graph, save

import lutra
from lutra.format import save_graph
from lutra.stream import probabilities

pytest_plugins = ["cli_support"]


@pytest.fixture
def voice(folder: Path) -> str:
    save_graph(audio_graph(), "v.lutra")
    return "v.lutra"


def scores(model: str, clips: Any) -> Any:
    return lutra.Session(model)(SMALL.apply(clips))


def test_run(capture: Any, voice: str) -> None:
    clips = sound(2400).reshape(3, 800)
    files = [write_wav(f"{i}.wav", clip) for i, clip in enumerate(clips)]
    want = scores(voice, clips)
    shares = probabilities(want)
    code, out, err = capture("run", voice, "--wav", *files)
    assert (code, err) == (0, "")
    for i, line in enumerate(out.splitlines()):
        best = CLASSES[want[i].argmax()]
        assert line.startswith(f"{i}.wav: {best} {100 * shares[i].max():.1f} %, ")
        assert line.count("%") == 3
    assert capture("run", voice, "--wav", *files, "-o", "y.npy") == (0, "", "")
    np.testing.assert_array_equal(np.load("y.npy"), want)
    code, out, _ = capture("run", voice, "--wav", *files, "--json")
    answers = json.loads(out)["answers"]
    assert [a["file"] for a in answers] == files
    assert [a["label"] for a in answers] == [CLASSES[row.argmax()] for row in want]
    assert answers[1]["probabilities"][CLASSES[2]] == shares[1, 2]


def test_run_short_silent_clipped_and_stereo(capture: Any, voice: str) -> None:
    clip = sound(500)
    padded = np.pad(clip, (0, 300))
    for samples, want, channels in (
        (clip, padded, 1),
        (np.repeat(clip, 2), padded, 2),
        (np.zeros(800, np.int16), np.zeros(800, np.int16), 1),
        (np.full(800, 32767), np.full(800, 32767, np.int16), 1),
        (clip[:1], np.pad(clip[:1], (0, 799)), 1),
    ):
        path = write_wav("x.wav", samples, channels=channels)
        assert capture("run", voice, "--wav", path, "-o", "y.npy")[0] == 0
        np.testing.assert_array_equal(np.load("y.npy"), scores(voice, want[None]))


def test_run_stream(capture: Any, voice: str) -> None:
    clip = sound(4000)
    path = write_wav("x.wav", clip)
    for every in (1, 5):
        want = scores(voice, windows(clip, SMALL, every))
        words = ["--wav", path, "--stream", *(["--every", "1"] if every == 1 else [])]
        assert capture("run", voice, *words, "-o", "y.npy") == (0, "", "")
        np.testing.assert_array_equal(np.load("y.npy"), want)
    code, out, _ = capture("run", voice, *words)
    assert code == 0
    assert len(out.splitlines()) == len(want)
    assert out.splitlines()[0].startswith(f"    0.10 s  {CLASSES[want[0].argmax()]} ")
    answers = json.loads(capture("run", voice, *words, "--smooth", "2", "--json")[1])["answers"]
    assert [a["seconds"] for a in answers] == pytest.approx([0.1 + 0.05 * i for i in range(9)])
    mean = (probabilities(want[:-1]) + probabilities(want[1:])) / 2
    assert [a["probability"] for a in answers[1:]] == pytest.approx(list(mean.max(1)))


def test_run_refuses_sound(refuse: Any, voice: str) -> None:
    def bad(match: str, *words: str) -> None:
        refuse("run", voice, "--wav", "x.wav", *words, match=match)

    bad("cannot read 'x.wav': No such file")
    write_wav("x.wav", sound(800), 16000)
    bad("has 16000 samples a second, but the model takes 8000; convert it first.*ffmpeg")
    bad("has 16000 samples a second", "--stream")
    write_wav("x.wav", sound(801))
    bad("give --stream for answers all along, or cut it")
    write_wav("x.wav", [])
    bad("holds no sound")
    write_wav("x.wav", sound(700))
    bad("less than a window of 0.10 s; leave --stream out", "--stream")
    Path("x.wav").write_bytes(b"RIFF of nothing")
    bad("as a WAV file")


def test_run_refuses_arguments(refuse: Any, voice: str) -> None:
    path = write_wav("x.wav", sound(800))
    run = ["run", voice]
    refuse(*run, match="--input FILE, or --wav FILE")
    refuse(*run, "-i", "x.npy", match="--output FILE, or --wav FILE")
    refuse(*run, "--wav", path, "-i", "x.npy", match="one of them")
    refuse(*run, "--wav", path, "-o", "y.npy", "-o", "z.npy", match="give it once")
    refuse(*run, "--wav", path, path, "--stream", match="one recording, not 2")
    refuse(*run, "--wav", path, "--every", "2", match="--every is for --stream")
    refuse(*run, "--wav", path, "--stream", "--smooth", "0", match="at least 1")
    refuse(*run, "--stream", "-i", "x.npy", "-o", "y.npy", match="--stream is for --wav")
    refuse(*run, "--wav", path, "-o", "none/y.npy", match="does not exist")
    save_graph(image_graph(), "i.lutra")
    refuse("run", "i.lutra", "--wav", path, match="does not say how to prepare sound")


def test_run_takes_arrays_of_sound(capture: Any, refuse: Any, voice: str) -> None:
    clips = sound(1600).reshape(2, 800)
    want = scores(voice, clips)
    for array in (clips, SMALL.features(clips), SMALL.apply(clips)):
        assert capture("run", voice, "-i", save("x.npy", array), "-o", "y.npy") == (0, "", "")
        np.testing.assert_array_equal(np.load("y.npy"), want)
    refuse("run", voice, "-i", save("x.npy", clips[:, :3].astype(np.int8)), "-o", "z.npy",
           match="dtype int8")  # fmt: skip


def test_eval_arrays(capture: Any, refuse: Any, voice: str) -> None:
    clips = sound(8000).reshape(10, 800)
    labels = scores(voice, clips).argmax(1)
    labels[:3] = (labels[:3] + 1) % 4
    words = ["--labels", save("y.npy", labels)]
    for array in (clips, clips.astype(np.float32) / 32768, SMALL.features(clips)):
        code, out, err = capture("eval", voice, "--inputs", save("x.npy", array), *words, "--json")
        assert (code, err) == (0, "")
        assert json.loads(out)["correct"] == 7
    bad = clips.astype(np.float32) / 32768
    bad[2, 5] = np.nan
    refuse("eval", voice, "--inputs", save("x.npy", bad), *words, match="NaN")
    bad = clips.astype(np.int64)
    refuse("eval", voice, "--inputs", save("x.npy", bad), *words, match="dtype int64")


def test_eval_folder(capture: Any, refuse: Any, voice: str) -> None:
    clips = sound(3200).reshape(4, 800)
    for name, clip, loud in zip(["yes", "yes", "up", "no"], clips, "abcd", strict=True):
        os.makedirs(f"clips/{name}", exist_ok=True)
        write_wav(f"clips/{name}/{loud}.wav", clip)
    want = scores(voice, clips).argmax(1)
    right = int((want == [1, 1, 3, 2]).sum())
    code, out, err = capture("eval", voice, "--wav", "clips", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["images"], report["correct"]) == (4, right)
    assert json.loads(capture("eval", voice, "--wav", "clips", "--limit", "2", "--json")[1])[
        "images"
    ] == 2  # fmt: skip
    refuse("eval", voice, "--wav", "none", match="cannot read 'none'")
    refuse("eval", voice, "--wav", "clips", "--images", "x.npy", match="leave those out")
    refuse("eval", voice, match="--labels Y, or --wav FOLDER")
    os.makedirs("clips/maybe")
    refuse("eval", voice, "--wav", "clips", match="'maybe', which is no class")
    os.makedirs("empty/yes")
    refuse("eval", voice, "--wav", "empty", match="holds no recordings")
    save_graph(audio_graph(classes=None), "n.lutra")
    refuse("eval", "n.lutra", "--wav", "clips", match="names its classes")

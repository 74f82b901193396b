"""Streams of sound give the answers of whole clips, whatever the blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audio_support import (
    CLASSES,
    LOG_MEL,
    MFCC,
    SMALL,
    audio_graph,
    sound,
    windows,
    without_levels,
)
from graphs import Builder
from sweeps import sweep

import lutra
from lutra.errors import FormatError, InputError
from lutra.preprocess.audio import AudioPreprocess
from lutra.stream import Answer, Stream, probabilities

ODD = replace(SMALL, samples=777, hop=90)  # a window is no whole number of hops


def answers(stream: Stream, clip: Any, size: int) -> list[Answer]:
    return [a for i in range(0, len(clip), size) for a in stream.push(clip[i : i + size])]


@pytest.mark.parametrize(
    "pre",
    [SMALL, without_levels(SMALL), replace(SMALL, gain="full-scale"), ODD],
    ids=["levels", "floats", "full-scale", "odd"],
)
@sweep("every", [1, 3, 40])
@sweep("size", [1, 7, 80, 81, 800, 5000])
def test_equals_whole_clips(pre: AudioPreprocess, size: int, every: int) -> None:
    session = lutra.Session(audio_graph(pre), threads=1)
    clip = sound(2900)
    wanted = session(pre.apply(windows(clip, pre, every)))
    found = answers(Stream(session, every=every), clip, size)
    assert [a.end for a in found] == [pre.samples + i * every * pre.hop for i in range(len(wanted))]
    np.testing.assert_array_equal(np.stack([a.scores for a in found]), wanted)


@pytest.mark.parametrize("pre", [LOG_MEL, MFCC], ids=["log-mel", "mfcc"])
def test_equals_whole_clips_of_a_second(pre: AudioPreprocess) -> None:
    session = lutra.Session(audio_graph(pre), threads=1)
    clip = sound(20000)
    wanted = session(pre.apply(windows(clip, pre)))
    for size in (320, 1000, 20000):
        found = answers(Stream(session), clip, size)
        np.testing.assert_array_equal(np.stack([a.scores for a in found]), wanted)


def test_blocks_of_changing_size_and_dtype() -> None:
    session = lutra.Session(audio_graph(), threads=1)
    clip, rng = sound(6000), np.random.default_rng(1)
    wanted = session(SMALL.apply(windows(clip, SMALL)))
    stream, found, at = Stream(session), [], 0
    while at < len(clip):
        block = clip[at : at + int(rng.integers(0, 500))]
        at += len(block)
        found += stream.push(block if rng.random() < 0.5 else block.astype(np.float32) / 32768)
    np.testing.assert_array_equal(np.stack([a.scores for a in found]), wanted)


def test_answers(tmp_path: Path) -> None:
    path = tmp_path / "m.lutra"
    lutra.save_graph(audio_graph(), path)
    stream = Stream(path)
    assert stream.session.threads == 1
    clip = sound(1000)
    assert stream(clip[:799]) is None
    assert stream(clip[:0]) is None
    first = stream(clip[799:800])
    assert first is not None
    assert (first.end, first.seconds) == (800, 0.1)
    np.testing.assert_array_equal(
        first.scores, lutra.Session(path)(SMALL.apply(clip[None, :800]))[0]
    )
    np.testing.assert_array_equal(first.probabilities, probabilities(first.scores))
    assert first.index == first.scores.argmax()
    assert first.label == CLASSES[first.index]
    last = stream(clip[800:])  # two windows end here; the newest is returned
    assert last is not None
    assert last.end == 960


def test_reset_forgets_everything() -> None:
    stream, clip = Stream(audio_graph(), smooth=3), sound(3000)
    first = answers(stream, clip, 100)
    stream.push(sound(777, seed=5))
    stream.reset()
    again = answers(stream, clip, 100)
    assert [a.end for a in again] == [a.end for a in first]
    for a, b in zip(again, first, strict=True):
        np.testing.assert_array_equal(a.probabilities, b.probabilities)


def test_smoothing_averages_probabilities() -> None:
    session, clip = lutra.Session(audio_graph(), threads=1), sound(1600)
    single = [a.probabilities for a in answers(Stream(session), clip, 80)]
    smooth = answers(Stream(session, smooth=4), clip, 80)
    for i, answer in enumerate(smooth):
        part = single[max(0, i - 3) : i + 1]
        np.testing.assert_allclose(answer.probabilities, np.mean(part, 0), rtol=1e-12)
        assert answer.index == answer.probabilities.argmax()


def test_models_that_end_in_a_softmax_and_fix_the_batch() -> None:
    b = Builder(("x", (1, 1, SMALL.frames, SMALL.width)))
    x = b.add("mean", b.conv2d("x", 1, 4, padding=(1, 1)), axes=(2, 3))
    b.add("softmax", x, axis=1)
    graph = b.graph(metadata={"preprocess": SMALL.to_dict()})
    answer = Stream(graph)(sound(800))
    assert answer is not None
    np.testing.assert_array_equal(answer.probabilities, answer.scores.astype(np.float64))
    assert answer.label == str(answer.index)  # it names no classes


def test_silence_and_clipping() -> None:
    for clip in (np.zeros(2000, np.int16), np.full(2000, 32767, np.int16)):
        for answer in answers(Stream(audio_graph()), clip, 90):
            assert np.isfinite(answer.scores).all()


def test_bad_blocks_are_not_part_of_the_stream() -> None:
    stream, clip = Stream(audio_graph()), sound(1600)
    stream.push(clip[:500])
    bad = np.full(10, 0.1, np.float32)
    bad[3] = np.nan
    for block, message in (
        (bad, "1 samples that are NaN"),
        (clip[:10].astype(np.int32), "dtype int32"),
        (clip[:10].reshape(5, 2), r"shape \(5, 2\)"),
        (clip[:10].astype(np.float32), "divide samples of 16 bits"),
        ([0.0], "list"),
    ):
        with pytest.raises(InputError, match=message):
            stream.push(block)  # type: ignore[arg-type]
    found = stream.push(clip[500:])
    wanted = answers(Stream(audio_graph()), clip, 1600)
    np.testing.assert_array_equal(found[-1].scores, wanted[-1].scores)


def test_refuses_models_and_numbers() -> None:
    for kind in ({"preprocess": None}, {"preprocess": {"kind": "image"}}):
        with pytest.raises(InputError, match="does not say how to prepare sound"):
            Stream(audio_graph(**kind))
    with pytest.raises(FormatError, match="preprocess has the fields"):
        Stream(audio_graph(preprocess={"kind": "audio"}))
    with pytest.raises(InputError, match=r"its front end makes \(N, 1, 49, 40\)"):
        Stream(audio_graph(preprocess=LOG_MEL.to_dict()))
    with pytest.raises(InputError, match=r"its front end makes \(N, 1, 9, 12\)"):
        Stream(audio_graph(batch=2))
    b = Builder(("x", (None, 1, SMALL.frames, SMALL.width)))
    b.add("relu", "x")
    with pytest.raises(InputError, match=r"one output \(N, classes\)"):
        Stream(b.graph(metadata={"preprocess": SMALL.to_dict()}))
    for numbers in ({"every": 0}, {"smooth": 0}, {"every": 1.5}, {"smooth": True}):
        with pytest.raises(InputError, match="not a whole number of at least 1"):
            Stream(audio_graph(), **numbers)  # type: ignore[arg-type]

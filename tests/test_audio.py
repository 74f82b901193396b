"""The front end for sound: features, descriptions, WAV files."""

from __future__ import annotations

import json
import lzma
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audio_support import LOG_MEL, MFCC, SMALL, sound, without_levels, write_wav
from examples_support import DATA

from lutra.errors import FormatError, InputError
from lutra.preprocess.audio import AudioPreprocess, Levels, read_wav

SPEECH = DATA / "speech"
needs_speech = pytest.mark.skipif(
    not (SPEECH / "kws01_mfcc_int8.npz").exists(),
    reason="needs Speech Commands: set LUTRA_TEST_DATA to the folder that holds speech/",
)


def plain_features(pre: AudioPreprocess, clip: Any) -> Any:
    """The features of one clip (samples,), written as the recipe reads, float64."""
    x = clip / 32768
    if pre.gain == "peak" and x.max() >= 1 / 32768:
        x = x / x.max()
    mel = 1127 * np.log(1 + np.array(pre.frequencies) / 700)
    corners = 700 * (np.exp(np.linspace(*mel, pre.bands + 2) / 1127) - 1)
    hertz = np.arange(pre.fft // 2 + 1) * pre.rate / pre.fft
    if pre.triangles == "mel":
        corners, hertz = (1127 * np.log(1 + f / 700) for f in (corners, hertz))
    rows = []
    for first in range(0, pre.samples - pre.frame + 1, pre.hop):
        n = np.arange(pre.frame)
        window = 0.5 - 0.5 * np.cos(2 * np.pi * n / pre.frame)
        spectrum = np.abs(np.fft.rfft(x[first : first + pre.frame] * window, pre.fft))
        if pre.spectrum == "power":
            spectrum = spectrum**2
        row = [
            np.log(spectrum @ np.interp(hertz, corners[b : b + 3], [0, 1, 0]) + pre.floor)
            for b in range(pre.bands)
        ]
        if pre.coefficients:
            k = np.arange(pre.coefficients)[:, None]
            at = np.arange(pre.bands) + 0.5
            row = np.sqrt(2 / pre.bands) * (np.cos(np.pi * k * at / pre.bands) @ row)
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("pre", [LOG_MEL, MFCC, SMALL], ids=["log-mel", "mfcc", "small"])
def test_is_the_recipe(pre: AudioPreprocess) -> None:
    clips = sound(3 * pre.samples).reshape(3, -1)
    want = np.stack([plain_features(pre, clip) for clip in clips])
    got = without_levels(pre).features(clips)
    assert got.shape == (3, pre.frames, pre.width)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)
    levels = pre.features(clips)
    assert pre.levels is not None
    assert levels.dtype == pre.levels.dtype
    np.testing.assert_allclose(
        (levels - pre.levels.zero) * pre.levels.step,
        np.clip(want, *((np.array([pre.levels.low, pre.levels.high]) - pre.levels.zero)
                        * pre.levels.step)),
        atol=pre.levels.step,
    )  # fmt: skip


def stored(part: str) -> tuple[Any, Any, Any]:
    """Waveforms, their rows, and the log-mel features of these rows."""
    with lzma.open(SPEECH / f"speechcmd_{part}_pcm.npy.xz") as file:
        planes = np.load(file)
    zigzag = (planes[0].astype(np.int32) << 8) | planes[1]
    waves = np.cumsum((zigzag >> 1) ^ -(zigzag & 1)).astype(np.int16).reshape(-1, 16000)
    row = np.load(SPEECH / f"speechcmd_{part}_pcm_rows.npz")["row"]
    with lzma.open(SPEECH / f"speechcmd_{part}_logmel.npy.xz") as file:
        return waves, row, np.load(file)[row]


@needs_speech
@pytest.mark.parametrize(("part", "split"), [("train", 0), ("test", 1)])
def test_makes_the_published_features(part: str, split: int) -> None:
    waves, row, features = stored(part)
    np.testing.assert_array_equal(LOG_MEL.features(waves), features)
    with np.load(SPEECH / "kws01_mfcc_int8.npz") as kws:
        at = {int(r): i for i, r in enumerate(row)}
        pairs = [
            (i, at[int(r)])
            for i, (s, r) in enumerate(
                zip(kws["speechcmd_split"], kws["speechcmd_row"], strict=True)
            )
            if s == split and int(r) in at
        ]
        assert len(pairs) > 20
        want = kws["x"][[i for i, _ in pairs]].astype(int)
    got = MFCC.features(waves[[i for _, i in pairs]])
    assert np.abs(got - want).max() <= 1
    assert (got == want).mean() > 0.998


@pytest.mark.parametrize("pre", [LOG_MEL, MFCC, SMALL], ids=["log-mel", "mfcc", "small"])
def test_same_bits_alone_and_in_a_batch(pre: AudioPreprocess) -> None:
    pre = without_levels(pre)
    clips = sound(40 * pre.samples).reshape(40, -1)
    many = pre.features(clips)
    for i in (0, 1, 17, 39):
        np.testing.assert_array_equal(pre.features(clips[i : i + 1])[0], many[i])
    x = pre.waveforms(clips)
    frames = x[:, : pre.frame]
    energies = pre.energies(frames)
    for i in (0, 3, 38):
        np.testing.assert_array_equal(pre.energies(frames[i]), energies[i])
    np.testing.assert_array_equal(pre.energies(frames[::-1]), energies[::-1])


def test_dtypes_of_waveforms_agree() -> None:
    clip = sound(16000)[None]
    want = LOG_MEL.apply(clip)
    assert want.shape == (1, 1, 49, 40)
    assert want.dtype == np.float32
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(LOG_MEL.apply((clip / 32768).astype(dtype)), want)


def test_values_are_float32_arithmetic() -> None:
    levels = np.arange(256, dtype=np.uint8)[None, :245].reshape(1, 49, 5)
    pre = AudioPreprocess(bands=5, levels=Levels(0.1, 138), mean=-6.5, std=3.0)
    x = (levels.astype(np.float32) - np.float32(138)) * np.float32(0.1)
    want = (x - np.float32(-6.5)) / np.float32(3.0)
    np.testing.assert_array_equal(pre.apply(levels, (None, 1, 49, 5)), want[:, None])
    np.testing.assert_array_equal(pre.apply(want[:, None]), want[:, None])  # ready


def test_silence() -> None:
    floor = np.log(1e-6)
    np.testing.assert_allclose(
        without_levels(LOG_MEL).features(np.zeros((1, 16000), np.int16)), floor, rtol=1e-6
    )
    # nothing to divide by: no NaN, and noise below one step of 16 bits is not blown up
    quiet = np.full((1, 16000), 1e-7, np.float32)
    for clip in (np.zeros((1, 16000), np.int16), np.full((1, 16000), -5, np.int16), quiet):
        made = without_levels(MFCC).features(clip)
        assert np.isfinite(made).all()
        if clip is quiet:
            np.testing.assert_allclose(
                made, without_levels(MFCC).features(np.zeros((1, 16000), np.int16)), atol=1
            )


def test_peak_gain_makes_loudness_irrelevant() -> None:
    clip = sound(16000, loud=1000.0).astype(np.float32) / 32768
    made = without_levels(MFCC).features(np.stack([clip, clip / 4]))
    np.testing.assert_allclose(made[0], made[1], atol=1e-4)


def test_clipped_sound_is_taken_as_it_is() -> None:
    clip = np.clip(sound(16000, loud=1e5).astype(int) * 8, -32768, 32767).astype(np.int16)[None]
    assert (np.abs(clip.astype(int)) >= 32767).mean() > 0.3
    for pre in (LOG_MEL, MFCC):
        features = pre.features(clip)
        assert features.std() > 1
        np.testing.assert_array_equal(features, pre.features(clip / np.float32(32768)))


def test_short_clips_get_zeros_at_the_end() -> None:
    clip = sound(16000)[None]
    clip[:, 9000:] = 0
    np.testing.assert_array_equal(LOG_MEL.features(clip[:, :9000]), LOG_MEL.features(clip))
    assert LOG_MEL.features(clip[:, :1]).shape == (1, 49, 40)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ([0.0], "is a list"),
        (np.zeros((1, 16000), np.int32), "dtype int32"),
        (np.zeros((1, 16000), np.uint8), "dtype uint8"),
        (np.zeros((1, 0), np.int16), "at least one sample"),
        (np.zeros((0, 16000), np.int16), "at least one sample"),
        (np.zeros((1, 16001), np.int16), "16001 samples, but the model looks at 16000"),
        (np.zeros(16000, np.int16), r"shape \(16000,\)"),
        (np.full((1, 9), np.nan, np.float32), "9 samples that are NaN"),
        (np.full((1, 9), np.inf), "NaN or infinite"),
        (np.full((1, 9), 20000.0), "divide samples of 16 bits by 32768"),
        (np.zeros((2, 49, 39), np.uint8), r"\(N, 49, 40\) is needed"),
        (np.zeros((2, 49, 40), np.int8), "dtype int8"),
        (np.zeros((2, 1, 49, 39), np.float32), r"float32 inputs \(N, 1, 49, 40\)"),
    ],
)
def test_refuses_audio(audio: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LOG_MEL.apply(audio)


def test_refuses_features_and_models_that_do_not_fit() -> None:
    pre = AudioPreprocess(bands=4, levels=Levels(1.0, 0, 0, 9))
    with pytest.raises(InputError, match=r"0\.\.10, but the levels of the model are 0\.\.9"):
        pre.apply(np.arange(196, dtype=np.uint8).reshape(1, 49, 4) % 11)
    for shape in ((None, 1, 49, 10), (None, 49, 4), (3, 1, 49, 4)):
        with pytest.raises(InputError, match="the model takes"):
            pre.apply(np.zeros((2, 100), np.int16), shape)


# Descriptions


def test_survives_json() -> None:
    for pre in (LOG_MEL, MFCC, SMALL, AudioPreprocess()):
        entry = json.loads(json.dumps(pre.to_dict()))
        assert entry["kind"] == "audio"
        assert AudioPreprocess.from_dict(entry) == pre
        assert AudioPreprocess.from_metadata({"preprocess": entry}) == pre
    assert AudioPreprocess.from_metadata({}) is None
    assert AudioPreprocess.from_metadata({"preprocess": {"kind": "image"}}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0}, "rate is 0"),
        ({"rate": 16000.0}, "rate is 16000.0"),
        ({"rate": True}, "rate is True"),
        ({"samples": 479}, "one frame at least"),
        ({"samples": 10**12}, "samples"),
        ({"frame": 513}, r"frame is 513; it must be a whole number in 1\.\.512"),
        ({"fft": 1 << 20}, "fft"),
        ({"fft": "512"}, "fft is '512'"),
        ({"hop": 0}, "hop"),
        ({"samples": 1 << 24, "hop": 1}, "take a larger hop"),
        ({"bands": 0}, "bands"),
        ({"coefficients": 41}, "coefficients"),
        ({"spectrum": "energy"}, "'power' or 'magnitude'"),
        ({"triangles": None}, "triangles is None"),
        ({"gain": ["peak"]}, "gain"),
        ({"frequencies": [20, 9000]}, "frequencies"),
        ({"frequencies": [500, 500.5]}, "1 Hz apart"),
        ({"frequencies": 20}, "two numbers"),
        ({"floor": 0}, "floor"),
        ({"floor": float("nan")}, "floor is nan"),
        ({"std": 0}, "std"),
        ({"mean": "0"}, "mean is '0'"),
        ({"mean": 10**400}, "mean"),
        ({"levels": 5}, "levels is a int"),
        ({"levels": {"step": 1}}, "levels has the fields step"),
        ({"levels": {"step": 0, "zero": 0, "low": 0, "high": 9, "rounding": "nearest"}}, "step"),
        ({"levels": {"step": 1, "zero": 0, "low": -1, "high": 128, "rounding": "nearest"}}, "int8"),
        ({"levels": {"step": 1, "zero": 0, "low": 5, "high": 5, "rounding": "nearest"}}, "5"),
        ({"levels": {"step": 1, "zero": 0, "low": 0, "high": 9, "rounding": "up"}}, "'up'"),
        ({"kind": "image"}, "'image'"),
        ({"extra": 1}, "fields"),
    ],
)
def test_refuses_nonsense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        AudioPreprocess.from_dict({**LOG_MEL.to_dict(), **change})


@pytest.mark.parametrize("entry", [1, "audio", ["audio"], {}, {"kind": "audio"}])
def test_refuses_what_is_no_entry(entry: object) -> None:
    with pytest.raises(FormatError, match="preprocess"):
        AudioPreprocess.from_dict(entry)


# WAV files


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_reads_wav(width: int, tmp_path: Path) -> None:
    bits = 8 * width
    top = 1 << (bits - 1)
    x = np.array([0, 1, -1, top - 1, -top, top // 2, -top // 3])
    samples, rate = read_wav(write_wav(tmp_path / "x.wav", x, 11025, width))
    assert rate == 11025
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, (x / top).astype(np.float32))


def test_stereo_is_averaged(tmp_path: Path) -> None:
    x = sound(600).reshape(300, 2)
    samples, _ = read_wav(write_wav(tmp_path / "x.wav", x.reshape(-1), channels=2))
    np.testing.assert_array_equal(samples, x.mean(1).astype(np.float32) / 32768)


def test_wav_gives_the_same_features_as_samples(tmp_path: Path) -> None:
    clip = sound(16000)
    samples, _ = read_wav(write_wav(tmp_path / "x.wav", clip, 16000))
    np.testing.assert_array_equal(LOG_MEL.features(samples[None]), LOG_MEL.features(clip[None]))


def test_refuses_wav(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    good = Path(write_wav(path, sound(100))).read_bytes()
    floats = bytearray(good)
    floats[20:22] = struct.pack("<H", 3)
    for data, match in (
        (b"", "cannot read"),
        (b"no sound", "cannot read"),
        (good[:30], "cannot read"),
        (good[:-1], "truncated|cannot read"),
        (good[:-50], "truncated"),
        (bytes(floats), "unknown format: 3; save it as 16-bit PCM"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=match):
            read_wav(path)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", "none"))
    with pytest.raises(InputError, match="holds no sound"):
        read_wav(path)
    with pytest.raises(InputError, match="No such file"):
        read_wav(tmp_path / "none.wav")
    with pytest.raises(InputError, match="directory"):
        read_wav(tmp_path)

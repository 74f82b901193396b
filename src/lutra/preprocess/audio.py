"""From sound to the input of a model, as the metadata of its file describe it.

The entry ``preprocess`` of the metadata says how waveforms become features, frame by frame::

    {"kind": "audio", "rate": 16000, "samples": 16000, "frame": 480, "hop": 320, "fft": 512,
     "spectrum": "power", "bands": 40, "frequencies": [20, 7600], "triangles": "hertz",
     "floor": 1e-06, "gain": "full-scale", "coefficients": 0,
     "levels": {"step": 0.1, "zero": 138, "low": 0, "high": 255, "rounding": "nearest"},
     "mean": 0.0, "std": 1.0}

Training, file and engine use the same code. A frame has the same bits whether it is computed alone
or among others: sums are written out in a fixed order and no matrix product is used.
"""

from __future__ import annotations

import math
import os
import wave
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Final

import numpy as np

from lutra.errors import FormatError, InputError
from lutra.node import Array, Shape
from lutra.preprocess.image import KEY, shown

__all__ = ["AudioPreprocess", "Levels", "read_wav"]

KIND: Final = "audio"
#: What one step of 16 bits is, where full scale is 1. Anything quieter counts as silence.
QUIETEST: Final = 1 / 32768
#: Float samples are -1..1. A little more may come from a decoder; this much is another unit.
LOUDEST: Final = 8.0
_MAX_RATE: Final = 768_000
_MAX_SAMPLES: Final = 1 << 24
_MAX_FFT: Final = 1 << 16
_MAX_BANDS: Final = 1024
_MAX_FEATURES: Final = 1 << 24
_FEW: Final = 1 << 13  # numbers that are added up faster in one call than in many
_PIECE: Final = 1 << 21  # numbers at once, which bounds the memory
_MEL: Final = 1127.0  # mel(f) = 1127 ln(1 + f / 700), HTK's
_CHOICES: Final = {
    "spectrum": ("power", "magnitude"),
    "triangles": ("hertz", "mel"),
    "gain": ("full-scale", "peak"),
}


@dataclass(frozen=True)
class Levels:
    """The grid of 8-bit features: ``q = clip(round(value / step + zero), low, high)``.

    Attributes:
        step: Distance of two levels, above 0.
        zero: The level of the value 0; need not be a whole number.
        low: The lowest level.
        high: The highest level; 0..255 and -128..127 are the ranges allowed.
        rounding: ``nearest`` is ``floor(x + 0.5)``, ``truncate`` drops the fraction.

    Raises:
        InputError: If a field makes no sense.
    """

    step: float
    zero: float
    low: int = 0
    high: int = 255
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        _need_numbers("levels: ", self, "step", "zero")
        _need_whole("levels: ", self, "low", -128, 255)
        _need_whole("levels: ", self, "high", -128, 255)
        if self.step <= 0 or abs(self.zero) > 1e6:
            raise InputError(
                f"preprocess: levels: step is {self.step} and zero is {self.zero}; step must be "
                "above 0 and zero at most 1e6"
            )
        if self.low >= self.high or (self.low < 0 and self.high > 127):
            raise InputError(
                f"preprocess: levels: {self.low}..{self.high} fit neither uint8 nor int8; give "
                "0..255 or -128..127, or a part of one of them"
            )
        if self.rounding not in ("nearest", "truncate"):
            raise InputError(
                f"preprocess: levels: rounding is {shown(self.rounding)}; it must be 'nearest' or "
                "'truncate'"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 or int8."""
        return np.dtype(np.int8 if self.low < 0 else np.uint8)

    def round(self, values: Array) -> Array:
        """The levels of values: float64 of any shape -> uint8 or int8."""
        at = values / self.step + self.zero
        at = np.floor(at + 0.5) if self.rounding == "nearest" else np.trunc(at)
        return np.clip(at, self.low, self.high).astype(self.dtype)


@dataclass(frozen=True)
class AudioPreprocess:
    """How sound becomes the input of a model: log-mel features, or MFCCs.

    Frames of ``frame`` samples start every ``hop`` samples. Each is multiplied by a Hann window
    (``0.5 - 0.5 cos(2 pi n / frame)``), transformed by an FFT of ``fft`` points, and summed up in
    ``bands`` triangles, whose corners are evenly spaced on HTK's mel scale. The logarithm of that
    is the feature, or, for MFCCs, the first coefficients of its cosine transform.

    Attributes:
        rate: Samples a second.
        samples: Samples of a clip.
        frame: Samples of a frame.
        hop: Samples from the start of a frame to that of the next.
        fft: Points of the transform, at least ``frame``.
        spectrum: ``power`` or ``magnitude``.
        bands: Triangles.
        frequencies: Where the first triangle begins and the last ends, in Hz.
        triangles: Whether they are straight over ``hertz`` or over ``mel``.
        floor: Added before the logarithm, above 0.
        gain: ``full-scale`` takes samples as they are, in -1..1; ``peak`` divides the clip by its
            largest sample, unless that is less than one step of 16 bits (1/32768): silence.
        coefficients: Of the cosine transform (DCT-II times sqrt(2 / bands)); 0 leaves it out.
        levels: The 8-bit grid that features are rounded to, or None.
        mean: Subtracted from the features.
        std: Divides them, after the mean.

    Raises:
        InputError: If a field makes no sense.

    Examples:
        >>> pre = AudioPreprocess()
        >>> pre.apply(np.zeros((2, 16000), np.int16)).shape
        (2, 1, 49, 40)
    """

    rate: int = 16000
    samples: int = 16000
    frame: int = 480
    hop: int = 320
    fft: int = 512
    spectrum: str = "power"
    bands: int = 40
    frequencies: tuple[float, float] = (20.0, 7600.0)
    triangles: str = "hertz"
    floor: float = 1e-6
    gain: str = "full-scale"
    coefficients: int = 0
    levels: Levels | None = None
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("rate", 1, _MAX_RATE),
            ("samples", 1, _MAX_SAMPLES),
            ("fft", 2, _MAX_FFT),
            ("frame", 1, self.fft if isinstance(self.fft, int) else 0),
            ("hop", 1, _MAX_SAMPLES),
            ("bands", 1, _MAX_BANDS),
            ("coefficients", 0, self.bands if isinstance(self.bands, int) else 0),
        ):
            _need_whole("", self, name, least, most)
        if self.samples < self.frame:
            raise InputError(
                f"preprocess: samples is {self.samples} and frame is {self.frame}; a clip must "
                "hold one frame at least"
            )
        if self.frames * self.bands > _MAX_FEATURES:
            raise InputError(
                f"preprocess: a clip of {self.samples} samples has {self.frames} frames of "
                f"{self.bands} bands, which is more than {_MAX_FEATURES}; take a larger hop"
            )
        _need_numbers("", self, "floor", "mean", "std")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"preprocess: {name} is {shown(getattr(self, name))}; it must be "
                    f"{' or '.join(map(repr, choices))}"
                )
        ends = self.frequencies
        pair = isinstance(ends, tuple | list) and len(ends) == 2 and all(map(_is_number, ends))
        if not pair or not 0 <= ends[0] <= ends[1] - 1 <= self.rate / 2 - 1:
            raise InputError(
                f"preprocess: frequencies is {shown(ends)}; it must be two numbers in "
                f"0..{self.rate / 2:g}, the lower first, 1 Hz apart at least"
            )
        object.__setattr__(self, "frequencies", (float(ends[0]), float(ends[1])))
        if self.floor < 1e-30 or self.std < 1e-30 or abs(self.mean) > 1e30:
            raise InputError(
                f"preprocess: floor is {self.floor}, mean is {self.mean} and std is {self.std}; "
                "floor and std must be above 0, and none of them beyond 1e30"
            )
        if self.levels is not None and not isinstance(self.levels, Levels):
            raise InputError(
                f"preprocess: levels is a {type(self.levels).__name__}; give Levels(...) or None"
            )

    # Descriptions

    @classmethod
    def from_dict(cls, entry: object) -> AudioPreprocess:
        """Reads the ``preprocess`` entry of the metadata of a file.

        Raises:
            FormatError: If it is not such an entry.
        """
        values = _entry("preprocess", entry, {"kind", *(field.name for field in fields(cls))})
        kind = values.pop("kind")
        if kind != KIND:
            raise FormatError(f"preprocess is of the kind {shown(kind)}, not {KIND!r}")
        try:
            if values["levels"] is not None:
                names = {field.name for field in fields(Levels)}
                values["levels"] = Levels(**_entry("preprocess: levels", values["levels"], names))
            return cls(**values)
        except InputError as error:
            raise FormatError(str(error)) from error

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> AudioPreprocess | None:
        """The description in the metadata of a graph, or None where there is none, or another kind.

        Raises:
            FormatError: If there is one of this kind that makes no sense.
        """
        entry = metadata.get(KEY)
        ours = isinstance(entry, Mapping) and entry.get("kind") == KIND
        return cls.from_dict(entry) if ours else None

    def to_dict(self) -> dict[str, Any]:
        """The entry for the metadata of a file."""
        return {"kind": KIND, **asdict(self), "frequencies": list(self.frequencies)}

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return (self.samples - self.frame) // self.hop + 1

    @property
    def width(self) -> int:
        """Features of a frame."""
        return self.coefficients or self.bands

    # Sound to features

    def waveforms(self, audio: Array) -> Array:
        """Checks sound and puts it on one scale.

        Args:
            audio: int16, or float32 or float64 in -1..1, of any shape.

        Returns:
            float32 of the same shape; one step of 16 bits is 1/32768.

        Raises:
            InputError: If it is something else, holds NaN or infinity, or samples beyond 8, which
                are those of another unit. Between 1 and 8 they are taken as they are.
        """
        if not isinstance(audio, np.ndarray):
            raise InputError(f"audio is a {type(audio).__name__}; give a numpy array")
        if audio.dtype == np.int16:
            return audio.astype(np.float32) * np.float32(QUIETEST)
        if audio.dtype not in (np.float32, np.float64):
            raise InputError(
                f"audio has dtype {audio.dtype}; give int16 samples, or float32 ones in -1..1"
            )
        if not np.isfinite(audio).all():
            bad = audio.size - int(np.isfinite(audio).sum())
            raise InputError(f"audio holds {bad} samples that are NaN or infinite; remove them")
        if audio.size and float(np.abs(audio).max()) > LOUDEST:
            raise InputError(
                f"audio holds float samples up to {float(np.abs(audio).max()):g}, but full scale "
                "is 1; divide samples of 16 bits by 32768, or give them as int16"
            )
        return audio.astype(np.float32)

    def energies(self, frames: Array) -> Array:
        """Sums of the spectrum in the triangles, before any gain.

        Args:
            frames: float32 (..., frame), as ``waveforms`` gives them.

        Returns:
            float64 (..., bands), 0 or above.
        """
        bins, weights = self._triangles
        rows = frames.reshape(-1, self.frame)
        result = np.empty((len(rows), self.bands))
        for piece in _pieces(len(rows), weights.size + 2 * self.fft):
            spectrum = np.fft.rfft(rows[piece].astype(np.float64) * self._window, self.fft)
            power = np.square(spectrum.real) + np.square(spectrum.imag)
            if self.spectrum == "magnitude":
                power = np.sqrt(power)
            result[piece] = _ordered_sum(power[:, bins] * weights)
        return result.reshape(*frames.shape[:-1], self.bands)

    def gains(self, audio: Array) -> Array:
        """What clips (..., samples) of ``waveforms`` are multiplied with, float64 (...)."""
        if self.gain == "full-scale":
            return np.ones(audio.shape[:-1])
        peak = audio.max(axis=-1).astype(np.float64)
        return np.where(peak < QUIETEST, 1.0, 1.0 / np.maximum(peak, QUIETEST))

    def finish(self, energies: Array, gain: Array) -> Array:
        """Features of energies.

        Args:
            energies: float64 (..., bands).
            gain: float64 that fits (..., 1): of the samples, before spectrum and sums.

        Returns:
            (..., width): uint8 or int8 where there are levels, else float32.
        """
        factor = np.square(gain) if self.spectrum == "power" else gain
        values = np.log(np.ascontiguousarray(energies * factor + self.floor))
        if self.coefficients:
            rows = values.reshape(-1, self.bands)
            values = np.empty((*values.shape[:-1], self.coefficients))
            made = values.reshape(len(rows), self.coefficients)
            for piece in _pieces(len(rows), self._cosines.size):
                made[piece] = _ordered_sum(rows[piece, :, None] * self._cosines)
        return values.astype(np.float32) if self.levels is None else self.levels.round(values)

    def features(self, audio: Array) -> Array:
        """Features of clips.

        Args:
            audio: (N, n) samples as ``waveforms`` takes them, 1 <= n <= ``samples``; shorter clips
                get zeros at the end.

        Returns:
            (N, frames, width): uint8 or int8 where there are levels, else float32.

        Raises:
            InputError: If the audio does not fit; see ``waveforms`` too.
        """
        sound = self.waveforms(audio)
        if sound.ndim != 2 or 0 in sound.shape:
            raise InputError(
                f"audio has shape {sound.shape}; give (N, samples) with at least one sample"
            )
        if sound.shape[1] > self.samples:
            raise InputError(
                f"audio has {sound.shape[1]} samples, but the model looks at {self.samples} "
                f"({self.samples / self.rate:g} s); cut it, or use lutra.Stream"
            )
        dtype = np.dtype(np.float32) if self.levels is None else self.levels.dtype
        result = np.empty((len(sound), self.frames, self.width), dtype)
        for piece in _pieces(len(sound), self.samples + self.frames * self.frame):
            part = sound[piece]
            clips = np.zeros((len(part), self.samples), np.float32)
            clips[:, : part.shape[1]] = part
            windows = np.lib.stride_tricks.sliding_window_view(clips, self.frame, axis=1)
            energies = self.energies(windows[:, :: self.hop][:, : self.frames])
            result[piece] = self.finish(energies, self.gains(clips)[:, None, None])
        return result

    # Features to inputs

    def values(self, features: Array) -> Array:
        """The input of the model: float32 (N, 1, frames, width) of features (N, frames, width)."""
        if self.levels is None:
            ready = (features - np.float32(self.mean)) / np.float32(self.std)
        else:
            ready = self._table[features.astype(np.int64) - self.levels.low]
        return np.ascontiguousarray(ready[:, None])

    def apply(self, audio: Array, shape: Shape | None = None) -> Array:
        """Makes the input of a model.

        Args:
            audio: One of

                * waveforms (N, n), int16 or float, see ``features``;
                * features (N, frames, width), uint8 or int8 as ``features`` gives them;
                * float32 (N, 1, frames, width) that is ready and stays as it is.
            shape: Shape of the model's input, such as ``session.get_inputs()[0].shape``, to check
                against; None for no check.

        Returns:
            float32 (N, 1, frames, width), contiguous.

        Raises:
            InputError: If the array is none of them or does not fit the model.
        """
        if not isinstance(audio, np.ndarray):
            raise InputError(f"audio is a {type(audio).__name__}; give a numpy array")
        wanted = (self.frames, self.width)
        if audio.ndim == 2:
            result = self.values(self.features(audio))
        elif audio.ndim == 4 and audio.dtype == np.float32 and audio.shape[1:] == (1, *wanted):
            result = np.ascontiguousarray(audio)
        elif self.levels is not None and audio.dtype == self.levels.dtype and audio.ndim == 3:
            if audio.shape[1:] != wanted:
                raise InputError(
                    f"features have shape {audio.shape}; (N, {wanted[0]}, {wanted[1]}) is needed"
                )
            if audio.size and (audio.min() < self.levels.low or audio.max() > self.levels.high):
                raise InputError(
                    f"features are {audio.min()}..{audio.max()}, but the levels of the model are "
                    f"{self.levels.low}..{self.levels.high}"
                )
            result = self.values(audio)
        else:
            levels = (
                "" if self.levels is None else f"{self.levels.dtype} features (N, {wanted[0]}, "
            )
            levels += "" if self.levels is None else f"{wanted[1]}), "
            raise InputError(
                f"audio has dtype {audio.dtype} and shape {audio.shape}; give waveforms "
                f"(N, samples) of int16 or float32, {levels}or float32 inputs "
                f"(N, 1, {wanted[0]}, {wanted[1]})"
            )
        fits = shape is None or (
            len(shape) == 4
            and all(w in (None, s) for w, s in zip(shape, result.shape, strict=True))
        )
        if not fits:
            assert shape is not None
            sizes = ", ".join("N" if size is None else str(size) for size in shape)
            raise InputError(
                f"audio makes an input of shape {result.shape}, but the model takes ({sizes}); "
                "its metadata describe another front end, or another batch"
            )
        return result

    # Constants

    @cached_property
    def _window(self) -> Array:
        at = np.arange(self.frame) / self.frame
        return np.asarray(0.5 - 0.5 * np.cos(2 * np.pi * at))

    @cached_property
    def _triangles(self) -> tuple[Array, Array]:
        """The bins under each triangle and their weights, (widest, bands) each."""
        hertz = np.arange(self.fft // 2 + 1) * (self.rate / self.fft)
        low, high = (_MEL * math.log1p(f / 700) for f in self.frequencies)
        corners = np.linspace(low, high, self.bands + 2)
        place = _MEL * np.log1p(hertz / 700) if self.triangles == "mel" else hertz
        if self.triangles == "hertz":
            corners = 700 * np.expm1(corners / _MEL)
        start, middle, end = (c[:, None] for c in (corners[:-2], corners[1:-1], corners[2:]))
        heights = np.minimum((place - start) / (middle - start), (end - place) / (end - middle))
        heights = np.maximum(heights, 0.0)  # (bands, bins)
        used = heights > 0
        first = np.where(used.any(1), used.argmax(1), 0)
        widest = max(1, int(used.sum(1).max()))
        bins = np.minimum(first + np.arange(widest)[:, None], len(hertz) - 1)
        inside = first + np.arange(widest)[:, None] < len(hertz)
        return bins, np.where(inside, heights[np.arange(self.bands), bins], 0.0)

    @cached_property
    def _cosines(self) -> Array:
        """The cosine transform, float64 (bands, coefficients)."""
        at = (np.arange(self.bands)[:, None] + 0.5) / self.bands
        waves = np.cos(np.pi * np.arange(self.coefficients) * at)
        return np.asarray(math.sqrt(2 / self.bands) * waves)

    @cached_property
    def _table(self) -> Array:
        """The input for each level, float32."""
        assert self.levels is not None
        # One rounding to float32 at each step, as float32 tensors compute it.
        levels = np.arange(self.levels.low, self.levels.high + 1, dtype=np.float32)
        values = (levels - np.float32(self.levels.zero)) * np.float32(self.levels.step)
        return np.asarray((values - np.float32(self.mean)) / np.float32(self.std))


def read_wav(path: str | os.PathLike[str]) -> tuple[Array, int]:
    """Reads a WAV file of 8, 16, 24 or 32-bit PCM.

    Args:
        path: The file. Several channels are averaged.

    Returns:
        Samples float32 (n,) in -1..1, those of 16 bits divided by 32768; and samples a second.

    Raises:
        InputError: If it cannot be read, is no such file, is truncated or holds no sample.
    """
    name = repr(os.fspath(path))
    try:
        with wave.open(os.fspath(path), "rb") as file:
            channels, width, rate, count = file.getparams()[:4]
            data = file.readframes(count)
    except OSError as error:
        raise InputError(
            f"cannot read {name}: {error.strerror or error}; check the path"
        ) from error
    except (wave.Error, EOFError, ValueError, ArithmeticError, MemoryError) as error:
        reason = " ".join(str(error).split()) or "it is too short"
        raise InputError(
            f"cannot read {name} as a WAV file: {reason}; save it as 16-bit PCM"
        ) from error
    if width not in (1, 2, 3, 4) or channels < 1 or rate < 1:
        raise InputError(
            f"{name} has {8 * width}-bit samples, {channels} channels and {rate} samples a second; "
            "save it as 16-bit PCM"
        )
    if len(data) != count * channels * width:
        raise InputError(
            f"{name} is truncated: it should hold {count * channels * width} bytes of sound and "
            f"holds {len(data)}; get it again, or save it anew"
        )
    if not count:
        raise InputError(f"{name} holds no sound; give at least one sample")
    sound = _from_pcm(np.frombuffer(data, np.uint8).reshape(-1, width))
    return sound.reshape(count, channels).mean(axis=1).astype(np.float32), rate


def _from_pcm(data: Array) -> Array:
    """float64 (n) in -1..1 of little-endian samples uint8 (n, bytes)."""
    width = data.shape[1]
    if width == 1:  # the only one without a sign
        return (data[:, 0].astype(np.float64) - 128) / 128
    filled = np.zeros((len(data), 4), np.uint8)
    filled[:, 4 - width :] = data
    return filled.view("<i4")[:, 0] / float(1 << 31)


def _pieces(rows: int, size: int) -> Iterator[slice]:
    """Cuts rows that need so many numbers each, which bounds the memory."""
    step = max(1, _PIECE // size)
    for first in range(0, rows, step):
        yield slice(first, first + step)


def _ordered_sum(terms: Array) -> Array:
    """Sums over the axis before the last, one after the other, whatever the shape."""
    if terms.size <= _FEW:  # one call for a frame of a stream; it adds in order by definition
        return np.asarray(np.add.accumulate(terms, axis=-2)[..., -1, :])
    total: Array = terms[..., 0, :].copy()
    for index in range(1, terms.shape[-2]):
        total += terms[..., index, :]
    return total


def _entry(name: str, entry: object, wanted: set[str]) -> dict[str, Any]:
    """An object of a file with these fields exactly."""
    if not isinstance(entry, Mapping) or set(entry) != wanted:
        found = ", ".join(sorted(map(str, entry)))[:200] if isinstance(entry, Mapping) else ""
        what = f"has the fields {found}" if found else f"is a {type(entry).__name__}"
        raise FormatError(
            f"{name} {what}; it must be an object with the fields {', '.join(sorted(wanted))}"
        )
    return dict(entry)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30


def _need_numbers(where: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not _is_number(value):
            raise InputError(f"preprocess: {where}{name} is {shown(value)}; it must be a number")
        object.__setattr__(owner, name, float(value))


def _need_whole(where: str, owner: object, name: str, least: int, most: int) -> None:
    value = getattr(owner, name)
    if type(value) is not int or not least <= value <= most:
        raise InputError(
            f"preprocess: {where}{name} is {shown(value)}; it must be a whole number in "
            f"{least}..{most}"
        )

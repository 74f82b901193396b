"""Sound and small models of sound for the tests."""

from __future__ import annotations

import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from graphs import Builder

from lutra.graph import Graph
from lutra.preprocess.audio import AudioPreprocess, Levels

LOG_MEL = AudioPreprocess(levels=Levels(0.1, 138.0), mean=-6.5, std=3.0)
MFCC = AudioPreprocess(
    spectrum="magnitude",
    frequencies=(20, 4000),
    triangles="mel",
    gain="peak",
    coefficients=10,
    levels=Levels(0.5847029, 83, -128, 127, "truncate"),
)
#: Small enough for models that run in no time: clips of 100 ms at 8 kHz.
SMALL = AudioPreprocess(
    rate=8000, samples=800, frame=120, hop=80, fft=128, bands=12, frequencies=(60, 3800),
    gain="peak", levels=Levels(0.1, 138.0), mean=-6.0, std=3.0,
)  # fmt: skip
CLASSES = ["silence", "yes", "no", "up"]


def audio_graph(pre: AudioPreprocess = SMALL, batch: int | None = None, **metadata: Any) -> Graph:
    """A classifier of sound with a lookup layer: (batch, 1, frames, width) -> (batch, 4)."""
    b = Builder(("x", (batch, 1, pre.frames, pre.width)))
    x = b.add("relu", b.conv2d("x", 1, 8, padding=(1, 1)))
    x = b.add("mean", b.pq_conv2d(x, 8, 8, padding=(1, 1)), axes=(2, 3))
    b.pq_linear(x, 8, 4)
    entries = {"preprocess": pre.to_dict(), "classes": CLASSES, **metadata}
    return b.graph(metadata={k: v for k, v in entries.items() if v is not None})


def sound(samples: int, seed: int = 0, loud: float = 4000.0) -> Any:
    """Noise that grows and shrinks, int16."""
    rng = np.random.default_rng(seed)
    shape = 1 + np.sin(np.arange(samples) / 700)
    return np.clip(rng.normal(size=samples) * shape * loud, -32768, 32767).astype(np.int16)


def write_wav(
    path: Path | str, samples: Any, rate: int = 8000, width: int = 2, channels: int = 1
) -> str:
    """A file of samples that are whole numbers of so many bytes; channels alternate."""
    values = np.asarray(samples, np.int64) + (128 if width == 1 else 0)
    data = values.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width]
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", "none"))
        file.writeframes(data.tobytes())
    return str(path)


def windows(clip: Any, pre: AudioPreprocess, every: int = 1) -> Any:
    """All windows of a recording (n, samples)."""
    step = every * pre.hop
    ends = range(pre.samples, len(clip) + 1, step)
    return np.stack([clip[end - pre.samples : end] for end in ends])


def without_levels(pre: AudioPreprocess) -> AudioPreprocess:
    """The same front end without rounding, which would hide small differences."""
    return replace(pre, levels=None)

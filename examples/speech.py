"""Speech Commands for the examples: clips as features, splits by speaker, augmentation.

Clips are kept as the log-mel features of 8 bits that `lutra.preprocess.audio` makes (49 frames of
40 bands, `0.1 * q - 13.8` is the natural logarithm of the energy), so that all of them fit in
memory. The keyword-spotting inputs of MLPerf Tiny (`kws01`) are MFCCs of some of the same
recordings; where more of those are needed than there are, a linear map makes them from log-mel
features.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lutra.preprocess.audio import AudioPreprocess, Levels

CLASSES = (
    "_silence_", "_unknown_", "yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go",
)  # fmt: skip
SILENCE = 0

#: Log-mel features: 40 bands of energy, normalised to about what the training clips have.
LOG_MEL = AudioPreprocess(levels=Levels(0.1, 138.0), mean=-6.5, std=3.0)
#: What MLPerf Tiny takes: 10 coefficients of magnitudes of the clip over its peak. The values lie
#: in -123..26; the standard deviation makes them small, so that one learning rate suits all layers.
MFCC = AudioPreprocess(
    spectrum="magnitude", frequencies=(20, 4000), triangles="mel", gain="peak", coefficients=10,
    levels=Levels(0.5847029, 83, -128, 127, "truncate"), std=25.0,
)  # fmt: skip


def level_values(features: np.ndarray, front: AudioPreprocess) -> np.ndarray:
    """What the 8-bit levels of features stand for, float32."""
    assert front.levels is not None
    return ((features - front.levels.zero) * front.levels.step).astype(np.float32)


@dataclass(frozen=True)
class Clips:
    """Features uint8 (N, frames, bands), labels int64 (N) and speakers int64 (N)."""

    x: np.ndarray
    y: np.ndarray
    speaker: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def subset(self, index: np.ndarray) -> Clips:
        """The clips with these numbers."""
        return Clips(self.x[index], self.y[index], self.speaker[index])


def load_speech_commands(folder: Path) -> tuple[Clips, Clips]:
    """Training and test clips, which share no speaker.

    Args:
        folder: holds speechcmd_train_logmel.npy.xz, speechcmd_train_meta.npz and the same of test.
    """
    parts = []
    for part in ("train", "test"):
        with lzma.open(folder / f"speechcmd_{part}_logmel.npy.xz") as file:
            x = np.load(file, allow_pickle=False)
        with np.load(folder / f"speechcmd_{part}_meta.npz", allow_pickle=False) as meta:
            if tuple(meta["classes"]) != CLASSES:
                raise ValueError(f"{folder}: the classes are {list(meta['classes'])}")
            y, speaker = meta["label"].astype(np.int64), meta["speaker"].astype(np.int64)
        parts.append(Clips(x, y, speaker))
    return parts[0], parts[1]


def load_waveforms(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Waveforms int16 (N, 16000) of some clips of "train" or "test", and the row of each."""
    with lzma.open(folder / f"speechcmd_{part}_pcm.npy.xz") as file:
        planes = np.load(file, allow_pickle=False)
    zigzag = (planes[0].astype(np.int32) << 8) | planes[1]
    samples = np.cumsum((zigzag >> 1) ^ -(zigzag & 1)).astype(np.int16)
    with np.load(folder / f"speechcmd_{part}_pcm_rows.npz", allow_pickle=False) as rows:
        return samples.reshape(-1, 16000), rows["row"].astype(np.int64)


def held_out(clips: Clips, share: float, seed: int) -> np.ndarray:
    """Which clips are held out: all of a share of the speakers, and of the silence, which has none.

    Returns:
        bool (N).
    """
    rng = np.random.default_rng(seed)
    silence = clips.y == SILENCE
    speakers = rng.permutation(np.unique(clips.speaker[~silence]))
    chosen = speakers[: max(1, round(share * len(speakers)))]
    return np.where(silence, rng.random(len(clips)) < share, np.isin(clips.speaker, chosen))


def split(clips: Clips, share: float, seed: int) -> tuple[Clips, Clips]:
    """Clips to train with, and clips of other speakers."""
    out = held_out(clips, share, seed)
    return clips.subset(np.flatnonzero(~out)), clips.subset(np.flatnonzero(out))


def normalized(values: Tensor, front: AudioPreprocess) -> Tensor:
    """Inputs float32 (N, 1, frames, width) of feature values (N, frames, width)."""
    return ((values - front.mean) / front.std).unsqueeze(1)


def warp(x: Tensor, factor: Tensor, shift: Tensor, axis: int) -> Tensor:
    """Stretches axis 1 or 2 of (N, frames, bands) about its middle and moves it; ends repeat.

    Args:
        factor, shift: (N); the shift is in frames or bands.
    """
    size = x.shape[axis]
    middle = (size - 1) / 2
    at = (torch.arange(size) - middle) * factor[:, None] + middle + shift[:, None]
    at = at.clamp(0, size - 1)
    low = at.floor().long().clamp(max=size - 2)
    part = at - low
    shape = [len(x), 1, 1]
    shape[axis] = size
    low, part = low.view(shape), part.view(shape)
    spread = list(x.shape)
    first = x.gather(axis, low.expand(spread))
    second = x.gather(axis, (low + 1).expand(spread))
    return first + part * (second - first)


def masked(x: Tensor, axis: int, widest: int, count: int) -> Tensor:
    """SpecAugment (Park et al. 2019): bars of axis 1 or 2 take the mean of their clip."""
    size = x.shape[axis]
    shape = [len(x), 1, 1]
    shape[axis] = size
    hidden = torch.zeros(len(x), size, dtype=torch.bool)
    for _ in range(count):
        width = torch.randint(widest + 1, (len(x), 1))
        first = (torch.rand(len(x), 1) * (size - width + 1)).long()
        at = torch.arange(size)
        hidden |= (at >= first) & (at < first + width)
    return torch.where(hidden.view(shape), x.mean((1, 2), keepdim=True), x)


class Augmented(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Clips that are stretched, moved, mixed with noise and with each other; fetches whole batches.

    The targets are probabilities float32 (N, classes).

    Args:
        clips: the clips.
        inputs: makes the network's inputs of log-mel values (N, frames, bands).
        mixup: the largest weight of another clip.
        noisy: share of the clips that noise is added to.
        masks: SpecAugment bars of each axis.
    """

    def __init__(
        self,
        clips: Clips,
        inputs: Callable[[Tensor], Tensor] = lambda values: normalized(values, LOG_MEL),
        *,
        mixup: float = 0.3,
        noisy: float = 0.7,
        masks: int = 2,
    ) -> None:
        self.inputs, self.mixup, self.noisy, self.masks = inputs, mixup, noisy, masks
        self.values = torch.from_numpy(level_values(clips.x, LOG_MEL))
        self.labels = torch.from_numpy(clips.y)
        self.noise = self.values[self.labels == SILENCE]
        self.classes = len(CLASSES)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([i])
        return x[0], y[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(indices)
        x, y = self.values[index], self.labels[index]
        count = len(index)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count)

        x = warp(x, uniform(0.8, 1.2), uniform(-6, 6), 1)
        x = warp(x, uniform(0.93, 1.07), uniform(-1.5, 1.5), 2)
        x = x + uniform(-2, 1)[:, None, None]  # louder and softer
        if len(self.noise):
            noise = self.noise[torch.randint(len(self.noise), (count,))]
            noise = warp(noise, uniform(0.8, 1.2), uniform(-20, 20), 1)
            noise = noise - noise.mean((1, 2), keepdim=True) + x.mean((1, 2), keepdim=True)
            level = torch.where(torch.rand(count) < self.noisy, uniform(-4, 1), torch.tensor(-20.0))
            x = torch.logaddexp(x, noise + level[:, None, None])
        target = torch.nn.functional.one_hot(y, self.classes).float()
        if self.mixup:
            weight = self.mixup * torch.rand(count) * (torch.rand(count) < 0.5)
            other = torch.randperm(count)
            x = torch.lerp(x, x[other], weight[:, None, None])
            target = torch.lerp(target, target[other], weight[:, None])
        x = masked(masked(x, 1, 8, self.masks), 2, 6, self.masks)
        return self.inputs(x.clamp(min=-13.8)), target


# The inputs of MLPerf Tiny


@dataclass(frozen=True)
class Kws01:
    """The inputs of MLPerf Tiny.

    Attributes:
        x: int8 (N, 49, 10), levels of `MFCC`.
        y: int64 (N), numbers of `classes`.
        classes: names, in MLPerf's order.
        row: int64 (N), the row of the same recording in the training clips, -1 elsewhere.
        test: bool (N), whether the recording is none of the training clips.
        numbers: int64 (12), MLPerf's number of each class of `CLASSES`.
    """

    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]
    row: np.ndarray
    test: np.ndarray
    numbers: np.ndarray


def load_kws01(folder: Path) -> Kws01:
    """The inputs of MLPerf Tiny; `folder` holds kws01_mfcc_int8.npz."""
    with np.load(folder / "kws01_mfcc_int8.npz", allow_pickle=False) as kws:
        classes = tuple(str(name) for name in kws["classes"])
        train = kws["speechcmd_split"] == 0
        # One recording is matched to no clip; it may be a training clip, so it is in neither part.
        test = kws["speechcmd_split"] == 1
        row = np.where(train, kws["speechcmd_row"].astype(np.int64), -1)
        order = {name.lower(): i for i, name in enumerate(classes)}
        numbers = np.array([order[name.strip("_")] for name in CLASSES])
        return Kws01(kws["x"], kws["y"].astype(np.int64), classes, row, test, numbers)


class MfccMap:
    """MFCCs of log-mel features, by least squares over clips of which both are known.

    Log-mel features lack the phase and the peak of the clip, but what a network hears in them is
    the same: the public DS-CNN is right about 91.9 % of the training clips so, and about 90.8 % of
    its own inputs.

    Args:
        values: log-mel values float32 (N, 49, 40).
        mfcc: values of the MFCCs float32 (N, 49, 10).
    """

    def __init__(self, values: Tensor, mfcc: Tensor) -> None:
        rows = self._rows(values).flatten(0, 1).double()
        self.weight = torch.linalg.lstsq(rows, mfcc.flatten(0, 1).double()).solution.float()

    def __call__(self, values: Tensor) -> Tensor:
        """Values of the MFCCs (N, 49, 10) of log-mel values (N, 49, 40)."""
        return self._rows(values) @ self.weight

    @staticmethod
    def _rows(values: Tensor) -> Tensor:
        """The features of each frame, how loud its clip is, and 1."""
        frames = values.logsumexp(2)
        loud = torch.stack(
            [
                frames.amax(1),
                frames.sort(1).values[:, -5],
                values[:, :, :30].amax((1, 2)),
                torch.ones(len(values)),
            ],
            1,
        )
        return torch.cat([values, loud[:, None].expand(-1, values.shape[1], -1)], 2)


class AugmentedMfcc(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Made-up MFCCs of augmented clips, and true ones that are only moved; fetches whole batches.

    Args:
        clips: the clips.
        mapping: from log-mel features to MFCCs.
        kws: the inputs of MLPerf Tiny.
        rows: those of them to train with.
        repeat: how often each of them comes in an epoch.
    """

    def __init__(
        self, clips: Clips, mapping: MfccMap, kws: Kws01, rows: np.ndarray, repeat: int = 2
    ) -> None:
        self.made = Augmented(clips, mapping, mixup=0.0, noisy=0.3, masks=0)
        self.values = torch.from_numpy(level_values(kws.x[rows], MFCC))
        self.labels = torch.from_numpy(kws.y[rows])
        self.numbers = torch.from_numpy(kws.numbers)
        self.repeat = repeat

    def __len__(self) -> int:
        return len(self.made) + self.repeat * len(self.values)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([i])
        return x[0], y[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        made = [i for i in indices if i < len(self.made)]
        true = torch.tensor([i - len(self.made) for i in indices if i >= len(self.made)]).long()
        parts, labels = [], []
        if made:
            parts.append(self.made.__getitems__(made)[0])
            labels.append(self.numbers[self.made.labels[torch.tensor(made)]])
        if len(true):
            true %= max(1, len(self.values))
            shift = 12 * torch.rand(len(true)) - 6
            parts.append(warp(self.values[true], torch.ones(len(true)), shift.round(), 1))
            labels.append(self.labels[true])
        x = torch.cat(parts)
        x[:, :, 0] += 12 * torch.rand(len(x), 1) - 6  # louder and softer
        return normalized(x, MFCC), torch.cat(labels)

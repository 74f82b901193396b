"""How good a model is: against labels, or against the dense model where there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import numpy as np

from lutra.errors import LutraError
from lutra.node import Array

#: Outputs of a model on batches: for each batch an array for each output.
Outputs = Sequence[Sequence[Array]]

#: dB of images without any difference.
MAX_PSNR: Final = 100.0
#: dB that a dense model is taken to have against the truth, where only its outputs are known.
ASSUMED_PSNR: Final = 30.0
_IMAGE_CHANNELS: Final = (1, 3)
_LEAST_PIXELS: Final = 8
_TINY: Final = 1e-12


class Measure(Protocol):
    """What a search keeps within its budget.

    Attributes:
        name: in a word or two, such as "accuracy".
        unit: of quality and drop.
        text: what it is and against what, in one sentence.
        dense: of the dense model.
    """

    name: str
    unit: str
    text: str
    dense: float

    def quality(self, outputs: Outputs) -> float:
        """Of outputs for the samples that judge; higher is better."""

    def drop(self, quality: float) -> float:
        """How much worse that is than the dense model; below 0 where it is better."""

    def badness(self, outputs: Outputs) -> Array:
        """How wrong the output for each sample is (N): for the choice of the worst."""


class _Points:
    """A measure whose drop is a difference."""

    unit = "points"

    def __init__(self, dense: Outputs, labels: Array | None) -> None:
        self._wanted, self._labels = dense, labels
        self.dense = self.quality(dense)

    def quality(self, outputs: Outputs) -> float:
        raise NotImplementedError

    def drop(self, quality: float) -> float:
        return self.dense - quality

    def badness(self, outputs: Outputs) -> Array:
        return relative_errors(outputs, self._wanted)


class Top1(_Points):
    """Share of samples whose largest score is that of their label, or of the dense model.

    Args:
        dense: outputs of the dense model.
        labels: of the samples; None without. Where the dense model is no better at them than the
            most frequent one, `doubt` says so in a sentence; else it is empty.
    """

    def __init__(self, dense: Outputs, labels: Array | None) -> None:
        count = sum(len(batch[0]) for batch in dense)
        against = "their label" if labels is not None else "that of the dense model"
        self.name = "accuracy" if labels is not None else "agreement"
        self.text = (
            f"the share of {count} samples whose largest score is {against}, in percent; one "
            f"sample is {100 / count:.2g} points"
        )
        super().__init__(dense, labels)
        self.doubt = ""
        if labels is not None:
            _, counts = np.unique(labels, return_counts=True)
            most = 100.0 * float(counts.max()) / count
            if self.dense <= most and len(counts) > 1:
                self.doubt = (
                    f"The dense model has only {self.dense:.2f} % right, and the most frequent "
                    f"label is that of {most:.2f} %: check that the labels count the classes as "
                    "the model does."
                )

    def quality(self, outputs: Outputs) -> float:
        wanted = self._labels
        if wanted is None:
            wanted = np.concatenate([batch[0].argmax(1) for batch in self._wanted])
        found = np.concatenate([batch[0].argmax(1) for batch in outputs])
        return 100.0 * float((found == wanted).mean())


class Cosine(_Points):
    """Mean cosine similarity with the outputs of the dense model."""

    name = "cosine similarity"
    text = "the mean cosine similarity of all outputs with those of the dense model, times 100"

    def quality(self, outputs: Outputs) -> float:
        total, count = 0.0, 0
        for got, wanted in zip(outputs, self._wanted, strict=True):
            for mine, theirs in zip(got, wanted, strict=True):
                a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (mine, theirs))
                norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
                same = (a == b).all(axis=1)
                total += float(np.where(same, 1.0, (a * b).sum(1) / np.maximum(norms, _TINY)).sum())
                count += len(a)
        return 100.0 * total / count


class Explained(_Points):
    """Share of the variance of targets that the outputs explain, in percent."""

    name = "explained variance"
    text = "the share of the variance of the targets that the outputs explain (R^2), in percent"

    def quality(self, outputs: Outputs) -> float:
        assert self._labels is not None
        got = np.concatenate([batch[0] for batch in outputs]).astype(np.float64)
        wanted = self._labels.reshape(got.shape).astype(np.float64)
        spread = np.square(wanted - wanted.mean(0)).sum()
        return 100.0 * float(1.0 - np.square(got - wanted).sum() / max(spread, _TINY))


class Psnr:
    """Peak signal-to-noise ratio of images in dB, against targets or the dense model's images."""

    name, unit = "PSNR", "dB"

    def __init__(self, dense: Outputs, labels: Array | None) -> None:
        self._labels, self._wanted = labels, dense
        values = [batch[0] for batch in dense] if labels is None else [labels]
        self._peak = max(float(max(v.max() for v in values) - min(v.min() for v in values)), _TINY)
        if labels is None:
            self.text = (
                "the mean PSNR to the images of the dense model; the drop is what that difference "
                f"costs a model that has {ASSUMED_PSNR:g} dB against the truth"
            )
        else:
            self.text = "the mean PSNR to the targets"
        self.dense = self.quality(dense)

    def quality(self, outputs: Outputs) -> float:
        values: list[float] = []
        for batch, wanted in zip(outputs, self._by_batch(outputs), strict=True):
            squared = np.square(batch[0].astype(np.float64) - wanted).reshape(len(batch[0]), -1)
            errors = np.maximum(squared.mean(1) / self._peak**2, 10.0 ** (-MAX_PSNR / 10))
            values += (-10.0 * np.log10(errors)).tolist()
        return float(np.mean(values))

    def _by_batch(self, outputs: Outputs) -> list[Array]:
        if self._labels is None:
            return [batch[0] for batch in self._wanted]
        made, start = [], 0
        for batch in outputs:
            made.append(self._labels[start : start + len(batch[0])].reshape(batch[0].shape))
            start += len(batch[0])
        return made

    def drop(self, quality: float) -> float:
        if self._labels is not None:
            return self.dense - quality
        lost = 10.0 * np.log10(1.0 + 10.0 ** ((ASSUMED_PSNR - quality) / 10))
        least = 10.0 * np.log10(1.0 + 10.0 ** ((ASSUMED_PSNR - self.dense) / 10))
        return float(lost - least)

    def badness(self, outputs: Outputs) -> Array:
        return relative_errors(outputs, self._wanted)


class Own:
    """A measure of the user's: a function of a model, higher is better."""

    name, unit = "quality", ""

    def __init__(self, dense: Outputs, value: float) -> None:
        self._wanted, self.dense = dense, value
        self.text = "what the function that was given returns; higher is better"

    def quality(self, outputs: Outputs) -> float:
        raise NotImplementedError  # it takes the model, see `Judge`

    def drop(self, quality: float) -> float:
        return self.dense - quality

    def badness(self, outputs: Outputs) -> Array:
        return relative_errors(outputs, self._wanted)


def choose_measure(dense: Outputs, labels: Array | None) -> Measure:
    """The measure that fits the outputs of a model.

    Args:
        dense: outputs of the dense model for the samples that judge.
        labels: of these samples; None without.

    Raises:
        LutraError: labels that fit no output.
    """
    first = dense[0][0]
    if labels is None:
        if len(dense[0]) == 1 and first.ndim == 2 and first.shape[1] > 1 and not _unit(dense):
            return Top1(dense, None)
        return Psnr(dense, None) if len(dense[0]) == 1 and _is_image(first) else Cosine(dense, None)
    classes = first.shape[1] if first.ndim == 2 else 0
    if labels.ndim == 1 and labels.dtype.kind in "iub" and classes > 1:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise LutraError(
                f"optimize: the labels are {low}..{high}, but the model has {classes} scores; "
                f"labels must be in 0..{classes - 1}"
            )
        return Top1(dense, labels)
    if labels[0].size != first[0].size:
        raise LutraError(
            f"optimize: a label has shape {labels.shape[1:]}, and the first output "
            f"{first.shape[1:]}; give the number of the class, a target of the output's shape, or "
            "evaluate=... of your own"
        )
    return Psnr(dense, labels) if _is_image(first) else Explained(dense, labels)


def surrogate(outputs: Outputs, dense: Outputs) -> float:
    """Squared error of outputs relative to their variance in the dense model, a mean over the
    outputs: smooth where shares of samples are steps."""
    values = []
    for position in range(len(dense[0])):
        wanted = [batch[position].astype(np.float64) for batch in dense]
        size = sum(x.size for x in wanted)
        mean = sum(float(x.sum()) for x in wanted) / size
        spread = sum(float(np.square(x - mean).sum()) for x in wanted)
        error = sum(
            float(np.square(batch[position] - x).sum())
            for batch, x in zip(outputs, wanted, strict=True)
        )
        values.append(error / max(spread, _TINY * size))
    return float(np.mean(values))


def relative_errors(outputs: Outputs, dense: Outputs) -> Array:
    """The squared error of each sample (N) relative to the mean square of all outputs."""
    totals = []
    for got, wanted in zip(outputs, dense, strict=True):
        total = np.zeros(len(wanted[0]))
        for mine, theirs in zip(got, wanted, strict=True):
            squared = np.square(mine.astype(np.float64) - theirs).reshape(len(theirs), -1)
            total += squared.mean(1) / max(float(np.square(theirs).mean()), _TINY)
        totals.append(total)
    return np.concatenate(totals)


def own_value(evaluate: Callable[[Any], float], model: Any) -> float:
    """What a function of the user's returns for a model.

    Raises:
        LutraError: it is no finite number.
    """
    value = evaluate(model)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise LutraError(
            f"optimize: evaluate returned {value!r}; it must return a finite number, the higher "
            "the better"
        )
    return number


def _unit(outputs: Outputs) -> bool:
    """Whether all rows have length 1, as embeddings do and scores do not."""
    rows = np.concatenate([batch[0] for batch in outputs])
    return bool(np.abs(np.linalg.norm(rows, axis=1) - 1.0).max() < 1e-3)


def _is_image(output: Array) -> bool:
    return (
        output.ndim == 4
        and output.shape[1] in _IMAGE_CHANNELS
        and min(output.shape[2:]) >= _LEAST_PIXELS
    )

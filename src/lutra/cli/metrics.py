"""What ``lutra eval`` measures: one class for each metric.

A metric is made from the targets. ``add`` takes the outputs of the next samples, in their order;
``entries`` are its results for JSON, and ``text`` for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np

from lutra.cli.common import UserError, need_finite, plain
from lutra.errors import InputError
from lutra.formatting import counted, did_you_mean, shape_text
from lutra.graph import Graph
from lutra.node import Array

#: What images without any difference count as, in dB.
MAX_PSNR: Final = 100.0
#: Luminance of ITU-R BT.601 as MATLAB's rgb2ycbcr computes it, of red, green and blue in 0..1.
_LUMINANCE: Final = np.array([65.481, 128.553, 24.966]) / 255
_LUMINANCE_BLACK: Final = 16 / 255


class Metric(Protocol):
    """See the module."""

    name: str

    def add(self, outputs: Array) -> None: ...

    def entries(self) -> dict[str, Any]: ...

    def text(self) -> str: ...


class Top1:
    """Share of samples whose largest score is that of their label.

    Args:
        labels: Whole numbers (N,) of 0..classes - 1.
        classes: How many classes the model tells apart.
        name: What to call the labels in errors.
        what: What to call the samples.

    Raises:
        InputError: If the labels are something else.
    """

    name = "top1"

    def __init__(
        self, labels: Array, classes: int, name: str = "labels", what: str = "images"
    ) -> None:
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise InputError(
                f"{name!r} holds {labels.dtype} values of shape {labels.shape}; labels must be "
                "whole numbers (N,)"
            )
        if len(labels) and (labels.min() < 0 or labels.max() >= classes):
            raise InputError(
                f"{name!r} holds labels {labels.min()}..{labels.max()}, but the model has "
                f"{classes} classes; labels must be in 0..{classes - 1}"
            )
        self._labels, self._what = labels, what
        self._seen = self._correct = 0

    def add(self, outputs: Array) -> None:
        """Counts the scores (n, classes) of the next n samples."""
        labels = self._labels[self._seen : self._seen + len(outputs)]
        self._correct += int((outputs.argmax(axis=1) == labels).sum())
        self._seen += len(outputs)

    def entries(self) -> dict[str, Any]:
        """``correct`` and ``top1``, a share of 1."""
        return {"correct": self._correct, "top1": self._correct / self._seen}

    def text(self) -> str:
        """One line."""
        share = 100 * self._correct / self._seen
        return f"top-1 {share:.2f}% ({self._correct} of {self._seen} {self._what})"


class Psnr:
    """Peak signal-to-noise ratio in dB of images: the mean of those of the single images.

    Images of 8 bits are compared as such: the output, in 0..1, is taken times 255, clipped and
    rounded. Others are compared as they are, the output clipped to 0..peak.

    Args:
        targets: uint8 (H, W) or (H, W, C), or float32 (H, W) or (C, H, W), one for each sample.
        names: What to call each of them in errors.
        border: Pixels at every side that do not count.
        luminance: Whether to compare the luminance of images of red, green and blue.
        peak: The largest value of float targets.

    Raises:
        InputError: If a target is no such image, or not larger than its border.
    """

    name = "psnr"

    def __init__(
        self,
        targets: Sequence[Array],
        names: Sequence[str],
        *,
        border: int = 0,
        luminance: bool = False,
        peak: float = 1.0,
    ) -> None:
        self._targets, self._names = targets, names
        self._border, self._luminance, self._peak = border, luminance, peak
        self._values: list[float] = []
        for target, name in zip(targets, names, strict=True):
            _check_target(target, name, border, luminance)

    def add(self, outputs: Array) -> None:
        """Compares the images (n, C, H, W) of the next n samples."""
        for output in outputs:
            index = len(self._values)
            self._values.append(self._compare(output, self._targets[index], self._names[index]))

    def _compare(self, output: Array, target: Array, name: str) -> float:
        wanted = _channels_first(target)
        if output.shape != wanted.shape:
            raise InputError(
                f"{name}: the model's output has shape {output.shape}, but the target is "
                f"{target.dtype} {target.shape}, which is {wanted.shape} with channels first; give "
                "targets of the output's size"
            )
        got, peak = output.astype(np.float64), self._peak
        if target.dtype == np.uint8:
            got, peak = np.rint(np.clip(got * 255, 0, 255)), 255.0
        else:
            got = np.clip(got, 0, peak)
        if self._luminance:
            got, wanted = _luminance(got, peak), _luminance(wanted, peak)
        inner = slice(self._border, -self._border or None)
        error = float(np.square(got - wanted)[..., inner, inner].mean())
        if error == 0.0:
            return MAX_PSNR
        return min(MAX_PSNR, float(10 * np.log10(peak**2 / error)))

    def entries(self) -> dict[str, Any]:
        """``psnr``, the mean, ``psnr_of`` every image, ``border`` and ``luminance``."""
        return {
            "psnr": float(np.mean(self._values)),
            "psnr_of": [round(value, 4) for value in self._values],
            "border": self._border,
            "luminance": self._luminance,
        }

    def text(self) -> str:
        """One line."""
        count = len(self._values)
        return f"PSNR {np.mean(self._values):.2f} dB (mean of {count} images)"


def output_of(graph: Graph, name: str | None) -> str:
    """The output that is measured: the only one, or the one of this name.

    Raises:
        UserError: If there is no such output, or several to choose from.
    """
    names = list(graph.outputs)
    if name is None and len(names) > 1:
        raise UserError(
            f"the model has the outputs {', '.join(map(plain, names))}; say which one to measure: "
            "--output NAME"
        )
    if name is not None and name not in names:
        raise UserError(
            f"there is no output {name!r}; {did_you_mean(name, names)}the model has "
            f"{', '.join(map(plain, names))}"
        )
    return names[0] if name is None else name


def classes_of(graph: Graph, output: str) -> int:
    """How many classes a classifier tells apart.

    Raises:
        UserError: If the model is none.
    """
    shape = graph.values[output].shape
    count = shape[-1]
    if len(shape) != 2 or count is None:
        raise UserError(
            "eval needs an output (N, classes); the output "
            f"{plain(output)} of this model is {shape_text(shape)}"
        )
    return count


def is_of_images(graph: Graph) -> bool:
    """Whether the samples of a model of one input are images: planes (C, H, W)."""
    return len(graph.inputs) == 1 and len(graph.inputs[0].shape) == 4


def need_images(graph: Graph, output: str) -> None:
    """Checks that a model makes one image of one image.

    Raises:
        UserError: If it does not.
    """
    shape = graph.values[output].shape
    if len(graph.inputs) != 1 or len(shape) != 4:
        raise UserError(
            "--metric psnr needs a model with one input and an output (N, C, H, W); this one has "
            f"{counted(len(graph.inputs), 'input')}, and its output {plain(output)} is "
            f"{shape_text(shape)}"
        )


def _check_target(target: Array, name: str, border: int, luminance: bool) -> None:
    layouts = {"uint8": "(H, W) or (H, W, C)", "float32": "(H, W) or (C, H, W)"}
    kind = str(target.dtype)
    if kind not in layouts or target.ndim not in (2, 3) or not target.size:
        raise InputError(
            f"{name} holds {kind} {target.shape}; a target must be an image, uint8 "
            f"{layouts['uint8']} or float32 {layouts['float32']}"
        )
    need_finite(name, target)
    channels, height, width = _channels_first(target).shape
    if min(height, width) <= 2 * border:
        raise InputError(
            f"{name} has {height}x{width} pixels, of which a border of {border} leaves none; "
            "lower --border"
        )
    if luminance and channels != 3:
        raise InputError(
            f"{name} has {channels} channels, so it has no luminance; leave --luminance out"
        )


def _channels_first(image: Array) -> Array:
    """float64 (C, H, W) of a target."""
    if image.ndim == 2:
        image = image[None]
    elif image.dtype == np.uint8:
        image = image.transpose(2, 0, 1)
    return image.astype(np.float64)


def _luminance(image: Array, peak: float) -> Array:
    """Luminance (H, W) of red, green and blue (3, H, W), all in 0..peak."""
    result: Array = peak * _LUMINANCE_BLACK + np.tensordot(_LUMINANCE, image, axes=1)
    return result

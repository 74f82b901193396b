"""From images to the input of a model, as the metadata of its file describe it.

The entry ``preprocess`` of the metadata says how 8-bit images become float32 inputs::

    {"kind": "image", "layout": "NCHW", "range": [0, 1], "mean": [...], "std": [...]}

``range`` is what 0 and 255 become; the mean is then subtracted and the result divided by the
standard deviation, for each channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lutra.errors import FormatError, InputError
from lutra.node import Array, Shape

__all__ = ["ImagePreprocess"]

#: Where the metadata of a graph keep the description.
KEY: Final = "preprocess"
_FIELDS: Final = frozenset({"kind", "layout", "range", "mean", "std"})
_MAX_CHANNELS: Final = 4096
_LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ImagePreprocess:
    """How 8-bit images become the input of a model.

    Attributes:
        layout: Order of the axes of the model's input; ``NCHW`` is the only one.
        range: What the 8-bit values 0 and 255 become, before mean and std.
        mean: Subtracted from each channel.
        std: Divides each channel, after the mean.

    Raises:
        InputError: If a field makes no sense.

    Examples:
        >>> pre = ImagePreprocess(mean=(0.5,), std=(0.25,))
        >>> pre.apply(np.full((1, 2, 2, 1), 255, np.uint8)).shape
        (1, 1, 2, 2)
    """

    layout: str = "NCHW"
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.layout != "NCHW":
            raise InputError(f"preprocess: layout is {shown(self.layout)}; it must be 'NCHW'")
        for name in ("range", "mean", "std"):
            object.__setattr__(self, name, _floats(name, getattr(self, name)))
        if len(self.range) != 2 or not self.range[0] < self.range[1]:
            raise InputError(
                f"preprocess: range is {shown(list(self.range))}; it must be two numbers, the "
                "lower first"
            )
        if len(self.mean) != len(self.std) or not 1 <= len(self.mean) <= _MAX_CHANNELS:
            raise InputError(
                f"preprocess: mean has {len(self.mean)} and std has {len(self.std)} entries; give "
                f"each one for every channel, 1 to {_MAX_CHANNELS}"
            )
        if min(self.std) <= 0:
            raise InputError(
                f"preprocess: std is {shown(list(self.std))}; every entry must be above 0"
            )
        if not np.isfinite(self._levels()).all():
            raise InputError(
                f"preprocess: range {shown(list(self.range))}, mean {shown(list(self.mean))} and "
                f"std {shown(list(self.std))} overflow float32; use smaller numbers"
            )

    @classmethod
    def from_dict(cls, entry: object) -> ImagePreprocess:
        """Reads the ``preprocess`` entry of the metadata of a file.

        Args:
            entry: What the file says.

        Raises:
            FormatError: If it is not such an entry.
        """
        if not isinstance(entry, Mapping):
            raise FormatError(
                f"preprocess is a {type(entry).__name__}; it must be an object with the fields "
                f"{', '.join(sorted(_FIELDS))}"
            )
        if set(entry) != _FIELDS:
            found = ", ".join(sorted(map(str, entry)))[:200] or "none"
            raise FormatError(
                f"preprocess has the fields {found}; it must have {', '.join(sorted(_FIELDS))}"
            )
        if entry["kind"] != "image":
            raise FormatError(f"preprocess is of the kind {shown(entry['kind'])}, not 'image'")
        try:
            return cls(entry["layout"], entry["range"], entry["mean"], entry["std"])
        except InputError as error:
            raise FormatError(str(error)) from error

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ImagePreprocess | None:
        """The description in the metadata of a graph, or None where there is none.

        Raises:
            FormatError: If there is one that makes no sense.
        """
        entry = metadata.get(KEY)
        return None if entry is None else cls.from_dict(entry)

    def to_dict(self) -> dict[str, Any]:
        """The entry for the metadata of a file."""
        return {
            "kind": "image",
            "layout": self.layout,
            "range": list(self.range),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def apply(self, images: Array, shape: Shape | None = None) -> Array:
        """Makes the input of a model.

        Args:
            images: uint8 (N, H, W, C), or float32 (N, C, H, W) that is ready and stays as it is.
            shape: Shape of the model's input, such as ``session.get_inputs()[0].shape``, to check
                against; None for no check.

        Returns:
            float32 (N, C, H, W), contiguous.

        Raises:
            InputError: If the images have another dtype or shape.
        """
        if not isinstance(images, np.ndarray):
            raise InputError(
                f"preprocess: the images are a {type(images).__name__}; give a numpy array"
            )
        if images.dtype == np.uint8:
            layout = "uint8 images (N, H, W, C)"
            channels_at = 3
        elif images.dtype.kind == "f" and images.dtype.itemsize == 4:
            layout = "float32 inputs (N, C, H, W)"
            channels_at = 1
        else:
            raise InputError(
                f"preprocess: the images have dtype {images.dtype}; give uint8 (N, H, W, C) or "
                "float32 (N, C, H, W)"
            )
        channels = len(self.mean)
        if images.ndim != 4 or (channels > 1 and images.shape[channels_at] != channels):
            wanted = f" with C = {channels}" if channels > 1 else ""
            raise InputError(
                f"preprocess: the images have shape {images.shape}; {layout} are needed{wanted}"
            )
        order = (0, 3, 1, 2) if channels_at == 3 else (0, 1, 2, 3)
        made = tuple(images.shape[axis] for axis in order)
        if shape is not None and not _fits(made, shape):
            sizes = ", ".join("N" if size is None else str(size) for size in shape)
            raise InputError(
                f"preprocess: {images.dtype} images of shape {images.shape} make an input of shape "
                f"{made}, but the model takes ({sizes}); resize the images or check their layout"
            )
        if channels_at == 1:
            return np.ascontiguousarray(images, np.float32)
        result = np.empty(made, np.float32)
        levels = self._levels()
        for channel in range(made[1]):
            result[:, channel] = levels[channel % channels][images[..., channel]]
        return result

    def _levels(self) -> Array:
        """What each 8-bit value becomes, float32 (channels, 256)."""
        # One rounding to float32 at each step, as the usual transforms of torchvision do it.
        low, high = (np.float32(end) for end in self.range)
        mean, std = (np.asarray(v, np.float32)[:, None] for v in (self.mean, self.std))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            unit = np.arange(256, dtype=np.float32) / np.float32(255)
            result: Array = (unit * (high - low) + low - mean) / std
        return result


def _fits(made: tuple[int, ...], shape: Shape) -> bool:
    return len(made) == len(shape) and all(
        want is None or size == want for size, want in zip(made, shape, strict=True)
    )


def _floats(name: str, value: object) -> tuple[float, ...]:
    numbers = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not numbers or any(
        isinstance(entry, bool)
        or not isinstance(entry, (int, float))
        # also an int that is too large for a float, where isfinite would overflow
        or abs(entry) > _LARGEST
        or not math.isfinite(entry)
        for entry in value  # type: ignore[attr-defined]
    ):
        raise InputError(
            f"preprocess: {name} is {shown(value)}; it must be a list of finite numbers"
        )
    return tuple(float(entry) for entry in value)  # type: ignore[attr-defined]


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

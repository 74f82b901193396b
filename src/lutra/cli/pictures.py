"""A folder of images as the input of a model."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from lutra.cli.common import UserError, plain
from lutra.cli.folders import files_of
from lutra.errors import InputError
from lutra.node import Array
from lutra.preprocess.image import ImagePreprocess

#: Endings of the names of images.
PICTURES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif")


def read_pictures(
    folder: str, size: tuple[int, int] | None, mean: Sequence[float], std: Sequence[float]
) -> tuple[Array, Array]:
    """Images of a folder, or of a folder for each class in it.

    Args:
        folder: Holds images, or CLASS/images.
        size: Height and width: an image is scaled so that it covers them, and cut in the middle.
            None takes images as they are, which must then have one size.
        mean: Subtracted from each channel, which is 0..1; one number is for all.
        std: Divides each channel.

    Returns:
        Images (N, C, H, W) float32, with 3 channels, or with 1 where all images are grey and mean
        has one number; and the place of each one's folder (N), in the order of the names.

    Raises:
        InputError: If there is no image, or one cannot be read.
        UserError: If Pillow is not installed, or the sizes differ.
    """
    try:
        pillow: Any = importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise UserError(
            "a folder of images needs Pillow, which is not installed; install it with "
            "pip install pillow"
        ) from error
    paths, _ = files_of(folder, PICTURES)
    if not paths:
        raise InputError(
            f"{folder!r} holds no images ({', '.join(PICTURES)}), nor do the folders in it"
        )
    found, classes = [], []
    for path, place in paths:
        try:
            with pillow.open(path) as opened:
                image = opened.convert("L" if opened.mode in ("1", "L", "I;16") else "RGB")
        except Exception as error:  # Pillow raises whatever its parsers meet
            raise InputError(
                f"cannot read {str(path)!r} as an image: {type(error).__name__}: {error}; take it "
                "out of the folder"
            ) from error
        found.append(image if size is None else _cover(pillow, image, size))
        classes.append(place)
    sizes = {image.size for image in found}
    if len(sizes) > 1:
        shown = ", ".join(f"{h}x{w}" for w, h in sorted(sizes)[:4])
        raise UserError(
            f"the images in {folder!r} have several sizes ({shown}, ...); give the size that the "
            "model takes: --size H,W"
        )
    grey = all(image.mode == "L" for image in found) and len(mean) == len(std) == 1
    channels = 1 if grey else 3
    pixels = np.stack([np.asarray(image if grey else image.convert("RGB")) for image in found])
    pixels = pixels.reshape(*pixels.shape[:3], channels)
    try:
        levels = [tuple(v) * channels if len(v) == 1 else tuple(v) for v in (mean, std)]
        made = ImagePreprocess(mean=levels[0], std=levels[1]).apply(pixels)
    except InputError as error:
        raise UserError(f"--mean and --std of images: {plain(error)}") from error
    return made, np.array(classes, np.int64)


def _cover(pillow: Any, image: Any, size: tuple[int, int]) -> Any:
    """The middle of an image that is scaled to cover a size."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(scaled, pillow.Resampling.BILINEAR)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return image.crop((left, top, left + width, top + height))

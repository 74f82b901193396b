"""Reads the lossless image stacks *.npy.xz of the example data."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np


def undo_median(path: Path) -> np.ndarray:
    """uint8 images (N, H, W, 3) from median-predicted residuals of the planes G, R - G, B - G."""
    with lzma.open(path) as file:
        residuals = np.load(file, allow_pickle=False).transpose(0, 2, 3, 1).astype(np.int16)
    planes, height, width, count = residuals.shape
    green = np.zeros((height, width, count), np.int16)
    decoded = []
    for c in range(planes):
        plane = np.zeros((height, width, count), np.int16)
        for y in range(height):
            for x in range(width):
                none = np.zeros(count, np.int16)
                up = plane[y - 1, x] if y else plane[y, x - 1] if x else none
                left = plane[y, x - 1] if x else up
                corner = plane[y - 1, x - 1] if x and y else left
                guess = np.clip(left + up - corner, np.minimum(left, up), np.maximum(left, up))
                plane[y, x] = ((guess + residuals[c, y, x] + green[y, x]) & 255) - green[y, x]
        decoded.append((plane + green).astype(np.uint8))
        if c == 0:
            green = plane
    red_green_blue = np.stack([decoded[1], decoded[0], decoded[2]], -1)
    return np.ascontiguousarray(red_green_blue.transpose(2, 0, 1, 3))

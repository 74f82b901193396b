"""Sliding windows over images, shared by convolutions and pooling."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lutra.node import Array

#: Entries of the patch matrix that exist at a time: bounds the memory of a convolution.
MAX_PATCH_ENTRIES = 2**22


def windows(
    x: Array, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Array:
    """All windows of padded images, as a view.

    Args:
        x: (N, C, H, W), already padded.
        kernel: Rows and columns of the window.
        stride: Steps between windows.
        dilation: Steps between the entries of a window.

    Returns:
        (N, C, Ho, Wo, kh, kw)
    """
    span = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    every = np.lib.stride_tricks.sliding_window_view(x, span, axis=(2, 3))
    return every[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def patches(view: Array) -> Iterator[tuple[int, slice, Array]]:
    """The rows of the patch matrix, in bands of output rows that fit in memory.

    Args:
        view: (N, C, Ho, Wo, kh, kw), from ``windows``.

    Yields:
        Image, band of output rows, and the patches (band * Wo, C * kh * kw) in the order
        (channel, kernel row, kernel column).
    """
    _, channels, height, width, kernel_rows, kernel_columns = view.shape
    length = channels * kernel_rows * kernel_columns
    step = max(1, MAX_PATCH_ENTRIES // (width * length))
    for image in range(view.shape[0]):
        for top in range(0, height, step):
            band = slice(top, min(top + step, height))
            block = view[image, :, band].transpose(1, 2, 0, 3, 4)
            yield image, band, block.reshape(-1, length)

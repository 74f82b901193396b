"""Bicubic upsampling and grid_sample: the engine, the reference, and what their rules refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import Array
from sequences import check, single

from lutra.errors import GraphError

F = np.float32


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("shape", "attrs"),
    [
        ((3, 5, 6), {"scale_h": 2.0, "scale_w": 2.0}),
        ((2, 7, 4), {"scale_h": 1.7, "scale_w": 0.6}),
        ((2, 9, 9), {"size": (4, 20)}),
        ((1, 1, 1), {"size": (3, 5)}),
        ((1, 2, 3), {"size": (1, 1)}),
        ((2, 6, 5), {"size": (6, 5)}),
    ],
)
def test_bicubic(
    batch: int, align_corners: bool, shape: tuple[int, ...], attrs: dict[str, Any]
) -> None:
    graph = single("upsample_bicubic", ("x", (None, *shape)), align_corners=align_corners, **attrs)
    x = normal(batch, *shape)
    got = check(graph, x)
    if attrs.get("size") == shape[1:]:
        np.testing.assert_array_equal(got, x)


def test_bicubic_to_the_size_of_another_value() -> None:
    graph = single("upsample_bicubic", ("x", (None, 2, None, None)), ("y", (None, 1, None, None)))
    for size in ((3, 4), (9, 2)):
        assert check(graph, normal(2, 2, 4, 5), normal(2, 1, *size)).shape == (2, 2, *size)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_grid_sample(mode: str, padding: str, align_corners: bool) -> None:
    attrs = {"mode": mode, "padding": padding, "align_corners": align_corners}
    graph = single("grid_sample", ("x", (None, 3, 5, 7)), ("grid", (None, 4, 6, 2)), **attrs)
    for batch in (1, 3):
        grid = F(1.5) * normal(batch, 4, 6, 2, seed=1)
        grid[0, 0, 0] = (-1, 1)
        grid[0, 1] *= 1e6
        check(graph, normal(batch, 3, 5, 7), grid)
    grid[0, 2, 3, 0] = np.nan
    grid[0, 3, 1, 1] = np.inf
    check(graph, normal(3, 3, 5, 7), grid, finite=False)


def test_the_grid_of_the_pixels_is_the_image() -> None:
    x = normal(2, 3, 4, 5)
    lines = [np.linspace(-1, 1, size, dtype=F) for size in (5, 4)]
    grid = np.broadcast_to(np.stack(np.meshgrid(*lines), axis=-1), (2, 4, 5, 2))
    graph = single(
        "grid_sample", ("x", (None, 3, None, None)), ("grid", (None, None, None, 2)),
        align_corners=True,
    )  # fmt: skip
    got = check(graph, x, np.ascontiguousarray(grid))
    np.testing.assert_allclose(got, x, atol=1e-5)


def test_one_pixel() -> None:
    for padding in ("zeros", "border", "reflection"):
        for align_corners in (False, True):
            graph = single(
                "grid_sample", ("x", (None, 1, 1, 1)), ("grid", (None, 2, 2, 2)),
                padding=padding, align_corners=align_corners,
            )  # fmt: skip
            check(graph, normal(1, 1, 1, 1), normal(1, 2, 2, 2))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(GraphError, match="give one of these: a size"):
        single("upsample_bicubic", ("x", (None, 1, 3, 3))).validate()
    for shape in ((None, 4, 4, 3), (2, 4, 4, 2)):
        with pytest.raises(GraphError, match=r"they must be \(N, C, H, W\) and \(N, H', W', 2\)"):
            single("grid_sample", ("x", (None, 1, 3, 3)), ("g", shape)).validate()
    with pytest.raises(GraphError, match="must be one of zeros, border, reflection"):
        single(
            "grid_sample", ("x", (None, 1, 3, 3)), ("g", (None, 4, 4, 2)), padding="wrap"
        ).validate()

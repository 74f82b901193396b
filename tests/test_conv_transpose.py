"""Transposed convolutions: the engine, the reference, and what their rules refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import Array, Builder
from sequences import check, single

from lutra import Session
from lutra.errors import GraphError
from lutra.graph import Graph
from lutra.reference import run_reference

F = np.float32
Pair = tuple[int, int]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


def transposed(
    shape: tuple[int | None, ...], outputs: int, kernel: Pair, groups: int = 1, **attrs: Any
) -> Graph:
    assert shape[1] is not None
    tensors = {
        "weight": normal(outputs, shape[1] // groups, *kernel, seed=1),
        "bias": normal(outputs, seed=2),
    }
    return single("conv_transpose2d", ("x", shape), tensors=tensors, groups=groups, **attrs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "attrs"),
    [
        ((4, 5, 6), 6, (2, 2), {"stride": (2, 2)}),
        ((3, 7, 5), 5, (3, 3), {"stride": (2, 2), "padding": (1, 1), "output_padding": (1, 1)}),
        ((3, 4, 9), 4, (4, 4), {"stride": (2, 2), "padding": (1, 1)}),
        ((2, 1, 1), 7, (4, 4), {}),
        ((4, 6, 3), 4, (3, 2), {"stride": (3, 1), "groups": 2, "padding": (0, 1)}),
        ((6, 5, 5), 12, (3, 3), {"stride": (2, 2), "groups": 6, "dilation": (2, 2)}),
        ((2, 5, 4), 3, (3, 3), {"stride": (3, 2), "dilation": (2, 3), "padding": (3, 2)}),
        ((2, 3, 70), 3, (1, 5), {"stride": (1, 4), "output_padding": (0, 3)}),
        ((1, 2, 2), 2, (2, 2), {"stride": (4, 5)}),  # outputs that no input reaches
    ],
)
def test_engine_and_reference_agree(
    batch: int, shape: tuple[int, ...], outputs: int, kernel: Pair, attrs: dict[str, Any]
) -> None:
    check(transposed((None, *shape), outputs, kernel, **attrs), normal(batch, *shape))


def test_any_size() -> None:
    graph = transposed((None, 3, None, None), 4, (3, 3), stride=(2, 2), padding=(1, 1))
    for height, width in ((1, 1), (2, 9), (11, 6)):
        got = check(graph, normal(2, 3, height, width))
        assert got.shape == (2, 4, 2 * height - 1, 2 * width - 1)


def test_the_step_adds_and_clamps() -> None:
    b = Builder(("x", (None, 3, 5, 5)), ("r", (None, 4, 9, 9)))
    tensors = {"weight": normal(4, 3, 3, 3), "bias": normal(4)}
    y = b.add("conv_transpose2d", "x", tensors=tensors, stride=(2, 2), padding=(1, 1))
    b.add("relu", b.add("add", y, "r"))
    feeds = [normal(2, 3, 5, 5), normal(2, 4, 9, 9, seed=5)]
    got = check(b.graph(), *feeds)
    assert (got == 0).any()
    steps = Session(b.graph()).profile({"x": feeds[0], "r": feeds[1]})
    assert len(steps.steps) == 1


def test_it_is_the_transpose_of_the_convolution() -> None:
    """<conv(x), y> = <x, transposed(y)> with the same kernel and without biases."""
    x, y, kernel = normal(2, 3, 7, 7), normal(2, 4, 4, 4, seed=1), normal(4, 3, 3, 3, seed=2)
    attrs = {"stride": (2, 2), "padding": (1, 1)}
    conv = single(
        "conv2d",
        ("x", (None, 3, 7, 7)),
        tensors={"weight": kernel, "bias": np.zeros(4, F)},
        **attrs,
    )
    back = single(
        "conv_transpose2d",
        ("x", (None, 4, 4, 4)),
        tensors={
            "weight": np.ascontiguousarray(kernel.transpose(1, 0, 2, 3)),
            "bias": np.zeros(3, F),
        },
        **attrs,
    )
    (there,) = run_reference(conv, [x]).values()
    (again,) = run_reference(back, [y]).values()
    np.testing.assert_allclose((there * y).sum(), (x * again).sum(), rtol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    tensors = {"weight": normal(4, 8, 2, 2), "bias": normal(4)}
    with pytest.raises(GraphError, match="give it an input of 8 channels"):
        single("conv_transpose2d", ("x", (None, 3, 5, 5)), tensors=tensors).validate()
    with pytest.raises(GraphError, match="it must be below one of the two"):
        transposed((None, 4, 5, 5), 4, (2, 2), output_padding=(0, 1)).validate()
    with pytest.raises(GraphError, match="use a larger input or less padding"):
        transposed((None, 4, 1, 1), 4, (2, 2), padding=(1, 1)).validate()
    with pytest.raises(GraphError, match="the groups must divide the outputs"):
        transposed((None, 4, 5, 5), 3, (2, 2), groups=2).validate()

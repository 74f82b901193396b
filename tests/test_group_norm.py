"""Group norm: the engine, the reference, and what its rules refuse."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import Array
from sequences import check, single

from lutra.errors import GraphError
from lutra.graph import Graph

F = np.float32


def group_norm(shape: tuple[int | None, ...], groups: int, channels: int | None = None) -> Graph:
    rng = np.random.default_rng(1)
    count = channels or shape[1]
    tensors = {name: rng.normal(size=count).astype(F) for name in ("weight", "bias")}
    return single("group_norm", ("x", shape), tensors=tensors, groups=groups, eps=1e-5)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((6,), 2), ((4, 5), 4), ((6, 7, 9), 3), ((8, 1, 1), 2), ((5, 3, 2, 4), 1), ((12, 17, 3), 12)],
)
def test_engine_and_reference_agree(batch: int, shape: tuple[int, ...], groups: int) -> None:
    check(group_norm((None, *shape), groups), 3 * normal(batch, *shape) + 2, tolerance=4e-6)


def test_a_mean_far_from_zero_costs_no_more_than_its_rounding() -> None:
    x = normal(2, 4, 16, 16) + F(3000)
    check(group_norm((None, 4, 16, 16), 2), x, tolerance=1e-4)


def test_equal_values_give_the_bias() -> None:
    graph = group_norm((None, 4, 5, 5), 2)
    got = check(graph, np.full((1, 4, 5, 5), 0.1, F))
    np.testing.assert_allclose(got[0, :, 0, 0], graph.tensors["node.bias"], atol=1e-3)


def test_nan_and_infinity_stay_in_their_group() -> None:
    x = normal(2, 4, 3, 3)
    x[0, 0, 1, 1], x[1, 3, 0, 0] = np.nan, np.inf
    got = check(group_norm((None, 4, 3, 3), 2), x, finite=False, tolerance=4e-6)
    assert np.isnan(got[0, :2]).all()
    assert np.isfinite(got[0, 2:]).all()
    assert np.isnan(got[1, 2:]).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(GraphError, match="the groups must divide the channels"):
        group_norm((None, 6, 2, 2), 4).validate()
    with pytest.raises(GraphError, match="give it an input of 5 channels on axis 1"):
        group_norm((None, 6, 2, 2), 5, channels=5).validate()
    tensors = {"weight": np.ones(2, F), "bias": np.ones(2, F)}
    with pytest.raises(GraphError, match="must be above 0"):
        single("group_norm", ("x", (None, 2, 3)), tensors=tensors, groups=1, eps=0.0).validate()

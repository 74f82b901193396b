"""Activation ranges by output error, zero points by data, weights that suit the rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lutra
from lutra.train import Int8, Lookup, convert, export
from lutra.train.layers import grid_refit
from lutra.train.layers.goal import Goal
from lutra.train.layers.grid_refit import fit_range, fit_rounded, search
from lutra.train.layers.int8 import Int8Linear
from lutra.train.layers.lookup import LookupLinear


def rows(seed: int, count: int = 800) -> torch.Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))


def test_zero_points_follow_the_data() -> None:
    """GELU's outputs are from -0.17 upwards: half of a symmetric grid would be empty."""
    dense, x = nn.Linear(12, 6), nn.functional.gelu(2.0 * rows(0))
    goal = Goal(dense(x).detach())
    layer = Int8Linear.from_float(dense, Int8())
    layer.set_activation_range(-float(x.max()), float(x.max()))
    symmetric = goal.error(layer.of_rows(x))
    layer.refit(x, goal)
    assert 0 < layer.grid().zero < 16
    assert goal.error(layer.of_rows(x)) < 0.35 * symmetric


def test_outliers_are_cut_off_where_that_helps() -> None:
    dense, x = nn.Linear(12, 6), rows(1).abs()
    x[0, 0] = 300.0
    goal = Goal(dense(x).detach())
    weight = torch.ones(6)
    layer = Int8Linear.from_float(dense, Int8(act_bits=4))
    with torch.no_grad():
        layer.weight[:, 0] = 0.0  # the outlier does not count
    goal = Goal(layer.dense_forward(x).detach(), weight, torch.zeros(6))
    fit_range(layer, x, goal)
    assert layer.grid().scale * layer.grid().qmax < 10.0
    assert layer.grid().zero == 0


def test_a_layer_of_some_outputs_gives_these_outputs() -> None:
    x = rows(5)
    for kind, method in ((Int8Linear, Int8()), (LookupLinear, Lookup())):
        layer = kind.from_float(nn.Linear(12, 9), method)
        layer.set_activation_range(-2.0, 3.0)
        some = layer.of_outputs(slice(None, None, 4))
        torch.testing.assert_close(some.of_rows(x), layer.of_rows(x)[:, ::4])
        some.set_activation_range(-1.0, 1.0)
        assert layer.weight.shape == (9, 12)


def test_the_range_of_a_wide_layer_is_judged_by_some_outputs() -> None:
    """Nearly the range that all outputs would take, with nearly their error."""
    x = rows(6, 64)
    dense = nn.Linear(12, 1600)
    goal = Goal(dense(x).detach())
    found = []
    for judged in (1600, 512):
        layer = LookupLinear.from_float(dense, Lookup())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grid_refit, "_JUDGED", judged)
            fit_range(layer, x, goal)
        found.append(goal.error(layer.of_rows(x)))
    assert found[1] <= 1.05 * found[0]


def test_each_end_is_searched_by_itself() -> None:
    best = {(-2.0, 3.0): 0.0}
    found = search([4.0, 2.0], [6.0, 3.0], lambda low, high: best.get((low, high), 1.0 - low / 9))
    assert found == (-2.0, 3.0)
    assert search([], [5.0, 1.0], lambda low, high: high) == (0.0, 1.0)
    assert search([2.0], [], lambda low, high: 0.0) == (-2.0, 0.0)
    assert search([], [], lambda low, high: 0.0) == (0.0, 1.0)


@pytest.mark.parametrize("kind", [Int8Linear, LookupLinear])
def test_weights_suit_the_rounded_input(kind: type) -> None:
    """Inputs that depend on each other: the weights can make up for a coarse grid."""
    dense = nn.Linear(12, 6)
    x = rows(2)
    x = x + x.roll(1, 1) + x.roll(2, 1)
    goal = Goal(dense(x).detach())
    layer = kind.from_float(dense, Int8(act_bits=3) if kind is Int8Linear else Lookup(8, 33))
    fit_range(layer, x, goal)
    before = goal.error(layer.of_rows(x))
    settle = layer._round_weights if kind is LookupLinear else lambda products: None
    fit_rounded(layer, x, goal, settle)
    after = goal.error(layer.of_rows(x))
    assert after < before
    fit_rounded(layer, x, Goal(layer.of_rows(x)), settle)  # nothing is better than no change
    assert goal.error(layer.of_rows(x)) == after


def test_old_states_of_a_symmetric_grid_load() -> None:
    layer = Int8Linear.from_float(nn.Linear(4, 3), Int8())
    layer.set_activation_range(-2.0, 2.0)
    state = {k: v for k, v in layer.state_dict().items() if k != "zero_point"}
    state["signed"], state["act_scale"] = torch.tensor(True), torch.tensor(0.5)
    layer.load_state_dict(state)
    assert (layer.grid().zero, layer.grid().scale) == (64, 0.5)


@pytest.mark.parametrize("isa", lutra.runnable_isas())
def test_any_zero_point_is_the_same_in_the_engine(isa: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1),
                          nn.SiLU(), nn.Conv2d(8, 4, 1)).eval()  # fmt: skip
    x = torch.randn(16, 3, 8, 8)
    converted, _ = convert(model, {"*": Int8()}, [x])
    assert 0 < converted[2].grid().zero < 32
    path = tmp_path / "model.lutra"
    export(converted, path, x[:2])
    session = lutra.Session(path, isa=isa)
    with torch.no_grad():
        want = converted.eval()(x)
    got = torch.from_numpy(session.run(None, {session.inputs[0].name: x.numpy()})[0])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

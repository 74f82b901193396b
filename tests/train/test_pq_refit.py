"""Closed-form fits of product quantisation: exact where they can be, careful with few rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lutra.train.layers import pq_refit
from lutra.train.layers.goal import Goal
from lutra.train.layers.pq_refit import fit_tables, fit_weight, sum_rows


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def share_left(codes: Tensor, want: Tensor, outputs: int = 4) -> float:
    """Mean squared error after the fit relative to the mean square of what was wanted."""
    start = torch.zeros(len(codes), 8, outputs)
    fit = fit_tables(codes, start, sum_rows(codes, start), Goal(want))
    left = want - sum_rows(codes, fit.change) - fit.shift
    return float(left.square().mean() / want.square().mean())


def test_tables_made_together_are_better() -> None:
    codes = torch.randint(8, (5, 3000), generator=generator(0))
    codes[1] = codes[0]  # sub-vectors that say the same
    want = torch.randn(8, 4, generator=generator(1))[codes[0]]
    want = want + torch.randn(8, 4, generator=generator(2))[codes[2]]
    assert share_left(codes, want) < 1e-4


def test_tables_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pq_refit, "_TABLE_ROWS", 16)
    codes = torch.randint(8, (5, 3000), generator=generator(0))
    want = sum_rows(codes, torch.randn(5, 8, 4, generator=generator(1)))
    assert share_left(codes, want) < 0.01


def test_entries_of_noise_stay_small() -> None:
    """Fewer rows than entries, and nothing to learn: what is held out says so."""
    codes = torch.randint(8, (40, 200), generator=generator(0))
    want = torch.randn(200, 4, generator=generator(1))
    start = torch.zeros(40, 8, 4)
    fit = fit_tables(codes, start, sum_rows(codes, start), Goal(want))
    other = torch.randint(8, (40, 200), generator=generator(2))
    assert float(sum_rows(other, fit.change).square().mean()) < 0.1


def test_weights_and_bias_are_found() -> None:
    x = torch.randn(500, 6, generator=generator(0)) + 3.0
    weight, bias = torch.randn(4, 6, generator=generator(1)), torch.tensor([1.0, -2.0, 0.5, 4.0])
    fit = fit_weight(x, torch.zeros(500, 4), Goal(x @ weight.t() + bias))
    torch.testing.assert_close(fit.change, weight, rtol=0.01, atol=0.01)
    torch.testing.assert_close(fit.shift, bias, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("low", [0.0, -float("inf")])
def test_what_a_relu_cuts_off_is_no_error(low: float) -> None:
    """A target that no linear layer gives, but a linear layer and a ReLU."""
    x = torch.randn(2000, 5, generator=generator(0))
    weight = torch.randn(3, 5, generator=generator(1))
    linear = x @ weight.t()
    noise = 5.0 * torch.rand(2000, 3, generator=generator(2))
    want = torch.where(linear > 0, linear, linear - noise)
    goal = Goal(want, low=low)
    fit = fit_weight(x, torch.zeros(2000, 3), goal)
    error = goal.error(x @ fit.change.t() + fit.shift)
    cut = Goal(want, low=0.0).error(x @ fit.change.t() + fit.shift)
    if low == 0.0:
        assert error < 0.03
    else:
        assert cut > 0.05


def test_goals_count_behind_gain_and_offset() -> None:
    y = torch.randn(50, 3, generator=generator(0))
    gain, offset = torch.tensor([2.0, -1.0, 0.5]), torch.randn(50, 3, generator=generator(1))
    goal = Goal(gain * y + offset, gain, offset, low=0.0)
    assert goal.error(y) < 1e-12
    inside = goal.want > 0.0
    wrong = y + 1.0
    torch.testing.assert_close(goal.targets(wrong)[inside], y[inside])
    assert goal.error(goal.targets(wrong)) < 1e-12
    assert float((goal.targets(y) - y).abs().max()) < 1e-5

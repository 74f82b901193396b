"""Weights rounded one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lutra.train import Lookup, convert
from lutra.train.layers.products import Products
from lutra.train.layers.weight_rounding import Feedback, round_weights


@pytest.mark.parametrize("half", [1, 7])
def test_outputs_move_less_than_with_the_nearest_levels(half: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 150) @ torch.randn(150, 150).div_(8) + torch.randn(400, 1)
    weight = torch.randn(9, 150)
    step = weight.abs().amax(1) / half * 0.7
    feedback = Feedback.of(Products(matrix=(x.t() @ x).double()))
    found = round_weights(weight, step, -half, half, feedback)
    assert set(found.unique().tolist()) <= set(range(-half, half + 1))
    nearest = (weight / step[:, None]).round().clamp(-half, half)

    def moved(levels: torch.Tensor) -> float:
        return float((x @ (levels * step[:, None] - weight).t()).square().mean())

    assert moved(found) < 0.7 * moved(nearest)
    # nothing to make good with
    apart = Feedback.of(Products(matrix=torch.eye(150, dtype=torch.float64)))
    assert torch.equal(round_weights(weight, step, -half, half, apart), nearest)
    # the same levels as codes from 0 up, with a step and a zero for each weight
    wide = step[:, None].expand_as(weight)
    codes = round_weights(weight, wide, 0, 2 * half, feedback, torch.full_like(wide, half))
    assert torch.equal(codes - half, found)


def plain(weight: torch.Tensor, step: torch.Tensor, half: int, gram: torch.Tensor) -> torch.Tensor:
    """GPTQ as it is written: the weights that are not rounded yet are solved for anew each time."""
    order = gram.diagonal().argsort(descending=True, stable=True)
    damped = gram[order][:, order]
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    rest, found = weight.double()[:, order], torch.zeros(weight.shape)
    for i in range(len(order)):
        code = (rest[:, i] / step).round().clamp(-half, half)
        found[:, order[i]] = code.float()
        inverse = torch.linalg.inv(damped[i:, i:])
        error = (rest[:, i] - code * step) / inverse[0, 0]
        rest[:, i:] -= error[:, None] * inverse[0]
    return found


@pytest.mark.parametrize("count", [1, 12, 300])
def test_rows_and_their_products_give_the_codes_of_gptq(count: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(count, 150) * torch.rand(150)).double()
    weight = torch.randn(9, 150)
    step = weight.abs().amax(1) / 3
    gram = x.t() @ x
    want = plain(weight, step, 3, gram)
    for products in (Products(rows=x), Products(matrix=gram)):
        torch.testing.assert_close(products.diagonal(), gram.diagonal())
        found = round_weights(weight, step, -3, 3, Feedback.of(products))
        assert float((found == want).float().mean()) > 0.99  # a tie may fall to either side


def test_the_grid_of_a_lookup_layer_follows_its_data() -> None:
    """Of GELU nearly all values are above zero; a grid around zero would waste its lower half."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 6)).eval()
    model, _ = convert(dense, {"2": Lookup()}, [torch.randn(600, 12)])
    assert 1 <= model[2].grid().zero <= 4
    state = {k: v for k, v in model[2].state_dict().items() if k != "zero_point"}
    other = type(model[2]).from_float(dense[2], Lookup())
    other.load_state_dict(state)  # of a version whose zero was the lowest or the middle
    assert other.grid().zero == 8

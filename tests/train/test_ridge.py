"""The weight of a ridge is chosen among those that the rounding of the sums leaves."""

from __future__ import annotations

import torch

from lutra.train.layers.ridge import Ridge, RowRidge, held_out


def test_sums_that_rounding_leaves_indefinite() -> None:
    torch.manual_seed(0)
    rows = torch.randn(64, 96)  # fewer rows than features: the sums are singular
    targets = torch.randn(64, 4)
    parts = [rows[part].t() @ rows[part] for part in held_out(64)]
    for part in parts:
        part.diagonal().sub_(0.02 * float(part.trace()) / 96)  # what rounding does, enlarged
    ridge = Ridge(parts)
    moments = [rows[part].t() @ targets[part] for part in held_out(64)]
    ridge.choose(moments, torch.ones(4))
    assert ridge.weight > 0.01
    assert bool(ridge.solve(moments).isfinite().all())


def test_few_rows_give_what_the_sums_give() -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, 200)
    targets = rows @ torch.randn(200, 3) + torch.randn(40, 3)
    parts = [rows[part] for part in held_out(40)]
    moments = [rows[part].t() @ targets[part] for part in held_out(40)]
    sums, short = Ridge([part.t() @ part for part in parts]), RowRidge(rows.double())
    sums.choose(moments, torch.ones(3))
    short.choose(targets, torch.ones(3))
    assert short.weight == sums.weight
    start = torch.randn(40, 3, dtype=torch.float64)
    known = sums.solve(moments, rows.t() @ start.float())
    torch.testing.assert_close(
        rows.t() @ short.solve(targets, start).float(), known, rtol=1e-3, atol=1e-4
    )

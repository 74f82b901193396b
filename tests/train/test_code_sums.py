"""What closed-form fits sum over samples by code: pairs of codes, moments, rows of tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lutra import _engine
from lutra.train.layers.pq_refit import _moments, sum_rows
from lutra.train.operators import native, portable

CASES = [(1, 1, 1, 3), (3, 7, 16, 5), (5, 64, 8, 33), (2, 513, 64, 1), (4, 0, 16, 2)]


def _codes(codebooks: int, rows: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(codebooks)
    return torch.randint(0, k, (codebooks, rows), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("codebooks", "rows", "k", "outputs"), CASES)
def test_pairs_are_counted(codebooks: int, rows: int, k: int, outputs: int) -> None:
    codes = _codes(codebooks, rows, k)
    want = np.zeros((codebooks, k, codebooks, k), np.int32)
    for row in codes.t().numpy():
        for b, code in enumerate(row):
            for a, other in enumerate(row):
                want[b, code, a, other] += 1
    got = native.code_pairs(codes, k)
    assert np.array_equal(got.numpy(), want.reshape(codebooks * k, -1))
    assert torch.equal(portable.code_pairs(codes, k), got)


@pytest.mark.parametrize(("codebooks", "rows", "k", "outputs"), CASES)
def test_sums_by_code(codebooks: int, rows: int, k: int, outputs: int) -> None:
    codes = _codes(codebooks, rows, k)
    values = torch.arange(rows * outputs).view(rows, outputs).float()  # whole: sums are exact
    tables = torch.arange(codebooks * k * outputs).view(codebooks, k, outputs).float()
    moments = torch.zeros((codebooks, k, outputs))
    total = torch.zeros((rows, outputs))
    for b in range(codebooks):
        for row in range(rows):
            moments[b, int(codes[b, row])] += values[row]
            total[row] += tables[b, int(codes[b, row])]
    assert torch.equal(_moments(codes, values, k), moments.flatten(0, 1))
    assert torch.equal(sum_rows(codes, tables), total)


def test_codes_out_of_range_are_refused() -> None:
    pool, counts = _engine.ThreadPool(1), np.zeros((8, 8), np.int32)
    with pytest.raises(ValueError, match="a code is not below centroids"):
        _engine.code_pairs(pool, np.full((2, 3), 4, np.uint8), 4, counts)
    with pytest.raises(ValueError, match="do not fit"):
        _engine.code_pairs(pool, np.zeros((3, 3), np.uint8), 4, counts)
    with pytest.raises(ValueError, match="1 to 64"):
        _engine.code_pairs(pool, np.zeros((2, 3), np.uint8), 65, counts)

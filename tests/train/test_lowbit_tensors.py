"""Matrices of low-bit weights take PyTorch tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layers import same_bits

from lutra import InputError, LowBitMatrix
from lutra.ops.lowbit_storage import TERNARY


def test_tensors_of_pytorch() -> None:
    rng = np.random.default_rng(2)
    weights = torch.from_numpy(rng.normal(size=(7, 32)).astype(np.float32))
    matrix = LowBitMatrix.pack(torch.nn.Parameter(weights), TERNARY)
    x = torch.from_numpy(rng.normal(size=(4, 32)).astype(np.float32))
    y = matrix.matmul(x.requires_grad_())
    assert isinstance(y, torch.Tensor)
    assert same_bits(y.numpy(), matrix.matmul(x.detach().numpy()))
    assert matrix.matmul(x.bfloat16()).dtype == torch.float32
    assert matrix.sums(torch.ones(2, 32, dtype=torch.int8)).shape == (2, 7)


def test_tensors_of_other_shapes_and_dtypes() -> None:
    matrix = LowBitMatrix.pack(torch.ones(3, 8, dtype=torch.int8), 2)
    y = matrix.matmul(torch.ones(2, 5, 8, dtype=torch.float64).transpose(0, 1))
    assert y.shape == (5, 2, 3)
    with pytest.raises(InputError, match="x has dtype int64"):
        matrix.matmul(torch.ones(2, 8, dtype=torch.int64))
    with pytest.raises(InputError, match=r"x is int32 \(2, 8\); give an array of int8"):
        matrix.sums(torch.ones(2, 8, dtype=torch.int32))

"""The part of an input's change that survives quantisation: a linear regression per codebook.

A straight-through estimator treats the quantiser x -> c(x) as the identity. With few centroids it
is far from that: it keeps the few directions of a sub-vector in which the centroids differ and
drops the rest, and its output varies less than its input. Gradients of the dropped directions are
noise, and because batch norm divides by the smaller deviation, the noise grows from layer to layer
(ResNet-20, V = 9, K = 16: the gradient of the first layer is 50 times too large). The best linear
model of the quantiser, A = cov(c, x) cov(x)^-1, has neither fault and costs nothing per step: the
input gradient A' W' dy is that of a convolution with the weights W A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lutra.train import distributed as collective

SAMPLE_ROWS = 2048  # rows that one estimate takes from a batch
REFRESH = 4  # training steps from one estimate to the next
_RIDGE = 1e-3  # relative to the mean variance of a codebook's entries


def regression(x: Tensor, quantized: Tensor) -> Tensor:
    """Least-squares maps A (B, W, V) with quantized ~ A x + constant, for each codebook.

    With torch.distributed the samples of all processes count.

    Args:
        x: sub-vectors (B, V, rows). quantized: what they become (B, W, rows): centroids (W = V), or
            codes as 0 and 1 (W = K).
    """
    both = torch.cat([x, quantized], 1)
    sums = both.sum(2)
    products = torch.bmm(both, x.transpose(1, 2))  # (B, V + W, V)
    rows = torch.tensor(float(x.shape[2]), device=x.device)
    for statistic in (sums, products, rows):
        collective.all_reduce(statistic)
    dim = x.shape[1]
    means = sums / rows
    covariance = products / rows - means[:, :, None] * means[:, None, :dim]
    own, cross = covariance[:, :dim], covariance[:, dim:]
    ridge = _RIDGE * own.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
    own = own + torch.eye(dim, device=x.device) * ridge[:, None, None]
    solution: Tensor = torch.linalg.solve(own, cross.transpose(1, 2))
    return solution.transpose(1, 2)

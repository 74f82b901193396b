"""What is added to the scores of an attention, as operators that the exporter writes."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

#: What is added to scores is at least this: sums of a few stay finite.
LOWEST: Final = -1e30
#: A score that gets this added has no weight left.
MASKED: Final = -1e4


@torch.library.custom_op("lutra::relative_bias", mutates_args=())
def _relative_bias(x: Tensor, bias: Tensor) -> Tensor:
    return x + bias


@_relative_bias.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("lutra::masked_scores", mutates_args=())
def _masked_scores(x: Tensor, keep: Tensor) -> Tensor:
    kept = keep if keep.dtype == torch.bool else keep > MASKED
    return x + torch.where(kept, 0.0, LOWEST)


@torch.library.custom_op("lutra::masked_attention", mutates_args=())
def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, causal: bool, scale: float
) -> Tensor:
    """Attention (N, heads, T, D) to the keys that `keep` (N, S) has; 0 where there is none."""
    seen = keep[:, None, None, :].expand(-1, 1, query.shape[2], -1)
    if causal:
        seen = seen.tril()
    scores = torch.matmul(query, key.mT) * scale
    weights = torch.where(seen, scores, LOWEST).softmax(-1)
    return torch.matmul(torch.where(seen, weights, 0.0), value)


@_masked_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, causal: bool, scale: float
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@_masked_scores.register_fake
def _(x: Tensor, keep: Tensor) -> Tensor:
    return x.new_empty(x.shape)

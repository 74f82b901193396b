"""What is added to the scores of an attention, as operators that the exporter writes."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

#: What is added to scores is at least this: sums of a few stay finite.
LOWEST: Final = -1e30
#: A score that gets this added has no weight left.
_MASKED: Final = -1e4


@torch.library.custom_op("lutra::relative_bias", mutates_args=())
def _relative_bias(x: Tensor, bias: Tensor) -> Tensor:
    return x + bias


@_relative_bias.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("lutra::masked_scores", mutates_args=())
def _masked_scores(x: Tensor, keep: Tensor) -> Tensor:
    kept = keep if keep.dtype == torch.bool else keep > _MASKED
    return x + torch.where(kept, 0.0, LOWEST)


@_masked_scores.register_fake
def _(x: Tensor, keep: Tensor) -> Tensor:
    return x.new_empty(x.shape)

"""Rotary embedding as one operator: what the exporter writes where it finds one."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("lutra::rotary", mutates_args=())
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    return x * cos + turned * sin


@_rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)

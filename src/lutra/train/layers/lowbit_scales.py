"""Scales of groups of low-bit weights, by the error that rounding makes."""

from __future__ import annotations

import torch
from torch import Tensor

_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the range of a group, to begin with
_STEPS = 3  # of rounding and fitting in turns, for each share
_BLOCK = 1 << 18  # weights whose scales are searched at a time
LEAST = 1e-30  # smaller scales are no normal float32


def round_codes(weight: Tensor, scale: Tensor, zero: Tensor | float, top: int) -> Tensor:
    """Codes 0..top of weights (..., group), as floats.

    Args:
        weight: of a group.
        scale, zero: of each group, with a last axis of 1.
        top: the largest code.
    """
    return (weight / scale + zero).round_().clamp_(0, top)


def mean_scales(weight: Tensor, levels: int) -> Tensor:
    """Scales (M, G) of weights (M, G, group) by their mean magnitude: a ternary code is -1, 0 or 1
    of it (BitNet b1.58, arXiv 2402.17764), one of 1 bit minus or plus it."""
    mean = weight.abs().mean(2)
    return (mean if levels == 3 else 2.0 * mean).clamp_min(LEAST)


@torch.no_grad()
def fit_scales(
    weight: Tensor, levels: int, share: Tensor | None = None, *, zero_points: bool = False
) -> tuple[Tensor, Tensor]:
    """Scales and zero points (M, G) with a small squared error of weights (M, G, group).

    For several ranges of a group, weights are rounded and the scale is fitted to their codes, in
    turns; the best one is taken.

    Args:
        weight: float32.
        levels: values of a code.
        share: what an error of each weight counts (G, group); None: all the same.
        zero_points: whether the zero point of a group may be any multiple of 1/2, and not the
            middle alone.
    """
    block = max(1, _BLOCK // max(1, weight[0].numel()))
    parts = [_fit(part, levels, share, zero_points) for part in torch.split(weight, block)]
    scales, zeros = zip(*parts, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _fit(
    weight: Tensor, levels: int, share: Tensor | None, zero_points: bool
) -> tuple[Tensor, Tensor]:
    top = levels - 1
    counts = torch.ones_like(weight[:1]) if share is None else share[None]
    low, high = weight.amin(2, keepdim=True).clamp_max(0), weight.amax(2, keepdim=True).clamp_min(0)
    reach = torch.maximum(-low, high)
    best_scale = best_zero = best_error = None
    for part, moved in ((p, m) for m in (False, True)[: 1 + zero_points] for p in _SHARES):
        if moved:
            scale = ((high - low) * (part / top)).clamp_min(LEAST)
            zero = (-low * part / scale).mul_(2).round_().div_(2).clamp_(0, top)
        else:
            scale = (reach * (2.0 * part / top)).clamp_min(LEAST)
            zero = torch.full_like(scale, top / 2)
        for _ in range(_STEPS):
            code = round_codes(weight, scale, zero, top) - zero
            weighted = counts * code
            products, squares = (weighted * weight).sum(2, True), (weighted * code).sum(2, True)
            scale = torch.where(products > 0, products / squares.clamp_min(LEAST), scale)
            scale = scale.clamp_min(LEAST)
        made = (round_codes(weight, scale, zero, top) - zero) * scale
        error = (counts * (made - weight).square()).sum(2, True)
        if best_scale is None or best_zero is None or best_error is None:
            best_scale, best_zero, best_error = scale, zero, error
        else:
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            best_error = torch.where(better, error, best_error)
    assert best_scale is not None
    assert best_zero is not None
    return best_scale[:, :, 0], best_zero[:, :, 0]

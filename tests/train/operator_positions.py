"""Single operators on positions, on sizes known at run time only, and on samples in parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from operator_cases import ROW, TOKENS, Case, call
from torch import Tensor


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


def _scores(x: Tensor) -> Tensor:
    return x @ x.transpose(1, 2)


HEADS = (2, 5, 6)
#: Operators of a fixed size.
CASES = {
    "einsum_of_parts": call(
        lambda m, x: torch.einsum("bhwc,hkc->bhwk", x.flatten(0, 1), m.c).unflatten(0, (-1, 2)),
        (2, 4, 3, 6),
        c=_numbers(4, 5, 6),
    ),
    "einsum_of_two_in_parts": call(
        lambda m, x, y: torch.einsum("nd,nd->n", x.flatten(0, 1), y.flatten(0, 1)).view(-1, 5),
        TOKENS,
        TOKENS,
    ),
    "einsum_of_three": call(
        lambda m, x, y: torch.einsum("bij,bjk,kl->bil", x, y, m.c), TOKENS, (6, 3), c=_numbers(3, 4)
    ),
    "einsum_of_a_constant_with_a_batch": call(
        lambda m, x: torch.einsum("ibd,jbd->bij", x.transpose(0, 1), m.c),
        TOKENS,
        c=_numbers(4, 1, 6),
    ),
    "scales_of_heads_with_time_first": call(
        lambda m, x: (x.permute(2, 0, 1, 3) * m.c + m.c).permute(1, 0, 2, 3),
        (2, 5, 6),
        c=_numbers(2, 6),
    ),
    "baddbmm_scaled": call(
        lambda m, x, y: torch.baddbmm(m.c, x, y, beta=0.5, alpha=2.0),
        TOKENS,
        (6, 3),
        c=_numbers(1, 5, 1),
    ),
    "baddbmm_of_parts": call(
        lambda m, x, y, z: torch.baddbmm(
            z.flatten(0, 1), x.flatten(0, 1), y.flatten(0, 1)
        ).unflatten(0, (-1, 2)),
        HEADS,
        (2, 6, 3),
        (2, 5, 3),
    ),
    "baddbmm_without_the_sum": call(
        lambda m, x, y: torch.baddbmm(m.c, x, y, beta=0), TOKENS, (6, 3), c=_numbers(1, 5, 3)
    ),
    "attention_with_computed_bias": call(
        lambda m, x, y: F.scaled_dot_product_attention(x, x, x, attn_mask=y), HEADS, (1, 5, 5)
    ),
    "attention_with_computed_mask": call(
        lambda m, x, y: F.scaled_dot_product_attention(x, x, x, attn_mask=y > -2),
        HEADS,
        (1, 5, 5),
    ),
    "places_as_output": call(lambda m, x: x.argmax(1), ROW),
    "mask_as_output": call(lambda m, x: torch.logical_or(x > 1, x < -1)),
}
#: Operators of any size on some axes.
SIZES: dict[str, tuple[Case, tuple[int, ...]]] = {
    "positions_added": (
        call(lambda m, x: x + torch.arange(x.shape[1])[None, :, None], TOKENS),
        (0, 1),
    ),
    "positions_multiplied": (
        call(lambda m, x: x * torch.arange(x.shape[1])[:, None].float(), TOKENS),
        (0, 1),
    ),
    "rows_of_images": (
        call(lambda m, x: x * torch.arange(x.shape[2])[:, None].float()),
        (0, 2, 3),
    ),
    "coordinates": (
        call(
            lambda m, x: torch.cat(
                [x, torch.arange(x.shape[3]).float().expand(x.shape[0], 1, x.shape[2], -1)], 1
            )
        ),
        (0, 2, 3),
    ),
    "distances": (
        call(
            lambda m, x: (
                _scores(x)
                * torch.exp(
                    -(torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs().float()
                )
            ),
            TOKENS,
        ),
        (0, 1),
    ),
    "sum": (call(lambda m, x: x.sum(1), TOKENS), (0, 1)),
    "sum_of_images": (call(lambda m, x: x.sum((1, 2, 3), keepdim=True)), (0, 2, 3)),
    "attention_pooling": (
        call(lambda m, x: ((x @ m.c).softmax(1) * x).sum(1), TOKENS, c=_numbers(6, 1)),
        (0, 1),
    ),
    "slopes_by_head": (  # as of ALiBi
        call(
            lambda m, x: (
                x @ x.transpose(2, 3) + m.c[:, None, None] * torch.arange(x.shape[2])[None, None]
            ).softmax(-1),
            HEADS,
            c=_numbers(2),
        ),
        (0, 2),
    ),
}

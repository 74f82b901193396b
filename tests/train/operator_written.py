"""Operators that are written in others, and values at computed places; see `operator_cases`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from operator_cases import ROW, SIGNAL, TOKENS, Case, Recurrent, call, module
from torch import Tensor, nn


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


def _each(functions: dict[str, Callable[[Tensor], Any]], shape: tuple[int, ...]) -> dict[str, Case]:
    return {
        name: call(lambda m, x, function=function: function(x), shape)
        for name, function in functions.items()
    }


def _ids(x: Tensor, count: int) -> Tensor:
    """Whole numbers below a count."""
    return (x.abs() * 3).long() % count


FUNCTIONS = {
    **_each(
        {
            "lgamma": torch.lgamma,
            "lgamma_large": lambda x: torch.lgamma(x.abs() * 1e4 + 1.0),
            "trigamma": lambda x: torch.polygamma(1, x.abs() + 0.1),
            "mvlgamma": lambda x: torch.mvlgamma(x.abs() + 2.0, 3),
            "erfinv": lambda x: torch.erfinv(x.tanh()),
            "ndtri": lambda x: torch.special.ndtri(x.sigmoid()),
            "ndtri_small": lambda x: torch.special.ndtri(1e-9 * x.sigmoid()),
            "log_ndtr": lambda x: torch.special.log_ndtr(5 * x),
            "i0": lambda x: torch.special.i0(3 * x),
            "i0e": lambda x: torch.special.i0e(3 * x),
            "i1": lambda x: torch.special.i1(3 * x),
            "i1e": lambda x: torch.special.i1e(3 * x),
            "ldexp": lambda x: torch.ldexp(x, torch.tensor([3, -2, 0, 1, 2, -1])),
            "rounded_grid": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 40),
            "rounded_channels": lambda x: torch.fake_quantize_per_channel_affine(
                x, torch.full((6,), 0.1), torch.zeros(6, dtype=torch.int32), 1, -8, 7
            ),
        },
        ROW,
    ),
    "digamma": call(lambda m, x: torch.digamma(x), ROW, positive=True),
}
ORDERS = _each(
    {
        "mode": lambda x: x.round().mode(1)[0],
        "mode_place": lambda x: x.round().mode(-1, keepdim=True)[1].float(),
        "logcumsumexp": lambda x: torch.logcumsumexp(5 * x, 1),
        "one_hot": lambda x: F.one_hot(_ids(x, 4), 4).float(),
        "isin": lambda x: torch.isin(_ids(x, 5), torch.tensor([1, 3])).float(),
        "bits": lambda x: (_ids(x, 9) >> 1 & 1) + (_ids(x, 9) ^ 5) + (_ids(x, 9) << 2 | 3) + 0.0,
        "einsum_trace": lambda x: torch.einsum("nii->n", x[:, :, :5]),
        "infinite_bias": lambda x: (x[..., :5] + torch.full((5, 5), -torch.inf).triu(1)).softmax(
            -1
        ),
        "a_row_of_many": lambda x: x[..., :1] + torch.ones(5, 3),
    },
    TOKENS,
)
PLACES = {
    "table": call(lambda m, x: m.c[_ids(x, 6)], TOKENS, c=_numbers(6, 3)),
    "table_of_numbers": call(lambda m, x: m.c[_ids(x, 6)], TOKENS, c=_numbers(6)),
    "table_of_pairs": call(lambda m, x: m.c[_ids(x, 3), _ids(-x, 2) - 2], TOKENS, c=_numbers(3, 2)),
    "rows_selected": call(
        lambda m, x: m.c.index_select(0, _ids(x, 6).flatten()).view(*x.shape, 3),
        TOKENS,
        c=_numbers(6, 3),
    ),
    "rows_of_flat_ids": call(
        lambda m, x: m.c[_ids(x, 6).flatten()].view(*x.shape, 3), TOKENS, c=_numbers(6, 3)
    ),
    "bags": call(
        lambda m, x: torch.cat(
            [F.embedding_bag(_ids(x, 6), m.c, mode=how) for how in ("mean", "sum", "max")], -1
        ),
        ROW,
        c=_numbers(6, 3),
    ),
    "scatter_reduce": call(
        lambda m, x: torch.cat(
            [
                torch.ones(x.shape[0], 4).scatter_reduce(1, _ids(x, 4), x, how, include_self=whole)
                for how in ("sum", "prod", "mean", "amax", "amin")
                for whole in (True, False)
            ],
            1,
        ),
        ROW,
    ),
    "index_add_to_zeros": call(
        lambda m, x: torch.zeros(x.shape[0], 4, 6).index_add(1, torch.tensor([0, 1, 1, 3, 2]), x),
        TOKENS,
    ),
}


def _changed(x: Tensor) -> Tensor:
    y = x.clone()
    y[y < 0] *= 0.1
    y[y > 1] = torch.log1p(y[y > 1]) - x[y > 1].abs()
    return y


def _rows_changed(x: Tensor) -> Tensor:
    y, below = x.clone(), x[..., 0] < 0
    y[below] = y[below] * 2 + 1
    return y


def _strided(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., ::2] = 0
    y[:, 1::3] = x[:, :2] + 1
    return y


def _on_the_diagonal(x: Tensor) -> Tensor:
    y = x[..., :5].clone()
    y.diagonal(dim1=1, dim2=2).fill_(0)
    y.diagonal(1, 1, 2).copy_(x[:, :4, 5])
    return y


WRITES = _each(
    {
        "under_a_mask": _changed,
        "rows_under_a_mask": _rows_changed,
        "every_second": _strided,
        "diagonal": _on_the_diagonal,
    },
    TOKENS,
)
COMPLEX = _each(
    {
        "quotient": lambda x: (torch.fft.rfft(x) / (torch.fft.rfft(x.flip(1)) + 20)).abs(),
        "exponential": lambda x: torch.view_as_real(torch.exp(1j * x - 0.5)),
        "reciprocal": lambda x: torch.complex(x, x + 1).square().reciprocal().imag,
        "some_frequencies": lambda x: _kept(x),
    },
    SIGNAL,
)


def _kept(x: Tensor) -> Tensor:
    """As in a Fourier neural operator: zeros, but for the first frequencies."""
    given = torch.fft.rfft(x)
    made = torch.zeros(*given.shape[:2], given.shape[2], dtype=torch.cfloat)
    made[:, :, :3] = given[:, :, :3] * (2 - 1j)
    return torch.fft.irfft(made, n=x.shape[-1])


def _stacked(x: Tensor) -> Tensor:
    """As in selective kernels: branches in front of the batch, and weights of each."""
    both = torch.stack([x, x.flip(1)], 0)
    return (both * both.softmax(0)).sum(0)


class Projected(nn.Module):
    """Two layers in both directions, and the states at the end."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        layers: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True}
        self.layer = kind(6, 4, **layers, **settings)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        made, end = self.layer(x)
        hidden: Tensor = end[0] if isinstance(end, tuple) else end
        return torch.cat([made.flatten(1), hidden.transpose(0, 1).flatten(1)], 1)


class Watched(nn.Module):
    """An attention that gives its weights too."""

    def __init__(self, masked: bool, average: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.masked, self.average = masked, average

    def forward(self, x: Tensor) -> Tensor:
        how: dict[str, Any] = {"average_attn_weights": self.average}
        if self.masked:
            how["key_padding_mask"] = x[..., 0] < x[..., 0].mean(1, keepdim=True)
        else:
            how["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
        made, weights = self.attention(x, x, x, **how)
        return torch.cat([made.flatten(1), weights.flatten(1)], 1)


LAYERS = {
    "stack_softmax": call(lambda m, x: _stacked(x), TOKENS),
    "rnn": module(lambda: Projected(nn.RNN), TOKENS),
    "rnn_without_bias": module(lambda: Projected(nn.RNN, bias=False), TOKENS),
    "rnn_relu": module(lambda: Projected(nn.RNN, nonlinearity="relu"), TOKENS),
    "rnn_cell": module(lambda: nn.RNNCell(6, 6), ROW),
    "lstm_projected": module(lambda: Projected(nn.LSTM, proj_size=3), TOKENS),
    "attention_causal_weights": module(lambda: Watched(False, True), TOKENS),
    "attention_masked_weights": module(lambda: Watched(True, False), TOKENS),
}
CASES = {
    f"written_{family}-{name}": case
    for family, cases in (
        ("functions", FUNCTIONS),
        ("orders", ORDERS),
        ("places", PLACES),
        ("writes", WRITES),
        ("complex", COMPLEX),
        ("layers", LAYERS),
    )
    for name, case in cases.items()
}


def _coordinates(x: Tensor) -> Tensor:
    rows, columns = torch.arange(x.shape[2]) + 0.5, torch.arange(x.shape[3]) * 2.0
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    return torch.cat([x, grid.expand(x.shape[0], -1, -1, -1)], 1)


def _anchors(x: Tensor) -> Tensor:
    y = F.avg_pool2d(x, 2)
    rows, columns = torch.arange(y.shape[2]) + 0.5, torch.arange(y.shape[3]) + 0.5
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1]).flatten(1)[None]
    return y[:, :2].flatten(2) + grid


#: Where sizes differ from run to run: the case, and the axes; see `test_operators_of_any_size`.
SIZES: dict[str, tuple[Case, tuple[int, ...]]] = {
    "windows": (call(lambda m, x: x.unfold(2, 4, 2).mean(-1), SIGNAL), (0, 2)),
    "windows_of_tokens": (call(lambda m, x: x.unfold(1, 3, 1), TOKENS), (0, 1)),
    "statistics": (
        call(lambda m, x: torch.cat([x.mean(2), x.std(2)], 1), SIGNAL),
        (0, 2),
    ),
    "variance_of_images": (call(lambda m, x: x.var((1, 2, 3), keepdim=True) * x), (0, 2, 3)),
    "coordinates": (call(lambda m, x: _coordinates(x)), (0, 2, 3)),
    "anchors": (call(lambda m, x: _anchors(x)), (0, 2, 3)),
    "rnn": (module(lambda: Recurrent(nn.RNN), TOKENS), (0, 1)),
    "focus": (
        call(lambda m, x: F.pixel_unshuffle(F.interpolate(x, scale_factor=2), 2) * 2),
        (0, 2, 3),
    ),
}

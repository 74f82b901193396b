"""Operators that order, write to places, or compute with complex numbers; masks of lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from operator_cases import IMAGE, TOKENS, Case, _numbers, call
from torch import Tensor

_SQUARE = (4, 8, 8)
_SOUND = (80,)


def _each(functions: dict[str, Callable[[Tensor], Any]], shape: tuple[int, ...]) -> dict[str, Case]:
    return {
        name: call(lambda m, x, f=function: f(x), shape) for name, function in functions.items()
    }


def _assigned(x: Tensor, places: Any, values: Any) -> Tensor:
    x = x.clone()
    x[places] = values
    return x


def _rows_of_zeros(x: Tensor) -> Tensor:
    made = torch.zeros_like(x)
    made[:, 1:] = x[:, :-1]
    return made


ORDERS = _each(
    {
        "sort": lambda x: x.sort(-1)[0],
        "sort_descending": lambda x: x.sort(1, descending=True)[0],
        "argsort": lambda x: x.argsort(-1, descending=True),
        "median": lambda x: x.median(1)[0],
        "median_keepdim": lambda x: x.median(2, keepdim=True)[0],
        "kthvalue": lambda x: x.kthvalue(2, -1)[0],
        "quantile": lambda x: x.quantile(0.3, 1, keepdim=True),
        "quantile_nearest": lambda x: x.quantile(0.7, -1, interpolation="nearest"),
        "cumprod": lambda x: x.cumprod(1),
        "cummax": lambda x: x.cummax(1)[0],
        "cummin": lambda x: x.cummin(2)[0],
        "bucketize": lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 0.5])),
        "searchsorted_right": lambda x: torch.searchsorted(
            torch.tensor([-1.0, 0.0, 0.5]), x.round(), right=True
        ),
    },
    TOKENS,
)
PLACES = _each(
    {
        "scatter_value": lambda x: torch.zeros_like(x).scatter(2, x.argmax(-1, keepdim=True), 2.0),
        "scatter_of_topk": lambda x: torch.zeros_like(x).scatter(
            -1, x.topk(2, -1)[1], x.softmax(-1).topk(2, -1)[0]
        ),
        "scatter_add": lambda x: x.scatter_add(2, x.topk(3, -1)[1], x[..., :3]),
        "index_put_mask": lambda x: _assigned(x, x < 0, 0.5),
        "index_put_rows": lambda x: _assigned(x, x.mean(-1) > 0, -1.0),
        "index_put_list": lambda x: _assigned(x, (slice(None), [0, 2]), x[:, [3, 1]]),
        "index_add": lambda x: x.index_add(1, torch.tensor([0, 0, 2]), x[:, :3]),
        "index_copy": lambda x: x.index_copy(2, torch.tensor([1, 0]), x[..., 2:4]),
        "index_fill": lambda x: x.index_fill(2, torch.tensor([-1]), 3.0),
        "entry_of_each_sample": lambda x: x[torch.arange(x.shape[0]), x[:, :, 0].argmax(1)],
        "entries_from_the_end": lambda x: x[
            torch.arange(x.shape[0])[:, None], -1 - x[:, :2, 0].round().abs().long().clamp(0, 2)
        ],
        "written_into_zeros": _rows_of_zeros,
    },
    TOKENS,
)
COMPLEX = {
    **_each(
        {
            "fft": lambda x: torch.fft.fft(x).real,
            "fft_imaginary": lambda x: torch.fft.fft(x, dim=1).imag,
            "fft2": lambda x: torch.fft.fft2(x).abs(),
            "fftn_forward": lambda x: torch.fft.fftn(x, dim=(1, 2), norm="forward").real,
            "rfft_longer": lambda x: torch.fft.rfft(x, n=12).abs().square(),
            "rfft_shorter": lambda x: torch.view_as_real(torch.fft.rfft(x, n=5, norm="ortho")),
            "irfft_odd": lambda x: torch.fft.irfft(torch.fft.rfft(x[..., :7]), n=7),
            "ifft": lambda x: torch.fft.ifft(torch.fft.fft(x) * (2 - 1j)).imag,
            "filter": lambda x: torch.fft.irfft2(
                torch.fft.rfft2(x, norm="ortho") * torch.complex(x[..., :5], x[..., 1:6]),
                s=(8, 8),
                norm="ortho",
            ),
            "shift": lambda x: torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1)).abs(),
            "conjugate": lambda x: (torch.fft.rfft(x) * torch.fft.rfft(x.flip(1)).conj()).real,
            "angle": lambda x: torch.fft.rfft(x)[..., 1:4].angle(),
            "rotary_of_complex": lambda x: torch.view_as_real(
                torch.view_as_complex(x.reshape(-1, 4, 8, 4, 2))
                * torch.polar(torch.ones(8, 4), torch.arange(32.0).reshape(8, 4) / 7)
            ).flatten(3),
        },
        _SQUARE,
    ),
    **_each(
        {
            "stft": lambda x: torch.stft(
                x, 16, 4, window=torch.hann_window(16), return_complex=True
            ).abs(),
            "stft_short_window": lambda x: torch.view_as_real(
                torch.stft(x, 32, 8, 20, torch.hann_window(20), center=False, return_complex=True)
            ),
        },
        _SOUND,
    ),
}
PLACES["table_by_argmin"] = call(
    lambda m, x: F.embedding(x.argmin(-1), m.c), TOKENS, c=_numbers(6, 3)
)
CASES = {
    **{f"orders-{name}": case for name, case in ORDERS.items()},
    **{f"places-{name}": case for name, case in PLACES.items()},
    **{f"complex-{name}": case for name, case in COMPLEX.items()},
    "resizing-antialiased": call(
        lambda m, x: F.interpolate(x, size=(5, 3), mode="bilinear", antialias=True), IMAGE
    ),
    "sampling-constant_grid": call(
        lambda m, x: F.grid_sample(x, m.c.expand(x.shape[0], -1, -1, -1), align_corners=False),
        IMAGE,
        c=_numbers(1, 3, 5, 2).tanh(),
    ),
}

"""LSTM, GRU and RNN as one torch operator each while a model is traced.

PyTorch writes out the steps of its own operators in a trace, which fixes the length of the
sequences. These compute the same by PyTorch's kernels and stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import rnn


@torch.library.custom_op("lutra::lstm", mutates_args=())
def _lstm(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rest = (has_biases, num_layers, 0.0, False, bidirectional, batch_first)
    made, hidden, cell = torch.lstm(input, [h, c], params, *rest)
    return made.clone(), hidden.clone(), cell.clone()


@_lstm.register_fake
def _(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = h.shape[-1] * (2 if bidirectional else 1)
    made = input.new_empty((*input.shape[:-1], width))
    return made, h.new_empty(h.shape), c.new_empty(c.shape)


@torch.library.custom_op("lutra::gru", mutates_args=())
def _gru(
    input: Tensor,
    h: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    rest = (has_biases, num_layers, 0.0, False, bidirectional, batch_first)
    made, hidden = torch.gru(input, h, params, *rest)
    return made.clone(), hidden.clone()


@_gru.register_fake
def _(
    input: Tensor,
    h: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    width = h.shape[-1] * (2 if bidirectional else 1)
    return input.new_empty((*input.shape[:-1], width)), h.new_empty(h.shape)


#: What a gate adds to be open (1) or shut (0) for any input.
_OPEN = 100.0


def as_gru(params: Sequence[Tensor]) -> list[Tensor]:
    """Weights of `nn.RNN` with tanh as those of a GRU whose gates never move.

    The old values count whole inside of tanh, and not at all beside it.

    Args:
        params: Of h' = tanh(W x + b + U h + c): W, U, and b and c if there are biases.

    Returns:
        Weights and biases of a GRU, (3 H, ...).
    """
    w, u, *biases = params
    hidden = w.shape[0]
    b, c = biases or (w.new_zeros(hidden), w.new_zeros(hidden))
    none = w.new_zeros(2 * hidden)
    gates = torch.cat([w.new_full((hidden,), _OPEN), w.new_full((hidden,), -_OPEN)])
    return [
        torch.cat([w.new_zeros((2 * hidden, w.shape[1])), w]),
        torch.cat([u.new_zeros((2 * hidden, u.shape[1])), u]),
        torch.cat([gates, b]),
        torch.cat([none, c]),
    ]


@contextmanager
def whole_recurrent_layers() -> Iterator[None]:
    """Have `nn.LSTM`, `nn.GRU` and `nn.RNN` with tanh call these operators in eval mode."""
    module: Any = rnn
    kept = module._VF
    module._VF = _Functions(kept)
    try:
        yield
    finally:
        module._VF = kept


class _Functions:
    """What `torch.nn.modules.rnn` calls, with other forms of two functions."""

    def __init__(self, kept: Any) -> None:
        self._kept = kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kept, name)

    def lstm(self, *args: Any) -> Any:
        return _whole(self._kept.lstm, lambda x, hx, *rest: _lstm(x, *hx, *rest), args)

    def gru(self, *args: Any) -> Any:
        return _whole(self._kept.gru, _gru, args)

    def rnn_tanh(self, *args: Any) -> Any:
        return _whole(self._kept.rnn_tanh, _rnn_tanh, args)


def _rnn_tanh(x: Tensor, h: Tensor, params: list[Tensor], has_biases: bool, *rest: Any) -> Any:
    each = 4 if has_biases else 2
    gates = [g for i in range(0, len(params), each) for g in as_gru(params[i : i + each])]
    return _gru(x, h, gates, True, *rest)


def _whole(kept: Callable[..., Any], whole: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Calls one of two forms of a recurrent layer.

    Args:
        kept: PyTorch's own.
        whole: The operator of this file, which takes neither packed sequences, nor dropout between
            layers, nor projections.
        args: Input, states, weights, whether there are biases, layers, dropout, training mode,
            directions, and whether the batch is first; packed sequences have one more.
    """
    if len(args) != 9 or not isinstance(args[3], bool) or args[6]:
        return kept(*args)
    x, hx, params, has_biases, layers, _, _, bidirectional, batch_first = args
    states = hx if isinstance(hx, Tensor) else hx[1]
    first = hx if isinstance(hx, Tensor) else hx[0]
    if x.ndim != 3 or first.shape != states.shape:
        return kept(*args)
    return whole(x, hx, list(params), has_biases, layers, bidirectional, batch_first)

"""LSTM and GRU as one torch operator each while a model is traced.

PyTorch writes out the steps of its own operators in a trace, which fixes the length of the
sequences. These compute the same by PyTorch's kernels and stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@contextmanager
def whole_recurrent_layers() -> Iterator[None]:
    """Have `nn.LSTM` and `nn.GRU` in eval mode call the operators of this file."""
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

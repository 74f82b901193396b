"""Recurrent layers that no operator of the graph is, written out step by step.

The file grows with the length of the sequence, which is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten
#: A step: what the input adds, the states, and weights for the states; new states, the output last.
_Step = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def projects(params: Sequence[Any], has_biases: bool) -> bool:
    """Whether an LSTM of these weights projects its hidden values."""
    each = 4 if has_biases else 2
    first = params[: each + 1]
    return len(first) > each and first[1].meta["val"].shape[1] != first[0].meta["val"].shape[0] // 4


def _lstm_step(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    h, c = states
    gates = x + F.linear(h, *weights[:2])
    opened, kept, new, shown = gates.chunk(4, -1)
    c = kept.sigmoid() * c + opened.sigmoid() * new.tanh()
    h = F.linear(shown.sigmoid() * c.tanh(), weights[2])
    return [h, c]


def _relu_step(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    return [(x + F.linear(states[0], *weights[:2])).relu()]


def _layers(
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    step: _Step,
    more: int,
) -> Any:
    """All layers and directions; `more` is the number of further weights of each."""
    rows = list((x if batch_first else x.transpose(0, 1)).unbind(1))
    each = 2 + 2 * has_biases + more
    ends: list[list[Tensor]] = [[] for _ in states]
    for layer in range(layers):
        sides = []
        for direction in range(1 + bidirectional):
            index = layer * (1 + bidirectional) + direction
            w, u, *rest = params[index * each : (index + 1) * each]
            b, c = (rest[0], rest[1]) if has_biases else (None, None)
            now = [state[index] for state in states]
            outputs: list[Tensor] = []
            for row in rows[::-1] if direction else rows:
                now = step(F.linear(row, w, b), now, (u, c, *rest[2 * has_biases :]))  # type: ignore[arg-type]
                outputs.append(now[0])
            sides.append(outputs[::-1] if direction else outputs)
            for end, state in zip(ends, now, strict=True):
                end.append(state)
        rows = [
            torch.cat(pair, -1) if bidirectional else pair[0] for pair in zip(*sides, strict=True)
        ]
    made = torch.stack(rows, 1)
    return made if batch_first else made.transpose(0, 1), *(torch.stack(end, 0) for end in ends)


def _steps(x: Tensor, batch_first: bool) -> int | None:
    size = x.shape[1 if batch_first else 0]
    return size if x.ndim == 3 and isinstance(size, int) else None


def _lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    if _steps(input, batch_first) is None:
        return NotImplemented
    rest = (has_biases, num_layers, bidirectional, batch_first)
    return _layers(input, hx, params, *rest, _lstm_step, 1)


def _rnn_relu(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    if _steps(input, batch_first) is None:
        return NotImplemented
    rest = (has_biases, num_layers, bidirectional, batch_first)
    return _layers(input, [hx], params, *rest, _relu_step, 0)


#: What is written for each operator; NotImplemented leaves it as it is.
WRITTEN: Final[dict[Any, Callable[..., Any]]] = {
    _aten.lstm.input: _lstm,
    _aten.rnn_relu.input: _rnn_relu,
}

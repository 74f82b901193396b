"""LSTM and GRU: a node for each layer and direction, and the states as inputs and outputs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lutra.ops.recurrent import GATES
from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import activation, need_constant
from lutra.train.exporting.lowering.core import (
    Deferred,
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    lowers,
)
from lutra.train.exporting.lowering.modules import PROJECTS
from lutra.train.operators.recurrent import as_gru


@dataclass(frozen=True)
class _Layers:
    """What the layers of one call have in common.

    Attributes:
        op: `lstm` or `gru`.
        params: The weights of each layer and direction, and its biases if there are any.
        directions: 1, or 2 where every layer goes both ways.
        hidden: Hidden values of a direction.
        states: States before the first step, (N, layers * directions, hidden) each; none: zeros.
        cells: Whether the cell states at the end are wanted.
    """

    op: str
    params: Sequence[Sequence[Tensor]]
    directions: int
    hidden: int
    states: Sequence[Ref]
    cells: bool


@lowers("lutra.lstm.default", takes=("input", "h", "c"))
def _lstm(
    ctx: Lowering,
    input: Any,
    h: Any,
    c: Any,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Ref | View, ...]:
    return _layers(
        ctx, "lstm", input, (h, c), params, has_biases, num_layers, bidirectional, batch_first
    )


@lowers("aten.lstm.input", takes=("input", "hx"))
def _aten_lstm(
    ctx: Lowering,
    input: Any,
    hx: Sequence[Any],
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Ref | View, ...]:
    return _layers(
        ctx, "lstm", input, hx, params, has_biases, num_layers, bidirectional, batch_first
    )


@lowers("lutra.gru.default", takes=("input", "h"))
def _gru(
    ctx: Lowering,
    input: Any,
    h: Any,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Ref | View, ...]:
    return _layers(
        ctx, "gru", input, (h,), params, has_biases, num_layers, bidirectional, batch_first
    )


@lowers("aten.gru.input", takes=("input", "hx"))
def _aten_gru(
    ctx: Lowering,
    input: Any,
    hx: Any,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Ref | View, ...]:
    return _gru(ctx, input, hx, params, has_biases, num_layers, bidirectional, batch_first)


@lowers("aten.rnn_tanh.input", takes=("input", "hx"))
def _rnn_tanh(
    ctx: Lowering,
    input: Any,
    hx: Any,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Ref | View, ...]:
    each = 4 if has_biases else 2
    weights = [need_constant(p, "a weight") for p in params]
    gates = [g for i in range(0, len(params), each) for g in as_gru(weights[i : i + each])]
    return _gru(ctx, input, hx, gates, True, num_layers, bidirectional, batch_first)


@lowers("aten.rnn_tanh_cell.default", takes=("hx",))
def _rnn_tanh_cell(
    ctx: Lowering, input: Ref, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any
) -> Ref:
    given = [need_constant(p, "a weight") for p in (w_ih, w_hh, b_ih, b_hh) if p is not None]
    gates = as_gru(given)
    return _cell(ctx, "gru", input, (hx,), gates)


@lowers("aten.lstm_cell.default", takes=("hx",))
def _lstm_cell(
    ctx: Lowering,
    input: Ref,
    hx: Sequence[Any],
    w_ih: Any,
    w_hh: Any,
    b_ih: Any,
    b_hh: Any,
) -> tuple[Ref, Ref]:
    made = _cell(ctx, "lstm", input, hx, (w_ih, w_hh, b_ih, b_hh))
    hidden = made.shape[1] // 2
    return _columns(ctx, made, 0, hidden), _columns(ctx, made, hidden, 2 * hidden)


@lowers("aten.gru_cell.default", takes=("hx",))
def _gru_cell(
    ctx: Lowering, input: Ref, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any
) -> Ref:
    return _cell(ctx, "gru", input, (hx,), (w_ih, w_hh, b_ih, b_hh))


def _cell(ctx: Lowering, op: str, x: Ref, states: Sequence[Any], params: Sequence[Any]) -> Ref:
    """One step, as a sequence of one token: (N, H), or (N, 2 H) with the cell."""
    given = (
        []
        if all(is_zero(ctx, each) for each in states)
        else [ctx.realise(activation(ctx, each)) for each in states]
    )
    tensors = _tensors(op, [p for p in params if p is not None])
    hidden = tensors["weight_hh"].shape[1]
    token = views.emit_reshape(ctx, x, (None, 1, x.shape[1]), "token")
    made = _emit(ctx, op, token, given, tensors, reverse=False, cells=op == "lstm")
    return views.emit_reshape(ctx, made, (None, made.shape[2] if op == "lstm" else hidden))


def _layers(
    ctx: Lowering,
    op: str,
    input: Any,
    states: Sequence[Any],
    params: Sequence[Any],
    has_biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Ref | View, ...]:
    x = activation(ctx, input)
    if x.rank != 3:
        raise UnsupportedUse("its input must have three axes: batch, tokens and features")
    sequence = ctx.realise(x if batch_first else views.permuted(ctx, x, (1, 0, 2)))
    directions = 2 if bidirectional else 1
    each = 4 if has_biases else 2
    if len(params) != each * layers * directions:
        raise UnsupportedUse(PROJECTS)
    weights = [need_constant(p, "a weight") for p in params]
    parts = [weights[i : i + each] for i in range(0, len(weights), each)]
    given: list[Ref] = []
    if not all(is_zero(ctx, state) for state in states):
        given = [
            ctx.realise(views.permuted(ctx, activation(ctx, state), (1, 0, 2))) for state in states
        ]
    hidden = int(parts[0][1].shape[1])
    cells = op == "lstm" and _is_read(ctx, 2)
    found = _Layers(op, parts, directions, hidden, given, cells)
    made, ends = _stack(ctx, found, sequence)
    output = made if batch_first else views.permuted(ctx, made, (1, 0, 2))
    count = layers * directions
    return output, *(_state(ctx, found, parts, count) for parts in ends)


def _stack(ctx: Lowering, layers: _Layers, x: Ref) -> tuple[Ref, list[list[Ref]]]:
    """The output of the last layer, and the state at the end of each layer and direction: h, and c
    if it is wanted."""
    ends: list[list[Ref]] = [[], []] if layers.cells else [[]]
    hidden = layers.hidden
    for first in range(0, len(layers.params), layers.directions):
        sides = []
        for index in range(first, first + layers.directions):
            reverse = index > first
            given = [_row(ctx, state, index, hidden) for state in layers.states]
            made = _emit(
                ctx,
                layers.op,
                x,
                given,
                _tensors(layers.op, layers.params[index]),
                reverse=reverse,
                cells=layers.cells,
            )
            end = end_of(ctx, made, reverse)
            if layers.cells:
                ends[0].append(_columns(ctx, end, 0, hidden))
                ends[1].append(_columns(ctx, end, hidden, 2 * hidden))
                made = _cut(ctx, made, 2, 0, hidden, "hidden")
            else:
                ends[0].append(end)
            sides.append(made)
        x = sides[0] if len(sides) == 1 else _concat(ctx, sides, 2)
    return x, ends


def _emit(
    ctx: Lowering,
    op: str,
    x: Ref,
    states: Sequence[Ref],
    tensors: dict[str, Tensor],
    *,
    reverse: bool,
    cells: bool,
) -> Ref:
    attrs = {"reverse": reverse} | ({"cells": cells} if op == "lstm" else {})
    width = tensors["weight_hh"].shape[1] * (2 if cells else 1)
    shape = (*x.shape[:2], width)
    return ctx.emit(op, (x, *states), shape, attrs=attrs, tensors=tensors, suffix=op)


def _tensors(op: str, params: Sequence[Any]) -> dict[str, Tensor]:
    weight_ih, weight_hh, *biases = (need_constant(p, "a weight") for p in params)
    rows, hidden = weight_hh.shape
    if rows != GATES[op] * hidden:
        raise UnsupportedUse(PROJECTS)
    bias_ih, bias_hh = biases or (torch.zeros(rows), torch.zeros(rows))
    return {
        "weight_ih": weight_ih,
        "weight_hh": weight_hh,
        "bias_ih": bias_ih,
        "bias_hh": bias_hh,
    }


def is_zero(ctx: Lowering, x: Any) -> bool:
    """Whether a state is nothing but zeros, for every size of the batch."""
    if isinstance(x, Tensor):
        return not bool(x.any())
    if not isinstance(x, Deferred) or x.inputs:
        return False
    sizes = (ctx.sources.sizes(shift=shift, first=batch) for shift, batch in ((0, 2), (1, 3)))
    return not any(bool(ctx.sources.evaluate(x.node, each, {}).any()) for each in sizes)


def _is_read(ctx: Lowering, index: int) -> bool:
    """Whether anybody reads a result of the operator that is being lowered."""
    return any(
        user.target is operator.getitem and user.args[1] == index and bool(user.users)
        for user in ctx.node.users
    )


def end_of(ctx: Lowering, made: Ref, reverse: bool) -> Ref:
    """What stands at the place of the last step: (N, T, D) to (N, D)."""
    shape = (None, made.shape[2])
    if reverse:
        return views.emit_reshape(ctx, _cut(ctx, made, 1, 0, 1, "first"), shape, "end")
    return ctx.emit("from_end", made, shape, attrs={"axis": 1, "back": 1}, suffix="end")


def _state(ctx: Lowering, layers: _Layers, ends: Sequence[Ref], count: int) -> Ref | View:
    """(layers * directions, N, H) from (N, H) of each."""
    joined = ends[0] if len(ends) == 1 else _concat(ctx, ends, 1)
    apart = views.reshaped(ctx, joined, (ctx.batch, count, layers.hidden))
    assert apart is not None  # one axis is cut in two
    return views.permuted(ctx, apart, (1, 0, 2))


def _row(ctx: Lowering, state: Ref, index: int, hidden: int) -> Ref:
    """(N, H) of a state (N, layers * directions, H)."""
    row = state if state.shape[1] == 1 else _cut(ctx, state, 1, index, index + 1, "state")
    return views.emit_reshape(ctx, row, (None, hidden), "state")


def _columns(ctx: Lowering, x: Ref, start: int, stop: int) -> Ref:
    return _cut(ctx, x, 1, start, stop, "part")


def _cut(ctx: Lowering, x: Ref, axis: int, start: int, stop: int, suffix: str) -> Ref:
    shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])
    attrs = {"axis": axis, "start": start, "stop": stop, "step": 1}
    return ctx.emit("slice", x, shape, attrs=attrs, suffix=suffix)


def _concat(ctx: Lowering, parts: Sequence[Ref], axis: int) -> Ref:
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return ctx.emit("concat", parts, tuple(shape), attrs={"axis": axis}, suffix="both")

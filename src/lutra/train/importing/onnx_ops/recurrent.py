"""Recurrent layers: `nn.LSTM`, `nn.GRU` and `nn.RNN`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lutra.train.importing.builder import Builder, Refusal, Value
from lutra.train.importing.onnx_ops.registry import Op, is_constant, onnx_op

#: The gates of torch in the order of ONNX: i o f c, z r h.
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
_DEFAULT = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}
_LAYERS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


@onnx_op("DynamicQuantizeLSTM", domain="com.microsoft")
def _dynamic_lstm(b: Builder, op: Op, x: Value, w: Any, r: Any, *rest: Any) -> Any:
    states, scales = [*rest, *[None] * 9][:5], [*rest, *[None] * 9][5:9]
    if not is_constant(w, r, *scales):
        raise Refusal("its weights are computed while the model runs; they must be constants")
    op.context.is_quantized = True
    floats = [
        ((m.float() - zero.float().reshape(-1, 1, 1)) * scale.float().reshape(-1, 1, 1))
        .transpose(1, 2).contiguous()
        for m, scale, zero in ((w, *scales[:2]), (r, *scales[2:]))
    ]  # fmt: skip
    return recurrent(b, replace(op, type="LSTM"), x, *floats, *states)


@onnx_op("LSTM", "GRU", "RNN")
def recurrent(b: Builder, op: Op, x: Value, w: Value, r: Value, *rest: Value | None) -> Any:
    """A recurrent layer, for one direction or two."""
    bias, lengths, h, c, peephole = [*rest, None, None, None, None, None][:5]
    if not is_constant(w, r) or not (bias is None or is_constant(bias)):
        raise Refusal("its weights are computed while the model runs; they must be constants")
    assert isinstance(w, Tensor)
    assert isinstance(r, Tensor)
    if w.ndim != 3 or r.ndim != 3 or b.ndim(x) != 3:
        raise Refusal(f"its input and weights have {b.ndim(x)}, {w.ndim} and {r.ndim} axes, not 3")
    direction = str(op.get("direction", "forward"))
    _check(op, peephole, direction, w.shape[0])
    batch_first = bool(op.get("layout", 0))
    if batch_first:
        x = b.call(torch.transpose, x, 0, 1)
        h, c = (None if s is None else b.call(torch.transpose, s, 0, 1) for s in (h, c))
    _check_lengths(b, x, lengths)
    if direction == "reverse":
        x = b.call(torch.flip, x, [0])
    layer = _layer(op, w, r, bias if isinstance(bias, Tensor) else None)
    y, last_h, last_c = _called(b, op, layer, x, h, c)
    if direction == "reverse":
        y = b.call(torch.flip, y, [0])
    hidden, count = r.shape[2], w.shape[0]
    if op.wants(0):  # (T, N, D * H) -> (T, D, N, H)
        if count == 1:
            y = b.call(torch.unsqueeze, y, 1)
        else:
            y = b.call(torch.unflatten, y, 2, (count, hidden))
            y = b.call(torch.permute, y, (0, 2, 1, 3))
    if batch_first:
        y = b.call(torch.permute, y, (2, 0, 1, 3)) if op.wants(0) else y
        last_h, last_c = (
            None if s is None else b.call(torch.transpose, s, 0, 1) for s in (last_h, last_c)
        )
    return (y, last_h) if op.type != "LSTM" else (y, last_h, last_c)


def _check(op: Op, peephole: Value | None, direction: str, count: int) -> None:
    if direction not in ("forward", "reverse", "bidirectional"):
        raise Refusal(f"its direction is {direction!r}")
    if count != (2 if direction == "bidirectional" else 1):
        raise Refusal(f"it has weights for {count} directions, and its direction is {direction!r}")
    default = _DEFAULT[op.type] * count
    given = [str(name).lower() for name in op.get("activations", default)]
    if given != default and not (op.type == "RNN" and given == ["relu"] * count):
        raise Refusal(f"its activations are {given}; PyTorch has {default}")
    if (
        op.get("clip")
        or op.get("input_forget", 0)
        or (peephole is not None and not (isinstance(peephole, Tensor) and not peephole.any()))
    ):
        raise Refusal("it has peepholes, coupled gates or a limit, which PyTorch does not have")
    if op.type == "GRU" and not op.get("linear_before_reset", 0):
        raise Refusal(
            "its reset gate comes before the matrix (linear_before_reset=0); PyTorch has only the "
            "other form"
        )


def _check_lengths(b: Builder, x: Value, lengths: Value | None) -> None:
    if lengths is None:
        return
    steps = b.sizes(x)[0]
    if not isinstance(lengths, Tensor) or steps is None or not bool((lengths == steps).all()):
        raise Refusal("each sample has a length of its own; give samples of one length")


def _layer(op: Op, w: Tensor, r: Tensor, bias: Tensor | None) -> Any:
    count, rows, inputs = w.shape
    hidden = r.shape[2]
    gates = _GATES[op.type]
    fits = rows == len(gates) * hidden and tuple(r.shape) == (count, rows, hidden)
    if not fits or (bias is not None and tuple(bias.shape) != (count, 2 * rows)):
        raise Refusal(
            f"its weights of shapes {tuple(w.shape)} and {tuple(r.shape)} do not fit each other"
        )
    more = {}
    if op.type == "RNN" and [str(a).lower() for a in op.get("activations", ())][:1] == ["relu"]:
        more["nonlinearity"] = "relu"
    layer = _LAYERS[op.type](
        inputs, hidden, bias=bias is not None, bidirectional=count == 2, **more
    )

    def ordered(matrix: Tensor) -> nn.Parameter:
        parts = matrix.float().reshape(len(gates), hidden, *matrix.shape[1:])
        return nn.Parameter(parts[list(gates)].reshape(matrix.shape).contiguous().clone())

    for i, suffix in enumerate(("", "_reverse")[:count]):
        setattr(layer, f"weight_ih_l0{suffix}", ordered(w[i]))
        setattr(layer, f"weight_hh_l0{suffix}", ordered(r[i]))
        if bias is not None:
            setattr(layer, f"bias_ih_l0{suffix}", ordered(bias[i, :rows]))
            setattr(layer, f"bias_hh_l0{suffix}", ordered(bias[i, rows:]))
    return layer


def _called(
    b: Builder, op: Op, layer: nn.Module, x: Value, h: Value | None, c: Value | None
) -> tuple[Any, Any, Any]:
    states = [s for s in (h, c if op.type == "LSTM" else None) if s is not None]
    if all(_is_zero(s) for s in states):
        states = []
    given: Any = ()
    if states:
        count = b.size(x, 1)
        wanted = (h, c)[: 2 if op.type == "LSTM" else 1]
        if any(s is None for s in wanted):
            raise Refusal("it has one of its two initial states only")
        given = tuple(_for_batch(b, s, count) for s in wanted)
        given = (given,) if op.type == "LSTM" else given
    y, last = b.module(op.path, layer, x, *given, sketch=_sketch(layer))
    return (y, *last) if isinstance(last, tuple) else (y, last, None)


def _sketch(layer: Any) -> Any:
    """What makes outputs and last states of the right shape."""
    count, hidden = 1 + layer.bidirectional, layer.hidden_size

    def sketch(x: Tensor, *_: Any) -> Any:
        y = x.new_empty(x.shape[0], x.shape[1], count * hidden)
        last = x.new_empty(count, x.shape[1], hidden)
        return y, (last, last.clone()) if isinstance(layer, nn.LSTM) else last

    return sketch


def _is_zero(x: Value) -> bool:
    if isinstance(x, fx.Node):
        fills = x.target in (torch.full, torch.zeros) and x.op == "call_function"
        return bool(fills and len(x.args) > 1 and x.args[1] == 0)
    return isinstance(x, Tensor) and not bool(x.any())


def _for_batch(b: Builder, state: Value | None, count: Any) -> Any:
    """An initial state of one sample as that of all samples."""
    if state is None or not isinstance(state, Tensor) or state.shape[1] != 1 or count == 1:
        return state
    return b.call(torch.Tensor.expand, state, [-1, count, -1])

"""`nn.GRU` and `nn.LSTM` whose matrices are linear layers of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lutra.errors import LutraError
from lutra.ops.recurrent import GATES
from lutra.train.layers.base import FrozenLayer, QuantizedLayer
from lutra.train.layers.forms import is_parametrized, runs_forward_of
from lutra.train.operators.frozen import FrozenNode
from lutra.train.operators.int8_recurrent import int8_recurrent

#: The operator of the linear layers that the operators of recurrent layers in int8 are made of.
_INT8_LINEAR = "int8_linear"


def why_no_matrices(rnn: nn.Module) -> str | None:
    """Why a recurrent layer cannot have linear layers of its own; None where it can."""
    name = type(rnn).__name__
    if not isinstance(rnn, nn.GRU | nn.LSTM):
        return f"{name} has no lookup form"
    if not (runs_forward_of(rnn, nn.GRU) or runs_forward_of(rnn, nn.LSTM)):
        return f"{name} has a forward of its own"
    if rnn.proj_size:
        return f"{name} with proj_size projects its states, which has no int8 form"
    if is_parametrized(rnn):
        return f"the weights of {name} are computed before each call"
    return None


def matrix_names(rnn: nn.Module) -> list[str]:
    """The linear layers of a `Recurrent` in the order in which it calls them first."""
    shape: Any = rnn  # its numbers of layers and directions
    sides = ("", "_reverse") if shape.bidirectional else ("",)
    return [
        f"{part}_l{layer}{side}"
        for layer in range(shape.num_layers)
        for side in sides
        for part in ("ih", "hh")
    ]


class Recurrent(nn.Module):
    """Computes what `nn.GRU` or `nn.LSTM` does, by calls of linear layers that can be replaced.

    The products of the inputs of all steps are one call of `ih_l0`, `ih_l0_reverse`, `ih_l1`, ...;
    each step calls `hh_l0`, ... once. With both in int8 a direction of a layer is one operator of
    the engine where no gradient is asked for, which is what is exported.

    Args:
        dense: the layer; its parameters are those of the linear layers now.
    """

    def __init__(self, dense: nn.GRU | nn.LSTM) -> None:
        super().__init__()
        self.mode = dense.mode
        self.input_size, self.hidden_size = dense.input_size, dense.hidden_size
        self.num_layers, self.bidirectional = dense.num_layers, dense.bidirectional
        self.batch_first, self.dropout, self.bias = dense.batch_first, dense.dropout, dense.bias
        self.proj_size = 0
        for name in matrix_names(dense):
            self.add_module(name, _linear(dense, name))
        self.train(dense.training)

    def flatten_parameters(self) -> None:
        """Does nothing: the weights are those of linear layers."""

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """Arguments and results of `nn.GRU` and `nn.LSTM`.

        Raises:
            LutraError: packed sequences.
        """
        if isinstance(input, PackedSequence):
            raise LutraError(
                "a converted GRU or LSTM takes no packed sequences; give padded ones and read the "
                "outputs up to each length"
            )
        lstm = self.mode == "LSTM"
        states = () if hx is None else tuple(hx) if lstm else (hx,)
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
            states = tuple(state.unsqueeze(1) for state in states)
        x = input if self.batch_first else input.transpose(0, 1)
        states = tuple(state.transpose(0, 1) for state in states)  # (N, layers, H)
        ends: list[list[Tensor]] = [[], []] if lstm else [[]]
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            sides = []
            for side in range(directions):
                index = layer * directions + side
                given = [state[:, index] for state in states]
                y, last = self._direction(x, layer, side == 1, given)
                for i, end in enumerate(ends):
                    end.append(last[:, i * self.hidden_size : (i + 1) * self.hidden_size])
                sides.append(y[:, :, : self.hidden_size] if lstm else y)
            x = sides[0] if directions == 1 else torch.cat(sides, 2)
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout)
        output = x if self.batch_first else x.transpose(0, 1)
        finals = [torch.stack(end, 1).transpose(0, 1) for end in ends]
        if not batched:
            output = output.squeeze(0 if self.batch_first else 1)
            finals = [final.squeeze(1) for final in finals]
        return output, (finals[0], finals[1]) if lstm else finals[0]

    def _direction(
        self, x: Tensor, layer: int, reverse: bool, states: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(N, T, H) of x (N, T, C), or (N, T, 2 H) of an LSTM: h, and c beside it; and what the
        last step made."""
        side = "_reverse" if reverse else ""
        ih, hh = self.get_submodule(f"ih_l{layer}{side}"), self.get_submodule(f"hh_l{layer}{side}")
        parts = (_frozen(ih), _frozen(hh))
        if parts[0] is not None and parts[1] is not None:
            return self._whole(x, parts[0], parts[1], reverse, states)
        a = ih(x)
        h, *cells = states or [x.new_zeros(x.shape[0], self.hidden_size)] * (
            2 if self.mode == "LSTM" else 1
        )
        made = []
        tokens = range(x.shape[1])
        for t in reversed(tokens) if reverse else tokens:
            b = hh(h)
            if cells:
                i, f, g, o = (b + a[:, t]).chunk(4, 1)
                cells = [f.sigmoid() * cells[0] + i.sigmoid() * g.tanh()]
                h = o.sigmoid() * cells[0].tanh()
            else:
                (ar, az, an), (br, bz, bn) = a[:, t].chunk(3, 1), b.chunk(3, 1)
                update = (bz + az).sigmoid()
                fresh = (an + (br + ar).sigmoid() * bn).tanh()
                h = (1 - update) * fresh + update * h
            made.append(torch.cat((h, *cells), 1))
        return torch.stack(made[::-1] if reverse else made, 1), made[-1]

    def _whole(
        self,
        x: Tensor,
        ih: FrozenLayer,
        hh: FrozenLayer,
        reverse: bool,
        states: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The same by the engine's operator."""
        name = self.mode.lower()
        tensors: dict[str, Tensor] = {}
        attrs: dict[str, Any] = {"reverse": reverse} | ({"cells": True} if name == "lstm" else {})
        for side, layer, grid in (("ih", ih, "act"), ("hh", hh, "state")):
            tensors |= {f"{role}_{side}": tensor for role, tensor in layer.tensors.items()}
            for part in ("scale", "zero", "bits"):
                attrs[f"{grid}_{part}"] = layer.node.attrs[f"act_{part}"]
        node = FrozenNode(f"int8_{name}", attrs, tuple(tensors))
        made = int8_recurrent(x, list(states), list(tensors.values()), node.to_json())
        return cast(tuple[Tensor, Tensor], made)

    def extra_repr(self) -> str:
        return (
            f"{self.mode}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, "
            f"bidirectional={self.bidirectional}, batch_first={self.batch_first}"
        )


def _frozen(layer: nn.Module) -> FrozenLayer | None:
    """A layer of int8 as the engine runs it; None for others, and where a gradient is asked for or
    somebody watches the calls."""
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        return None
    if isinstance(layer, QuantizedLayer) and layer.op == _INT8_LINEAR:
        if layer.training or torch.is_grad_enabled():
            return None
        return cast(FrozenLayer, layer.frozen())
    return layer if isinstance(layer, FrozenLayer) and layer.node.op == _INT8_LINEAR else None


def _linear(dense: nn.GRU | nn.LSTM, name: str) -> nn.Linear:
    """A linear layer with the parameters of a matrix of a recurrent layer."""
    weight = getattr(dense, f"weight_{name}")
    assert weight.shape[0] == GATES[dense.mode.lower()] * dense.hidden_size
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=dense.bias, device="meta")
    made.weight = weight
    if dense.bias:
        made.bias = getattr(dense, f"bias_{name}")
    return made

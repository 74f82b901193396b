"""One direction of a recurrent layer with matrices in int8, as one PyTorch operator.

It stays whole in a trace, whatever the length of the sequences is, and is computed by the engine,
so that PyTorch has the bits of the exported file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lutra.graph import Graph
from lutra.node import Node, Value
from lutra.runtime.session import Session
from lutra.train.operators import native
from lutra.train.operators.frozen import FrozenNode


@torch.library.custom_op("lutra::int8_recurrent", mutates_args=())
def int8_recurrent(
    x: Tensor, states: Sequence[Tensor], tensors: Sequence[Tensor], node: str
) -> tuple[Tensor, Tensor]:
    """(N, T, H) of x (N, T, C), or (N, T, 2 H) with the cells of an LSTM; and what it has at the
    place of the last step.

    Args:
        x: the input.
        states: before the first step, (N, H) each; none are zeros.
        tensors: of `int8_lstm` or `int8_gru`, in the order of the roles of `node`.
        node: `FrozenNode.to_json()`.
    """
    given = [t.detach().float().cpu() for t in (x, *states)]
    session = native.cached(
        tuple(tensors), (node, len(states)), lambda: _session(node, len(states), tensors)
    )
    names = [value.name for value in session.graph.inputs]
    feeds = {name: t.contiguous().numpy() for name, t in zip(names, given, strict=True)}
    (made,) = session.run(None, feeds)
    last = made[:, 0 if FrozenNode.from_json(node).attrs["reverse"] else -1]
    return torch.from_numpy(made.copy()).to(x.device), torch.from_numpy(last.copy()).to(x.device)


@int8_recurrent.register_fake
def _(
    x: Tensor, states: Sequence[Tensor], tensors: Sequence[Tensor], node: str
) -> tuple[Tensor, Tensor]:
    parsed = FrozenNode.from_json(node)
    hidden = tensors[parsed.roles.index("weight_hh")].shape[1]
    width = hidden * (2 if parsed.attrs.get("cells") else 1)
    made = x.new_empty((x.shape[0], x.shape[1], width), dtype=torch.float32)
    return made, x.new_empty((x.shape[0], width), dtype=torch.float32)


def _session(text: str, states: int, tensors: Sequence[Tensor]) -> Session:
    """A graph of one node, with open batch and length."""
    parsed = FrozenNode.from_json(text)
    arrays = {role: t.detach().cpu().numpy() for role, t in zip(parsed.roles, tensors, strict=True)}
    shapes = [(None, None, arrays["weight_ih"].shape[1])]
    inputs = [Value("x", "float32", shapes[0])]
    inputs += [
        Value(name, "float32", (None, arrays["weight_hh"].shape[1])) for name in "hc"[:states]
    ]
    names = tuple(value.name for value in inputs)
    roles = {role: role for role in arrays}
    node = Node(parsed.op, parsed.op, names, "y", parsed.attrs, roles)
    graph = Graph(inputs=tuple(inputs), outputs=("y",), nodes=(node,), tensors=arrays)
    return Session(graph, threads=torch.get_num_threads(), check_finite=False)

"""Masks that a model makes of the lengths of its sequences, for lengths of any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra import Session, runnable_isas
from lutra.format import load_graph
from lutra.train import export
from lutra.train.layers.attention import plain_attention


def _kept(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(x.size(1))[None] < lengths[:, None]


class Net(nn.Module):
    def __init__(self, function: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(8, 24)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 2)
        self.gru = nn.GRU(8, 5, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.function(self, x, lengths)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _bool(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    mask = _kept(x, lengths)[:, None, None]
    return _joined(F.scaled_dot_product_attention(*net.heads(x), attn_mask=mask))


def _causal(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    early = torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril()
    mask = _kept(x, lengths)[:, None, None] & early
    return _joined(F.scaled_dot_product_attention(*net.heads(x), attn_mask=mask))


def _added(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    q, k, v = net.heads(x)
    bias = (1 - _kept(x, lengths).float())[:, None, None] * -1e9
    return _joined((q @ k.mT / 2 + bias).softmax(-1) @ v)


def _filled(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    drop = ~_kept(x, lengths)[:, None]
    return (x @ x.mT).masked_fill(drop, float("-inf")).softmax(-1) @ x


def _layer(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    made: Tensor = net.attention(x, x, x, key_padding_mask=~_kept(x, lengths))[0]
    return made


def _encoder(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    made: Tensor = net.encoder(x, src_key_padding_mask=~_kept(x, lengths))
    return made


def _pooled(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    keep = _kept(x, lengths)
    weight = torch.where(keep, x[..., 0], torch.full_like(x[..., 0], float("-inf")))
    return (weight.softmax(-1)[:, None] @ x).squeeze(1)


def _last(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    made: Tensor = net.gru(x)[0][torch.arange(x.size(0)), lengths - 1]
    return made


def _shares(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    """Numbers with fractions that integers give: compared, cast and made bools."""
    half = lengths.float() / 2
    return x.mean(1) * (half > 1).float()[:, None] + half.long()[:, None] + half.bool()[:, None]


@pytest.mark.parametrize(
    "function",
    [_bool, _causal, _added, _filled, _layer, _encoder, _pooled, _last, _shares],
    ids=lambda function: function.__name__[1:],
)
def test_masks_of_lengths(
    function: Callable[[Net, Tensor, Tensor], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, path = Net(function).eval(), tmp_path / "m.lutra"
    export(net, path, (torch.randn(2, 6, 8), torch.tensor([6, 3])), dynamic_axes={"x": (1,)})
    ops = [node.op for node in load_graph(path).nodes]
    if function in (_bool, _causal, _added, _encoder):  # one operator, not its parts
        assert "masked_attention" in ops
        assert "softmax" not in ops
    for count in (5, 9):
        x, lengths = torch.randn(3, count, 8), torch.tensor([count, 1, 3])
        with torch.no_grad(), plain_attention():
            want = net(x, lengths)
        for isa in runnable_isas():
            session = Session(load_graph(path), isa=isa)
            (got,) = session.run(None, {"x": x.numpy(), "lengths": lengths.numpy()})
            assert torch.allclose(torch.from_numpy(got), want, atol=2e-5)

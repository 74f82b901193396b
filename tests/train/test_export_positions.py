"""Export of rotary embeddings and biases of relative positions, of fixed and of any length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported import check_model, ops
from torch import Tensor, nn

from lutra import Session
from lutra.errors import UnsupportedModelError
from lutra.format import load_graph
from lutra.train.exporting.export import export


def halves(x: Tensor) -> Tensor:
    return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)


def chunks(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), dim=-1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Rotary(nn.Module):
    """Attention whose queries and keys are rotated."""

    def __init__(self, turn: Callable[[Tensor], Tensor], heads_last: bool = False) -> None:
        super().__init__()
        self.turn, self.heads_last = turn, heads_last
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.register_buffer("rate", torch.tensor([1.0, 0.1, 0.02]))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        angles = torch.arange(tokens)[:, None] * self.rate
        double = (
            angles.repeat_interleave(2, -1) if self.turn is pairs else torch.cat(2 * [angles], -1)
        )
        cos, sin = double.cos()[None], double.sin()[None]
        q, k, v = (y.view(batch, tokens, 2, 6) for y in self.qkv(x).chunk(3, -1))
        if not self.heads_last:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        axis = 2 if self.heads_last else 1
        cos, sin = cos.unsqueeze(axis), sin.unsqueeze(axis)
        q, k = (y * cos + self.turn(y) * sin for y in (q, k))
        if self.heads_last:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))
        return self.out(y.transpose(1, 2).reshape(batch, tokens, 12))


@pytest.mark.parametrize("turn", [halves, chunks, pairs])
@pytest.mark.parametrize("heads_last", [False, True])
def test_rotary(tmp_path: Path, turn: Callable[[Tensor], Tensor], heads_last: bool) -> None:
    graph = check_model(tmp_path, Rotary(turn, heads_last), (7, 12))
    assert ops(graph).count("rotary") == 2
    assert not {"concat", "affine", "mul"} & set(ops(graph))


@pytest.mark.parametrize("turn", [halves, chunks, pairs])
def test_rotary_of_any_length(tmp_path: Path, turn: Callable[[Tensor], Tensor]) -> None:
    model = Rotary(turn).eval()
    path = tmp_path / "m.lutra"
    export(model, path, torch.randn(2, 6, 12), dynamic_axes=(1,))
    assert ops(load_graph(path)).count("rotary") == 2
    for tokens in (1, 5, 33):
        x = torch.randn(3, tokens, 12)
        with torch.no_grad():
            want = model(x).numpy()
        (got,) = Session(path).run(None, {"x": x.numpy()})
        np.testing.assert_allclose(got, want, atol=1e-5)


class Biased(nn.Module):
    """Attention with a bias for each head and distance, gathered from a table."""

    def __init__(self, explicit: bool, tokens: int | None = None, chosen: bool = False) -> None:
        super().__init__()
        self.explicit, self.chosen = explicit, chosen
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.table = nn.Embedding(9, 2)
        index = None if tokens is None else self.buckets(tokens)
        self.register_buffer("index", index)

    @staticmethod
    def buckets(tokens: int) -> Tensor:
        place = torch.arange(tokens)
        return (place - place[:, None]).clamp(-4, 4) + 4

    def bias(self, tokens: int) -> Tensor:
        index = self.buckets(tokens) if self.index is None else self.index
        return self.table(index).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (y.view(batch, tokens, 2, 6).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        bias, terms = self.bias(tokens), []
        if mask is not None:
            keys, least = mask[:, None, None], torch.finfo(torch.float32).min
            if self.chosen:
                bias = torch.where(keys.bool(), bias, least)
            else:
                terms = [(1.0 - keys.float()) * least]
        if self.explicit:
            scores = q @ k.transpose(-1, -2) / 6**0.5 + bias
            y = sum(terms, scores).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=sum(terms, bias))
        return self.out(y.transpose(1, 2).reshape(batch, tokens, 12))


@pytest.mark.parametrize("explicit", [True, False])
def test_a_constant_bias(tmp_path: Path, explicit: bool) -> None:
    graph = check_model(tmp_path, Biased(explicit, 7), (7, 12))
    assert "softmax" in ops(graph)
    assert not {"gather", "embedding", "relative_bias"} & set(ops(graph))


@pytest.mark.parametrize(
    ("explicit", "masked", "chosen"),
    [
        (True, False, False),
        (False, False, False),
        (True, True, False),
        (False, True, False),
        (False, True, True),
    ],
)
def test_a_bias_of_any_length(tmp_path: Path, explicit: bool, masked: bool, chosen: bool) -> None:
    model = Biased(explicit, chosen=chosen).eval()
    path = tmp_path / "m.lutra"

    def inputs(batch: int, tokens: int) -> tuple[Tensor, ...]:
        mask = (torch.rand(batch, tokens) < 0.7).long()
        mask[:, 0] = 1
        return (torch.randn(batch, tokens, 12), mask)[: 1 + masked]

    export(model, path, inputs(2, 6), dynamic_axes=(1,))
    graph = load_graph(path)
    assert "relative_bias" in ops(graph)
    for tokens in (2, 5, 33):
        given = inputs(3, tokens)
        with torch.no_grad():
            want = model(*given).numpy()
        feeds = {v.name: x.numpy() for v, x in zip(graph.inputs, given, strict=True)}
        (got,) = Session(path).run(None, feeds)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_bias_of_more_than_the_distance_is_refused(tmp_path: Path) -> None:
    class Product(Biased):
        def bias(self, tokens: int) -> Tensor:
            place = torch.arange(tokens)
            return 0.1 * (place * place[:, None]).float()[None, None]

    with pytest.raises(UnsupportedModelError, match="more than the distance of two positions"):
        export(Product(False), tmp_path / "m.lutra", torch.randn(2, 6, 12), dynamic_axes=(1,))

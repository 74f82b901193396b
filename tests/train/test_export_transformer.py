"""Export of what transformers are made of: the graph computes what torch computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sweeps import quick_cover
from torch import Tensor, nn
from torch_sequences import lowered, same_as_torch

from lutra import Session
from lutra.errors import InputError, UnsupportedModelError
from lutra.train import (
    TableAttention,
    TableFunction,
    TableLayerNorm,
    TableRMSNorm,
    TableSoftmax,
    masked_mean,
)

N, T, D = 2, 5, 8


class Call(nn.Module):
    """A model from a function of itself and its inputs, with child modules given by name."""

    def __init__(self, function: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class WithMask(Call):
    def forward(self, x: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, mask)


class Cross(Call):
    def forward(self, x: Tensor, memory: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, memory)


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def linear(*sizes: int) -> nn.Linear:
    return nn.Linear(*(sizes or (D, D)))


#: Of (N, T, D), with T of any size: the model and the operators of its graph.
SEQUENCES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "linear": (linear, ["linear"]),
    "layer_norm": (lambda: nn.LayerNorm(D), ["layer_norm"]),
    "layer_norm_plain": (lambda: nn.LayerNorm(D, elementwise_affine=False), ["layer_norm"]),
    "rms_norm": (lambda: nn.RMSNorm(D), ["rms_norm"]),
    "rms_norm_eps": (lambda: nn.RMSNorm(D, 1e-3, elementwise_affine=False), ["rms_norm"]),
    "rms_by_hand": (
        lambda: Call(lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        ["mul", "mean", "affine_scalar", "rsqrt", "mul"],
    ),
    "gelu": (nn.GELU, ["gelu"]),
    "gelu_tanh": (lambda: nn.GELU("tanh"), ["gelu"]),
    "silu": (nn.SiLU, ["silu"]),
    "tanh_sigmoid": (lambda: Call(lambda m, x: x.tanh() + x.sigmoid()), ["tanh", "sigmoid", "add"]),
    "exp_erf": (lambda: Call(lambda m, x: x.exp() - x.erf()), ["exp", "erf", "sub"]),
    "roots": (
        lambda: Call(lambda m, x: (x.square() + 1).sqrt() * x.exp().rsqrt() / (2 + x.sigmoid())),
        ["mul", "affine_scalar", "sqrt", "exp", "rsqrt", "mul", "sigmoid", "affine_scalar", "div"],
    ),
    "reciprocal": (
        lambda: Call(lambda m, x: 3 / (x.exp() + 1) + x.exp().reciprocal()),
        ["exp", "affine_scalar", "reciprocal", "affine_scalar", "exp", "reciprocal", "add"],
    ),
    "softmax_features": (lambda: Call(lambda m, x: x.softmax(-1)), ["softmax"]),
    "softmax_tokens": (lambda: Call(lambda m, x: x.softmax(1)), ["softmax"]),
    "token_mean": (lambda: Call(lambda m, x: x.mean(1)), ["mean"]),
    "first_token": (lambda: Call(lambda m, x: x[:, 0]), ["slice", "flatten"]),
    "features": (lambda: Call(lambda m, x: torch.cat([x[..., 2:4], x], -1)), ["slice", "concat"]),
    "chunk": (lambda: Call(lambda m, x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1]), None),
    "gather": (
        lambda: Call(lambda m, x: x.index_select(2, torch.tensor([5, 0, 5]))),
        ["gather"],
    ),
    "index": (lambda: Call(lambda m, x: x[:, :, [3, 1]]), ["gather"]),
    "transpose": (lambda: Call(lambda m, x: x.transpose(1, 2)), ["transpose"]),
    "permute_twice": (
        lambda: Call(lambda m, x: x.permute(0, 2, 1).relu().permute(0, 2, 1)),
        ["transpose", "relu", "transpose"],
    ),
    "nothing": (lambda: Call(lambda m, x: heads(x).transpose(1, 2).flatten(2).relu()), ["relu"]),
    "time_first": (
        lambda: Call(lambda m, x: m.f(x.transpose(0, 1)).relu().transpose(0, 1), f=linear()),
        ["linear", "relu"],
    ),
    "rows": (
        lambda: Call(lambda m, x: m.f(x.reshape(-1, D)).view(x.shape[0], -1, 4), f=linear(D, 4)),
        ["linear"],
    ),
    "bmm": (lambda: Call(lambda m, x: torch.bmm(x, x.transpose(1, 2))), ["matmul"]),
    "bmm_features": (lambda: Call(lambda m, x: x.transpose(1, 2) @ x), ["matmul"]),
    "matmul_heads": (
        lambda: Call(lambda m, x: heads(x) @ heads(x).transpose(2, 3)),
        ["reshape", "transpose", "matmul"],
    ),
    "outer": (
        lambda: Call(lambda m, x: x.mean(2, keepdim=True) * x - x[:, :, :1]),
        ["mean", "mul", "slice", "sub"],
    ),
    "expand": (
        lambda: Call(lambda m, x: x[:, :, :1].expand(-1, -1, D) / x.exp()),
        ["slice", "exp", "div"],
    ),
    "scaled": (
        lambda: Call(lambda m, x: x * torch.linspace(1, 2, D)),
        ["transpose", "affine", "transpose"],
    ),
    "positions": (
        lambda: Call(
            lambda m, x: x + m.table(torch.arange(x.shape[1]))[None],
            table=nn.Embedding(32, D),
        ),
        ["position_embedding"],
    ),
    "sines": (
        lambda: Call(
            lambda m, x: x + torch.sin(torch.arange(x.shape[1])[:, None] / (1 + torch.arange(D)))
        ),
        ["position_embedding"],
    ),
}


@pytest.mark.parametrize("name", quick_cover({k: v[1] for k, v in SEQUENCES.items()}))
def test_sequences_of_any_length(name: str) -> None:
    torch.manual_seed(0)
    make, ops = SEQUENCES[name]
    model = make()
    graph = lowered(model, torch.randn(N, T, D), axes=(0, 1))
    if ops is not None:
        assert [node.op for node in graph.nodes] == ops
    for batch, length in ((1, 1), (3, 9)):
        same_as_torch(graph, model, torch.randn(batch, length, D))


FIXED: dict[str, Callable[[], nn.Module]] = {
    "constant_rows": lambda: Call(lambda m, x: x + torch.arange(float(T))[:, None]),
    "constant_table": lambda: Call(lambda m, x: x * torch.arange(float(T * D)).view(T, D)),
    "sum": lambda: Call(lambda m, x: x.sum(1)),
    "split_transpose": lambda: Call(lambda m, x: x.view(-1, T, 2, 4).permute(0, 3, 1, 2)),
    "patches": lambda: Call(
        lambda m, x: m.f(x.view(-1, T, 2, 4).flatten(2).transpose(1, 2)), f=linear(T, 3)
    ),
    "expand_out": lambda: Call(lambda m, x: x[:, :1].expand(-1, 4, -1)),
    "shared_keys": lambda: Call(
        lambda m, x: joined(
            F.scaled_dot_product_attention(
                heads(x),
                heads(x[..., :4], 1)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2),
                heads(x),
            )
        )
    ),
    "left_weight": lambda: Call(lambda m, x: torch.ones(3, T) @ x.relu()),
}


@pytest.mark.parametrize("name", FIXED)
def test_sequences_of_one_length(name: str) -> None:
    model = FIXED[name]()
    graph = lowered(model, torch.randn(N, T, D), axes=(0,))
    same_as_torch(graph, model, torch.randn(3, T, D))


class Attention(nn.Module):
    """Self-attention written in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.way = way

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (heads(y) for y in self.qkv(x).chunk(3, -1))
        keep = mask[:, None, None, :] != 0
        if self.way == "sdpa":
            return joined(F.scaled_dot_product_attention(q, k, v, keep))
        if self.way == "sdpa_float":
            bias = (1.0 - keep.float()) * torch.finfo(torch.float32).min
            return joined(F.scaled_dot_product_attention(q, k, v, bias))
        if self.way == "causal":
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            return joined(F.scaled_dot_product_attention(q, k, v, keep & later, scale=0.2))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.way == "filled":
            scores = scores.masked_fill(~keep, float("-inf"))
        elif self.way == "where":
            scores = torch.where(keep, scores, torch.tensor(-1e9))
        else:
            scores = scores + (mask[:, None, None, :] == 0) * -1e9
        return joined(F.dropout(scores.softmax(-1), 0.1, self.training) @ v)


@pytest.mark.parametrize("way", ["sdpa", "sdpa_float", "causal", "filled", "where", "added"])
def test_attention_is_one_operator(way: str) -> None:
    torch.manual_seed(0)
    model = Attention(way).eval()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    graph = lowered(model, torch.randn(N, T, D), mask, axes=(0, 1))
    assert [n.op for n in graph.nodes] == ["linear", "slice", "slice", "slice", "attention"]
    node = graph.nodes[-1]
    assert node.inputs[-1] == "mask"
    assert node.attrs["causal"] == (way == "causal")
    for batch, length in ((1, 1), (3, 9)):
        mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()
        same_as_torch(graph, model, torch.randn(batch, length, D), mask)


def test_attention_without_mask_and_across_two_inputs() -> None:
    model = Cross(
        lambda m, x, y: joined(F.scaled_dot_product_attention(heads(x), heads(y), heads(y + 1)))
    )
    graph = lowered(model, torch.randn(N, 3, D), torch.randn(N, T, D), axes=(0, 1))
    assert [node.op for node in graph.nodes] == ["affine_scalar", "attention"]
    same_as_torch(graph, model, torch.randn(3, 6, D), torch.randn(3, 4, D))


def test_causal_attention() -> None:
    model = Call(
        lambda m, x: joined(
            F.scaled_dot_product_attention(heads(x), heads(x), heads(x), is_causal=True)
        )
    )
    graph = lowered(model, torch.randn(N, T, D), axes=(0, 1))
    assert [node.op for node in graph.nodes] == ["attention"]
    same_as_torch(graph, model, torch.randn(1, 7, D))


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention(weights: bool, masked: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(D, 2, batch_first=True, dropout=0.1)
    if masked:
        model: nn.Module = WithMask(
            lambda m, x, mask: m.layer(x, x, x, key_padding_mask=mask == 0, need_weights=weights)[
                0
            ],
            layer=layer,
        )
    else:
        model = Call(lambda m, x: m.layer(x, x, x, need_weights=weights)[0], layer=layer)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    graph = lowered(model.eval(), torch.randn(N, T, D), *([mask] * masked), axes=(0, 1))
    ops = [node.op for node in graph.nodes if node.op not in ("affine_scalar",)]
    assert ops == ["linear", "slice", "slice", "slice", "attention", "linear"]
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0]])
    same_as_torch(graph, model, torch.randn(1, 7, D), *([mask] * masked))


def test_causal_multihead_attention() -> None:
    layer = nn.MultiheadAttention(D, 4, batch_first=True)
    model = Call(
        lambda m, x: m.layer(
            x,
            x,
            x,
            attn_mask=torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1),
            need_weights=False,
        )[0],
        layer=layer,
    )
    graph = lowered(model.eval(), torch.randn(N, T, D), axes=(0, 1))
    (node,) = (node for node in graph.nodes if node.op == "attention")
    assert node.attrs["causal"]
    assert len(node.inputs) == 3
    same_as_torch(graph, model, torch.randn(1, 7, D))


@pytest.mark.parametrize(
    ("batch_first", "norm_first"),
    [
        (True, False),
        (False, True),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_encoder_layers(norm_first: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        D, 2, 16, activation="gelu", norm_first=norm_first, batch_first=batch_first
    )
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        x = m.stack(x, src_key_padding_mask=mask == 0)
        return x if batch_first else x.transpose(0, 1)

    model = WithMask(forward, stack=stack).eval()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    graph = lowered(model, torch.randn(N, T, D), mask, axes=(0, 1))
    ops = [node.op for node in graph.nodes]
    assert ops.count("attention") == 2
    assert ops.count("layer_norm") == 4
    assert "transpose" not in ops
    assert "reshape" not in ops
    same_as_torch(graph, model, torch.randn(1, 7, D), torch.tensor([[1, 1, 1, 1, 0, 0, 0]]))


class Patches(nn.Module):
    """A small vision transformer: patches, a table of positions, attention as timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, D, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 4, D))
        self.norm = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        batch, count, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, count, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return (x + self.out(y.transpose(1, 2).reshape(batch, count, width))).mean(1)


def test_vision_transformer() -> None:
    torch.manual_seed(0)
    model = Patches()
    graph = lowered(model, torch.randn(2, 3, 8, 8), axes=(0,))
    ops = [node.op for node in graph.nodes]
    assert "attention" in ops
    assert "softmax" not in ops
    same_as_torch(graph, model, torch.randn(3, 3, 8, 8))


TABLES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "function": (lambda: TableFunction.fit("gelu"), ["piecewise"]),
    "softmax": (lambda: TableSoftmax(), ["softmax"]),
    "softmax_tokens": (lambda: TableSoftmax(1), ["softmax"]),
    "layer_norm": (lambda: TableLayerNorm(D), ["layer_norm"]),
    "rms_norm": (lambda: TableRMSNorm(D), ["rms_norm"]),
    "attention": (
        lambda: Call(lambda m, x: joined(m.f(heads(x), heads(x), heads(x))), f=TableAttention()),
        ["attention"],
    ),
    "attention_by_hand": (
        lambda: Call(
            lambda m, x: joined(m.f(heads(x) @ heads(x).transpose(2, 3) / 2) @ heads(x)),
            f=TableSoftmax(),
        ),
        ["attention"],
    ),
}


@pytest.mark.parametrize("name", quick_cover({k: v[1] for k, v in TABLES.items()}))
def test_function_tables(name: str) -> None:
    make, ops = TABLES[name]
    model = make()
    graph = lowered(model, torch.randn(N, T, D), axes=(0, 1))
    assert [node.op for node in graph.nodes] == ops
    assert any(role.endswith("slope") for role in graph.nodes[0].tensors)
    same_as_torch(graph, model, torch.randn(1, 7, D))


def pooled(x: Tensor, mask: Tensor, way: str) -> Tensor:
    weight = mask.unsqueeze(-1)
    if way == "operator":
        return masked_mean(x, mask)
    if way == "expanded":
        weight = weight.expand(x.size()).float()
        return (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
    if way == "filled":
        return x.masked_fill(weight == 0, 0.0).sum(1) / mask.sum(1)[..., None]
    return (x * weight).sum(dim=1) / mask.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("way", ["operator", "expanded", "filled", "short"])
def test_masked_means(way: str) -> None:
    model = WithMask(lambda m, x, mask: pooled(x.relu(), mask, way))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    graph = lowered(model, torch.randn(N, T, D), mask, axes=(0, 1))
    assert [node.op for node in graph.nodes] == ["relu", "masked_mean"]
    same_as_torch(graph, model, torch.randn(1, 7, D), torch.tensor([[1, 0, 0, 1, 0, 0, 1]]))


def test_masks_that_are_computed_with() -> None:
    model = WithMask(
        lambda m, x, mask: (
            x * mask.unsqueeze(-1) + x.masked_fill(mask.bool().logical_not()[..., None], -2.0)
        )
    )
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    graph = lowered(model, torch.randn(N, T, D), mask, axes=(0, 1))
    assert "cast" in [node.op for node in graph.nodes]
    same_as_torch(graph, model, torch.randn(1, 3, D), torch.tensor([[1, 0, 1]]))


def test_gradient_of_masked_mean() -> None:
    x = torch.randn(N, T, D, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda x: masked_mean(x, mask), (x,))
    assert torch.equal(masked_mean(x, mask)[1], x[1].mean(0)) or torch.allclose(
        masked_mean(x, mask)[1], x[1].mean(0)
    )
    assert not masked_mean(x, torch.zeros_like(mask)).any()
    with pytest.raises(InputError, match=r"\(N, T\) of integers"):
        masked_mean(x, torch.ones(N, T))


REFUSED: list[tuple[Callable[..., Any], Sequence[Tensor], str]] = [
    (
        lambda m, x, mask: x * mask.cumprod(1).unsqueeze(-1),
        (torch.ones(N, T).long(),),
        "orders axis 1, whose size is known at run time only",
    ),
    (
        lambda m, x, mask: x + (x.shape[1] - torch.arange(x.shape[1]))[:, None],
        (torch.ones(N, T).long(),),
        "depend on the length",
    ),
    (
        lambda m, x, mask: x + torch.arange(x.shape[0])[:, None, None],
        (torch.ones(N, T).long(),),
        "batch",
    ),
]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, mask: joined(
            F.scaled_dot_product_attention(
                heads(x), heads(x), heads(x), mask[:, None, None, :] == 0
            )
        ),
        lambda m, x, mask: x.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")),
    ],
    ids=["of attention", "filled"],
)
def test_masks_that_are_compared(function: Callable[..., Any]) -> None:
    model = WithMask(function)
    graph = lowered(model, torch.randn(N, T, D), torch.ones(N, T).long(), axes=(0, 1))
    mask = torch.zeros(5, T + 3).long()
    mask[:, 4:] = 1
    same_as_torch(graph, model, torch.randn(5, T + 3, D), mask)


def test_a_bias_of_scores_that_is_an_input() -> None:
    model = WithMask(
        lambda m, x, y: joined(
            F.scaled_dot_product_attention(heads(x), heads(x), heads(x), y[:, None])
        )
    )
    graph = lowered(model, torch.randn(N, T, D), torch.randn(N, T, T), axes=(0,))
    same_as_torch(graph, model, torch.randn(5, T, D), torch.randn(5, T, T))


def test_a_mask_as_an_output_is_float() -> None:
    model = WithMask(lambda m, x, mask: mask * 2)
    graph = lowered(model, torch.randn(N, T, D), torch.ones(N, T).long(), axes=(0, 1))
    feeds = {"x": np.zeros((1, 3, D), np.float32), "mask": np.array([[1, 0, 3]], np.int32)}
    (made,) = Session(graph).run(None, feeds)
    assert made.dtype == np.float32
    assert made.tolist() == [[2.0, 0.0, 6.0]]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refusals(case: int) -> None:
    function, others, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        lowered(WithMask(function), torch.randn(N, T, D), *others, axes=(0, 1))

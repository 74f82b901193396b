"""Function tables in PyTorch: modules, operators, gradients, and the swap of a whole model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lutra
from lutra.errors import LutraError
from lutra.functions import ENTRIES, KNOWN, fit, fit_exp, fit_reciprocal, fit_rsqrt
from lutra.train import (
    PQ,
    Function,
    Keep,
    Lookup,
    TableAttention,
    TableFunction,
    TableLayerNorm,
    TableRMSNorm,
    TableSoftmax,
    convert,
    fit_relu_net,
    recipe_from_json,
    recipe_to_json,
)
from lutra.train.operators import functions as ops


def floats(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * scale


INF, NAN = float("inf"), float("nan")
EXTREMES = [0.0, -0.0, 1e-45, 1e-39, 1.0, 4.0, 1e30, 3e38, -1.0, -87.0, -87.5, -1e30, 88.0, 89.0]


@pytest.mark.parametrize("entries", ENTRIES)
def test_operators_are_the_tables(entries: int) -> None:
    """Both forms of each operator, native and PyTorch, give what the NumPy tables give."""
    extremes = torch.tensor([*EXTREMES, INF, -INF, NAN])
    x = torch.cat([floats(5000, scale=3), floats(1000, scale=1e4).abs(), extremes])
    for name in ("gelu", "tanh", "sigmoid"):
        table = fit(name, entries=entries)
        tensors = [torch.tensor(array) for array in table.tensors.values()]
        want = table(x.numpy())
        got = ops.piecewise(x, *tensors).numpy()
        assert np.array_equal(got, want, equal_nan=True)
        torch_form = ops.portable_piecewise(x, *tensors).numpy()
        np.testing.assert_allclose(torch_form, want, rtol=1e-6, atol=1e-6)
    for table, portable in (
        (fit_exp(entries), ops.portable_exp),
        (fit_reciprocal(entries), ops.portable_reciprocal),
        (fit_rsqrt(entries), ops.portable_rsqrt),
    ):
        tensors = [torch.tensor(array) for array in table.tensors.values()]
        want = table(x.numpy())
        got = ops._apply({"exp": "table_exp"}.get(table.kind, f"table_{table.kind}"), x, *tensors)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)
        np.testing.assert_allclose(portable(x, *tensors).numpy(), want, rtol=1e-6)


def test_gradient_of_a_function_is_its_slope() -> None:
    layer = TableFunction.fit("gelu")
    x = floats(1000, scale=3).requires_grad_()
    layer(x).sum().backward()
    assert np.array_equal(x.grad.numpy(), layer.table.derivative(x.detach().numpy()))
    exact = x.detach().clone().requires_grad_()
    F.gelu(exact).sum().backward()
    assert (x.grad - exact.grad).abs().mean() < 0.05


def gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    return list(torch.autograd.grad((y * floats(*y.shape, seed=9)).sum(), leaves))


def near(got: Tensor, want: Tensor, share: float) -> bool:
    return bool((got - want).abs().max() <= share * want.abs().max())


def test_softmax() -> None:
    x = floats(4, 7, 33, scale=4)
    for dim in (-1, 1):
        layer = TableSoftmax(dim)
        assert (layer(x) - x.softmax(dim)).abs().max() < 0.002
        (got,), (want,) = gradients(layer, x), gradients(lambda t, d=dim: t.softmax(d), x)
        assert near(got, want, 0.005)
    masked = x.clone()
    masked[:, :, 5:] = -float("inf")
    assert (TableSoftmax()(masked)[:, :, 5:] == 0).all()
    assert TableSoftmax()(torch.full((2, 3), -float("inf"))).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_norms(scale: float) -> None:
    x = floats(4, 7, 48, scale=scale)
    exact = nn.LayerNorm(48)
    nn.init.normal_(exact.weight)
    nn.init.normal_(exact.bias)
    layer = TableLayerNorm.from_exact(exact)
    centred = exact(x) - exact.bias
    assert ((layer(x) - exact(x)).abs() <= 0.002 * centred.abs() + 1e-6).all()
    assert layer.weight is exact.weight

    def plain(t: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(t, (48,), w, b)

    def table(t: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.table_layer_norm(t, w, b, layer.rsqrt_slope, layer.rsqrt_intercept, 1e-5)

    for got, want in zip(
        gradients(table, x, exact.weight, exact.bias),
        gradients(plain, x, exact.weight, exact.bias),
        strict=True,
    ):
        assert near(got, want, 1e-4)
    rms = nn.RMSNorm(48, eps=1e-6)
    nn.init.normal_(rms.weight)
    got, want = TableRMSNorm.from_exact(rms, 1e-6)(x), rms(x)
    assert ((got - want).abs() <= 0.002 * want.abs() + 1e-9).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention(causal: bool, mask: str | None) -> None:
    q, k, v = floats(2, 3, 9, 8), floats(2, 3, 9, 8, seed=1), floats(2, 3, 9, 8, seed=2)
    keys = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    keys[1, :, :, 6:] = False
    given = {
        None: None,
        "bool": keys,
        "float": torch.zeros(2, 1, 9, 9).masked_fill(~keys, torch.finfo(torch.float32).min),
    }[mask]
    if causal and mask is not None:
        given = given & torch.ones(9, 9, dtype=torch.bool).tril() if mask == "bool" else None
    layer = TableAttention()
    flag = causal and given is None
    want = F.scaled_dot_product_attention(q, k, v, given, is_causal=flag)
    assert near(layer(q, k, v, given, is_causal=flag), want, 0.003)
    for got, exact in zip(
        gradients(lambda *t: layer(*t, given, is_causal=flag), q, k, v),
        gradients(lambda *t: F.scaled_dot_product_attention(*t, given, is_causal=flag), q, k, v),
        strict=True,
    ):
        assert near(got, exact, 0.005)
    dropped = layer(q, k, v, given, dropout_p=0.5, is_causal=flag)
    assert torch.isfinite(dropped).all()


def test_half_precision() -> None:
    x = floats(64).bfloat16()
    assert TableFunction.fit("silu")(x).dtype == torch.bfloat16
    assert TableSoftmax()(x).dtype == torch.bfloat16


# ---- whole models -------------------------------------------------------------------------------


class OwnGelu(nn.Module):
    """As in a library: an activation that only its forward tells apart."""

    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * input * (1 + torch.tanh(0.7978845608 * (input + 0.044715 * input**3)))


class LlamaRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


class Attention(nn.Module):
    def __init__(self, size: int, eager: bool) -> None:
        super().__init__()
        self.qkv, self.eager = nn.Linear(size, 3 * size), eager

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
        if self.eager:
            scores = q @ k.transpose(-1, -2) / (d // 4) ** 0.5
            y = nn.functional.softmax(scores, dim=-1, dtype=torch.float32) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(n, t, d)


class Block(nn.Module):
    def __init__(self, size: int, eager: bool) -> None:
        super().__init__()
        self.attention = Attention(size, eager)
        self.norm1, self.norm2 = nn.LayerNorm(size), LlamaRMSNorm(size)
        self.up, self.down, self.act = nn.Linear(size, 64), nn.Linear(64, size), OwnGelu()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.down(self.act(self.up(self.norm2(x))))
        return x + 0.1 * F.silu(x) * torch.sigmoid(x) + x.tanh()


class Model(nn.Module):
    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(size, False), Block(size, True)])
        self.head = nn.Linear(size, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.layer_norm(self.head(x.mean(1)), (5,))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


DATA = [floats(8, 6, 32, seed=i) for i in range(3)]


def test_whole_model(model: Model) -> None:
    before = model(DATA[0])
    swapped, report = convert(model, {"*": Function()}, DATA)
    names = {(entry.name, entry.function) for entry in report.functions}
    per_block = {
        ("attention.x", "x"), ("norm1", "layer_norm"), ("norm2", "rms_norm"), ("act", "gelu_tanh"),
        ("", "silu"), ("", "sigmoid"), ("", "tanh"),
    }  # fmt: skip
    want = {("", "layer_norm")}
    for i, attention in enumerate(("attention", "softmax")):
        for name, function in per_block:
            if function == "x":
                want.add((f"blocks.{i}.attention", attention))
            else:
                want.add((f"blocks.{i}.{name}".rstrip("."), function))
    assert names == want
    assert isinstance(swapped.blocks[0].act, TableFunction)
    assert isinstance(swapped.blocks[1].norm2, TableRMSNorm)
    assert isinstance(swapped, Model)
    after = swapped(DATA[0])
    assert 0 < (after - before).abs().max() < 0.05
    assert torch.equal(model(DATA[0]), before)  # the given model stays as it is
    assert "blocks.0.act: gelu_tanh, table of 16, minimax, inputs " in str(report)
    assert report.to_dict()["functions"][0]["entries"] == 16


def test_swapped_model_is_an_ordinary_one(model: Model) -> None:
    swapped, _ = convert(model, {"*": Function()}, DATA)
    want = swapped(DATA[0])
    for other in (copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped))):
        assert torch.equal(other(DATA[0]), want)
    fresh, _ = convert(model, {"*": Function(calibrate=False)}, DATA)
    assert not torch.equal(fresh(DATA[0]), want)
    fresh.load_state_dict(swapped.state_dict())
    assert torch.equal(fresh(DATA[0]), want)
    swapped.train()
    loss = swapped(DATA[0]).square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in swapped.parameters() if p.requires_grad)


def test_export(model: Model, tmp_path: Path) -> None:
    """The engine computes what PyTorch does, each table a part of its node."""
    swapped, report = convert(model, {"*": Function()}, DATA)
    graph = lutra.export(swapped, tmp_path / "model.lutra", DATA[0])
    tables = [
        node
        for node in graph.nodes
        if any(role.endswith("slope") for role in graph.node_tensors(node))
    ]
    assert len(tables) == len(report.functions)
    assert {node.op for node in tables} == {
        "piecewise", "attention", "layer_norm", "rms_norm",
    }  # fmt: skip
    got = lutra.Session(graph)(DATA[1].numpy())
    np.testing.assert_allclose(got, swapped(DATA[1]).detach().numpy(), atol=1e-5)


def test_a_call_that_cannot_be_swapped() -> None:
    """The softmax inside of torch's own attention stays exact, and all else is swapped."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True).eval()
    x = floats(3, 5, 16)
    swapped, report = convert(layer, {"*": Function()}, [x])
    assert {entry.function for entry in report.functions} == {"gelu", "layer_norm"}
    assert (swapped(x) - layer(x)).abs().max() < 0.01


def test_patterns(model: Model) -> None:
    _, report = convert(model, {"blocks.0.attention": Keep(), "blocks.0": Function()}, DATA)
    assert {entry.name for entry in report.functions} == {
        "blocks.0", "blocks.0.norm1", "blocks.0.norm2", "blocks.0.act",
    }  # fmt: skip
    swapped, report = convert(model, {"*": Function(functions=("softmax",))}, DATA)
    assert [entry.name for entry in report.functions] == ["blocks.1.attention"]
    exact, got = copy.deepcopy(model), swapped
    exact.blocks[1], got.blocks[1] = nn.Identity(), nn.Identity()
    assert torch.equal(exact(DATA[0]), got(DATA[0]))  # nothing else has changed


def test_kept_inside_of_swapped(model: Model) -> None:
    """A module that a pattern keeps calls exact functions, though those around it do not."""
    swapped, report = convert(model, {"blocks.1": Keep(), "*": Function()}, DATA)
    assert not any(entry.name == "blocks.1" for entry in report.functions)
    x = DATA[0]
    partly = swapped.blocks[1]
    for name in ("attention", "norm1", "norm2", "up", "down", "act"):
        setattr(partly, name, getattr(model.blocks[1], name))
    assert torch.equal(partly(x), model.blocks[1](x))


def test_with_other_methods(model: Model) -> None:
    recipe = {"*.qkv": PQ(v=4), "*.up": Lookup(), "**": Function()}
    swapped, report = convert(model, recipe, DATA, rows=128)
    assert {layer.name for layer in report.replaced} == {
        "blocks.0.attention.qkv", "blocks.1.attention.qkv", "blocks.0.up", "blocks.1.up",
    }  # fmt: skip
    assert len(report.functions) == 15
    plain, _ = convert(model, {"*.qkv": PQ(v=4), "*.up": Lookup()}, DATA, rows=128)
    assert (swapped(DATA[0]) - plain(DATA[0])).abs().max() < 0.2
    # The tables of a lookup layer are made with exact functions.
    swapped.train()
    x = floats(4, 32)
    assert torch.equal(swapped.blocks[0].up(x), plain.train().blocks[0].up(x))


def test_far_inputs_do_not_blow_up(model: Model) -> None:
    """Ten times the range that was calibrated: a network without asymptotes goes on along its
    last line, a table with them does not."""
    swapped, _ = convert(model, {"*": Function()}, DATA)
    x = 10 * DATA[0]
    exact = model(x)
    assert (swapped(x) - exact).abs().max() < 0.1
    naive = fit_relu_net("silu", -3.0, 3.0, asymptotes=False, steps=300)
    table = fit("silu", -3.0, 3.0)
    far = np.linspace(-30, 30, 1001).astype(np.float32)
    assert naive.errors(KNOWN["silu"], far).largest > 20 * table.errors(KNOWN["silu"], far).largest


@pytest.mark.parametrize("name", ["gelu", "tanh", "exp"])
def test_relu_net(name: str) -> None:
    low = -6.0 if name == "exp" else -4.0
    high = 0.0 if name == "exp" else 4.0
    table = fit_relu_net(name, low, high, steps=500)
    assert table.entries == 16
    inside = np.linspace(low, high, 10_001)
    assert table.errors(KNOWN[name], inside).mean < 0.02
    best = fit(name, low, high)
    assert best.errors(KNOWN[name], inside).largest < table.errors(KNOWN[name], inside).largest
    exact = KNOWN[name]
    assert table(np.float32(-1e6)) == np.float32(exact.left[0] * -1e6 + exact.left[1])


def test_methods_of_a_recipe(model: Model) -> None:
    want = model(DATA[0])
    for method in ("minimax", "dp", "relu_net"):
        chosen = Function(entries=16, method=method, functions=("gelu_tanh",))
        swapped, report = convert(model, {"blocks.0.act": chosen}, DATA)
        assert [entry.method for entry in report.functions] == [method]
        assert (swapped(DATA[0]) - want).abs().max() < 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hugging_face(attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        vocab_size=50, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    bert = transformers.BertModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(0, 50, (3, 9), generator=generator),
        "attention_mask": (torch.arange(9) < torch.tensor([[9], [4], [1]])).long(),
    }
    swapped, report = convert(bert, {"*": Function()}, [batch])
    layer = "encoder.layer.0"
    assert {(entry.name, entry.function) for entry in report.functions} == {
        ("embeddings.LayerNorm", "layer_norm"),
        (f"{layer}.attention.self", {"sdpa": "attention", "eager": "softmax"}[attention]),
        (f"{layer}.attention.output.LayerNorm", "layer_norm"),
        (f"{layer}.intermediate.intermediate_act_fn", "gelu"),
        (f"{layer}.output.LayerNorm", "layer_norm"),
        ("pooler.activation", "tanh"),
    }
    got, want = (model(**batch).last_hidden_state for model in (swapped, bert))
    assert 0 < (got - want).abs().max() < 0.01
    assert isinstance(swapped, transformers.BertModel)


def test_module_alone() -> None:
    swapped, report = convert(nn.GELU(), {"*": Function()}, [floats(10, 4)])
    assert isinstance(swapped, TableFunction)
    assert report.functions[0].name == ""


def test_unused_functions_are_an_error() -> None:
    with pytest.raises(LutraError, match="calls no function that has one"):
        convert(nn.Linear(4, 4), {"*": Function()}, [floats(10, 4)])
    with pytest.raises(LutraError, match="matches no module"):
        convert(nn.Linear(4, 4), {"other": Function()}, [floats(10, 4)])
    with pytest.raises(LutraError, match="holds NaN"):
        convert(nn.GELU(), {"*": Function()}, [torch.full((3, 4), float("nan"))])


def test_recipe_as_json() -> None:
    recipe = {"a": Function(), "b.*": Function(8, "dp", functions=("gelu", "exp")), "c": PQ()}
    assert recipe_from_json(recipe_to_json(recipe)) == recipe
    for wrong in (
        {"entries": 12},
        {"method": "best"},
        {"functions": ("relu",)},
        {"functions": ()},
        {"functions": ("exp",), "calibrate": False},
        {"calibrate": 1},
    ):
        with pytest.raises(LutraError, match="Function: "):
            Function(**wrong)


def test_names_are_here() -> None:
    assert lutra.Function is Function

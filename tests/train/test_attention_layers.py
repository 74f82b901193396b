"""`nn.MultiheadAttention` and the encoders of torch.nn: replaced projections, and no fast path."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lutra import load_graph
from lutra.errors import LutraError
from lutra.train import PQ, Int8, Keep, Lookup, PQLinear, convert, export
from lutra.train.layers.attention import Attention


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quick(model: nn.Module, recipe: Any, data: Any) -> Any:
    return convert(model, recipe, data, rows=256, kmeans_steps=2, progress=False)


MASK = noise(5, 7) > 1
PADDING = torch.zeros(3, 7, dtype=torch.bool)
PADDING[:, 5:] = True
CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "no weights": {"need_weights": False},
    "mask": {"attn_mask": MASK, "need_weights": False},
    "both masks": {"attn_mask": MASK, "key_padding_mask": PADDING},
    "float masks": {"attn_mask": noise(12, 5, 7), "key_padding_mask": -3.0 * PADDING},
    "every head": {"average_attn_weights": False},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("settings", [{}, {"kdim": 6, "vdim": 4}, {"bias": False}], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_it_computes_what_torch_does(first: bool, settings: Any, call: str) -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(8, 4, batch_first=first, **settings)
    sizes = ((5, 8), (7, dense.kdim), (7, dense.vdim))
    x = [noise(3, *size, seed=i) for i, size in enumerate(sizes)]
    x = x if first else [tensor.transpose(0, 1) for tensor in x]
    settings = CALLS[call]
    for got, want in zip(Attention(dense)(*x, **settings), dense(*x, **settings), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want)


def test_single_sequences_and_causal_hints() -> None:
    dense = nn.MultiheadAttention(8, 2)
    made, x = Attention(dense), noise(5, 8)
    for got, want in zip(made(x, x, x), dense(x, x, x), strict=True):
        torch.testing.assert_close(got, want)
    settings = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True}
    got, _ = made(x, x, x, need_weights=False, **settings)
    torch.testing.assert_close(got, dense(x, x, x, need_weights=False, **settings)[0])
    with pytest.raises(LutraError, match="give the mask"):
        made(x, x, x, is_causal=True)
    for name in ("in_proj_weight", "in_proj_bias"):
        assert torch.equal(getattr(made, name), getattr(dense, name))


class Net(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.m = nn.MultiheadAttention(8, 2, batch_first=True, **settings)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.m(x, x, x)[0])
        return y


@pytest.mark.parametrize("method", [PQ(v=2), Int8(), Lookup()], ids=lambda m: m.name)
def test_projections_are_replaced_and_exported(method: Any, tmp_path: Path) -> None:
    model, report = quick(Net(), {"m": method}, [noise(32, 5, 8)])
    names = ["m.q_proj", "m.k_proj", "m.v_proj", "m.out_proj"]
    assert [entry.name for entry in report.replaced] == names
    assert report["fc"].reason == "no pattern of the recipe names it"
    export(model, tmp_path / "m.lutra", noise(2, 5, 8))
    ops = [node.op for node in load_graph(tmp_path / "m.lutra").nodes]
    assert ops == [f"{method.name}_linear"] * 3 + ["attention", f"{method.name}_linear", "linear"]
    if method.name == "pq":  # one set of codes for q, k and v
        assert model.m.q_proj.centroids is model.m.v_proj.centroids
    model.train()(noise(2, 5, 8)).sum().backward()
    assert model.m.k_proj.weight.grad.abs().sum() > 0


def test_a_recipe_may_name_one_projection() -> None:
    recipe = {"m.out_proj": Keep(), "m.q_proj": Int8(), "m": PQ(v=2)}
    model, report = quick(Net(), recipe, [noise(32, 5, 8)])
    methods = [entry.method for entry in report.layers]
    assert methods == ["int8", "pq", "pq", None, None]
    assert type(model.m.out_proj) is nn.Linear


def test_an_attention_that_no_pattern_names_stays() -> None:
    model, report = quick(Net(), {"fc": PQ(v=2)}, [noise(32, 5, 8)])
    assert type(model.m) is nn.MultiheadAttention
    assert [(e.name, e.replaced) for e in report.layers] == [
        ("m", False), ("m.out_proj", False), ("fc", True)
    ]  # fmt: skip
    assert "part of the attention 'm'" in report["m.out_proj"].reason


@pytest.mark.parametrize("setting", ["add_bias_kv", "add_zero_attn"])
def test_what_cannot_be_replaced_is_said(setting: str) -> None:
    _, report = quick(Net(**{setting: True}), {"*": PQ(v=2)}, [noise(32, 5, 8)])
    assert f"{setting}=True has no lookup form" in report["m"].reason
    with pytest.raises(LutraError, match=f"'m' names 'm' .*{setting}=True"):
        quick(Net(**{setting: True}), {"m": PQ(v=2)}, [noise(32, 5, 8)])


# The fast path


@pytest.mark.parametrize(
    "recipe",
    [{"*": PQ(v=2, k=8)}, {"layers.0.linear1": Int8(2)}, {"layers.0.self_attn": PQ(v=2, k=8)}],
)
def test_encoders_never_take_the_fast_path(recipe: Any) -> None:
    torch.manual_seed(0)
    dense = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = noise(16, 5, 8)
    padding = torch.zeros(16, 5, dtype=torch.bool)
    padding[:, 3:] = True
    model, _ = quick(dense, recipe, [{"src": x, "src_key_padding_mask": padding}])
    with_gradient = model(x, src_key_padding_mask=padding)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            each.load_state_dict(model.state_dict())
            got = each(x, src_key_padding_mask=padding)
            torch.testing.assert_close(got, with_gradient, rtol=0.0, atol=1e-4)
            assert float((each(x) - dense(x)).abs().max()) > 1e-3
            each.train().eval()
            assert float((each(x) - dense(x)).abs().max()) > 1e-3


def test_a_single_encoder_layer_is_exported(tmp_path: Path) -> None:
    dense = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model, report = quick(dense, {"*": PQ(v=2)}, [noise(16, 5, 8)])
    assert len(report.replaced) == 6
    assert isinstance(model.self_attn.out_proj, PQLinear)
    export(model, tmp_path / "m.lutra", noise(2, 5, 8))
    ops = [node.op for node in load_graph(tmp_path / "m.lutra").nodes]
    assert ops.count("pq_linear") == 6

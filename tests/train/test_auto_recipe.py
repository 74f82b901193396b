"""Recipes that fit any network: `auto_recipe`, "auto", and methods with an `otherwise`."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lutra
from lutra.errors import LutraError
from lutra.ops.limits import MAX_CODEBOOKS
from lutra.train import (
    PQ,
    Function,
    Int8,
    Keep,
    Lookup,
    auto_recipe,
    convert,
    recipe_from_json,
    recipe_to_json,
)
from lutra.train.conversion.fallback import settle


class Mixed(nn.Module):
    """Every kind of layer: plain, grouped, narrow, pointwise, reflecting, wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.plain = nn.Conv2d(32, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.reflecting = nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")
        self.pointwise = nn.Conv2d(32, 64, 1)
        self.narrow = nn.Conv2d(64, 16, 1)
        self.up = nn.Conv2d(16, 64, 1)
        self.wide = nn.Linear(256, 64)
        self.head = nn.Linear(64, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.plain(self.stem(x)).relu())
        x = self.up(self.narrow(self.pointwise(self.reflecting(x)).relu()))
        y: Tensor = self.head(self.wide(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)).relu())
        return y


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.first = nn.Linear(32, 64)
        self.second = nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(self.words(ids)).relu()).mean(1)
        return y


def plain(recipe: Any) -> dict[str, str]:
    return {
        name: f"{m.name}{m.v if isinstance(m, PQ) and m.v else ''}" for name, m in recipe.items()
    }


def test_the_rule() -> None:
    assert plain(auto_recipe(Mixed())) == {
        "stem": "int8",
        "plain": "pq",
        "depthwise": "int8",
        "reflecting": "pq",
        "pointwise": "pq",
        "narrow": "int8",
        "up": "int8",
        "wide": "pq16",
        "head": "int8",
        "*": "pq",
    }
    # an embedding is the first layer of its network
    assert plain(auto_recipe(Tokens())) == {
        "words": "int8", "first": "pq", "second": "int8", "*": "pq"
    }  # fmt: skip
    assert plain(auto_recipe(nn.Linear(64, 64))) == {"": "int8"}
    assert lutra.auto_recipe is auto_recipe


def test_auto_converts_whole_networks() -> None:
    torch.manual_seed(0)
    data = [torch.randn(4, 3, 8, 8)]
    converted, report = convert(Mixed(), "auto", data, progress=False)
    methods = {layer.name: layer.method for layer in report.layers}
    assert methods == {
        "stem": "int8", "plain": "pq", "depthwise": "int8", "reflecting.conv": "pq",
        "pointwise": "pq", "narrow": "int8", "up": "int8", "wide": "pq", "head": "int8",
    }  # fmt: skip
    assert converted(data[0]).isfinite().all()
    text = json.dumps(recipe_to_json(auto_recipe(Mixed())))
    again, _ = convert(Mixed(), recipe_from_json(json.loads(text)), data, progress=False)
    assert [type(m) for m in again.modules()] == [type(m) for m in converted.modules()]
    _, report = convert(Tokens(), "auto", [torch.randint(0, 50, (4, 7))], progress=False)
    assert [layer.method for layer in report.layers] == ["int8", "pq", "int8"]


def test_auto_knows_all_kinds_of_layers() -> None:
    model = nn.Sequential(
        nn.Conv1d(40, 64, 3, padding=1), nn.Conv1d(64, 256, 5, padding=2),
        nn.Conv1d(256, 256, 3, groups=4), nn.Flatten(1), nn.Linear(256 * 6, 40),
    )  # fmt: skip
    assert plain(auto_recipe(model)) == {
        "0": "int8", "1": "pq", "2": "int8", "4": "int8", "*": "pq"
    }  # fmt: skip
    data = [torch.randn(16, 40, 8)]
    _, report = convert(model, "auto", data, progress=False)
    assert [layer.method for layer in report.layers] == ["int8", "pq", "int8", "int8"]
    blocks = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(256, 4, 64, batch_first=True), 2, enable_nested_tensor=False
    )
    recipe = plain(auto_recipe(blocks))
    assert recipe["layers.1.self_attn"] == recipe["layers.1.linear1"] == "pq16"
    assert (recipe["layers.0.linear2"], recipe["layers.1.linear2"]) == ("pq", "int8")
    _, report = convert(blocks, "auto", [torch.randn(8, 6, 256)], progress=False)
    assert {layer.method for layer in report.layers} == {"int8", "pq"}


def test_names_that_look_like_patterns_stand_for_themselves() -> None:
    model = nn.ModuleDict({"a*": nn.Linear(64, 64), "a?": nn.Linear(64, 64), "ab": nn.Linear(9, 9)})
    assert list(auto_recipe(model)) == ["a[*]", "a[?]", "ab", "*"]


def test_what_auto_refuses() -> None:
    for model, message in (
        (nn.Sequential(nn.ReLU()), "Sequential has no convolution, linear layer or embedding"),
        ("model.pt", "the model is a str; give a torch.nn.Module"),
    ):
        with pytest.raises(LutraError, match=message):
            auto_recipe(model)  # type: ignore[arg-type]
    with pytest.raises(LutraError, match=r"the text 'best'; give a dict .* .auto., or"):
        convert(nn.Linear(8, 8), "best", [torch.randn(4, 8)])  # type: ignore[arg-type]


GROUPED = nn.Conv2d(8, 8, 3, groups=2)
REFLECTING = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
LARGE = nn.Conv2d(1, 4, 9)
DEEP = nn.Linear(MAX_CODEBOOKS + 1, 2, bias=False)
WORDS = nn.Embedding(4, 4)
PLAIN = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("layer", "given", "want", "reason"),
    [
        (PLAIN, PQ(v=2, otherwise=Int8()), PQ(v=2), ""),
        (GROUPED, PQ(otherwise=Int8(6)), Int8(6), "int8 in place of pq: .*groups=2 cannot be"),
        (GROUPED, PQ(otherwise=Int8(otherwise=Keep())), Int8(), "groups=2 cannot be"),
        (GROUPED, Lookup(otherwise=Int8()), Int8(), "int8 in place of lookup: .*groups=2"),
        (REFLECTING, PQ(otherwise=Keep()), Keep(), "keep in place of pq: .*'reflect'"),
        (LARGE, PQ(otherwise=Lookup(otherwise=Int8())), Lookup(), "lookup .* has 81 entries, more"),
        (LARGE, PQ(v=9, otherwise=Int8()), PQ(v=9), ""),
        (DEEP, PQ(v=1, otherwise=Lookup()), Lookup(), "more than 131072 sub-vectors of 1$"),
        (WORDS, PQ(otherwise=Int8()), Int8(), "embeddings take Int8"),
        (WORDS, PQ(otherwise=Lookup(otherwise=Int8())), Int8(), "only; embeddings take Int8"),
        (GROUPED, Int8(), Int8(), ""),
        (REFLECTING, Int8(otherwise=Keep()), Keep(), "keep in place of int8: .*'reflect'"),
    ],
)
def test_otherwise(layer: nn.Module, given: Any, want: Any, reason: str) -> None:
    method, why = settle(given, layer, type(layer))
    assert method == want
    assert bool(why) == bool(reason)
    assert re.search(reason, why), why


def test_the_report_says_why() -> None:
    grouped = (nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=4))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *grouped)
    recipe = {"2": PQ(otherwise=Keep()), "*": PQ(otherwise=Int8())}
    _, report = convert(model, recipe, [torch.randn(4, 3, 8, 8)], progress=False)
    assert [layer.method for layer in report.layers] == ["pq", "int8", None]
    assert report["0"].fallback == ""
    assert "groups=2" in report["1"].fallback
    assert "1: int8 in place of pq: a convolution with groups=2 cannot be looked up" in str(report)
    assert "keep in place of pq" in report["2"].reason
    with pytest.raises(LutraError, match=r"layer '1': a convolution with groups=2"):
        convert(model, {"1": PQ()}, [torch.randn(4, 3, 8, 8)], progress=False)
    with pytest.raises(LutraError, match=r"layer '1': .*groups=2"):  # the last one stands
        convert(model, {"1": Lookup(otherwise=PQ())}, [torch.randn(4, 3, 8, 8)], progress=False)


def test_otherwise_in_json() -> None:
    recipe = {"a": PQ(v=2, otherwise=Lookup(8, 7, otherwise=Int8(6))), "*": PQ(otherwise=Keep("x"))}
    data = json.loads(json.dumps(recipe_to_json(recipe)))
    assert data["a"]["otherwise"]["otherwise"] == {"method": "int8", "act_bits": 6}
    assert recipe_from_json(data) == recipe
    assert "otherwise" not in recipe_to_json({"*": PQ()})["*"]
    assert recipe_from_json({"*": {"method": "pq", "otherwise": {"method": "int8"}}}) == {
        "*": PQ(otherwise=Int8())
    }
    for bad, message in (
        ({"method": "nine"}, "otherwise has the method 'nine'"),
        ({"k": 3}, "otherwise has the method None"),
        ({"method": "int8", "bits": 3}, r"pattern '\*'.*bits"),
        ({"method": "function"}, "otherwise=Function.* is no method of layers"),
        ("int8", "otherwise='int8' is no method of layers"),
    ):
        with pytest.raises(LutraError, match=message):
            recipe_from_json({"*": {"method": "pq", "otherwise": bad}})
    with pytest.raises(LutraError, match="it is a list; give an object"):
        recipe_from_json([])  # type: ignore[arg-type]
    with pytest.raises(LutraError, match="Lookup: otherwise=Function"):
        Lookup(otherwise=Function())

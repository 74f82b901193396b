"""Export of BERT models of the transformers library: whole, for any batch and length."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_export_transformer import WithMask
from torch import Tensor, nn
from torch_sequences import same_as_torch

from lutra import PQ, Function
from lutra.errors import InputError, UnsupportedModelError
from lutra.format import load_graph
from lutra.graph import Graph
from lutra.runtime.session import Session
from lutra.train import convert, export
from lutra.train.exporting import parity as check

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

WIDTH, LONGEST, WORDS = 32, 40, 100
BLOCK = ["linear"] * 3 + ["attention", "linear", "add", "layer_norm"]
BLOCK += ["linear", "gelu", "linear", "add", "layer_norm"]
BODY = ["embedding", "position_embedding", "layer_norm", *BLOCK, *BLOCK]


def bert(attention: str = "sdpa", **settings: Any) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LONGEST,
        **settings,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():  # those of a new model hardly differ from position to
            parameter.add_(torch.randn_like(parameter) * 0.1)  # position
    return model.eval()


class Encoder(nn.Module):
    """A sentence encoder: the mean of the tokens that count, of length 1."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).expand(tokens.size()).float()
        mean = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return F.normalize(mean, p=2, dim=1)


class Classifier(nn.Module):
    """A head on the first token, and types of tokens as a third input."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.pool, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        tokens = self.body(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        return self.head(self.pool(tokens.last_hidden_state[:, 0]).tanh())


def sentences(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and masks, padded at the end; the first sentence is as long as it can be."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (batch, length), generator=generator)
    sizes = torch.randint(1, length + 1, (batch, 1), generator=generator)
    sizes[0] = length
    mask = (torch.arange(length) < sizes).long()
    return ids * mask, mask


def exported(model: nn.Module, path: Path, *example: Tensor, **settings: Any) -> Graph:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(model, path, example, dynamic_axes=(0, 1), **settings)
    return load_graph(path)


def operators(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_sentence_encoder(tmp_path: Path, attention: str) -> None:
    model = Encoder(bert(attention))
    graph = exported(model, tmp_path / "model.lutra", *sentences(3, 7))
    assert operators(graph) == [*BODY, "masked_mean", "l2_norm", "clamp", "div"]
    assert [(v.name, v.dtype, v.shape) for v in graph.inputs] == [
        ("input_ids", "int32", (None, None)),
        ("attention_mask", "int32", (None, None)),
    ]
    (table,) = (node for node in graph.nodes if node.op == "position_embedding")
    assert graph.tensors[table.tensors["weight"]].shape == (LONGEST, WIDTH)
    for batch, length in ((1, 1), (1, 2), (4, 13), (2, LONGEST)):
        same_as_torch(graph, model, *sentences(batch, length, seed=length))


def test_session_takes_int64_and_names_what_is_wrong(tmp_path: Path) -> None:
    model = Encoder(bert())
    exported(model, tmp_path / "model.lutra", *sentences(2, 7))
    session = Session(tmp_path / "model.lutra")
    ids, mask = sentences(2, 9)
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.bool().numpy()}
    (got,) = session.run(None, feeds)
    assert np.abs(got - check.outputs_of(model, (ids, mask))[0]).max() < 1e-5
    with pytest.raises(InputError, match=str(WORDS)):
        session.run(None, {**feeds, "input_ids": np.full((2, 9), WORDS)})
    ids, mask = sentences(1, LONGEST + 1)
    with pytest.raises(InputError, match=str(LONGEST)):
        session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})


@pytest.mark.slow
def test_classifier_with_token_types(tmp_path: Path) -> None:
    model = Classifier(bert("eager", hidden_act="gelu_new")).eval()
    ids, mask = sentences(2, 6)
    types = (torch.arange(6) > 2).long().expand(2, -1).contiguous()
    graph = exported(model, tmp_path / "model.lutra", ids, mask, types)
    assert operators(graph).count("embedding") == 2
    assert operators(graph).count("attention") == 2
    ids, mask = sentences(3, 11)
    same_as_torch(graph, model, ids, mask, torch.randint(0, 2, (3, 11)))


@pytest.mark.slow
def test_sequence_classification_of_transformers(tmp_path: Path) -> None:
    config = bert().config
    config.num_labels = 3

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.BertForSequenceClassification(config)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    model = Logits().eval()
    graph = exported(model, tmp_path / "model.lutra", *sentences(2, 6))
    same_as_torch(graph, model, *sentences(3, 12))


def test_lookup_layers(tmp_path: Path) -> None:
    model = Encoder(bert())
    names = ("input_ids", "attention_mask")
    batches = [dict(zip(names, sentences(8, 12, seed=n), strict=True)) for n in range(2)]
    lookup, _ = convert(model, {"*": PQ(v=4, k=16)}, batches)
    graph = exported(lookup, tmp_path / "model.lutra", *sentences(3, 7))
    assert operators(graph).count("pq_linear") == 12
    assert "linear" not in operators(graph)
    ids, mask = sentences(3, 15)
    feeds = check.feeds_of(graph, (ids, mask))
    results = [run(graph, feeds)["output"] for run in check.runners().values()]
    wanted = check.outputs_of(lookup.eval(), (ids, mask))[0]
    for got in results:  # rounding may move a code; directions hardly change
        assert (got * wanted).sum(1).min() > 0.999


@pytest.mark.slow
def test_function_tables(tmp_path: Path) -> None:
    model = Encoder(bert())
    names = ("input_ids", "attention_mask")
    batches = [dict(zip(names, sentences(8, 12, seed=n), strict=True)) for n in range(2)]
    tables, _ = convert(model, {"*": PQ(v=4, k=16), "**": Function()}, batches)
    graph = exported(tables, tmp_path / "model.lutra", *sentences(3, 7))
    assert operators(graph).count("piecewise") == 2
    for node in graph.nodes:
        if node.op in ("attention", "layer_norm"):
            assert any(role.endswith("slope") for role in node.tensors), node.name
    ids, mask = sentences(3, 15)
    wanted = check.outputs_of(tables.eval(), (ids, mask))[0]
    got = Session(graph).run(None, check.feeds_of(graph, (ids, mask)))[0]
    assert (got * wanted).sum(1).min() > 0.999


def test_inputs_of_other_types() -> None:
    model = WithMask(lambda m, x, mask: x * mask.unsqueeze(-1))
    mask = torch.ones(2, 5, dtype=torch.int16)
    with pytest.raises(UnsupportedModelError, match="int32, int64 and bool"):
        export(model, "never", (torch.randn(2, 5, 3), mask))
    with pytest.raises(InputError, match="int32"):
        export(Encoder(bert()), "never", (sentences(2, 5)[0], torch.full((2, 5), 2**40)))

"""Embeddings in int8: conversion and rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train import PQ, Int8, convert
from lutra.train.layers.int8_embedding import Int8Embedding


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


def ids() -> Tensor:
    return torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(0))


def test_rows_are_rounded_with_a_scale_each() -> None:
    dense = nn.Embedding(50, 16)
    with torch.no_grad():
        dense.weight[3] *= 100.0
        dense.weight[4] = 0.0
    layer = Int8Embedding.from_float(dense)
    error = (layer(ids()) - dense(ids())).abs()
    assert bool((error <= dense.weight.abs().amax(1)[ids()][..., None] / 127 * 0.5001).all())
    assert float(layer(torch.tensor([4])).abs().max()) == 0.0
    assert layer.int8_weight.dtype == torch.int8


def test_int8_names_an_embedding_and_other_methods_leave_it() -> None:
    torch.manual_seed(0)
    model = Tagger()
    converted, report = convert(model, {"words": Int8(), "*": PQ(v=4)}, [ids()])
    assert isinstance(converted.words, Int8Embedding)
    assert report["words"].method == "int8"
    assert 0.0 < report["words"].error < 1e-3
    assert report["words"].int8_bytes == 800
    kept, report = convert(model, {"*": PQ(v=4)}, [ids()])
    assert isinstance(kept.words, nn.Embedding)
    assert "Int8() only" in report["words"].reason
    alone, _ = convert(model, {"words": Int8()}, [])
    assert isinstance(alone.words, Int8Embedding)
    torch.testing.assert_close(alone(ids()), model(ids()), rtol=0.0, atol=0.05)
    with pytest.raises(LutraError, match="embedding of Tagger"):
        convert(model, {"nothing": Int8()}, [ids()])

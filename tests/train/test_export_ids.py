"""Ids that a model changes before it looks them up: views, columns, sums, positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lutra import Session
from lutra.format import load_graph
from lutra.reference import run_reference
from lutra.train.exporting.export import export

ROWS = 50


class Tokens(nn.Module):
    def __init__(self, function: Callable[[Tokens, Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(ROWS, 8), nn.Embedding(2, 8)
        self.function = function

    def forward(self, ids: Tensor) -> Tensor:
        return self.function(self, ids)


def _roberta(m: Tokens, ids: Tensor) -> Tensor:
    seen = ids.ne(1).int()
    positions = (torch.cumsum(seen, dim=1).type_as(seen) * seen).long() + 1
    return m.words(ids) + m.words(positions)


FORMS: dict[str, tuple[Callable[[Tokens, Tensor], Tensor], str]] = {
    "plain": (lambda m, i: m.words(i), "embedding"),
    "identity_view": (lambda m, i: m.words(i.view(-1, i.shape[-1])), "embedding"),
    "long": (lambda m, i: m.words(i.long()), "embedding"),
    "column": (lambda m, i: m.words(i[:, 0]), "slice"),
    "first_columns": (lambda m, i: m.words(i[:, :3]), "slice"),
    "column_by_column": (lambda m, i: m.words(i[:, 0]) * m.words(i[:, 1] % 7), "slice"),
    "zeros_like": (lambda m, i: m.words(i) + m.types(torch.zeros_like(i)), "position_embedding"),
    "zeros": (
        lambda m, i: m.words(i) + m.types(torch.zeros(i.shape, dtype=torch.long)),
        "position_embedding",
    ),
    "new_zeros": (lambda m, i: m.words(i) + m.types(i.new_zeros(i.shape)), "position_embedding"),
    "plus_one": (lambda m, i: m.words(i + 1), "cast"),
    "clamped": (lambda m, i: m.words(i.clamp(3, 30)), "clamp"),
    "kinds": (lambda m, i: m.words(i) + m.types((i > 5).long()), "cast"),
    "cumulative": (lambda m, i: m.words(i) + m.words(i.ne(1).cumsum(1) * i.ne(1)), "cumsum"),
    "roberta": (_roberta, "cumsum"),
    "chosen": (lambda m, i: m.words(torch.where(i > 40, 3, i)), "where"),
}


@pytest.mark.parametrize("name", FORMS)
def test_ids_are_computed(name: str, tmp_path: Path) -> None:
    function, op = FORMS[name]
    torch.manual_seed(0)
    model = Tokens(function).eval()
    ids = torch.randint(0, ROWS - 1, (4, 6))
    path = tmp_path / "m.lutra"
    export(model, path, ids, dynamic_axes=(0, 1))
    graph = load_graph(path)
    assert op in [node.op for node in graph.nodes]
    for batch, length in ((1, 6), (3, 9)):
        ids = torch.randint(0, ROWS - 1, (batch, length))
        want = model(ids).detach().numpy()
        feeds: dict[str, Any] = {graph.inputs[0].name: ids.numpy().astype(np.int32)}
        np.testing.assert_allclose(Session(graph).run(None, feeds)[0], want, atol=1e-5)
        (got,) = run_reference(graph, feeds).values()
        np.testing.assert_allclose(got, want, atol=1e-5)

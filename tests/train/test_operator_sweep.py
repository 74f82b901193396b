"""Every operator by itself: exported, and computed by the engine as by torch, or refused."""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from operator_cases import CASES as FIRST
from operator_cases import Case
from operator_orders import CASES as OF_ORDERS
from operator_positions import CASES as OF_POSITIONS
from operator_positions import SIZES as POSITIONS_OF_ANY_SIZE
from operator_relatives import RELATIVES
from operator_relatives import SIZES as RELATIVES_OF_ANY_SIZE
from operator_volumes import CASES as OF_VOLUMES
from operator_volumes import SIZES as VOLUMES_OF_ANY_SIZE
from operator_written import CASES as WRITTEN
from operator_written import SIZES as WRITTEN_OF_ANY_SIZE
from torch import Tensor

from lutra import Session, runnable_isas
from lutra.errors import UnsupportedModelError
from lutra.format import load_graph
from lutra.reference import run_reference
from lutra.reference.compare import difference
from lutra.train.exporting.export import export

CASES = {
    **FIRST,
    **{f"relatives-{name}": case for name, case in RELATIVES.items()},
    **{f"positions-{name}": case for name, case in OF_POSITIONS.items()},
    **OF_ORDERS,
    **OF_VOLUMES,
    **WRITTEN,
}
#: One of each kind; the others are slow.
QUICK = (
    "activations-prelu_channels",
    "functions-pow_fraction",
    "pairs-addcmul",
    "masks-where_number",
    "masks-masked_fill_infinity",
    "shapes-class_token",
    "shapes-stack_first_mean",
    "pads-reflect_2d",
    "pads-max_pool_behind_infinity",
    "reductions-std",
    "reductions-cosine_similarity",
    "products-einsum_heads",
    "orders-median",
    "places-scatter_of_topk",
    "places-index_put_mask",
    "places-entry_of_each_sample",
    "complex-filter",
    "complex-stft",
    "positions-einsum_of_parts",
    "positions-mask_as_output",
    "positions-attention_pooling",
    "volumes-video",
    "volumes-transposed_groups",
    "volume_pools-max_padded",
    "unpools-odd",
    "matrices-inverse_3",
    "written_functions-lgamma",
    "written_places-table",
    "written_writes-under_a_mask",
    "written_layers-attention_causal_weights",
)


def inputs_of(case: Case, batch: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(batch, *shape, generator=generator) for shape in case.shapes)
    return tuple(x.abs() + 0.1 if case.positive else x for x in drawn)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_single_operators(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make().eval()
    path = tmp_path / "model.lutra"
    write = functools.partial(export, model, path, inputs_of(case, 2, 1))
    if case.refused is not None:
        with pytest.raises(UnsupportedModelError, match=re.escape(case.refused)):
            write()
        assert not path.exists()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write()
    graph = load_graph(path)
    for batch in (1, 3):
        inputs = inputs_of(case, batch, 2 + batch)
        want: np.ndarray[Any, Any] = model(*(x.clone() for x in inputs)).detach().numpy()
        feeds = {v.name: x.numpy() for v, x in zip(graph.inputs, inputs, strict=True)}
        (expected,) = run_reference(graph, feeds).values()
        assert difference(expected, want) < 1e-5
        first: np.ndarray[Any, Any] | None = None
        for isa in runnable_isas():
            (got,) = Session(graph, isa=isa).run(None, feeds)
            assert got.shape == want.shape
            assert difference(got, want) < 1e-5, isa
            first = got if first is None else first
            np.testing.assert_array_equal(got.view(np.int32), first.view(np.int32), isa)


#: Operators whose sizes may differ from run to run: the case, and the axes.
SIZES = {
    "masks-where_number": (0, 2, 3),
    "masks-zeros_like": (0, 2, 3),
    "shapes-class_token": (0, 1),
    "shapes-select_channel": (0, 2, 3),
    "reductions-max_values": (0, 2, 3),
    "shapes-channel_shuffle": (0, 2, 3),
    "pairs-maximum": (0, 2, 3),
    "reductions-cumsum": (0, 1),
    "reductions-std_population": (0, 2, 3),
    "reductions-logsumexp": (0, 2, 3),
    "activations-log_softmax_channels": (0, 2, 3),
    "products-einsum_linear": (0, 1),
    "pads-zeros": (0, 2, 3),
}


ANY_SIZE = {
    **{name: (CASES[name], axes) for name, axes in SIZES.items()},
    **{f"relatives-{name}": each for name, each in RELATIVES_OF_ANY_SIZE.items()},
    **{f"positions-{name}": each for name, each in POSITIONS_OF_ANY_SIZE.items()},
    **VOLUMES_OF_ANY_SIZE,
    **{f"written-{name}": each for name, each in WRITTEN_OF_ANY_SIZE.items()},
}


@pytest.mark.parametrize(
    "name",
    [
        name
        if name == "positions-attention_pooling"
        else pytest.param(name, marks=pytest.mark.slow)
        for name in ANY_SIZE
    ],
)
def test_operators_of_any_size(name: str, tmp_path: Path) -> None:
    case, axes = ANY_SIZE[name]
    model = case.make().eval()
    path = tmp_path / "model.lutra"
    export(model, path, inputs_of(case, 2, 1), dynamic_axes=axes)
    graph = load_graph(path)
    for more in (0, 3):
        shapes = tuple(
            tuple(size + more * (axis in axes) for axis, size in enumerate(shape, 1))
            for shape in case.shapes
        )
        inputs = inputs_of(Case(case.make, shapes, None, case.positive), 3, 4)
        want = model(*inputs).detach().numpy()
        feeds = {v.name: x.numpy() for v, x in zip(graph.inputs, inputs, strict=True)}
        (got,) = Session(graph).run(None, feeds)
        assert got.shape == want.shape
        assert difference(got, want) < 1e-5


def test_the_sweep_is_as_large_as_it_says() -> None:
    assert len(CASES) >= 120
    assert sum(case.refused is None for case in CASES.values()) >= 110
    assert set(QUICK) <= {*CASES, *ANY_SIZE}

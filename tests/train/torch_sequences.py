"""Graphs of torch models over sequences, compared with torch in every way that they can be run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lutra.graph import Graph
from lutra.train.exporting import parity as check
from lutra.train.exporting.capture import argument_names, capture, dynamic_axes_of, example_tensors
from lutra.train.exporting.lowering import lower
from lutra.train.exporting.lowering.decompose import decomposed

TOLERANCE = 2e-5


def lowered(model: nn.Module, *example: Tensor, axes: Sequence[int]) -> Graph:
    """The graph of a model, which computes the same for the example, node by node."""
    model = copy.deepcopy(model).eval()
    inputs = example_tensors(example)
    names = argument_names(model, len(inputs))
    program = decomposed(capture(model, inputs, dynamic_axes_of(axes, names, inputs)))
    result = lower(program, names)
    result.graph.validate()
    wanted = check.outputs_of(model, inputs)
    check.check_graph(result, program, check.Check(inputs, wanted), tolerance=TOLERANCE)
    for run in check.runners().values():
        first = check._first_difference(result, check._record(program, inputs), run, TOLERANCE)
        assert first is None
    return result.graph


def same_as_torch(graph: Graph, model: nn.Module, *inputs: Tensor) -> None:
    """Compares outputs for other inputs."""
    with torch.no_grad():
        made: Any = copy.deepcopy(model).eval()(*inputs)
    outputs = made if isinstance(made, (tuple, list)) else [made]
    feeds = check.feeds_of(graph, inputs)
    for run in check.runners().values():
        got = run(graph, feeds)
        for name, want in zip(graph.outputs, outputs, strict=True):
            assert got[name].shape == tuple(want.shape)
            assert check.difference(got[name], want.numpy()) < TOLERANCE

"""The price of a family: everything that lutra does with one, for one that is all in this file.

A layer of the family `Index` has a table with a row for each index of an activation and a column
for each output; what it computes is the sum of the rows that its activations choose. The engine's
step is `tests/index_family_op.cc`, a plugin. Nothing else is edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from index_family import load_index_family
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lutra.cli as cli
from lutra import reference
from lutra.errors import LutraError
from lutra.format import load_graph
from lutra.node import Array, Node, Value
from lutra.ops import OPS, register
from lutra.ops.grid import GRID, check_grid
from lutra.ops.rows import example_ends, infer_linear, linear_attrs
from lutra.ops.spec import Cost, Example, OpSpec, TensorRole, inner, integer, node_error, number
from lutra.reference import run_reference
from lutra.reference.pq import quantise
from lutra.runtime.cpu import runnable_isas
from lutra.runtime.session import Session
from lutra.train import Keep, convert, export, finetune, recipe_from_json, recipe_to_json
from lutra.train import recipe as recipes
from lutra.train.layers import base
from lutra.train.layers.base import Family, FrozenLayer, RowLayer
from lutra.train.layers.pq import quantize_tables
from lutra.train.operators import frozen as operators
from lutra.train.operators import portable
from lutra.train.operators.frozen import FrozenNode, frozen_kernel
from lutra.train.recipe import Method

OP = "index_linear"
TENSORS = {
    "table": TensorRole("int8", 2),
    "scale": TensorRole("float32", 1),
    "bias": TensorRole("float32", 1),
}


# ---- recipe, operator, reference ----------------------------------------------------------------


@dataclass(frozen=True)
class Index(Method, name="index"):
    """A table of activation index and output."""

    act_bits: int = 4


del recipes._METHODS["index"]  # other tests must not meet the family; see the fixture


def check(node: Node, tensors: Mapping[str, Array]) -> None:
    rows, outputs = tensors["table"].shape
    if rows != check_grid(node) + 1:
        raise node_error(node, f"has a table of {rows} rows", "give it one for each index")
    for role in ("scale", "bias"):
        if tensors[role].shape != (outputs,):
            raise node_error(node, f"has {role} of another size", f"it needs {outputs}")


def infer(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    return infer_linear(node, inputs, tensors["table"].shape[1])


def cost(node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]) -> Cost:
    (made,) = inner(output)
    reads = made * integer(node, "in_features")
    return Cost(lookups=reads, dense_macs=reads, scaled=made, table_bytes=tensors["table"].nbytes)


def examples(rng: np.random.Generator, inputs: int) -> list[Example]:
    table = rng.integers(-127, 128, (16, 9)).astype(np.int8)
    attrs: Any = {"in_features": inputs, "act_scale": 0.1, "act_zero": 8, "act_bits": 4}
    return [(attrs, {"table": table, **example_ends(rng, 9)})]


SPEC = OpSpec(
    OP,
    attrs={**linear_attrs(2**20), **GRID},
    tensors=TENSORS,
    check=check,
    infer=infer,
    cost=cost,
    output_axis=-1,
    is_table_layer=True,
    gain_role="scale",
    bias_role="bias",
    examples=examples,
)


def index_linear(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    scale, zero = number(node, "act_scale"), integer(node, "act_zero")
    rows = quantise(inputs[0], scale, zero, integer(node, "act_bits"))
    sums = tensors["table"].astype(np.int32)[rows].sum(1)
    y: Array = sums.astype(np.float32) * tensors["scale"] + tensors["bias"]
    return y


# ---- torch --------------------------------------------------------------------------------------


def frozen_index(x: Tensor, node: FrozenNode, tensors: Mapping[str, Tensor]) -> Tensor:
    grid = base.Grid.of_attrs(node.attrs)
    rows = portable.quantize(x, grid).long().flatten(1)
    sums = tensors["table"].int()[rows].sum(1).float()
    return (sums * tensors["scale"] + tensors["bias"])[:, :, None, None]


class IndexLinear(RowLayer):
    """Trains its table; what reaches its input is no gradient."""

    op = OP
    method: Index

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.table = nn.Parameter(torch.zeros(1 << self.method.act_bits, self.outputs))

    def learn(self, rows: Tensor, *, steps: int, seed: int) -> None:
        """The best table for the dense outputs, by least squares over counts of indices."""
        kinds = torch.arange(len(self.table), device=rows.device)
        counts = (portable.quantize(rows, self.grid()).long()[:, :, None] == kinds).sum(1).float()
        want = rows @ self.weight.t()
        with torch.no_grad():
            self.table.copy_(torch.linalg.lstsq(counts, want, driver="gelsd").solution)

    def settle(self, rows: Tensor) -> Mapping[str, Any]:
        return {"label": "index", "table_bytes": self.table.numel(), "error": 0.0}

    def _run(self, x: Tensor) -> Tensor:
        self.forget_frozen()
        with torch.no_grad():
            table, scale = quantize_tables(self.table[None])
            rounded = table[0].float() * scale
        rows = portable.quantize(x.detach(), self.grid()).long().flatten(1)
        y = (self.table + (rounded - self.table).detach())[rows].sum(1)
        y = y if self.bias is None else y + self.bias
        return y[:, :, None, None]

    def freeze(self) -> FrozenLayer:
        with torch.no_grad():
            table, scale = quantize_tables(self.table[None])
            return self._freeze(FrozenLayer, {"table": table[0], "scale": scale})


@pytest.fixture(autouse=True)
def _family() -> Iterator[None]:
    """Registered for one test: others must not meet it."""
    load_index_family()
    recipes._METHODS["index"] = Index
    register(SPEC)
    reference.register(OP, index_linear)
    frozen_kernel(OP)(frozen_index)
    base.register(Family(Index, {nn.Linear: IndexLinear}))
    yield
    del OPS[OP], reference.KERNELS[OP], operators._KERNELS[OP], base._FAMILIES["index"]
    del recipes._METHODS["index"]


def model_and_data() -> tuple[nn.Module, Tensor, Tensor]:
    """The classes are lengths: sums over the entries of a row, which the table can hold."""
    torch.manual_seed(0)
    x = torch.randn(512, 12)
    lengths = x.square().sum(1)
    edges = torch.quantile(lengths, torch.tensor([1 / 3, 2 / 3]))
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    return model, x, torch.bucketize(lengths, edges)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def test_a_family_of_its_own_from_recipe_to_engine(tmp_path: Path, capsys: Any) -> None:
    model, x, y = model_and_data()
    recipe = recipe_from_json(recipe_to_json({"3": Keep(), "0": Index(6)}))
    assert recipe["0"] == Index(6)
    converted, report = convert(model, recipe, [x], progress=False)
    assert [layer.method for layer in report.layers] == ["index", None]
    assert "index" in str(report)

    before = accuracy(converted, x, y)
    data = DataLoader(TensorDataset(x, y), batch_size=64)
    finetune(converted, data, epochs=20, lr=1e-2, progress=False)
    assert accuracy(converted, x, y) > max(before, 0.8)

    path = tmp_path / "index.lutra"
    export(converted, path, x[:8])
    graph = load_graph(path)
    assert [node.op for node in graph.nodes].count(OP) == 1
    with torch.no_grad():
        want = converted.eval()(x).numpy()
    np.testing.assert_allclose(
        run_reference(graph, [x.numpy()])["output"], want, rtol=1e-4, atol=1e-4
    )
    for isa in runnable_isas():
        np.testing.assert_allclose(Session(graph, isa=isa)(x.numpy()), want, rtol=1e-4, atol=1e-4)

    for command in (["inspect", str(path)], ["verify", str(path)], ["doctor"]):
        assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert OP in out


def test_layers_of_the_family_give_the_same_bits_everywhere() -> None:
    model, x, _ = model_and_data()
    converted, _ = convert(model, {"0": Index(), "*": Keep()}, [x], progress=False)
    layer = converted.get_submodule("0")
    assert isinstance(layer, IndexLinear)
    rows = torch.randn(33, 12)
    with torch.no_grad():
        want = layer.eval()(rows).numpy()
    frozen = layer.freeze()
    roles = {role: role for role in frozen.tensors}
    node = Node(OP, "layer", ("x",), "y", frozen.node.attrs, roles)
    np.testing.assert_array_equal(index_linear(node, [rows.numpy()], frozen.arrays()), want)
    layer.train()
    np.testing.assert_allclose(layer(rows).detach().numpy(), want, rtol=1e-5, atol=1e-5)


def test_bad_input_is_refused() -> None:
    model, x, _ = model_and_data()
    converted, _ = convert(model, {"0": Index(), "*": Keep()}, [x], progress=False)
    with pytest.raises(LutraError, match=r"IndexLinear: the input has shape \(2, 9\)"):
        converted.get_submodule("0")(torch.rand(2, 9))

"""Codes of kernel rows and of pixels in training: layers, gradients, conversion, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lutra
from lutra.errors import LutraError
from lutra.ops.pq import cut_rows
from lutra.train import PQ, convert, export, finetune
from lutra.train.geometry import Geometry
from lutra.train.layers.pq import PQConv2d, quantize_tables
from lutra.train.operators import portable
from lutra.train.operators import pq as ops
from lutra.train.parts import Parts

GROUPS = ["row", "pixel"]
ENCODERS = ["nearest", "tree"]


class Net(nn.Module):
    """Strides, padding, a kernel of one row, a shortcut of one pixel, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(5, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.short = nn.Conv2d(8, 8, 1, stride=2)
        self.c = nn.Conv2d(8, 6, (1, 3), padding=(0, 1))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.norm(self.b(x)) + self.short(x))
        y: Tensor = self.fc(F.relu(self.c(x)).mean((2, 3)))
        return y


@pytest.fixture
def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(32, 5, 9, 7)


def converted(group: str, encoder: str, x: Tensor, *, free: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    method = PQ(k=8, encoder=encoder, group=group, free_tables=free)  # type: ignore[arg-type]
    return convert(Net().eval(), {"*": method}, [x], rows=512, kmeans_steps=3)[0]


@pytest.mark.parametrize("group", ["patch", *GROUPS])
def test_parts_are_those_of_the_specification(group: str) -> None:
    geometry = Geometry(5, (3, 2), (2, 1), (1, 2), (1, 2))
    parts, v = Parts(geometry, group), 4  # type: ignore[arg-type]
    rows = torch.arange(7.0 * geometry.depth).view(7, -1)
    node = lutra.Node(
        "pq_conv2d", "n", ("x",), "y", {"in_channels": 5, "kernel": (3, 2), "group": group}, {}
    )
    np.testing.assert_array_equal(parts.cut(rows).numpy(), cut_rows(node, rows.numpy()))
    assert torch.equal(parts.join(parts.cut(rows)), rows)
    assert torch.equal(parts.rows_of(parts.blocks(rows, v)), rows)
    books = parts.codebook_blocks(rows, v)
    tables = parts.blocks(rows, v).unflatten(0, (-1, parts.count))  # (G, T, V, M)
    assert torch.equal(books, tables.transpose(1, 2).flatten(2))
    sub = parts.sub_vectors(rows, v).unflatten(1, (7, parts.count))  # (G, n, T, V)
    assert torch.equal(sub.permute(0, 2, 3, 1), tables)


@pytest.mark.parametrize("free", [None, True])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("group", GROUPS)
def test_training_evaluation_and_file_agree(
    group: str, encoder: str, free: bool | None, inputs: Tensor, tmp_path: Path
) -> None:
    model = converted(group, encoder, inputs, free=free)
    assert model.a.parts.count == (3 if group == "row" else 9)
    assert model.c.parts.count == (1 if group == "row" else 3)
    assert model.short.parts.count == 1
    data = DataLoader(TensorDataset(inputs, torch.arange(32) % 4), batch_size=8)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    finetune(model, data, steps=4, lr=1e-2)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before.get(name, p))]
    assert not set(still) & set(before)
    for layer in (model.a, model.b):
        x = torch.randn(3, *((5, 9, 7) if layer is model.a else (8, 6, 5)))
        trained = layer.train()(x).detach()
        with torch.no_grad():
            assert torch.equal(layer.eval()(x), trained)
    path = tmp_path / "grouped.lutra"
    model.eval()
    export(model, path, inputs[:2])
    with torch.no_grad():
        want = model(inputs).numpy()
    for isa in lutra.runnable_isas():
        np.testing.assert_allclose(lutra.Session(path, isa=isa)(inputs.numpy()), want, atol=1e-5)
    nodes = {n.name: n for n in lutra.load_graph(path).nodes if n.op.startswith("pq")}
    groups = [n.attrs.get("group") for n in nodes.values()]
    assert groups.count(group) == 3
    assert groups.count("patch") == 1


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("group", GROUPS)
def test_the_engine_and_pytorch_give_the_same_codes(
    group: str, encoder: str, stride: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(7, 5, (3, 4), stride=stride, padding=(2, 1), dilation=(1, 2))
    layer = PQConv2d.from_float(conv, PQ(k=8, encoder=encoder, group=group))  # type: ignore[arg-type]
    layer.set_activation_range(-2.0, 2.0)
    layer.learn(torch.randn(300, 84), steps=3, seed=0)
    made = layer.encoder()
    tables, scale = quantize_tables(layer.tables(made).detach())
    x = 2 * torch.randn(2, 7, 8, 11)
    args = (x, layer.geometry, layer.grid(), made, tables, scale)
    y, codes = ops.forward(*args)
    plain, plain_codes = portable.forward(*args, torch.zeros_like(scale))
    assert torch.equal(codes, plain_codes)
    assert torch.equal(y, plain)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("group", GROUPS)
def test_gradients_of_tables_and_bias_are_exact(group: str, encoder: str) -> None:
    """Against the difference of outputs for a change of the float tables, before rounding."""
    torch.manual_seed(0)
    method = PQ(k=8, encoder=encoder, group=group, free_tables=True)  # type: ignore[arg-type]
    layer = PQConv2d.from_float(nn.Conv2d(4, 3, 3, padding=1), method)
    layer.set_activation_range(-2.0, 2.0)
    layer.learn(torch.randn(300, 36), steps=3, seed=0)
    x, weight = torch.randn(2, 4, 5, 6), torch.randn(2, 3, 5, 6)
    layer.train()
    (layer(x) * weight).sum().backward()
    got = layer.table_residual.grad
    codes = portable.encode(x, layer.geometry, layer.grid(), layer.encoder())
    want = torch.zeros_like(got)
    rows = weight.permute(0, 2, 3, 1).reshape(-1, 3)
    for table, its in enumerate(codes.long()):
        want[table].index_add_(0, its, rows)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_pixels_of_one_kernel_are_fewer_codes_than_patches(inputs: Tensor) -> None:
    model = converted("row", "nearest", inputs)
    assert model.a.centroids.shape == (5, 8, 3)
    assert model.a.freeze().tables.shape == (15, 8, 8)
    model = converted("pixel", "nearest", inputs)
    assert model.a.centroids.shape == (2, 8, 4)
    assert model.a.freeze().tables.shape == (18, 8, 8)


@pytest.mark.parametrize("group", GROUPS)
def test_compact_tables(group: str, inputs: Tensor, tmp_path: Path) -> None:
    model = converted(group, "nearest", inputs).eval()
    export(model, tmp_path / "compact.lutra", inputs[:2], tables="compact")
    export(model, tmp_path / "stored.lutra", inputs[:2])
    got, want = (
        lutra.Session(tmp_path / f"{n}.lutra")(inputs.numpy()) for n in ("compact", "stored")
    )
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()
    assert any("factor" in n.tensors for n in lutra.load_graph(tmp_path / "compact.lutra").nodes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "image"}, "group='image' is not one of"),
        ({"group": "row", "gradient": "soft"}, "no soft gradient"),
        ({"group": "pixel", "centroids": "average"}, "no moving averages"),
    ],
)
def test_refusals(settings: dict[str, str], message: str) -> None:
    with pytest.raises(LutraError, match=message):
        PQ(**settings)  # type: ignore[arg-type]

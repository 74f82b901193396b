"""Layers of one table from PyTorch to the graph, with the batch norms behind them."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lutra import load_graph, run_reference
from lutra.ops.lookup import unpack_weights
from lutra.train import Lookup, LookupConv2d, LookupLinear
from lutra.train.exporting import parity as check
from lutra.train.exporting.capture import capture
from lutra.train.exporting.export import export, freeze_lookup_layers
from lutra.train.exporting.fold import find_folds, fold_batch_norm


def trained_norm(norm: nn.Module, seed: int) -> None:
    """Statistics as after training; one gamma is negative and one is 0."""
    generator = torch.Generator().manual_seed(seed)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.weight[0], norm.weight[1] = 0.0, -0.7
        norm.bias.normal_(generator=generator)
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2.0, generator=generator)


class Net(nn.Module):
    """Lookup convolutions and linear layers with batch norms, (N, 3, 8, 8) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 6, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False)
        self.conv = LookupConv2d.from_float(conv, Lookup())
        self.conv.set_activation_range(-2.0, 2.0)
        self.norm = nn.BatchNorm2d(6)
        self.fc = LookupLinear.from_float(nn.Linear(6, 5), Lookup(levels=64, weights=33))
        self.fc.set_activation_range(0.0, 1.0)
        self.last = nn.BatchNorm1d(5)
        trained_norm(self.norm, 1)
        trained_norm(self.last, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        y: Tensor = self.last(self.fc(x.mean((2, 3))))
        return y


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_graph_holds_the_layers(tmp_path: Path, net: Net, images: Tensor) -> None:
    path = tmp_path / "m.lutra"
    export(net, path, images)
    graph = load_graph(path)
    conv, fc = (node for node in graph.nodes if node.op.startswith("lookup_"))
    assert (conv.name, conv.op, fc.name, fc.op) == ("conv", "lookup_conv2d", "fc", "lookup_linear")
    frozen = net.conv.freeze()
    assert conv.attrs == {
        "in_channels": 3,
        "kernel": (3, 3),
        "stride": (2, 1),
        "padding": (1, 0),
        "dilation": (1, 2),
        "act_scale": frozen.grid.scale,
        "act_zero": 8,
        "act_bits": 4,
        "weight_bits": 4,
    }
    assert fc.attrs == {
        "in_features": 6,
        "act_scale": net.fc.freeze().grid.scale,
        "act_zero": 0,
        "act_bits": 6,
        "weight_bits": 8,
    }
    tensors = graph.node_tensors(conv)
    assert np.array_equal(tensors["table"], frozen.table.numpy())
    assert np.array_equal(tensors["weight"], frozen.weight.numpy())
    index = unpack_weights(tensors["weight"], 4, 27)
    assert index.max() <= 14
    assert len(np.unique(index)) > 5
    assert all(node.op != "affine" for node in graph.nodes)


@pytest.mark.parametrize("batch", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5))])
def test_graph_equals_torch_for_any_batch(
    tmp_path: Path, net: Net, images: Tensor, batch: int
) -> None:
    path = tmp_path / "m.lutra"
    export(net, path, images)
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
    folded = fold_batch_norm(freeze_lookup_layers(copy.deepcopy(net)), x)
    with torch.no_grad():
        want = folded(x).numpy()
    (got,) = run_reference(load_graph(path), [x.numpy()]).values()
    assert check.difference(got, want) < 1e-5


def test_folding_changes_scale_and_bias_only(net: Net, images: Tensor) -> None:
    frozen = freeze_lookup_layers(copy.deepcopy(net))
    folded = fold_batch_norm(frozen, images)
    for name, norm in (("conv", "norm"), ("fc", "last")):
        assert isinstance(getattr(folded, norm), nn.Identity)
        new, old = getattr(folded, name), getattr(frozen, name)
        assert torch.equal(new.weight, old.weight)
        assert torch.equal(new.table, old.table)
        assert new.scale[0] == 0.0  # gamma was 0
        assert new.scale[1] < 0.0 < old.scale[1]
    want = frozen.norm(frozen.conv(images))
    torch.testing.assert_close(folded.conv(images), want, rtol=1e-5, atol=1e-5)
    rows = torch.rand(7, 6)
    want = frozen.last(frozen.fc(rows))
    torch.testing.assert_close(folded.fc(rows), want, rtol=1e-5, atol=1e-5)


def test_layers_used_twice_are_not_folded(images: Tensor) -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z: Tensor = self.norm(y) + y
            return z

    model = freeze_lookup_layers(Twice().eval())
    assert find_folds(model, capture(model, (images,))) == []

"""Codebooks shared by layers that read the same tensor, and the reconstruction loss of eLUT-NN."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lutra.errors import LutraError
from lutra.train import PQ, PQLinear, convert, finetune, reconstruction_loss


class Attention(nn.Module):
    """q, k and v of one tensor; `other` reads a copy of it, `last` something else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.other, self.last = (nn.Linear(24, 24) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), 2)
        return self.last(weights @ self.v(x)) + self.other(x.clone())


def batches(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn((4, 7, 24), generator=generator) for _ in range(count)]


def converted(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return convert(Attention(), {"*": PQ(v=4, **settings)}, batches())[0]


@pytest.mark.parametrize("centroids", ["gradient", "average"])
def test_layers_that_read_the_same_tensor_share_their_codebooks(centroids: Any) -> None:
    model = converted(centroids=centroids)
    assert model.q.centroids is model.k.centroids is model.v.centroids
    assert model.other.centroids is not model.q.centroids
    assert model.last.centroids is not model.q.centroids
    for name in ("k", "v"):
        layer = model.get_submodule(name)
        assert layer.follows
        assert layer.grid() == model.q.grid()
        np.testing.assert_array_equal(layer.freeze().centroids, model.q.freeze().centroids)
    assert not model.q.follows


@pytest.mark.slow
def test_sharing_survives_copies_checkpoints_and_training(tmp_path: Any) -> None:
    model = copy.deepcopy(converted())
    assert model.q.centroids is model.v.centroids
    data = DataLoader(TensorDataset(torch.cat(batches()), torch.cat(batches())), batch_size=8)
    settings: dict[str, Any] = {"steps": 4, "loss": F.mse_loss, "checkpoint_dir": tmp_path}
    before = model.q.centroids.detach().clone()
    finetune(model, data, checkpoint_every=2, **settings)
    assert model.q.centroids is model.k.centroids
    assert not torch.equal(before, model.q.centroids)
    again = converted()
    finetune(again, data, checkpoint_every=2, **settings)  # takes the last checkpoint
    assert again.q.centroids is again.k.centroids
    for (name, a), (_, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_layers_can_be_told_not_to_share() -> None:
    model, _ = convert(Attention(), {"*": PQ(v=4)}, batches(), share_encoders=False)
    assert model.q.centroids is not model.k.centroids
    different, _ = convert(Attention(), {"q": PQ(v=4), "[kv]": PQ(v=8)}, batches())
    assert different.k.centroids is different.v.centroids
    assert different.q.centroids is not different.k.centroids
    trees, _ = convert(Attention(), {"*": PQ(v=4, encoder="tree")}, batches())
    assert trees.q.centroids is not trees.k.centroids


def layer_of(**settings: Any) -> tuple[PQLinear, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(200, 24)
    model, _ = convert(nn.Sequential(nn.Linear(24, 10)), {"0": PQ(v=4, **settings)}, [x])
    layer = model[0]
    assert isinstance(layer, PQLinear)
    return layer.train(), x[:50].clone().requires_grad_()


def test_dense_gradients_are_those_of_the_dense_layer() -> None:
    layer, x = layer_of(gradient="dense", reconstruction=0.5)
    y = layer(x)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    assert layer.centroids.grad is None
    got = (x.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone())
    x.grad = layer.weight.grad = layer.bias.grad = None
    (F.linear(x, layer.weight, layer.bias) * weight).sum().backward()
    for a, b in zip(got, (x.grad, layer.weight.grad, layer.bias.grad), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():  # the forward pass is that of the engine
        torch.testing.assert_close(y, layer.eval()(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", ["dense", "projected", "straight-through"])
def test_the_reconstruction_loss_is_that_of_both_sides(gradient: Any) -> None:
    layer, x = layer_of(gradient=gradient, reconstruction=0.25)
    y = layer(x)
    loss = reconstruction_loss(layer)
    want = F.linear(x, layer.weight, layer.bias)
    expected = 2 * 0.25 * (y - want).square().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert layer.centroids.grad is not None
    assert layer.centroids.grad.abs().max() > 0
    assert reconstruction_loss(layer) is None  # it was taken
    layer.eval()(x)
    assert reconstruction_loss(layer) is None


@pytest.mark.slow
def test_elut_training_brings_the_layer_nearer_to_the_dense_one() -> None:
    model = converted(gradient="dense", reconstruction=1.0)
    data = torch.cat(batches())
    loader = DataLoader(TensorDataset(data, torch.zeros(len(data))), batch_size=8)

    def error() -> float:
        with torch.no_grad():
            wanted = F.linear(data, model.q.weight, model.q.bias)
            return float((model.q(data) - wanted).square().mean())

    start = error()
    finetune(model, loader, steps=60, lr=1e-2, loss=lambda y, _: 0.0 * y.sum())
    assert error() < 0.95 * start


def test_a_recipe_that_trains_no_codebooks_is_refused() -> None:
    with pytest.raises(LutraError, match="trains no codebooks"):
        PQ(gradient="dense")
    with pytest.raises(LutraError, match="reconstruction=-1"):
        PQ(reconstruction=-1)
    PQ(gradient="dense", centroids="average")

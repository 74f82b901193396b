"""Batch norms are folded into the layers before them where nothing else reads those."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exported import (
    IMAGE,
    Fn,
    check_model,
    ops,
    randomise,
)
from torch import Tensor, nn

from lutra.train.exporting.fold import fold_batch_norm


@pytest.mark.parametrize("gamma", [-1.5, 0.0, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_folding_with_any_gamma(gamma: float, bias: bool) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight.fill_(gamma)
    x = torch.randn(2, *IMAGE)
    folded = fold_batch_norm(model, x)
    assert isinstance(folded[1], nn.Identity)
    assert isinstance(model[1], nn.BatchNorm2d)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_folding_follows_the_data_and_not_the_order_of_modules() -> None:
    model = Fn(
        lambda m, x: m.norm_a(m.conv_a(x)) + m.norm_b(m.conv_b(x)),
        norm_b=nn.BatchNorm2d(4),
        conv_a=nn.Conv2d(3, 4, 1),
        conv_b=nn.Conv2d(3, 4, 1),
        norm_a=nn.BatchNorm2d(4),
    )
    randomise(model)
    x = torch.randn(2, *IMAGE)
    folded = fold_batch_norm(model, x)
    assert isinstance(folded.norm_a, nn.Identity)
    assert isinstance(folded.norm_b, nn.Identity)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_folding_into_transposed_convolutions(tmp_path: Path, groups: int, bias: bool) -> None:
    images = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups, bias=bias), nn.BatchNorm2d(6)
    )
    points = nn.Sequential(
        nn.ConvTranspose1d(4, 6, 4, stride=2, groups=groups, bias=bias), nn.BatchNorm1d(6)
    )
    for model, shape in ((images, (4, 5, 7)), (points, (4, 9))):
        randomise(model)
        x = torch.randn(2, *shape)
        folded = fold_batch_norm(model, x)
        assert isinstance(folded[1], nn.Identity)
        torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)
        assert "affine" not in ops(check_model(tmp_path, model, shape))


class PaddedConv(nn.Conv2d):
    """A forward of its own, as TensorFlow's padding needs it."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class NoBias(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


@pytest.mark.parametrize("folds", [True, False])
def test_folding_into_layers_with_a_forward_of_their_own(tmp_path: Path, folds: bool) -> None:
    layer = (PaddedConv if folds else NoBias)(3, 4, 3, bias=False)
    model = randomise(nn.Sequential(layer, nn.BatchNorm2d(4)))
    x = torch.randn(2, *IMAGE)
    folded = fold_batch_norm(model, x)
    assert isinstance(folded[1], nn.Identity) == folds
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert ("affine" in ops(check_model(tmp_path, model, IMAGE))) != folds


class NormAct(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


@pytest.mark.parametrize(
    "model",
    [
        Fn(lambda m, x: m.n(y := m.c(x)) + y, c=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3)),
        Fn(lambda m, x: m.n(m.c(m.c(x))), c=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3)),
        Fn(lambda m, x: m.n(m.c(m.n(x))), c=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3)),
        Fn(lambda m, x: m.n(F.relu(m.c(x))), c=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3)),
        Fn(lambda m, x: m.n(m.c(x)), c=nn.Conv2d(3, 3, 1), n=NormAct(3)),
    ],
    ids=["two_readers", "conv_twice", "norm_twice", "relu_between", "subclass_of_norm"],
)
def test_norms_that_must_stay(tmp_path: Path, model: nn.Module) -> None:
    x = torch.randn(2, *IMAGE)
    assert not isinstance(fold_batch_norm(model, x).n, nn.Identity)
    assert "affine" in ops(check_model(tmp_path, model, IMAGE))

"""Layers with a forward of their own, and transposed convolutions, are replaced like others."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lutra
from lutra.train import PQ, Int8, Keep, Lookup, auto_recipe, convert, export
from lutra.train.layers.own_forward import OwnForward, split


class SamePadding(nn.Conv2d):
    """Pads as TensorFlow does, by the size of the input."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.size()[-2:]
        amounts: list[int] = []
        for size, k, s in zip(x.shape[2:], kernel, self.stride, strict=True):
            amount = max((math.ceil(size / s) - 1) * s + k - size, 0)
            amounts = [amount // 2, amount - amount // 2, *amounts]
        return F.conv2d(F.pad(x, amounts), self.weight, self.bias, self.stride, 0, 1, self.groups)


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Standardised(nn.Conv2d):
    """Computes its weight, as networks without batch norm do."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / std * self.gain
        return self._conv_forward(x, weight, self.bias)


class Adapter(nn.Linear):
    """A linear layer with a correction of low rank."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.up(self.down(x))


MODELS = {
    "same": (
        nn.Sequential(SamePadding(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        (3, 11, 12),
    ),
    "causal": (nn.Sequential(Causal(3, 8, 4), nn.ReLU(), Causal(8, 4, 3)), (3, 20)),
    "standardised": (
        nn.Sequential(Standardised(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        (3, 10, 10),
    ),
    "adapter": (nn.Sequential(Adapter(16, 32), nn.ReLU(), nn.Linear(32, 4)), (16,)),
    "reflect": (nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), (3, 9, 9)),
    "same even": (nn.Conv2d(3, 8, 4, padding="same"), (3, 9, 9)),
    "transposed": (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1, groups=2, bias=False),
            nn.BatchNorm2d(4),
        ),
        (3, 7, 8),
    ),
    "transposed lines": (
        nn.Sequential(nn.ConvTranspose1d(4, 8, 5, 3, 1), nn.Tanh(), nn.ConvTranspose1d(8, 2, 2)),
        (4, 12),
    ),
    "transposed, two strides": (
        nn.ConvTranspose2d(4, 6, (3, 5), (2, 3), (1, 0), (1, 2)),
        (4, 5, 6),
    ),
}
RECIPES = {
    "int8": {"*": Int8()},
    "lookup": {"*": Lookup(16, 15, otherwise=Int8())},
    "pq": {"*": PQ(k=16, otherwise=Int8())},
    "auto": "auto",
}


def _model(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    model, shape = MODELS[name]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model.eval(), shape


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_replaced_and_exported(name: str, recipe: str, tmp_path: Path) -> None:
    model, shape = _model(name)
    data = [torch.randn(8, *shape) for _ in range(4)]
    new, report = convert(model, RECIPES[recipe], data)
    assert [layer.name for layer in report.layers if not layer.replaced] == []
    x = torch.randn(3, *shape)
    with torch.no_grad():
        dense, wanted = model(x), new.eval()(x)
    assert wanted.shape == dense.shape
    export(new, tmp_path / "m.lutra", x)
    got = lutra.Session(tmp_path / "m.lutra")(x.numpy())
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-3, atol=1e-3)
    if recipe == "int8":
        assert F.cosine_similarity(dense.flatten(), wanted.flatten(), 0) > 0.995


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_model_is_exported_as_it_is(name: str, tmp_path: Path) -> None:
    model, shape = _model(name)
    x = torch.randn(3, *shape)
    export(model, tmp_path / "m.lutra", x)
    got = lutra.Session(tmp_path / "m.lutra")(x.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(got, model(x).numpy(), rtol=1e-4, atol=1e-4)


def test_new_layers_train_and_keep_attributes() -> None:
    model, shape = _model("transposed")
    new, _ = convert(model, {"*": Int8()}, [torch.randn(8, *shape) for _ in range(2)])
    up = new[2]
    assert (up.stride, up.kernel_size, up.out_channels) == ((2, 2), (4, 4), 6)
    # Calibration moves weights by a little.
    torch.testing.assert_close(up.weight, model[2].weight, rtol=0.0, atol=0.01)
    new.train()(torch.randn(2, *shape)).sum().backward()
    assert up.conv.weight.grad is not None
    assert float(up.conv.weight.grad.abs().sum()) > 0


def test_norm_behind_a_layer_that_adds_no_bias() -> None:
    class NoBias(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight)

    model = nn.Sequential(NoBias(3, 4, 1), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        model[1].running_mean.fill_(3.0)
        x = torch.randn(2, 3, 4, 4)
        folded = lutra.train.exporting.fold.fold_batch_norm(model, x)
        torch.testing.assert_close(folded(x), model(x))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.weight.norm()


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight) + F.conv2d(x.flip(-1), self.weight)


class Dynamic(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * x.mean())


class Matmul(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Scaled(4, 4), "uses its weight beside"),
        (Twice(4, 4, 1), "2 times"),
        (Dynamic(4, 4), "from its input"),
        (Matmul(4, 4), "0 times"),
    ],
)
def test_what_cannot_be_split_is_kept_with_the_reason(layer: nn.Module, reason: str) -> None:
    assert reason in str(split(layer))
    shape = (4, 6, 6) if isinstance(layer, nn.Conv2d) else (4,)
    first = nn.Conv2d(4, 4, 1) if isinstance(layer, nn.Conv2d) else nn.Linear(4, 4)
    _, report = convert(nn.Sequential(first, layer), {"*": Int8()}, [torch.rand(8, *shape)])
    kept = report.layers[1]
    assert not kept.replaced
    assert reason in kept.reason
    assert "1" not in auto_recipe(nn.Sequential(first, layer))


def test_a_forward_that_leaves_its_operator_out_is_an_error() -> None:
    class Sometimes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) if x.shape[0] > 1 else x * self.weight.sum()

    new, _ = convert(Sometimes(4, 4), {"*": Int8()}, [torch.rand(8, 4)])
    with pytest.raises(lutra.LutraError, match="0 times for this input"):
        new(torch.rand(1, 4))


def test_dilated_transposed_convolutions_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3, 2, dilation=2))
    _, report = convert(model, {"*": Int8()}, [torch.rand(4, 3, 9, 9)])
    assert "dilation (2, 2)" in report.layers[1].reason


def test_output_size() -> None:
    class Up(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.up, self.size = nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), size

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[self.size, self.size])

    convert(Up(12), {"*": Int8()}, [torch.rand(4, 3, 6, 6)])
    with pytest.raises(lutra.LutraError, match="output_size"):
        convert(Up(11), {"*": Int8()}, [torch.rand(4, 3, 6, 6)])
    model = Up(11)
    convert(nn.Sequential(nn.Conv2d(3, 3, 1), model), {"1.up": Keep(), "*": Int8()},
            [torch.rand(4, 3, 6, 6)])  # fmt: skip


def test_weights_that_are_shared_stay_shared() -> None:
    layer = SamePadding(3, 3, 3)
    split_layer = split(layer)
    assert isinstance(split_layer, OwnForward)
    assert split_layer.weight is layer.weight
    new, _ = convert(
        nn.Sequential(layer, nn.ReLU(), layer), {"*": Int8()}, [torch.rand(4, 3, 6, 6)]
    )
    assert new[0] is new[2]

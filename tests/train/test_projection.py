"""The projected gradient: a regression of centroids on inputs, and what the layer does with it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lutra.train import PQ, PQConv2d, convert
from lutra.train.layers.pq_projection import REFRESH, regression
from lutra.train.operators import portable


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_regression_recovers_a_linear_map() -> None:
    x = torch.randn(3, 4, 5000, generator=generator(0)) + 2.0
    maps = torch.randn(3, 4, 4, generator=generator(1))
    noise = 0.01 * torch.randn(3, 4, 5000, generator=generator(2))
    got = regression(x, torch.bmm(maps, x) + 7.0 + noise)
    torch.testing.assert_close(got, maps, atol=0.01, rtol=0.0)


def test_constant_entries_get_no_gradient() -> None:
    x = torch.randn(1, 3, 1000, generator=generator(0))
    x[:, 1] = 0.0  # a missing entry of a short sub-vector, or a dead channel
    got = regression(x, x * torch.tensor([1.0, 1.0, 0.5])[None, :, None])
    want = torch.diag(torch.tensor([1.0, 0.0, 0.5]))[None]
    torch.testing.assert_close(got, want, atol=0.01, rtol=0.0)


def converted(v: int, channels: int = 6) -> tuple[PQConv2d, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(24, channels, 8, 8, generator=generator(0)).relu()
    dense = nn.Sequential(nn.Conv2d(channels, 5, 3, padding=1))
    model, _ = convert(dense, {"0": PQ(v=v, k=16, gradient="projected")}, [x])
    layer = model[0]
    assert isinstance(layer, PQConv2d)
    return layer.train(), x


@pytest.mark.parametrize("v", [3, 9, 16])  # 16 leaves a shorter last sub-vector
def test_input_gradient_is_that_of_projected_weights(v: int) -> None:
    layer, x = converted(v)
    x.requires_grad_()
    y = layer(x)
    direction = torch.randn(y.shape, generator=generator(3))
    y.backward(direction)

    missing = layer.codebooks * layer.v - layer.geometry.depth
    blocks = F.pad(layer.weight.detach().reshape(5, -1), (0, missing)).view(5, layer.codebooks, -1)
    projected = torch.einsum("mbv,bvw->mbw", blocks, layer.projection)
    weight = projected.reshape(5, -1)[:, : layer.geometry.depth].view_as(layer.weight)
    want = torch.nn.grad.conv2d_input(x.shape, weight, direction, padding=1)
    grid = layer.grid()
    clipped = x.detach() >= (grid.qmax + 0.5) * grid.scale
    assert x.grad is not None
    torch.testing.assert_close(x.grad, want.masked_fill(clipped, 0.0), atol=1e-4, rtol=1e-4)


def test_projection_is_the_regression_of_the_codes() -> None:
    layer, x = converted(9)
    layer(x)
    grid = layer.grid()
    codes = portable.encode(x, layer.geometry, grid, layer.encoder())
    centroids = (layer.grid_centroids().float() - grid.zero) * grid.scale
    index = codes.long()[:, :, None].expand(-1, -1, layer.v)
    quantized = torch.gather(centroids, 1, index).transpose(1, 2)
    want = regression(portable.unfold(x, layer.geometry, layer.v, 0.0), quantized)
    torch.testing.assert_close(layer.projection, want)
    # The quantiser keeps less than everything, and what it keeps is not nothing.
    kept = layer.projection.diagonal(dim1=1, dim2=2).mean()
    assert 0.2 < float(kept) < 0.98


def test_it_is_refreshed_in_training_only() -> None:
    layer, x = converted(9)
    layer(x)
    first = layer.projection.clone()
    for step in range(1, REFRESH + 1):
        layer(x * 0.5)
        assert torch.equal(layer.projection, first) == (step < REFRESH)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    layer(x)  # with gradients, but not training
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_state_dict_round_trip_keeps_the_schedule() -> None:
    layer, x = converted(9)
    layer(x)
    other = copy.deepcopy(layer)
    other.projection.zero_()
    other.projection_age.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.projection, layer.projection)
    assert int(other.projection_age) == 1


def test_deep_gradients_do_not_explode() -> None:
    """What the projection is for: through many quantised layers with batch norm the first layer's
    gradient stays near the dense network's, while the plain straight-through one grows."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for _ in range(8):
        blocks += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    dense = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *blocks).train()
    x = torch.randn(16, 3, 12, 12, generator=generator(0))
    target = torch.randn(16, 8, 12, 12, generator=generator(1))

    def first_gradient(model: nn.Module) -> float:
        model.train()
        model.zero_grad()
        F.mse_loss(model(x), target).backward()
        gradient = model.get_parameter("0.weight").grad
        assert gradient is not None
        return float(gradient.norm())

    recipe = {str(2 + 3 * i): PQ(v=9, k=8, gradient="projected") for i in range(8)}
    projected, _ = convert(dense, recipe, [x])
    plain = {name: PQ(v=9, k=8, gradient="straight-through") for name in recipe}
    straight, _ = convert(dense, plain, [x])
    reference = first_gradient(dense)
    assert first_gradient(projected) < 3.0 * reference
    assert first_gradient(straight) > 3.0 * first_gradient(projected)

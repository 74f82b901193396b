"""The gradients that the lookup layers promise, and the kernels behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pq_cases import (
    CASES,
    Case,
    images,
    make_conv,
    make_linear,
)
from torch import Tensor

from lutra.train.encoder import Nearest
from lutra.train.layers.pq import quantize_tables
from lutra.train.operators import native, portable
from lutra.train.operators import pq as ops

# Gradients


def unfold(x: Tensor, layer: Any, padding: float = 0.0) -> Tensor:
    """Sub-vectors (rows, B, V), independent of the package."""
    g = layer.geometry
    ph, pw = g.padding
    x = F.pad(x, (pw, pw, ph, ph), value=padding)
    rows = F.unfold(x, g.kernel, g.dilation, 0, g.stride).transpose(1, 2).flatten(0, 1)
    return F.pad(rows, (0, layer.codebooks * layer.v - g.depth)).view(-1, layer.codebooks, layer.v)


def slow_tables(layer: Any, centroids: Tensor, weight: Tensor) -> Tensor:
    """Tables (B, K, M) with rounding passed straight through."""
    grid = layer.grid()
    on_grid = ((layer.grid_centroids().to(weight.dtype) - grid.zero) * grid.scale).detach()
    tail = layer.codebooks * layer.v - layer.geometry.depth
    if tail:
        on_grid[-1, :, layer.v - tail :] = 0
    blocks = F.pad(weight.flatten(1), (0, tail)).view(len(weight), layer.codebooks, layer.v)
    exact = torch.einsum("bkv,mbv->bkm", on_grid + centroids - centroids.detach(), blocks)
    int8, scale = quantize_tables(layer.tables(layer.encoder()).detach())
    return exact + (int8 * scale - exact).detach()


def as_images(rows: Tensor, layer: Any, x: Tensor) -> Tensor:
    height, width = layer.geometry.out_size(x.shape[2], x.shape[3])
    return rows.view(len(x), height, width, -1).permute(0, 3, 1, 2)


GRADIENT_CASES = [CASES[i] for i in (1, 3, 5, 6, 8, 10, 12)]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_straight_through_gradients(case: Case) -> None:
    layer = make_conv(case, gradient="straight-through")
    x = images(case).requires_grad_()
    y = layer(x)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    y.backward(gradient)

    # The input's is the dense layer's where x is not clipped, and zero elsewhere.
    weight = layer.weight.detach().clone().requires_grad_()
    g = layer.geometry
    dense_x = x.detach().clone().requires_grad_()
    F.conv2d(dense_x, weight, None, g.stride, g.padding, g.dilation).backward(gradient)
    grid = layer.grid()
    inside = (x >= -(grid.zero + 0.5) * grid.scale) & (
        x <= (grid.qmax - grid.zero + 0.5) * grid.scale
    )
    assert not inside.all()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense_x.grad * inside)

    # Those of weights and centroids are exact with the codes held fixed.
    codes = portable.encode(x.detach(), g, grid, layer.encoder())
    one_hot = F.one_hot(codes.long(), case.k).float()  # (B, rows, K)
    centroids = layer.centroids.detach().clone().requires_grad_()
    weight.grad = None
    slow = torch.einsum("brk,bkm->rm", one_hot, slow_tables(layer, centroids, weight))
    slow = as_images(slow, layer, x)
    bias = 0.0 if layer.bias is None else layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(slow + bias, y)
    slow.backward(gradient)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.centroids.grad, centroids.grad, rtol=1e-4, atol=1e-4)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, gradient.sum((0, 2, 3)))


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
@pytest.mark.parametrize("block", [None, 500])
def test_soft_gradients(case: Case, block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the naive formula, which holds distances and weights of every position at once."""
    if block is not None:
        monkeypatch.setattr(portable, "BLOCK", block)
    layer = make_conv(case, gradient="soft", temperature=0.3)
    x = images(case).requires_grad_()
    y = layer(x)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    y.backward(gradient)

    def leaf(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_()

    slow_x, centroids, weight = leaf(x), leaf(layer.centroids), leaf(layer.weight)
    logit = leaf(layer.inverse_temperature_logit)
    sub = unfold(slow_x, layer)[:, :, None]  # (rows, B, 1, V)
    distance = (sub - centroids).square().sum(3).sqrt()  # (rows, B, K)
    attention = torch.softmax(-distance * (F.softplus(logit) + 1.0), 2)
    soft = torch.einsum("rbk,bkm->rm", attention, slow_tables(layer, centroids, weight))
    as_images(soft, layer, x).backward(gradient.double())

    for got, want in [
        (x.grad, slow_x.grad),
        (layer.weight.grad, weight.grad),
        (layer.centroids.grad, centroids.grad),
        (layer.inverse_temperature_logit.grad, logit.grad),
    ]:
        assert got is not None
        assert want is not None
        scale = want.abs().max()
        assert scale > 0
        torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=1e-3)


def test_soft_gradient_at_a_centroid_is_finite_and_small() -> None:
    layer = make_conv(Case(v=9, channels=1), gradient="soft")
    x = torch.zeros(1, 1, 7, 6, requires_grad=True)
    with torch.no_grad():
        layer.centroids[:, 0] = 0.0
        layer.centroids[:, 1] = 0.7
    layer(x).sum().backward()
    y = torch.full((1, 1, 7, 6), 0.7, requires_grad=True)
    layer(y).sum().backward()
    for gradient in (x.grad, y.grad, layer.centroids.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e3


@pytest.mark.parametrize("temperature", [1e-3, 0.065, 0.999])
def test_temperature_is_as_asked(temperature: float) -> None:
    layer = make_linear(4, 2, gradient="soft", temperature=temperature)
    inverse = F.softplus(layer.inverse_temperature_logit) + 1.0
    assert 1.0 / inverse.item() == pytest.approx(temperature, rel=1e-4)


@pytest.mark.parametrize("gradient", ["projected", "straight-through", "soft"])
def test_second_derivatives_are_refused(gradient: str) -> None:
    layer = make_linear(4, 2, gradient=gradient, v=4, k=8)
    x = torch.rand(3, 4, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_linear_gradients_equal_those_of_a_1x1_convolution() -> None:
    linear = make_linear(10, 3, v=4, k=8, signed=True, act_bits=7)
    conv = make_conv(
        Case(v=4, k=8, channels=10, outputs=3, kernel=(1, 1), padding=(0, 0), signed=True)
    )
    with torch.no_grad():
        conv.weight.copy_(linear.weight.view_as(conv.weight))
        conv.centroids.copy_(linear.centroids)
        conv.bias.copy_(linear.bias)
    x = torch.randn(2, 3, 4, 10, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    linear(x).square().sum().backward()
    conv(z.permute(0, 3, 1, 2)).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    torch.testing.assert_close(linear.weight.grad, conv.weight.grad.view_as(linear.weight))


@pytest.mark.parametrize("method", [{}, {"gradient": "soft"}, {"centroids": "average"}])
def test_frozen_parameters_get_no_gradient(method: dict[str, Any]) -> None:
    layer = make_conv(Case(v=9), **method).requires_grad_(False)
    x = images(Case(v=9)).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in layer.parameters())


# Clusters


def test_centroids_move_to_the_means_of_their_clusters() -> None:
    case = Case(v=5, signed=True)
    layer = make_conv(case, centroids="average", decay=0.0)
    assert not layer.centroids.requires_grad
    x = images(case)
    grid, before = layer.grid(), layer.centroids.clone()
    codes = portable.encode(x, layer.geometry, grid, layer.encoder()).long()
    layer(x)
    sub = unfold((portable.quantize(x, grid) - grid.zero) * grid.scale, layer)
    tail = layer.codebooks * layer.v - layer.geometry.depth
    for codebook in range(layer.codebooks):
        for k in range(case.k):
            members = sub[codes[codebook] == k, codebook]
            want = members.mean(0) if len(members) else before[codebook, k]
            got = layer.centroids[codebook, k]
            if codebook == layer.codebooks - 1:  # entries that are not there
                want, got = want[: layer.v - tail], got[: layer.v - tail]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.cluster_counts, F.one_hot(codes, case.k).sum(1).float())


def test_the_moving_average_is_slow() -> None:
    case = Case(v=9)
    layer = make_conv(case, centroids="average", decay=0.9)
    x = images(case)
    layer.cluster_counts.fill_(30.0)
    fast = make_conv(case, centroids="average", decay=0.0)
    before = layer.centroids.clone()
    layer(x)
    fast(x)
    share = (0.1 * fast.cluster_counts / (27.0 + 0.1 * fast.cluster_counts))[:, :, None]
    torch.testing.assert_close(layer.centroids, before + share * (fast.centroids - before))
    moved = layer.centroids.clone()
    layer.eval()(x)
    assert torch.equal(layer.centroids, moved)


@pytest.mark.parametrize("gradient", ["projected", "straight-through", "soft"])
def test_a_layer_may_be_used_twice_in_a_step(gradient: str) -> None:
    case = Case(v=9, outputs=4)
    layer = make_conv(case, centroids="average", gradient=gradient)
    x = images(case).requires_grad_()
    layer(layer(x)).square().mean().backward()
    assert x.grad is not None
    assert layer.weight.grad.isfinite().all()


# Native and portable functions


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("block", [None, 2000])
def test_native_equals_portable(
    case: Case, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block is not None:
        monkeypatch.setattr(portable, "BLOCK", block)
    layer, x = make_conv(case), images(case)
    geometry, grid, frozen = layer.geometry, layer.grid(), layer.freeze()
    tensors = (Nearest(frozen.centroids), frozen.tables, frozen.scale)
    y, codes = ops.forward(x, geometry, grid, *tensors)
    zeros = torch.zeros(case.outputs)
    with torch.autocast("cpu", torch.bfloat16):  # must not make the search inexact
        slow, slow_codes = portable.forward(x, geometry, grid, *tensors, zeros)
    assert torch.equal(codes, slow_codes)
    assert torch.equal(codes, portable.encode(x, geometry, grid, tensors[0]))
    assert torch.equal(y, slow)
    for got, want in zip(
        native.cluster_sums(geometry, grid, x, codes, case.k, layer.v),
        portable.cluster_sums(geometry, grid, x, codes, case.k, layer.v),
        strict=True,
    ):
        assert torch.equal(got, want)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        gradient = torch.randn_like(y).contiguous(memory_format=memory_format)
        with torch.autocast("cpu", torch.bfloat16):
            want = portable.table_gradient(codes, gradient, case.k)
        torch.testing.assert_close(
            native.table_gradient(codes, gradient, case.k), want, rtol=1e-5, atol=1e-5
        )


def test_the_portable_path_trains_like_the_native_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would run."""
    case = Case(v=9, signed=True)
    results = []
    for is_native in (True, False):
        with monkeypatch.context() as patch:
            if not is_native:
                patch.setattr(ops, "_is_native", lambda _: False)
            layer = make_conv(case, centroids="average")
            x = images(case).contiguous(memory_format=torch.channels_last).requires_grad_()
            y = layer(x)
            y.square().sum().backward()
            with torch.no_grad():
                frozen = layer.eval()(x)
            assert frozen.is_contiguous(memory_format=torch.channels_last)
            results.append((y, frozen, layer.centroids, x.grad, layer.weight.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(results[0][0], results[1][0])


def test_gradients_of_any_layout_and_stride() -> None:
    layer = make_conv(Case(v=9))
    x = images(Case(v=9))
    gradients = []
    for reduce in (lambda y: y.sum(), lambda y: (y * torch.ones_like(y)).sum()):
        layer.zero_grad()
        reduce(layer(x)).backward()  # the first passes an expanded scalar back
        gradients.append(layer.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])

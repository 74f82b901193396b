"""The trainable lookup layers: exact outputs in every mode, and the gradients they promise."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layers import Layer
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.graph import Node
from lutra.reference import run_node
from lutra.train import PQ, PQConv2d, PQLinear, native, ops, portable
from lutra.train.geometry import Geometry, Quantization
from lutra.train.layers import FrozenPQ, quantize_tables


@dataclass(frozen=True)
class Case:
    """A convolution, its method and its input size."""

    v: int
    k: int = 16
    channels: int = 4
    outputs: int = 5
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    signed: bool = False
    act_bits: int = 7
    size: tuple[int, int] = (7, 6)
    bias: bool = True


CASES = [
    Case(v=1, k=8, channels=2),
    Case(v=3),
    Case(v=4, signed=True),  # 36 = 9 * 4
    Case(v=5, signed=True, k=32),  # the last sub-vector has one entry
    Case(v=9),
    Case(v=9, signed=True, stride=(2, 1), padding=(0, 2), bias=False),
    Case(v=9, k=64, dilation=(2, 1), padding=(2, 1), size=(8, 9), act_bits=6, signed=True),
    Case(v=9, channels=1, kernel=(5, 3), padding=(2, 0), outputs=1, k=8),
    Case(v=18, k=32, channels=3),  # 27 = 18 + 9
    Case(v=18, signed=True, stride=(3, 3), padding=(1, 1)),
    Case(v=4, kernel=(1, 1), padding=(0, 0), channels=7, signed=True),
    Case(v=16, kernel=(1, 1), padding=(0, 0), stride=(2, 2), channels=16, act_bits=4),
    Case(v=40, k=8, signed=True),  # longer than a row
    Case(v=64, channels=9, k=64),
]


def make_conv(case: Case, seed: int = 0, **method: Any) -> PQConv2d:
    """A layer whose centroids are random points of the grid's range."""
    torch.manual_seed(seed)
    dense = nn.Conv2d(
        case.channels,
        case.outputs,
        case.kernel,
        case.stride,
        case.padding,
        case.dilation,
        bias=case.bias,
    )
    method = {"centroids": "gradient", **method}
    return spread(
        PQConv2d.from_float(dense, PQ(v=case.v, k=case.k, act_bits=case.act_bits, **method)),
        case.signed,
    )


def make_linear(features: int, outputs: int, *, signed: bool = False, **method: Any) -> PQLinear:
    torch.manual_seed(1)
    method = {"centroids": "gradient", **method}
    return spread(PQLinear.from_float(nn.Linear(features, outputs), PQ(**method)), signed)


def spread(layer: Any, signed: bool) -> Any:
    layer.set_activation_range(-2.0 if signed else 0.0, 2.0)
    with torch.no_grad():
        layer.centroids.uniform_(-2.0 if signed else 0.0, 2.0)
    return layer


def images(case: Case, batch: int = 3, seed: int = 3) -> Tensor:
    """Inputs that go beyond the grid on both sides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(batch, case.channels, *case.size)
    return x.uniform_(-2.5, 2.5, generator=generator)


def reference(layer: Any, x: Tensor) -> np.ndarray[Any, Any]:
    """What the executable specification makes of the layer's integer tensors."""
    frozen, geometry, grid = layer.freeze(), layer.geometry, layer.grid()
    tensors = {
        role: getattr(frozen, role).numpy() for role in ("centroids", "tables", "scale", "bias")
    }
    quantiser = {"act_scale": grid.scale, "act_zero": grid.zero, "act_bits": grid.bits}
    if isinstance(layer, PQLinear):
        attrs = {"in_features": geometry.channels, "encoder": "nearest", **quantiser}
        node = Node("pq_linear", "layer", ("x",), "y", attrs, {role: role for role in tensors})
        return run_node(node, [x.numpy()], tensors)
    return Layer(
        x.contiguous().numpy(),
        tensors,
        geometry.kernel,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        **quantiser,
    ).reference()


def outputs_of_every_mode(layer: Any, x: Tensor) -> dict[str, Tensor]:
    layer.train()
    outputs = {"training": layer(x).detach()}
    layer.eval()
    outputs["eval with gradients"] = layer(x).detach()
    with torch.no_grad():
        outputs["eval"] = layer(x)
        outputs["frozen"] = layer.freeze()(x)
    with torch.inference_mode():
        outputs["inference"] = layer(x).clone()
    return outputs


# Exact outputs


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv_is_exact_in_every_mode(case: Case, layout: torch.memory_format) -> None:
    layer = make_conv(case)
    x = images(case).contiguous(memory_format=layout)
    want = reference(layer, x)
    for mode, got in outputs_of_every_mode(layer, x).items():
        np.testing.assert_array_equal(got.numpy(), want, err_msg=mode)


@pytest.mark.parametrize("gradient", ["projected", "straight-through", "soft"])
@pytest.mark.parametrize("centroids", ["average", "gradient"])
def test_methods_differ_in_gradients_only(gradient: str, centroids: str) -> None:
    case = Case(v=9, signed=True)
    x = images(case)
    plain, other = make_conv(case), make_conv(case, gradient=gradient, centroids=centroids)
    assert torch.equal(other(x), plain(x))


@pytest.mark.parametrize(("features", "v"), [(16, 4), (10, 4), (3, 1), (7, 9), (64, 64)])
@pytest.mark.parametrize("signed", [False, True])
def test_linear_is_exact_in_every_mode(features: int, v: int, signed: bool) -> None:
    layer = make_linear(features, 6, signed=signed, v=v, k=8)
    x = torch.empty(2, 5, features).uniform_(-2.5, 2.5)
    want = reference(layer, x)
    for mode, got in outputs_of_every_mode(layer, x).items():
        np.testing.assert_array_equal(got.numpy(), want, err_msg=mode)
    for shape in [(features,), (5, features), (2, 3, 2, features)]:
        with torch.no_grad():
            assert layer(torch.ones(shape)).shape == (*shape[:-1], 6)
        assert layer(torch.ones(shape)).shape == (*shape[:-1], 6)


def test_nan_and_infinity_are_encoded_as_the_specification_says() -> None:
    case = Case(v=3, signed=True)
    layer, x = make_conv(case), images(case)
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    want = reference(layer, x)
    for mode, got in outputs_of_every_mode(layer, x).items():
        np.testing.assert_array_equal(got.numpy(), want, err_msg=mode)


def test_empty_batch_and_strided_input() -> None:
    case = Case(v=9)
    layer = make_conv(case)
    y = layer(torch.zeros(0, 4, 7, 6, requires_grad=True))
    assert y.shape == (0, 5, 7, 6)
    y.sum().backward()
    assert not layer.weight.grad.any()
    wide = images(Case(v=9, size=(14, 12)))
    view = wide[:, :, ::2, ::2]
    assert torch.equal(layer(view), layer(view.contiguous()))


def test_tables_are_symmetric_int8_with_a_scale_per_output() -> None:
    layer = make_conv(Case(v=9))
    with torch.no_grad():
        layer.weight[2] *= 100.0
        layer.weight[3] = 0.0
        exact = layer.tables(layer.grid_centroids())
    frozen = layer.freeze()
    assert frozen.tables.dtype == torch.int8
    assert frozen.tables.min() >= -127
    assert frozen.scale.shape == (5,)
    assert (frozen.tables.abs().amax((0, 1)) == torch.tensor([127, 127, 127, 0, 127])).all()
    error = (frozen.tables * frozen.scale - exact).abs()
    assert (error <= frozen.scale * 0.5001).all()


def test_grid_is_unsigned_only_without_negative_values() -> None:
    layer = make_conv(Case(v=9))
    layer.set_activation_range(0.0, 3.0)
    assert layer.grid() == Quantization(float(torch.tensor(3.0 / 127)), 0, 7)
    layer.set_activation_range(-3.0, 1.0)
    assert layer.grid() == Quantization(float(torch.tensor(3.0 / 63)), 64, 7)


def test_default_sub_vectors_are_those_of_lut_nn() -> None:
    assert PQConv2d.from_float(nn.Conv2d(2, 2, 3), PQ()).dim == 9
    assert PQConv2d.from_float(nn.Conv2d(8, 2, 1), PQ()).dim == 4
    assert PQLinear.from_float(nn.Linear(8, 2), PQ()).dim == 4
    with pytest.raises(LutraError, match=r"11x11 kernel has 121 entries.*set v"):
        PQConv2d.from_float(nn.Conv2d(1, 1, 11), PQ())


# Wrong inputs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 7, 6), (2, 3, 7, 6), (2, 4, 1, 0), (4,)])
def test_conv_refuses_wrong_shapes(shape: tuple[int, ...], training: bool) -> None:
    layer = make_conv(Case(v=9, padding=(0, 0))).train(training)
    with torch.set_grad_enabled(training), pytest.raises(LutraError, match="PQConv2d: the input"):
        layer(torch.zeros(shape))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 9), (2, 11), ()])
def test_linear_refuses_wrong_shapes(shape: tuple[int, ...], training: bool) -> None:
    layer = make_linear(10, 3, v=4, k=8).train(training)
    with torch.set_grad_enabled(training), pytest.raises(LutraError, match="10 input features"):
        layer(torch.zeros(shape))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Conv2d(4, 4, 3, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(4, 4, 2, padding="same"), "not symmetric"),
    ],
)
def test_geometry_refuses_what_the_kernels_cannot_do(layer: nn.Conv2d, message: str) -> None:
    with pytest.raises(LutraError, match=message):
        Geometry.of(layer)


@pytest.mark.parametrize(
    ("layer", "padding"),
    [
        (nn.Conv2d(2, 2, (3, 5), padding="same", dilation=(2, 1)), (2, 2)),
        (nn.Conv2d(2, 2, 3, padding="valid"), (0, 0)),
    ],
)
def test_geometry_of_named_paddings(layer: nn.Conv2d, padding: tuple[int, int]) -> None:
    geometry = Geometry.of(layer)
    assert geometry.padding == padding
    assert geometry.out_size(9, 9) == tuple(layer(torch.zeros(1, 2, 9, 9)).shape[2:])


# Gradients


def unfold(x: Tensor, layer: Any, padding: float = 0.0) -> Tensor:
    """Sub-vectors (rows, B, V), independent of the package."""
    g = layer.geometry
    ph, pw = g.padding
    x = F.pad(x, (pw, pw, ph, ph), value=padding)
    rows = F.unfold(x, g.kernel, g.dilation, 0, g.stride).transpose(1, 2).flatten(0, 1)
    return F.pad(rows, (0, layer.books * layer.dim - g.depth)).view(-1, layer.books, layer.dim)


def slow_tables(layer: Any, centroids: Tensor, weight: Tensor) -> Tensor:
    """Tables (B, K, M) with rounding passed straight through."""
    grid = layer.grid()
    on_grid = ((layer.grid_centroids().to(weight.dtype) - grid.zero) * grid.scale).detach()
    tail = layer.books * layer.dim - layer.geometry.depth
    if tail:
        on_grid[-1, :, layer.dim - tail :] = 0
    blocks = F.pad(weight.flatten(1), (0, tail)).view(len(weight), layer.books, layer.dim)
    exact = torch.einsum("bkv,mbv->bkm", on_grid + centroids - centroids.detach(), blocks)
    int8, scale = quantize_tables(layer.tables(layer.grid_centroids()).detach())
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
    codes = portable.encode(x.detach(), g, grid, layer.grid_centroids())
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
    codes = portable.encode(x, layer.geometry, grid, layer.grid_centroids()).long()
    layer(x)
    sub = unfold((portable.quantize(x, grid) - grid.zero) * grid.scale, layer)
    tail = layer.books * layer.dim - layer.geometry.depth
    for book in range(layer.books):
        for k in range(case.k):
            members = sub[codes[book] == k, book]
            want = members.mean(0) if len(members) else before[book, k]
            got = layer.centroids[book, k]
            if book == layer.books - 1:  # entries that are not there
                want, got = want[: layer.dim - tail], got[: layer.dim - tail]
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
    tensors = (frozen.centroids, frozen.tables, frozen.scale)
    y, codes = ops.forward(x, geometry, grid, *tensors)
    zeros = torch.zeros(case.outputs)
    with torch.autocast("cpu", torch.bfloat16):  # must not make the search inexact
        slow, slow_codes = portable.forward(x, geometry, grid, *tensors, zeros)
    assert torch.equal(codes, slow_codes)
    assert torch.equal(codes, portable.encode(x, geometry, grid, frozen.centroids))
    assert torch.equal(y, slow)
    for got, want in zip(
        native.cluster_sums(geometry, grid, x, codes, case.k, layer.dim),
        portable.cluster_sums(geometry, grid, x, codes, case.k, layer.dim),
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


# Modules


def test_state_dict_round_trip() -> None:
    case = Case(v=9, signed=True)
    for method in ({}, {"centroids": "average"}, {"gradient": "soft"}):
        layer, other = make_conv(case, **method), make_conv(case, seed=9, **method)
        other.set_activation_range(0.0, 1.0)
        x = images(case)
        layer(x)  # moves averaged centroids
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        with torch.no_grad():
            before = other.eval()(x)
            other.load_state_dict(torch.load(file, weights_only=True))
            assert torch.equal(other(x), layer.eval()(x))
            assert not torch.equal(other(x), before)


def _step(layer: Any) -> None:
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(torch.rand(2, 4, 7, 6)).sum().backward()
    optimizer.step()


def _fused_step(layer: Any) -> None:
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    layer(torch.rand(2, 4, 7, 6)).sum().backward()
    optimizer.step()


@torch.no_grad()
def _write(layer: Any) -> None:
    layer.weight[0] = 1.0


def _write_data(layer: Any) -> None:
    layer.train()
    layer.weight.data.fill_(0.3)
    layer.eval()


def _load(layer: Any) -> None:
    layer.load_state_dict(make_conv(Case(v=9), seed=4).state_dict())


def _assign(layer: Any) -> None:
    layer.load_state_dict(make_conv(Case(v=9), seed=4).state_dict(), assign=True)


def _signed(layer: Any) -> None:
    layer.set_activation_range(-2.0, 2.0)


def _double(layer: Any) -> None:
    layer.weight.data *= 2.0
    layer.to(torch.float64)


def _bias(layer: Any) -> None:
    layer.bias = nn.Parameter(torch.ones(5))


@pytest.mark.parametrize(
    "change",
    [_step, _fused_step, _write, _write_data, _load, _assign, _signed, _double, _bias],
    ids=lambda f: f.__name__,
)
def test_tables_kept_for_eval_mode_are_renewed(change: Callable[[Any], None]) -> None:
    layer = make_conv(Case(v=9)).eval()
    x = images(Case(v=9))
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer(x), before)
    change(layer)
    layer.eval()
    with torch.no_grad():
        after = layer(x)
        assert not torch.equal(after, before)
        np.testing.assert_array_equal(after.numpy(), reference(layer, x))


def test_tables_are_made_once_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_conv(Case(v=9)).eval()
    x = images(Case(v=9))
    packed: list[object] = []
    make = native.make_layer
    monkeypatch.setattr(native, "make_layer", lambda *a: packed.append(a) or make(*a))
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(3):
            with mode():
                layer(x)
    assert len(packed) == 1


def test_packed_layers_follow_their_tensors() -> None:
    frozen = make_conv(Case(v=9)).freeze()
    x = images(Case(v=9))
    y = frozen(x)
    for factor in (2.0, 4.0, 8.0, 16.0):  # addresses of freed tensors are used again
        frozen.scale = frozen.scale * 2.0
        frozen.bias = frozen.bias * 2.0
        if factor > 4.0:
            assert torch.equal(frozen(x), y * factor)
    frozen.scale.zero_()
    frozen.bias.zero_()
    assert not frozen(x).any()


def test_packed_layers_are_freed_with_their_tensors() -> None:
    frozen = make_conv(Case(v=9)).freeze()
    frozen(images(Case(v=9)))
    key = id(frozen.tables)
    assert key in native._layers
    del frozen
    assert key not in native._layers


def test_layers_made_in_inference_mode_work() -> None:
    with torch.inference_mode():
        layer = make_conv(Case(v=9)).eval()
        x = images(Case(v=9))
        layer(x)
        layer.weight.mul_(2.0)
        after = layer(x)
    np.testing.assert_array_equal(after.numpy(), reference(layer, x))


def test_deepcopy_and_pickle() -> None:
    layer = make_conv(Case(v=9)).eval()
    x = images(Case(v=9))
    with torch.no_grad():
        want = layer(x)
        clone = copy.deepcopy(layer)
        clone.weight.zero_()
        assert not torch.equal(clone(x), want)
        assert torch.equal(layer(x), want)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(x), want)
    assert "_frozen" not in dict(layer.named_modules())


@pytest.mark.parametrize("gradient", ["projected", "straight-through", "soft"])
def test_bfloat16_autocast_trains_float32_parameters(gradient: str) -> None:
    case = Case(v=9, outputs=4)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), make_conv(case, gradient=gradient))
    optimizer = torch.optim.Adam(model.parameters())
    x = images(case).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model[0](x)
        assert hidden.dtype == torch.bfloat16
        y = model[1](hidden)
        loss = y.square().mean()
        loss.backward()  # inside, as some loops have it
    assert y.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[1].eval()(hidden), y)  # lookups stay exact
    optimizer.step()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", [{}, {"gradient": "soft"}, {"centroids": "average"}])
def test_other_dtypes(dtype: torch.dtype, method: dict[str, Any]) -> None:
    layer = make_conv(Case(v=9), **method).to(dtype)
    x = images(Case(v=9)).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert x.grad is not None
    assert layer.weight.grad.dtype == dtype


def test_repr_tells_the_method() -> None:
    assert "V=9, K=16, gradient=soft" in repr(make_conv(Case(v=9), gradient="soft"))


# Operators


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv_operator_is_well_formed(layout: torch.memory_format) -> None:
    case = Case(v=9, stride=(2, 1))
    layer = make_conv(case)
    frozen, grid, g = layer.freeze(), layer.grid(), layer.geometry
    torch.library.opcheck(
        ops.pq_conv2d,
        (
            images(case).contiguous(memory_format=layout),
            *(frozen.centroids, frozen.tables, frozen.scale, frozen.bias),
            *(grid.scale, grid.zero, grid.bits, "nearest"),
            *(g.kernel, g.stride, g.padding, g.dilation),
        ),
    )


def test_linear_operator_is_well_formed() -> None:
    layer = make_linear(10, 3, v=4, k=8)
    frozen, grid = layer.freeze(), layer.grid()
    torch.library.opcheck(
        ops.pq_linear,
        (
            torch.rand(2, 3, 10),
            *(frozen.centroids, frozen.tables, frozen.scale, frozen.bias),
            *(grid.scale, grid.zero, grid.bits, "nearest"),
        ),
    )


def test_unknown_encoders_are_refused() -> None:
    frozen = make_linear(10, 3, v=4, k=8).freeze()
    assert isinstance(frozen, FrozenPQ)
    tensors = (frozen.centroids, frozen.tables, frozen.scale, frozen.bias)
    with pytest.raises(LutraError, match="encoder 'tree' is unknown"):
        ops.pq_linear(torch.rand(2, 10), *tensors, 0.1, 0, 7, "tree")

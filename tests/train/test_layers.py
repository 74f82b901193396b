"""The lookup layers as modules: exact outputs in every mode, caches, operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pq_cases import (
    CASES,
    Case,
    images,
    make_conv,
    make_linear,
    operator_arguments,
    outputs_of_every_mode,
    reference,
)
from torch import nn

from lutra.errors import LutraError
from lutra.train import PQ, PQConv2d, PQLinear
from lutra.train.geometry import Geometry, Grid
from lutra.train.layers.pq import FrozenPQ
from lutra.train.operators import native
from lutra.train.operators.frozen import frozen as frozen_op

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
        exact = layer.tables(layer.encoder())
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
    assert layer.grid() == Grid(float(torch.tensor(3.0 / 127)), 0, 7)
    layer.set_activation_range(-3.0, 1.0)
    assert layer.grid() == Grid(float(torch.tensor(3.0 / 63)), 64, 7)


def test_default_sub_vectors_are_those_of_lut_nn() -> None:
    assert PQConv2d.from_float(nn.Conv2d(2, 2, 3), PQ()).v == 9
    assert PQConv2d.from_float(nn.Conv2d(8, 2, 1), PQ()).v == 4
    assert PQLinear.from_float(nn.Linear(8, 2), PQ()).v == 4
    with pytest.raises(LutraError, match=r"11x11 kernel has 121 entries.*set v"):
        PQConv2d.from_float(nn.Conv2d(1, 1, 11), PQ())


# Wrong inputs


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


# Modules


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
    key = id(frozen.centroids)
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
    x = images(case).contiguous(memory_format=layout)
    torch.library.opcheck(frozen_op, operator_arguments(make_conv(case).freeze(), x))


def test_linear_operator_is_well_formed() -> None:
    layer = make_linear(10, 3, v=4, k=8).freeze()
    torch.library.opcheck(frozen_op, operator_arguments(layer, torch.rand(2, 3, 10)))


def test_unknown_encoders_are_refused() -> None:
    frozen = make_linear(10, 3, v=4, k=8).freeze()
    assert isinstance(frozen, FrozenPQ)
    x, tensors, _ = operator_arguments(frozen, torch.rand(2, 10))
    forest = replace(frozen.node, attrs={**frozen.node.attrs, "encoder": "forest"})
    with pytest.raises(LutraError, match="encoder 'forest' is unknown"):
        frozen_op(x, tensors, forest.to_json())

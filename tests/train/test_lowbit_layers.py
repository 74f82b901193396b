"""Low-bit layers in PyTorch: groups, gradients, conversion, training, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lutra.cli as cli
from lutra import Session, load_graph, run_reference, runnable_isas
from lutra.errors import LutraError
from lutra.train import (
    Int8,
    Keep,
    LowBit,
    LowBitLinear,
    SpeedGate,
    convert,
    export,
    finetune,
    recipe_from_json,
    recipe_to_json,
)
from lutra.train.layers.lowbit_scales import fit_scales, mean_scales, round_codes
from lutra.train.operators import lowbit as operators
from lutra.train.operators import portable

METHODS = [
    LowBit(1, 32),
    LowBit(rounding="absmean"),
    LowBit(group=64),
    LowBit(2, 32, zero_points=True),
    LowBit(3, 128),
    LowBit(4, 32, "nearest"),
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(method: LowBit, inputs: int = 256, outputs: int = 10) -> LowBitLinear:
    torch.manual_seed(1)
    return LowBitLinear.from_float(nn.Linear(inputs, outputs), method)


def model_and_data() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )
    return model.eval(), noise(1500, 8) @ noise(8, 32, seed=1) + 0.1 * noise(1500, 32, seed=2)


def error_of(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        want = dense(x)
        return float((model.eval()(x) - want).square().mean() / want.var())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_layer_engine_and_reference_give_the_same_bits(method: LowBit, tmp_path: Path) -> None:
    layer, x = make(method).eval(), noise(40, 256)
    x[7] = 0.0
    export(nn.Sequential(layer), tmp_path / "layer.lutra", x[:2])
    want = run_reference(load_graph(tmp_path / "layer.lutra"), [x.numpy()]).popitem()[1]
    for isa in runnable_isas():
        got = Session(tmp_path / "layer.lutra", isa=isa)(x.numpy())
        np.testing.assert_array_equal(got, want, err_msg=isa)
    with torch.no_grad():
        np.testing.assert_array_equal(layer(x).numpy(), want)
    np.testing.assert_array_equal(layer.train()(x).detach().numpy(), want)
    # what other devices compute
    frozen = layer.freeze()
    products = operators.lowbit_products(
        *operators.quantize_rows(x), operators._levels(frozen.node, frozen.tensors), frozen.scale
    )
    np.testing.assert_array_equal((products + frozen.bias).numpy(), want)


def test_a_row_that_is_not_finite_gives_nan_with_gradients_and_without() -> None:
    layer, x = make(LowBit()).eval(), noise(3, 256)
    x[1, 5] = float("inf")
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(torch.isnan(y).all(1), torch.tensor([False, True, False]))
    np.testing.assert_array_equal(layer(x).detach().numpy(), y.numpy())


def test_exact_products_are_exact_where_float32_sums_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.full((1, 3, 20000), 30.0)
    rows = torch.randint(100, 128, (1, 20000, 2), generator=generator).float()
    want = (weight.double() @ rows.double()).float()
    assert float(want.min()) > 2**24
    assert torch.equal(portable.exact_products(weight, rows, 30 * 127), want)


def test_scales_of_mean_magnitude_are_those_of_bitnet() -> None:
    weight = noise(4, 2, 32)
    assert torch.equal(mean_scales(weight, 3), weight.abs().mean(2))
    assert torch.equal(mean_scales(weight, 2), 2 * weight.abs().mean(2))
    layer = make(LowBit(rounding="absmean"))
    scale = layer.weight.abs().mean(1, keepdim=True)
    want = (layer.weight / scale).round().clamp(-1, 1)
    np.testing.assert_array_equal(
        operators._levels(layer.freeze().node, layer.freeze().tensors)[:, 0], want.detach()
    )


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 16])
def test_fitted_scales_beat_those_of_the_range(levels: int) -> None:
    weight = noise(30, 4, 64)

    def error(scale: Tensor, zero: Tensor) -> float:
        codes = round_codes(weight, scale[:, :, None], zero[:, :, None], levels - 1)
        return float(((codes - zero[:, :, None]) * scale[:, :, None] - weight).square().mean())

    scale, zero = fit_scales(weight, levels)
    assert torch.equal(zero, torch.full_like(zero, (levels - 1) / 2))
    top = 2 * weight.abs().amax(2) / (levels - 1)
    assert error(scale, zero) < (0.97 if levels == 16 else 0.9) * error(top, zero)
    shifted, weight = weight, weight + 1.5
    skewed, moved = fit_scales(weight, levels, zero_points=True)
    assert error(skewed, moved) < error(*fit_scales(weight, levels))
    assert bool((2 * moved == (2 * moved).round()).all())
    share = torch.ones(4, 64)
    share[:, :8] = 1e4  # the others hardly count
    weight = shifted
    scale, zero = fit_scales(weight, levels, share)
    plain, _ = fit_scales(weight, levels)
    weight = weight[:, :, :8]
    assert error(scale, zero) < error(plain, zero)


def test_gradients_are_those_of_the_rounded_layer() -> None:
    layer, x = make(LowBit(2, 64, "nearest")), noise(20, 256).requires_grad_()
    out = noise(20, 10, seed=3)
    (layer(x) * out).sum().backward()
    scale = layer.log_scale.detach().exp()[:, :, None]
    exact = layer.weight.detach().view(10, 4, 64) / scale + 1.5
    rounded = ((exact.round().clamp(0, 3) - 1.5) * scale).flatten(1)
    q, step = operators.quantize_rows(x.detach())
    torch.testing.assert_close(x.grad, out @ rounded)
    inside = ((exact >= -0.5) & (exact <= 3.5)).flatten(1)
    assert 0 < int((~inside).sum()) < inside.numel()
    by_weight = out.t() @ (q * step)
    torch.testing.assert_close(layer.weight.grad, by_weight * inside)
    # of the scale: what a small change of it does to the rounded weights, codes held
    steps = exact.round().clamp(0, 3) - 1.5
    slope = steps - torch.where(inside.view_as(exact), exact - 1.5, 0.0)
    want = (by_weight.view(10, 4, 64) * slope * scale).sum(2)
    torch.testing.assert_close(layer.log_scale.grad, want)
    absmean = make(LowBit(rounding="absmean"))
    (absmean(x.detach()) * out).sum().backward()
    torch.testing.assert_close(absmean.weight.grad, by_weight)


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4])
def test_calibrated_rounding_beats_the_nearest(bits: float) -> None:
    dense, x = model_and_data()
    errors = {}
    for rounding in ("nearest", "calibrated"):
        recipe = {"*": LowBit(bits, rounding=rounding)}
        model, report = convert(dense, recipe, [x[:1200]], progress=False)
        errors[rounding] = error_of(model, dense, x[1200:])
        assert all(entry.replaced and entry.method == "lowbit" for entry in report.layers)
        assert report["0"].label == f"low-bit {bits:g}"
    assert errors["calibrated"] < 0.7 * errors["nearest"]
    parallel, _ = convert(
        dense, {"*": LowBit(bits)}, [x[:1200]], calibration="parallel", progress=False
    )
    assert torch.equal(parallel[0].weight, dense[0].weight)  # its scales alone are calibrated


def test_more_bits_are_more_accurate() -> None:
    dense, x = model_and_data()
    errors = []
    for bits in (1, 1.58, 2, 3, 4):
        model, _ = convert(dense, {"*": LowBit(bits)}, [x[:1200]], progress=False)
        errors.append(error_of(model, dense, x[1200:]))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.005


def test_training_ternary_weights_from_the_first_step_on() -> None:
    torch.manual_seed(0)
    x = noise(512, 32)
    y = (x @ noise(32, 6, seed=5)).argmax(1)
    data = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    for method in (LowBit(rounding="absmean"), LowBit(2)):
        dense = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 6))
        model, _ = convert(dense, {"*": method}, [x], progress=False)
        before = dict(model.named_parameters())["0.weight"].detach().clone()
        finetune(model, data, steps=120, lr=1e-2, progress=False)
        assert not torch.equal(model[0].weight, before)
        with torch.no_grad():
            share = float((model.eval()(x).argmax(1) == y).float().mean())
        assert share > 0.85


def test_tied_weights_stay_where_they_are() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(40, 32)
            self.head = nn.Linear(32, 40)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids).relu())

    torch.manual_seed(0)
    dense = Tied()
    ids = torch.randint(0, 40, (300, 3))
    model, _ = convert(dense, {"head": LowBit(4)}, [ids], progress=False)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, dense.head.weight)


def test_convolutions_and_odd_inputs_are_refused_or_become_something_else() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 25, 8), nn.Linear(8, 2))
    x = [noise(300, 3, 5, 5)]
    _, report = convert(model, {"*": LowBit()}, x, progress=False)
    assert not report["0"].replaced
    assert report["0"].reason == "conv2ds take Int8() or Lookup() or PQ() only"
    with pytest.raises(
        LutraError, match=r"layer '2': a group of 32 does not divide the 100 inputs"
    ):
        convert(model, {"*": LowBit(group=32)}, x, progress=False)
    _, report = convert(model, {"*": LowBit(group=32, otherwise=Int8())}, x, progress=False)
    assert [entry.method for entry in report.layers] == ["int8"] * 3
    assert "a group of 32 does not divide the 100 inputs" in report["2"].reason


def test_the_speed_gate_times_low_bit_layers_against_dense_ones() -> None:
    dense, x = model_and_data()
    times = {"lookup": 1.0, "float32": 2.0, "int8": 3.0}
    gate = SpeedGate(measure=lambda graphs, _: {name: times[name] for name in graphs})
    recipe = {"4": Keep(), "*": LowBit(2)}
    _, report = convert(dense, recipe, [x], speed_gate=gate, progress=False)
    assert [entry.method for entry in report.layers] == ["lowbit", "lowbit", None]
    times["lookup"] = 4.0
    _, report = convert(dense, {"0": Int8(), **recipe}, [x], speed_gate=gate, progress=False)
    assert [entry.method for entry in report.layers] == ["int8", None, None]


def test_a_file_verifies_and_inspects(tmp_path: Path, capsys: Any) -> None:
    dense, x = model_and_data()
    model, report = convert(dense, {"*": LowBit(4, 32)}, [x], progress=False)
    path = tmp_path / "model.lutra"
    export(model, path, x[:4])
    assert "low-bit weights" in str(report)
    for command in (
        ["verify", str(path)],
        ["inspect", str(path)],
        ["bench", str(path), "--runs", "2"],
    ):
        assert cli.main(command) == 0, capsys.readouterr().out
    assert "lowbit_linear" in capsys.readouterr().out


def test_recipes_survive_json() -> None:
    recipe = {"a": LowBit(), "b": LowBit(2, 64, "nearest", zero_points=True, otherwise=Int8())}
    text = json.dumps(recipe_to_json(recipe))
    assert recipe_from_json(json.loads(text)) == recipe


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bits": 5}, "bits=5 is not one of [1, 1.58, 2, 3, 4]"),
        ({"bits": True}, "bits=True is not one of"),
        ({"bits": "2"}, "bits='2' is not one of"),
        ({"group": 48}, "group=48 is not one of [32, 64, 128] or None"),
        ({"rounding": "up"}, "rounding='up' is not one of ['calibrated', 'nearest', 'absmean']"),
        ({"bits": 2, "rounding": "absmean"}, "rounding='absmean' is of 1 and 1.58 bits, not of 2"),
        ({"zero_points": True}, "zero_points=True is of 2 to 4 bits, not of 1.58"),
        ({"bits": 2, "zero_points": 1}, "zero_points=1 is not True or False"),
        ({"otherwise": 3}, "otherwise=3 is no method of layers"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(LutraError) as caught:
        LowBit(**settings)
    assert str(caught.value).startswith(f"LowBit: {reason}")


def test_a_layer_that_is_too_deep_is_refused() -> None:
    with pytest.raises(LutraError, match="adds up 600000 products"):
        LowBitLinear.from_float(nn.Linear(600_000, 1), LowBit())

"""Int8 layers in PyTorch: exact outputs in every mode, gradients, conversion, export."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lutra import Session, load_graph, run_reference, runnable_isas
from lutra.errors import LutraError
from lutra.graph import Graph, Node, Value
from lutra.train import (
    PQ,
    Int8,
    Int8Conv2d,
    Int8Linear,
    Keep,
    convert,
    export,
    finetune,
    recipe_from_json,
    recipe_to_json,
)
from lutra.train.exporting.export import freeze_lookup_layers
from lutra.train.layers.int8 import quantize_weight
from lutra.train.operators import int8 as module
from lutra.train.operators import portable
from lutra.train.operators.frozen import frozen as frozen_op


def make_conv(*args: Any, signed: bool = False, bits: int = 7, **kwargs: Any) -> Int8Conv2d:
    torch.manual_seed(3)
    layer = Int8Conv2d.from_float(nn.Conv2d(*args, **kwargs), Int8(bits))
    layer.set_activation_range(-2.0 if signed else 0.0, 2.0)
    return layer


def make_linear(features: int, outputs: int, signed: bool = True, bits: int = 7) -> Int8Linear:
    torch.manual_seed(4)
    layer = Int8Linear.from_float(nn.Linear(features, outputs), Int8(bits))
    layer.set_activation_range(-2.0 if signed else 0.0, 2.0)
    return layer


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Values that go beyond the grid on both sides."""
    return torch.empty(shape).uniform_(-2.5, 2.5, generator=torch.Generator().manual_seed(seed))


def graph_of(layer: Any, x: Tensor) -> Graph:
    """The graph of the layer's integers."""
    frozen, g, q = layer.freeze(), layer.geometry, layer.grid()
    tensors = {role: getattr(frozen, role).numpy() for role in ("weight", "scale", "bias")}
    attrs: dict[str, Any] = {"act_scale": q.scale, "act_zero": q.zero, "act_bits": q.bits}
    if isinstance(layer, Int8Conv2d):
        attrs |= {"stride": g.stride, "padding": g.padding, "dilation": g.dilation}
        attrs["groups"] = g.groups
    op = "int8_conv2d" if isinstance(layer, Int8Conv2d) else "int8_linear"
    node = Node(op, "layer", ("x",), "y", attrs, {role: role for role in tensors})
    return Graph((Value("x", "float32", (None, *x.shape[1:])),), ("y",), (node,), tensors)


def every_mode(layer: Any, x: Tensor) -> dict[str, Tensor]:
    layer.train()
    outputs = {"training": layer(x).detach()}
    layer.eval()
    outputs["eval with gradients"] = layer(x).detach()
    with torch.no_grad():
        outputs["eval"] = layer(x)
        outputs["frozen"] = layer.freeze()(x)
        outputs["channels last"] = layer(
            x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        )
    with torch.inference_mode():
        outputs["inference"] = layer(x).clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs["mixed precision"] = layer(x).detach()
    return outputs


def check_bits(layer: Any, x: Tensor) -> None:
    """The specification, the engine and the layer in every mode give the same bits."""
    graph = graph_of(layer, x)
    want = run_reference(graph, [x.numpy()])["y"]
    for isa in runnable_isas():
        np.testing.assert_array_equal(Session(graph, isa=isa)(x.numpy()), want, isa)
    for mode, y in every_mode(layer, x).items():
        assert y.dtype == torch.float32
        np.testing.assert_array_equal(y.numpy(), want, mode)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((3, 8, 3), {"padding": 1}),
        ((3, 5, 5), {"stride": 2, "padding": 2, "bias": False}),
        ((6, 6, 3), {"groups": 6, "padding": 1}),
        ((6, 12, (3, 1)), {"groups": 3, "dilation": (2, 1), "padding": (2, 0)}),
        ((8, 16, 3), {"groups": 8, "stride": 2, "padding": 1}),
        ((6, 6, 5), {"groups": 6, "dilation": 2, "padding": "same", "bias": False}),
        ((4, 7, 1), {"stride": (1, 2)}),
        ((130, 4, 3), {"padding": "same"}),  # 1170 products: float32 adds them in two parts
    ],
)
def test_convolutions_are_those_of_the_engine(args: Any, kwargs: Any, signed: bool) -> None:
    check_bits(make_conv(*args, signed=signed, **kwargs), noise(3, args[0], 9, 8))


@pytest.mark.parametrize("bits", range(1, 8))
def test_linear_layers_are_those_of_the_engine(bits: int) -> None:
    for signed in (False, True):
        check_bits(make_linear(19, 7, signed, bits), noise(5, 19))
        check_bits(make_linear(19, 7, signed, bits), noise(1, 2, 19))


@pytest.mark.parametrize("features", [1040, 1041, 5000])
def test_long_sums_are_exact(features: int) -> None:
    layer = make_linear(features, 3, signed=False)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.weight[1, ::3] = -0.5
        layer.weight[2] = torch.linspace(-1, 1, features)
    check_bits(layer, torch.full((2, features), 9.0))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((24, 24, 3), {"groups": 24, "padding": 1}),
        ((6, 12, (3, 1)), {"groups": 3, "dilation": (2, 1), "padding": (2, 0)}),
        ((130, 4, 3), {"padding": "same"}),
        ((7, 9, 1), {"stride": 2}),
    ],
)
def test_products_of_pytorch_have_the_same_bits(
    args: Any, kwargs: Any, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other devices add up by products of PyTorch."""
    layer, x = make_conv(*args, **kwargs), noise(5, args[0], 9, 7)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, _ = quantize_weight(layer._kernel().float().detach(), layer.grid())
    sums = module.integer_sums(x, weight, layer.geometry, layer.grid())
    products = module.portable_sums(x, weight, layer.geometry, layer.grid())
    assert torch.equal(sums, products)
    assert sums.stride() == products.stride()
    monkeypatch.setattr(portable, "BLOCK", 1)
    assert torch.equal(module.portable_sums(x, weight, layer.geometry, layer.grid()), products)


def test_weights_of_zero_and_of_almost_zero() -> None:
    layer = make_linear(4, 3)
    with torch.no_grad():
        layer.weight[0] = 0.0
        layer.weight[1] = 1e-38
    frozen = layer.freeze()
    assert not frozen.weight[:2].any()
    assert bool(torch.isfinite(frozen.scale).all())
    check_bits(layer, noise(3, 4))


def test_no_images_give_no_images() -> None:
    for mode in (True, False):
        assert make_conv(3, 4, 3).train(mode)(torch.zeros(0, 3, 5, 5)).shape == (0, 4, 3, 3)
        assert make_linear(3, 4).train(mode)(torch.zeros(0, 3)).shape == (0, 4)
        with torch.no_grad():
            assert make_conv(3, 4, 3).eval()(torch.zeros(0, 3, 5, 5)).shape == (0, 4, 3, 3)


def test_wrong_layers_are_refused() -> None:
    with pytest.raises(LutraError, match="padding_mode='reflect'"):
        make_conv(3, 3, 3, padding=1, padding_mode="reflect")
    with pytest.raises(LutraError, match=r"adds up 132105 products .* keep it"):
        make_linear(132105, 1)


def test_eval_follows_the_weights() -> None:
    layer, x = make_linear(6, 4).eval(), noise(2, 6)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2.0)
        assert not torch.equal(layer(x), before)
        layer.set_activation_range(0.0, 1.0)
        want = layer.freeze()(x)
        assert torch.equal(layer(x), want)
    assert set(layer.state_dict()) == {"weight", "bias", "act_scale", "signed", "zero_point"}


def test_operators_keep_their_promises() -> None:
    conv, linear = make_conv(4, 6, 3, groups=2, padding=1).freeze(), make_linear(5, 3).freeze()
    images = noise(2, 4, 5, 6)
    for layer, x in (
        (conv, images),
        (conv, images.contiguous(memory_format=torch.channels_last)),
        (linear, noise(2, 3, 5)),
    ):
        torch.library.opcheck(
            frozen_op,
            (x, list(layer.tensors.values()), layer.node.to_json()),
            test_utils=("test_schema", "test_faketensor"),
        )


# Gradients


def test_gradients_are_those_of_the_rounded_layer() -> None:
    layer = make_conv(4, 6, 3, groups=2, padding=1, stride=2, signed=True)
    x = noise(3, 4, 7, 6).requires_grad_()
    out = layer(x)
    towards = noise(*out.shape, seed=1)
    out.backward(towards)
    grid, frozen = layer.grid(), layer.freeze()
    low, high = -(grid.zero + 0.5) * grid.scale, (grid.qmax - grid.zero + 0.5) * grid.scale
    rounded = (portable.quantize(x.detach(), grid) - grid.zero) * grid.scale
    rounded.requires_grad_()
    weight = frozen.weight.float() * (frozen.scale / grid.scale).view(-1, 1, 1, 1)
    weight.requires_grad_()
    want = F.conv2d(rounded, weight, layer.bias.detach(), 2, 1, 1, 2)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    want.backward(towards)
    inside = (x > low) & (x < high)
    assert not inside.all()
    torch.testing.assert_close(x.grad, rounded.grad * inside)
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(layer.bias.grad, towards.sum((0, 2, 3)))


@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_reach_everything_that_wants_them(mixed: bool) -> None:
    model = nn.Sequential(
        make_conv(3, 8, 3), nn.ReLU(), make_conv(8, 8, 3, groups=8), nn.Flatten(),
        make_linear(8 * 16, 5),
    )  # fmt: skip
    model[2].weight.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        model(noise(2, 3, 8, 8)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            assert bool(parameter.grad.abs().sum() > 0), name


# Recipes and conversion


def test_recipes_survive_json() -> None:
    recipe = {"stem": Int8(), "*.dw": Int8(act_bits=5), "x": Keep("why"), "*": PQ(v=4)}
    text = json.dumps(recipe_to_json(recipe))
    assert recipe_from_json(json.loads(text)) == recipe
    assert recipe_to_json(recipe)["stem"] == {"method": "int8", "act_bits": 7}
    for bits in (0, 8, 7.0, True, "7", None):
        with pytest.raises(LutraError, match=r"Int8: act_bits=.* is not an integer in 1..7"):
            Int8(act_bits=bits)  # type: ignore[arg-type]
    with pytest.raises(LutraError, match="unexpected keyword argument 'k'"):
        recipe_from_json({"*": {"method": "int8", "k": 16}})


class Net(nn.Module):
    """First convolution, depthwise and pointwise convolution with a shortcut, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.pw = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)
        generator = torch.Generator().manual_seed(1)
        for norm in (self.bn1, self.bn2):
            norm.running_mean.normal_(0, 0.3, generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
            nn.init.normal_(norm.weight, generator=generator)
            nn.init.normal_(norm.bias, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.pw(F.relu(self.bn2(self.dw(x)))) + x)
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


RECIPE = {"conv1": Int8(), "dw": Int8(), "fc": Int8(), "*": PQ(v=2, k=64)}


def test_methods_mix_in_one_recipe(net: Net) -> None:
    x = noise(64, 3, 10, 10)
    model, report = convert(net, RECIPE, x.split(16), progress=False)
    assert isinstance(model.conv1, Int8Conv2d)
    assert isinstance(model.dw, Int8Conv2d)
    assert isinstance(model.fc, Int8Linear)
    assert bool(model.conv1.signed)
    assert not bool(model.fc.signed)
    assert type(net.conv1) is nn.Conv2d
    methods = {layer.name: layer.method for layer in report.layers}
    assert methods == {"conv1": "int8", "dw": "int8", "pw": "pq", "fc": "int8"}
    entry = report["dw"]
    assert (entry.replaced, entry.kind, entry.int8_bytes) == (True, "conv2d", 72)
    assert (entry.weight_bytes, entry.table_bytes, entry.lookups_per_row) == (288, 0, 0)
    assert (entry.multiplies_per_row, entry.v, entry.k, entry.codebooks) == (72, None, None, None)
    assert (entry.used, report["pw"].int8_bytes) == (None, 0)
    for name in ("conv1", "dw", "fc"):
        error = report[name].error
        assert error is not None
        assert 0 < error < 0.002
    text = str(report)
    assert "4 of 4 layers replaced; tables 2048 bytes for 256 bytes of float32 weights" in text
    assert "int8 weights 320 bytes for 1280" in text
    assert any(line.split()[:3] == ["dw", "conv2d", "int8"] for line in text.splitlines())
    json.dumps(report.to_dict())
    with torch.no_grad():
        dense, got = net(x), model.eval()(x)
    assert float((got - dense).square().mean() / dense.var()) < 0.1


def test_only_int8_is_a_recipe_too(net: Net) -> None:
    x = noise(64, 3, 10, 10)
    model, report = convert(net, {"*": Int8()}, x.split(16), progress=False)
    assert "tables 0 bytes for 0 bytes" in str(report)
    with torch.no_grad():
        dense, got = net(x), model.eval()(x)
    assert float((got - dense).square().mean() / dense.var()) < 0.01
    coarse, _ = convert(net, {"*": Int8(act_bits=2)}, x.split(16), progress=False)
    with torch.no_grad():
        far = coarse.eval()(x)
    assert (far - dense).square().mean() > (got - dense).square().mean()


def test_what_product_quantisation_refuses_says_int8(net: Net) -> None:
    with pytest.raises(LutraError, match=r"layer 'dw': .*groups=8 .*keep it, or give it Int8\(\)"):
        convert(net, {"*": PQ()}, [noise(64, 3, 8, 8)], progress=False)


@pytest.mark.slow
def test_fine_tuning_learns(net: Net) -> None:
    torch.manual_seed(0)
    y = torch.arange(256) % 4
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    x = colours[y][:, :, None, None] + 0.5 * torch.randn(256, 3, 6, 6)
    model, _ = convert(net, {"*": Int8()}, x.split(64), progress=False)
    with torch.no_grad():
        assert (model.eval()(x).argmax(1) == y).float().mean() < 0.5
    weights = {name: getattr(model, name).weight.clone() for name in ("conv1", "dw", "fc")}
    data = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    finetune(model, data, steps=40, lr=0.02, progress=False)
    for name, weight in weights.items():
        assert not torch.equal(getattr(model, name).weight, weight)
    with torch.no_grad():
        accuracy = (model.eval()(x).argmax(1) == y).float().mean()
    assert accuracy > 0.95


# Export


@pytest.mark.parametrize("recipe", [RECIPE, {"*": Int8()}, {"dw": Int8(5), "fc": Int8()}])
def test_exported_networks_compute_the_same(
    net: Net, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    x = noise(32, 3, 10, 10)
    model, _ = convert(net, recipe, x.split(16), progress=False)
    path = tmp_path / "m.lutra"
    graph = export(model, path, x[:8])
    nodes = {node.name: node for node in graph.nodes}
    assert "affine" not in {node.op for node in graph.nodes}  # the norms are folded
    assert (nodes["dw"].op, nodes["dw"].attrs["groups"]) == ("int8_conv2d", 8)
    assert nodes["fc"].op == "int8_linear"
    weight = graph.tensors[nodes["dw"].tensors["weight"]]
    np.testing.assert_array_equal(weight, model.dw.freeze().weight.numpy())
    frozen = freeze_lookup_layers(copy.deepcopy(model).eval())
    with torch.no_grad():
        want = frozen(x).numpy()
    assert load_graph(path).nodes == graph.nodes
    outputs = [Session(path, isa=isa)(x.numpy()) for isa in runnable_isas()]
    for got in outputs:
        np.testing.assert_array_equal(got, outputs[0])
        # Folded norms round elsewhere, which may move an activation by a step.
        assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_export_without_norms_keeps_every_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.ReLU6(), nn.Flatten(), nn.Linear(8 * 16, 10),
    )  # fmt: skip
    x = noise(40, 3, 9, 9)
    model, _ = convert(dense, {"*": Int8()}, [x], progress=False)
    export(model, tmp_path / "m.lutra", x[:2])
    with torch.no_grad():
        want = model.eval()(x).numpy()
    for isa in runnable_isas():
        np.testing.assert_array_equal(Session(tmp_path / "m.lutra", isa=isa)(x.numpy()), want)


def test_linear_layers_of_three_axes_are_exported(tmp_path: Path) -> None:
    model = nn.Sequential(make_linear(6, 5), nn.ReLU(), make_linear(5, 4, signed=False)).eval()
    x = noise(3, 7, 6)
    export(model, tmp_path / "m.lutra", x)
    with torch.no_grad():
        want = model(x).numpy()
    np.testing.assert_array_equal(Session(tmp_path / "m.lutra")(x.numpy()), want)


def test_folding_keeps_the_integers(tmp_path: Path) -> None:
    """A norm goes into scale and bias, also one that turns signs around or is zero."""
    norm = nn.BatchNorm2d(6)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -1.0, 0.0, 2.0, 0.5, -3.0]))
        norm.bias.normal_()
        norm.running_mean.normal_()
    layer = make_conv(4, 6, 3, groups=2, signed=True)
    model = nn.Sequential(layer, norm).eval()
    x = noise(3, 4, 6, 6)
    graph = export(model, tmp_path / "m.lutra", x)
    assert [node.op for node in graph.nodes] == ["int8_conv2d"]
    roles = graph.nodes[0].tensors
    np.testing.assert_array_equal(graph.tensors[roles["weight"]], layer.freeze().weight.numpy())
    assert graph.tensors[roles["scale"]][2] == 0.0
    assert graph.tensors[roles["scale"]][1] < 0.0

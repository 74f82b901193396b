"""Export of ordinary torch models: the graph must compute what torch computes, for any batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lutra.train.exporting.parity as check
from lutra.errors import InputError, LutraError, UnsupportedModelError
from lutra.format import load_graph
from lutra.graph import Graph
from lutra.reference import run_reference
from lutra.runtime.session import Session
from lutra.train.exporting.export import export
from lutra.train.exporting.fold import fold_batch_norm

IMAGE = (3, 9, 8)


class Fn(nn.Module):
    """A model from a function of itself and its inputs, with child modules given by name."""

    def __init__(self, function: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            if isinstance(child, Tensor) and not isinstance(child, nn.Parameter):
                self.register_buffer(name, child)
            else:
                setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def randomise(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and signs as after training, so that folding is not trivial."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.3, 2.0, generator=generator)
            if module.weight is not None:
                with torch.no_grad():
                    module.weight.normal_(generator=generator)
                    module.bias.normal_(generator=generator)
    return model


def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    result = copy.deepcopy(model).eval()(*(x.clone() for x in inputs))
    values = result.values() if isinstance(result, dict) else result
    return [v.detach().numpy() for v in ([values] if isinstance(values, Tensor) else values)]


def check_model(
    tmp_path: Path, model: nn.Module, *shapes: tuple[int, ...], example_batch: int = 2
) -> Graph:
    """Export, load, and compare with torch at batch 1, 2 and 5; return the loaded graph."""
    randomise(model)
    generator = torch.Generator().manual_seed(3)

    def draw(batch: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)

    path = tmp_path / "model.lutra"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
        export(model, path, draw(example_batch))
    graph = load_graph(path)
    for batch in (1, 2, 5):
        inputs = draw(batch)
        feeds = {v.name: x.numpy() for v, x in zip(graph.inputs, inputs, strict=True)}
        wanted = outputs_of(model, inputs)
        assert len(wanted) == len(graph.outputs)
        for run in check.runners().values():
            got = run(graph, feeds)
            for name, want in zip(graph.outputs, wanted, strict=True):
                assert got[name].shape == want.shape
                assert check.difference(got[name], want) < 1e-5
    return graph


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


class PreActBlock(nn.Module):
    """Pre-activation block with an option-A shortcut: strided slice, then zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.extra = outputs - inputs
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x), inplace=True))
        y = self.conv2(F.relu(self.bn2(y)))
        short = x[:, :, :: self.stride, :: self.stride]
        return y + F.pad(short, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


class PreActNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(4, 4, 1), PreActBlock(4, 4, 1))
        self.layer2 = nn.Sequential(PreActBlock(4, 8, 2))
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(F.avg_pool2d(x, x.shape[2:]).view(x.size(0), -1))


def conv(*args: Any, **kwargs: Any) -> nn.Sequential:
    layer = nn.Conv2d(*args, **kwargs)
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU(inplace=True))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "conv_bn_relu": (lambda: conv(3, 5, 3, padding=1, bias=False), ["conv2d", "relu"]),
    "conv_bias_stride_dilation": (
        lambda: conv(3, 5, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(2, 1)),
        ["conv2d", "relu"],
    ),
    "conv_same": (lambda: conv(3, 4, 3, padding="same"), ["conv2d", "relu"]),
    "conv_same_even": (lambda: conv(3, 4, (2, 4), padding="same"), ["pad", "conv2d", "relu"]),
    "conv_valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), ["conv2d"]),
    "grouped_depthwise": (
        lambda: nn.Sequential(conv(3, 6, 1), conv(6, 12, 3, groups=6), conv(12, 4, 1, groups=2)),
        ["conv2d", "relu"] * 3,
    ),
    "zero_pad_module": (
        lambda: nn.Sequential(nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(3, 2, 3)),
        ["pad", "conv2d"],
    ),
    "constant_pad": (lambda: nn.ConstantPad2d((1, 0, 2, 0), 1.5), ["pad"]),
    "bn_first": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)),
        ["affine", "conv2d"],
    ),
    "bn_not_affine": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
        ["conv2d"],
    ),
    "relu6_forms": (
        lambda: Fn(lambda m, x: F.hardtanh(F.relu6(x - 0.5) - 1, 0, 6).clamp(0, 6).clamp_min(0)),
        ["affine", "relu6", "affine", "relu6", "relu6", "relu"],
    ),
    "in_place_relu_is_seen_by_later_readers": (
        lambda: Fn(lambda m, x: F.relu(m.conv(x), inplace=True), conv=nn.Conv2d(3, 3, 1)),
        ["conv2d", "relu"],
    ),
    "in_place_twice_read": (
        lambda: Fn(lambda m, x: _add_after_in_place(m.conv(x)), conv=nn.Conv2d(3, 3, 1)),
        ["conv2d", "relu", "add"],
    ),
    "channel_constants": (
        lambda: Fn(
            lambda m, x: 1 - (x * m.scale + m.shift) / 3 - x,
            scale=torch.randn(3, 1, 1),
            shift=nn.Parameter(torch.randn(1, 3, 1, 1)),
        ),
        ["affine", "affine", "affine", "affine", "sub"],
    ),
    "max_pool": (lambda: nn.MaxPool2d(3, 2, 1), ["max_pool2d"]),
    "max_pool_ceil": (lambda: nn.MaxPool2d((3, 2), 2, (1, 0), 1, ceil_mode=True), ["max_pool2d"]),
    "max_pool_dilated": (lambda: nn.MaxPool2d(2, 1, dilation=2), ["max_pool2d"]),
    "max_pool_indices_unused": (
        lambda: Fn(lambda m, x: m.pool(x)[0], pool=nn.MaxPool2d(2, return_indices=True)),
        ["max_pool2d"],
    ),
    "avg_pool": (lambda: nn.AvgPool2d(3, 2, 1), ["avg_pool2d"]),
    "avg_pool_ceil": (lambda: nn.AvgPool2d(2, 2, 1, ceil_mode=True), ["avg_pool2d"]),
    "avg_pool_exclude_pad": (
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        ["avg_pool2d"],
    ),
    "adaptive_avg": (lambda: nn.AdaptiveAvgPool2d((4, 3)), ["adaptive_avg_pool2d"]),
    "adaptive_avg_keeps_axis": (lambda: nn.AdaptiveAvgPool2d((None, 3)), ["adaptive_avg_pool2d"]),
    "adaptive_max": (lambda: nn.AdaptiveMaxPool2d((4, 3)), ["adaptive_max_pool2d"]),
    "global_avg_flatten": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)),
        ["adaptive_avg_pool2d", "flatten", "linear"],
    ),
    "mean": (lambda: Fn(lambda m, x: x.mean((-1, 2))), ["mean"]),
    "mean_keepdim": (lambda: Fn(lambda m, x: x.mean([2, 3], keepdim=True)), ["mean"]),
    "flatten": (lambda: Fn(lambda m, x: x.flatten(2)), ["flatten"]),
    "view_size": (lambda: Fn(lambda m, x: x.view(x.size(0), -1)), ["flatten"]),
    "view_minus_one": (lambda: Fn(lambda m, x: x.view(-1, 216)), ["flatten"]),
    "reshape_shape": (lambda: Fn(lambda m, x: x.reshape(x.shape[0], 9, -1)), ["reshape"]),
    "reshape_same": (lambda: Fn(lambda m, x: F.relu(x.reshape(x.shape))), ["relu"]),
    "squeeze_unsqueeze": (
        lambda: Fn(lambda m, x: x.mean(2, keepdim=True).squeeze(2).unsqueeze(1)),
        ["mean", "reshape"],
    ),
    "bn1d": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(216, 5), nn.BatchNorm1d(5), nn.ReLU()),
        ["flatten", "linear", "relu"],
    ),
    "bn1d_on_rows_is_not_folded": (
        lambda: nn.Sequential(nn.Flatten(2), nn.Linear(72, 5), nn.BatchNorm1d(3)),
        ["flatten", "linear", "affine"],
    ),
    "linear_on_images": (lambda: nn.Linear(8, 5, bias=False), ["linear"]),
    "addmm_and_matmul": (
        lambda: Fn(
            lambda m, x: torch.addmm(m.b, x.flatten(1), m.w, beta=2, alpha=0.5) @ m.v,
            w=nn.Parameter(torch.randn(216, 4)),
            b=torch.randn(4),
            v=torch.randn(4, 2),
        ),
        ["flatten", "linear", "linear"],
    ),
    "concat": (
        lambda: Fn(lambda m, x: torch.cat([x, m.conv(x), x], -3), conv=nn.Conv2d(3, 2, 1)),
        ["conv2d", "concat"],
    ),
    "slices": (
        lambda: Fn(lambda m, x: x[:, -2:, 1::3, :-1][:, :, :, :100] + 0 * 1),
        ["slice", "slice", "slice", "affine"],
    ),
    "split_and_chunk": (
        lambda: Fn(lambda m, x: _swap_halves(x)),
        ["slice", "slice", "concat", "slice", "slice", "slice", "concat"],
    ),
    "select": (lambda: Fn(lambda m, x: x[:, :, -1] - x[:, :, 0]), None),
    "softmax": (
        lambda: nn.Sequential(nn.Flatten(), nn.Softmax(dim=-1)),
        ["flatten", "softmax"],
    ),
    "dropout_and_identity": (
        lambda: nn.Sequential(
            nn.Identity(), nn.Dropout2d(0.5), nn.Conv2d(3, 2, 1), nn.Dropout(0.5, inplace=True)
        ),
        ["conv2d"],
    ),
    "pass_through": (
        lambda: Fn(lambda m, x: F.relu(x.contiguous().float().clone()).detach()),
        ["relu"],
    ),
    "functional_batch_norm": (
        lambda: Fn(
            lambda m, x: F.batch_norm(m.conv(x), m.mean, m.var),
            conv=nn.Conv2d(3, 2, 1),
            mean=torch.randn(2),
            var=torch.rand(2) + 0.5,
        ),
        ["conv2d", "affine"],
    ),
    "weights_computed_from_parameters": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 3)),
        ["conv2d"],
    ),
    "no_grad_region": (lambda: Fn(lambda m, x: _no_grad(x)), ["relu"]),
    "output_is_input": (lambda: nn.Identity(), ["reshape"]),
    "preact_resnet": (PreActNet, None),
}


def _add_after_in_place(x: Tensor) -> Tensor:
    y = F.relu(x, inplace=True)
    return x + y  # x is the rectified tensor by now


def _swap_halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 3)
    a, b, c = torch.cat([b, a], 3).split(1, dim=1)
    return torch.cat([c, b, a], 1)


def _no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.relu(x)


@pytest.mark.parametrize("name", MODELS)
def test_graph_equals_torch(tmp_path: Path, name: str) -> None:
    make, wanted = MODELS[name]
    torch.manual_seed(0)
    graph = check_model(tmp_path, make(), IMAGE)
    if wanted is not None:
        assert ops(graph) == wanted


@pytest.mark.parametrize("batch", [1, 3])
def test_any_example_batch_gives_a_dynamic_batch(tmp_path: Path, batch: int) -> None:
    graph = check_model(tmp_path, PreActNet(), IMAGE, example_batch=batch)
    assert graph.inputs[0].shape == (None, *IMAGE)
    assert graph.golden is not None
    assert graph.golden[0][0].shape == (batch, *IMAGE)


def test_nodes_are_named_after_modules(tmp_path: Path) -> None:
    graph = check_model(tmp_path, PreActNet(), IMAGE)
    names = [node.name for node in graph.nodes]
    assert {"stem", "layer1.0.bn1", "layer1.0.conv1", "layer1.0.add", "fc"} <= set(names)
    assert graph.inputs[0].name == "x"
    assert graph.outputs == ("output",)
    stem = next(node for node in graph.nodes if node.name == "stem")
    assert stem.tensors["weight"] == "stem.weight"


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.b = nn.Linear(6, 3)

    def forward(self, left: Tensor, right: Tensor, power: int = 1) -> dict[str, Tensor]:
        a, b = self.a(left), self.b(right)
        return {"total": a + b, "left": a, "twice": a}


def test_two_inputs_and_named_outputs(tmp_path: Path) -> None:
    graph = check_model(tmp_path, TwoInputs(), (4,), (6,))
    assert [value.name for value in graph.inputs] == ["left", "right"]
    assert graph.outputs == ("total", "left_2", "twice")  # values have one name each


def test_names_given_by_the_caller(tmp_path: Path) -> None:
    x = (torch.randn(2, 4), torch.randn(2, 6))
    graph = export(
        TwoInputs(), tmp_path / "m.lutra", x, input_names=("p", "q"), output_names=("s", "t", "u")
    )
    assert [value.name for value in graph.inputs] == ["p", "q"]
    assert graph.outputs == ("s", "t", "u")
    with pytest.raises(InputError, match="input_names"):
        export(TwoInputs(), tmp_path / "m.lutra", x, input_names=("p",))
    with pytest.raises(LutraError, match="3 outputs"):
        export(TwoInputs(), tmp_path / "m.lutra", x, output_names=("p",))


def test_tuple_of_outputs(tmp_path: Path) -> None:
    model = Fn(lambda m, x: (m.fc(x), (F.relu(x), x)), fc=nn.Linear(8, 2))
    randomise(model)
    graph = export(model, tmp_path / "m.lutra", torch.randn(2, 8))
    assert graph.outputs == ("output_0", "output_1", "output_2")


def test_module_used_twice_is_written_once(tmp_path: Path) -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    graph = check_model(tmp_path, Fn(lambda m, x: m.block(m.block(x)), block=block), IMAGE)
    # The norm runs twice, so it stays; its tensors are made twice, the kernel is one.
    convs = [node for node in graph.nodes if node.op == "conv2d"]
    assert len(convs) == 2
    assert convs[0].tensors == convs[1].tensors
    assert convs[0].name != convs[1].name


def test_tied_weights_are_written_once_and_not_folded(tmp_path: Path) -> None:
    a, b = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, nn.BatchNorm2d(3), b, nn.BatchNorm2d(3))
    graph = check_model(tmp_path, model, IMAGE)
    assert ops(graph) == ["conv2d", "affine", "conv2d", "affine"]
    first, second = (node for node in graph.nodes if node.op == "conv2d")
    assert first.tensors["weight"] == second.tensors["weight"]


# ---- folding ------------------------------------------------------------------------------------


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


# ---- the model is left alone --------------------------------------------------------------------


def test_export_does_not_change_the_model(tmp_path: Path) -> None:
    model = nn.Sequential(
        conv(3, 4, 3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(168, 2), nn.ReLU(inplace=True)
    )
    model.train()
    model[0][1].eval()  # a frozen norm in a model that trains
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    x = torch.randn(2, *IMAGE)
    kept = x.clone()
    export(model, tmp_path / "m.lutra", x)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(x, kept)


def test_wrappers_and_half_precision(tmp_path: Path) -> None:
    model = nn.DataParallel(nn.Sequential(nn.Linear(4, 3)).to(torch.bfloat16))
    graph = export(model, tmp_path / "m.lutra", torch.randn(2, 4, dtype=torch.bfloat16))
    assert [node.name for node in graph.nodes] == ["0"]


def test_metadata_and_golden(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    path = tmp_path / "m.lutra"
    export(model, path, torch.randn(20, 4), metadata={"classes": ["a", "b", "c"]})
    graph = load_graph(path)
    assert graph.metadata["classes"] == ["a", "b", "c"]
    assert graph.metadata["producer"].startswith("lutra ")
    assert graph.golden is not None
    inputs, outputs = graph.golden
    assert inputs[0].shape == (8, 4)
    np.testing.assert_array_equal(Session(graph)(inputs[0]), outputs[0])
    export(model, path, torch.randn(2, 4), golden=False)
    assert load_graph(path).golden is None


# ---- what cannot be exported --------------------------------------------------------------------


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
        self.act = nn.Sequential(nn.Mish(), nn.ReLU(), nn.Mish())
        self.gru = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        x = torch.fft.fft(x).real
        x = torch.einsum("nchw,ncvw->nchv", x, x)[:, :, :, :8]
        y, _ = self.gru(x.mean(1))
        return y * x.mean(1) + x.mean((0, 1))


def test_all_unsupported_operators_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "m.lutra"
    with pytest.raises(UnsupportedModelError) as caught:
        export(Unsupported(), path, torch.randn(2, 3, 9, 8))
    items = caught.value.items
    for part in (
        "aten.pad.default in conv: it pads with mode 'reflect'",
        "aten.mish.default in act.0: use ReLU",
        "aten.mish.default in act.2",
        "aten.fft_fft.default in the model itself",
        "aten.einsum.default",
        "aten.gru.input in gru: recurrent layers",
    ):
        assert any(part in item for item in items), (part, items)
        assert part in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: x.mean(0, keepdim=True), "batch"),
        (lambda m, x: x[:1], "batch"),
        (lambda m, x: x.flatten(0, 1), "batch"),
        (lambda m, x: torch.cat([x, x], 0), "batch"),
        (lambda m, x: x.softmax(0), "batch"),
        (lambda m, x: x.flatten(1) @ x.flatten(1).t(), "axis 0 is not the batch"),
        (lambda m, x: x.transpose(0, 1).contiguous().view(3, -1), "batch"),
        (lambda m, x: F.avg_pool2d(x, 2, divisor_override=3), "divisor_override"),
        (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[1], "first one"),
        (lambda m, x: F.dropout(x), "eval mode"),
        (lambda m, x: F.instance_norm(x), "batch norm"),
        (lambda m, x: x.clamp(float("nan"), 1), "use numbers"),
        (lambda m, x: x.double().float(), "float64"),
        (lambda m, x: (x, torch.ones(2)), "does not depend on the inputs"),
        (lambda m, x: x.reshape(2, -1), "one batch size only"),
        (lambda m, x: x if x.sum() > 0 else -x, "could not trace"),
        (lambda m, x: x.permute(1, 0, 2, 3), "mixes the batch into axis 1"),
        (lambda m, x: F.conv_transpose2d(x, torch.ones(3, 2, 2, 2)), "upsampling or"),
        (lambda m, x: F.interpolate(x, scale_factor=2, mode="bicubic"), "nearest and bilinear"),
        (lambda m, x: F.conv2d(x, x.mean(0, keepdim=True)), "batch"),
        (lambda m, x: F.pad(x, (0, -1)), "slice"),
        (lambda m, x: x / x.size(0), "computes with the batch size"),
        (lambda m, x: x + x.shape[0], "computes with the batch size"),
        (lambda m, x: F.avg_pool2d(x.flatten(2), 2), "4 axes"),
        (lambda m, x: F.interpolate(x.flatten(2), size=4), "upsampling of images"),
    ],
)
def test_unsupported_uses_say_what_to_do(
    tmp_path: Path, function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        export(Fn(function), tmp_path / "m.lutra", torch.randn(2, *IMAGE))


def test_a_model_for_batch_one_only(tmp_path: Path) -> None:
    model = Fn(lambda m, x: x.reshape(1, 216))
    with pytest.raises(UnsupportedModelError, match=r"one batch size only \(1 in the example\)"):
        export(model, tmp_path / "m.lutra", torch.randn(1, *IMAGE))


def test_batch_norm_without_statistics(tmp_path: Path) -> None:
    model = nn.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(UnsupportedModelError, match="track_running_stats=True"):
        export(model, tmp_path / "m.lutra", torch.randn(2, *IMAGE))


def test_inputs_of_other_dtypes_are_refused(tmp_path: Path) -> None:
    model = Fn(lambda m, x: x.float())
    with pytest.raises(UnsupportedModelError, match=r"'x' is torch\.int16"):
        export(model, tmp_path / "m.lutra", torch.zeros(2, 4, dtype=torch.int16))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((), "empty"),
        ((np.zeros((2, 4), np.float32),), "must be a torch.Tensor"),
        (torch.zeros(4), "batch axis"),
        (torch.zeros(0, 4), "at least one sample"),
        ((torch.zeros(2, 4), torch.zeros(3, 4)), "share one"),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), "does not take"),
        (torch.zeros(2, 5), r"fails on example_input of shapes \[\(2, 5\)\]"),
    ],
)
def test_bad_examples(tmp_path: Path, example: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export(nn.Linear(4, 2), tmp_path / "m.lutra", example)


# ---- the check ----------------------------------------------------------------------------------


def test_check_names_the_first_node_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Graph, feeds: Any) -> Any:
        values = dict(run_reference(graph, feeds, intermediates=True))
        if any(node.name == "1" for node in graph.nodes):  # the second layer, and all behind it
            values = {name: value + 1 for name, value in values.items()}
        return {name: values[name] for name in graph.outputs}

    monkeypatch.setattr(check, "runners", lambda: {"a broken engine": broken})
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU())
    path = tmp_path / "m.lutra"
    with pytest.raises(LutraError, match=r"a broken engine differs .* is '1' \(linear\)"):
        export(model, path, torch.randn(2, 4))
    assert not path.exists()


def test_models_that_give_nan_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(LutraError, match="NaN or infinity"):
        export(model, tmp_path / "m.lutra", torch.full((2, 4), float("nan")))

"""New layers in the place of dense ones: attributes, and which models are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train import PQ, Int8, Lookup, convert, export

METHODS = {"pq": PQ(v=4), "int8": Int8(), "lookup": Lookup()}


def quick(model: nn.Module, recipe: Any, data: Any, **settings: Any) -> Any:
    settings = {"rows": 256, "kmeans_steps": 2, "progress": False, **settings}
    return convert(model, recipe, data, **settings)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


CONVOLUTION = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    "padding_mode", "transposed", "output_padding",
)  # fmt: skip
DENSE: dict[str, tuple[nn.Module, Tensor, tuple[str, ...]]] = {
    "conv2d": (
        nn.Conv2d(4, 6, 3, stride=2, padding="valid", dilation=(1, 2)),
        noise(16, 4, 9, 9),
        CONVOLUTION,
    ),
    "conv1d": (nn.Conv1d(4, 6, 3, padding="same", bias=False), noise(16, 4, 9), CONVOLUTION),
    "linear": (nn.Linear(8, 5), noise(64, 8), ("in_features", "out_features")),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", DENSE)
def test_attributes_of_the_dense_layer_stay(kind: str, method: str) -> None:
    dense, x, names = DENSE[kind]
    dense.__dict__["tag"] = "mine"
    layer, _ = quick(dense, {"*": METHODS[method]}, [x], calibration="parallel")
    for new in (layer, layer.freeze()):
        assert {n: getattr(new, n) for n in names} == {n: getattr(dense, n) for n in names}
        assert new.tag == "mine"
    assert torch.equal(layer.weight, dense.weight)
    assert layer.weight.dtype == torch.float32
    assert (layer.bias is None) == (dense.bias is None)
    assert layer(x).shape == dense(x).shape


def test_attributes_of_an_embedding_stay() -> None:
    dense = nn.Embedding(30, 8, padding_idx=2)
    layer, _ = quick(nn.Sequential(dense), {"0": Int8()}, [])
    names = ("num_embeddings", "embedding_dim", "padding_idx")
    assert [getattr(layer[0], name) for name in names] == [30, 8, 2]
    assert layer[0].weight.dtype == torch.float32
    torch.testing.assert_close(layer[0].weight, dense.weight, rtol=0.0, atol=0.03)
    old = {"0.weight": layer[0].int8_weight.clone(), "0.scale": layer[0].scale.clone()}
    layer[0].int8_weight.zero_()
    layer.load_state_dict(old)  # written by lutra 0.1
    assert torch.equal(layer[0].int8_weight, old["0.weight"])


class Reader(nn.Module):
    """Casts to the dtype of a weight and asks for a stride, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x.to(self.patch.weight.dtype))
        return y * self.patch.stride[0]


@pytest.mark.parametrize("method", METHODS)
def test_models_that_read_a_layer_are_exported(method: str, tmp_path: Path) -> None:
    model, _ = quick(Reader(), {"patch": METHODS[method]}, [noise(16, 3, 8, 8)])
    graph = export(model, tmp_path / "m.lutra", noise(2, 3, 8, 8))
    assert f"{method}_conv2d" in [node.op for node in graph.nodes]


# Models


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("how", ["wrapped", "in place", "inside"])
def test_compiled_models_are_taken(how: str) -> None:
    dense: Any = net()
    want, _ = quick(net(), {"2": PQ(v=2)}, [noise(64, 8)])
    if how == "wrapped":
        dense = torch.compile(dense, backend="eager")
    elif how == "inside":
        dense[0] = torch.compile(dense[0], backend="eager")
    else:
        dense.compile(backend="eager")
    recipe = {"_orig_mod.2" if how == "wrapped" else "2": PQ(v=2)}
    model, report = quick(dense, recipe, [noise(64, 8)])
    assert [entry.name for entry in report.layers] == ["0", "2"]
    assert "compiled by torch.compile" in str(report)
    assert torch.equal(model(noise(5, 8)), want(noise(5, 8)))
    assert not any("_orig_mod" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_become_float32(dtype: torch.dtype) -> None:
    dense = net().to(dtype)
    model, report = quick(dense, {"*": Int8()}, [(noise(64, 8).to(dtype), torch.zeros(64))])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in dense.parameters()} == {dtype}
    assert "float16 or bfloat16" in str(report)
    torch.testing.assert_close(model(noise(9, 8)), dense.float()(noise(9, 8)), rtol=0.0, atol=0.1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("net.pt", "path 'net.pt'; load the file"),
        (Path("net.pt"), "path 'net.pt'"),
        (net().state_dict(), "load_state_dict"),
        (nn.Linear, "class Linear; give an instance"),
        (F.relu, "a function; give a torch.nn.Module"),
        (nn.LazyLinear(3), "has no weights yet"),
    ],
)
def test_what_is_no_module_is_refused(model: Any, message: str) -> None:
    with pytest.raises(LutraError, match=message):
        quick(model, {"*": Int8()}, [noise(4, 8)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_traced_modules_are_refused() -> None:
    for model in (torch.jit.script(net()), torch.jit.trace(net(), noise(2, 8))):
        with pytest.raises(LutraError, match="give the module behind it"):
            quick(model, {"*": Int8()}, [noise(4, 8)])


# Layers that are gone past


class Hidden(nn.Module):
    """Calls a layer that it holds in a tuple too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 2)
        self.kept = (self.fc,)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.kept[0](x))
        return y


class Fast(Hidden):
    """Multiplies by the weight on the fast path."""

    def forward(self, x: Tensor) -> Tensor:
        fast = torch.backends.mha.get_fastpath_enabled()
        y = F.linear(x, self.fc.weight, self.fc.bias) if fast else self.fc(x)
        calls: Tensor = self.out(y)
        return calls


@pytest.mark.parametrize("kind", [Hidden, Fast])
def test_layers_that_are_gone_past_are_named(kind: type[Hidden]) -> None:
    model = kind()
    with pytest.raises(LutraError, match="past the new layers 'fc', as"):
        quick(model, {"*": Int8()}, [noise(64, 8)])
    quick(model, {"out": Int8()}, [noise(64, 8)])


class Routed(nn.Module):
    """Reads a shape, and has a tied weight that another module uses."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.words(ids)).view(-1, self.head.weight.shape[0])
        return y


def test_shapes_and_tied_weights_may_be_read() -> None:
    model, _ = quick(Routed(), {"head": PQ(v=4)}, [torch.arange(16)])
    assert model.head.weight is model.words.weight

"""Every module with a weight stands in the report: replaced, or kept with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lutra import load_graph
from lutra.errors import LutraError
from lutra.train import PQ, Int8, Lookup, convert, export


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def quick(model: nn.Module, recipe: Any, data: Any, **settings: Any) -> Any:
    settings = {"rows": 256, "kmeans_steps": 2, "progress": False, **settings}
    return convert(model, recipe, data, **settings)


class Twice(nn.Conv2d):
    """Calls its operator twice."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.weight), self.weight)


class Named(nn.Conv2d):
    """A subclass with the forward of its parent."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)
        self.mark = "mine"


class Prompt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.token


KEPT = {
    "ConvTranspose1d": (
        nn.ConvTranspose1d(4, 4, 3, padding=2, stride=2, dilation=2, output_padding=1),
        "no lookup form",
    ),
    "ConvTranspose3d": (nn.ConvTranspose3d(4, 4, 1), "ConvTranspose3d has no lookup form"),
    "Conv3d": (nn.Conv3d(4, 4, 1), "Conv3d has no lookup form"),
    "GRU": (nn.GRU(4, 4, batch_first=True), "GRU has no lookup form"),
    "LSTM": (nn.LSTM(4, 4, batch_first=True), "LSTM has no lookup form"),
    "Bilinear": (nn.Bilinear(4, 4, 4), "Bilinear has no lookup form"),
    "EmbeddingBag": (nn.EmbeddingBag(4, 4), "EmbeddingBag has no lookup form"),
    "Twice": (Twice(4, 4, 1), "Twice has a forward of its own, which calls"),
    "Prompt": (Prompt(), "Prompt has no lookup form"),
    "Embedding": (nn.Embedding(4, 4, max_norm=1.0), "max_norm changes the weight"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_has_no_lookup_form_is_kept_with_the_reason(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.other = nn.Linear(4, 4), nn.LayerNorm(4), KEPT[kind][0]

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.fc(x))
            return y

    model, report = quick(Net(), {"*": PQ(v=2)}, [noise(32, 4)])
    assert [(entry.name, entry.replaced) for entry in report.layers] == [
        ("fc", True),
        ("other", False),
    ]
    assert type(model.other).__name__ == kind == report["other"].kind.capitalize()[0] + kind[1:]
    assert KEPT[kind][1] in report["other"].reason
    size = sum(parameter.numel() for parameter in KEPT[kind][0].parameters())
    assert report["other"].weight_bytes == 4 * size
    assert report["norm"].kind == "LayerNorm"
    assert "vectors for weights: 1 LayerNorm" in str(report)
    _, report = quick(Net(), {"fc": PQ(v=2)}, [noise(32, 4)])
    assert report["other"].reason == "no pattern of the recipe names it"
    with pytest.raises(LutraError, match=r"pattern 'other' names 'other' .* cannot be replaced"):
        quick(Net(), {"other": PQ(v=2), "fc": Int8()}, [noise(32, 4)])


def test_convolutions_of_lines_are_replaced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv1d(4, 8, 9, padding=4, bias=False), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Conv1d(8, 8, 3, groups=8, padding="same"), nn.ReLU(),
        nn.Conv1d(8, 6, 2, stride=2, dilation=3),
    )  # fmt: skip
    x = noise(16, 4, 30)
    dense(x)
    model, report = quick(dense, {"0": PQ(), "3": Int8(), "5": Lookup(64, 33)}, [x], rows=2048)
    assert [(entry.kind, entry.method) for entry in report.layers] == [
        ("conv1d", "pq"), ("conv1d", "int8"), ("conv1d", "lookup"),
    ]  # fmt: skip
    assert report["0"].v == 9
    model.train()(x).sum().backward()
    assert model[0].weight.grad.shape == (8, 4, 9)
    graph = export(model, tmp_path / "m.lutra", x[:4])
    ops = [node.op for node in graph.nodes]
    assert [op for op in ops if "conv" in op] == ["pq_conv2d", "int8_conv2d", "lookup_conv2d"]
    assert "affine" not in ops  # the batch norm is folded
    with pytest.raises(LutraError, match=r"give \(N, 4, L\)"):
        model(noise(2, 5, 30))
    exact, _ = quick(nn.Sequential(dense[5]), {"0": Lookup(64, 33)}, [noise(16, 8, 30)])
    want = dense[5](noise(16, 8, 30))
    torch.testing.assert_close(exact(noise(16, 8, 30)), want, rtol=0.0, atol=0.3)


def test_the_speed_gate_times_lines() -> None:
    model, report = quick(nn.Conv1d(4, 8, 3), {"*": PQ()}, [noise(16, 4, 30)], speed_gate=True)
    assert report[""].gate.input_shape == (1, 4, 1, 30)
    assert model(noise(2, 4, 30)).shape == (2, 8, 28)


@pytest.mark.parametrize(
    "method", [PQ(v=2), PQ(v=2, encoder="tree"), Int8(), Lookup()], ids=lambda m: m.name
)
def test_transposed_weights_of_transformers(method: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    dense = nn.Sequential(Conv1D(6, 4), nn.ReLU(), Conv1D(4, 6))
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_()
    x = noise(64, 5, 4)
    model, report = quick(dense, {"*": method}, [x], calibration="parallel")
    fitted, _ = quick(dense, {"*": method}, [x])
    assert fitted[0].weight.shape == (4, 6)
    assert [entry.kind for entry in report.replaced] == ["linear", "linear"]
    assert torch.equal(model[0].weight, dense[0].weight)
    assert (model[0].nf, model[0].nx) == (6, 4)
    error = (model(x) - dense(x)).square().mean() / dense(x).var()
    assert error.item() < 0.3
    model.train()(x).sum().backward()
    assert model[0].weight.grad.shape == (4, 6)
    ops = [node.op for node in export(model, tmp_path / "m.lutra", x[:2]).nodes]
    assert ops == [f"{method.name}_linear", "relu", f"{method.name}_linear"]


def test_subclasses_with_the_forward_of_the_parent_are_replaced() -> None:
    model, report = quick(nn.Sequential(Named(4)), {"0": PQ(v=2)}, [noise(8, 4, 5, 5)])
    assert report["0"].replaced
    assert model[0].mark == "mine"
    patched = nn.Sequential(Named(4), nn.Conv2d(4, 4, 1))
    patched[0].forward = lambda x: 2.0 * x
    _, report = quick(patched, {"*": PQ(v=2)}, [noise(8, 4, 5, 5)])
    assert "forward of its own" in report["0"].reason


def _pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


COMPUTED: dict[str, tuple[Any, str]] = {
    "weight norm": (parametrizations.weight_norm, "WeightNorm"),
    "old weight norm": (nn.utils.weight_norm, "WeightNorm"),
    "spectral norm": (parametrizations.spectral_norm, "SpectralNorm"),
    "old spectral norm": (nn.utils.spectral_norm, "SpectralNorm"),
    "pruning": (_pruned, "L1Unstructured"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_folded(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wrap, name = COMPUTED[kind]
    dense = nn.Sequential(wrap(nn.Linear(6, 6)), nn.ReLU(), wrap(nn.Linear(6, 4)))
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(3.0)
    x = noise(64, 6)
    dense(x)  # weights that were computed with gradients can be copied too
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    model, report = quick(dense, {"0": Int8()}, [x], calibration="parallel")
    assert report["0"].reason == f"the recipe names it; its weight is what {name} computed"
    assert report["2"].reason == "no pattern of the recipe names it"
    assert [entry.name for entry in report.layers] == ["0", "2"]
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    dense.eval()
    model.eval()
    torch.testing.assert_close(model(x), dense(x), rtol=0.0, atol=0.1)
    torch.testing.assert_close(model[0].weight, dense[0].weight)
    assert not model[0]._forward_pre_hooks
    export(model, tmp_path / "m.lutra", x[:4])
    assert load_graph(tmp_path / "m.lutra").nodes[0].op == "int8_linear"

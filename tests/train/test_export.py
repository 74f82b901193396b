"""Export: names, inputs and outputs, tied weights, metadata, the check; the model is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported import (
    IMAGE,
    Fn,
    PreActNet,
    check_model,
    conv,
    ops,
    randomise,
)
from torch import Tensor, nn

import lutra.train.exporting.parity as check
from lutra.cli import main
from lutra.errors import InputError, LutraError
from lutra.format import load_graph
from lutra.graph import Graph
from lutra.reference import run_reference
from lutra.runtime.session import Session
from lutra.train.exporting.export import export


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


@pytest.mark.parametrize(
    ("model", "features", "samples"),
    [
        (nn.Linear(8, 2), 8, 8),  # little of anything: all samples
        (nn.Linear(1000, 24), 1000, 4),  # 4096 bytes a sample, 16 KB
        (nn.Linear(1000, 600), 1000, 8),  # a tenth of 2.4 MB
        (nn.Sequential(nn.Linear(5000, 1), nn.Linear(1, 5000)), 5000, 0),
    ],
)
def test_golden_data_stay_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: nn.Module, features: int,
    samples: int,
) -> None:  # fmt: skip
    path = str(tmp_path / "m.lutra")
    export(model, path, torch.randn(8, features))
    graph = load_graph(path)
    if samples:
        assert graph.golden is not None
        (x,), (y,) = graph.golden
        assert len(x) == len(y) == samples
        assert x.nbytes + y.nbytes <= max(16384, (tmp_path / "m.lutra").stat().st_size / 10)
        np.testing.assert_array_equal(Session(graph)(x), y)
        assert "golden" not in graph.metadata
        assert graph.no_golden == ""
        return
    assert graph.golden is None
    reason = "one sample takes 40000 bytes, and golden data 16384 at most"
    assert graph.metadata["golden"] == {"samples": 0, "reason": reason}
    assert main(["inspect", path]) == main(["verify", path]) == 0
    said = capsys.readouterr().out
    assert f"no golden data ({reason})" in said
    assert f"note: the file holds no golden data ({reason}), so only random" in said
    assert main(["verify", path, "--samples", "0"]) == 2
    assert f"no golden data ({reason}); give --samples" in capsys.readouterr().err


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

"""Export of lookup layers: the file must hold the very tables that the frozen layers hold."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lutra.train.exporting.export as exporting
import lutra.train.exporting.parity as check
from lutra.errors import LutraError
from lutra.format import load_graph
from lutra.graph import Graph
from lutra.reference import run_reference
from lutra.train import PQ, PQConv2d, PQLinear, convert
from lutra.train.exporting.export import export, freeze_lookup_layers
from lutra.train.exporting.fold import fold_batch_norm


def with_codebooks(layer: Any) -> Any:
    """Random codebooks on a signed grid: export does not care whether they were learned."""
    layer.set_activation_range(-3.0, 3.0)
    with torch.no_grad():
        layer.centroids.normal_(generator=torch.Generator().manual_seed(5))
    return layer


def pq_conv(*args: Any, **kwargs: Any) -> Any:
    return with_codebooks(PQConv2d.from_float(nn.Conv2d(*args, **kwargs), PQ(v=9, k=16)))


def pq_linear(*args: Any, **kwargs: Any) -> Any:
    return with_codebooks(PQLinear.from_float(nn.Linear(*args, **kwargs), PQ(v=4, k=16)))


class Net(nn.Module):
    """Dense stem, a residual block of lookup layers, a lookup classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = pq_conv(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = pq_conv(8, 8, (3, 1), stride=(2, 1), padding=(1, 0))
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = pq_linear(8 * 4 * 8, 10)
        generator = torch.Generator().manual_seed(1)
        for norm in (self.bn1, self.bn2):
            norm.running_mean.normal_(0, 0.3, generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
            nn.init.normal_(norm.weight, generator=generator)
            nn.init.normal_(norm.bias, generator=generator)
        with torch.no_grad():
            self.bn1.weight[0] = 0.0
            self.bn1.weight[1] = -1.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.bn1(self.conv1(x))) + x
        x = self.bn2(self.conv2(x))
        return self.fc(x.flatten(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def test_graph_holds_the_lookup_layers(tmp_path: Path, net: Net, images: Tensor) -> None:
    graph = export(net, tmp_path / "m.lutra", images)
    assert [node.op for node in graph.nodes] == [
        "conv2d",
        "relu",
        "pq_conv2d",  # the norms are folded
        "relu",
        "add",
        "pq_conv2d",
        "flatten",
        "pq_linear",
    ]
    conv2 = next(node for node in graph.nodes if node.name == "conv2")
    assert conv2.attrs["kernel"] == (3, 1)
    assert conv2.attrs["stride"] == (2, 1)
    frozen = net.conv2.freeze()
    np.testing.assert_array_equal(graph.tensors[conv2.tensors["tables"]], frozen.tables.numpy())
    np.testing.assert_array_equal(
        graph.tensors[conv2.tensors["centroids"]], frozen.centroids.numpy()
    )


@pytest.mark.parametrize("batch", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5))])
def test_graph_equals_torch_for_any_batch(tmp_path: Path, net: Net, batch: int) -> None:
    path = tmp_path / "m.lutra"
    export(net, path, torch.randn(1, 3, 8, 8))
    x = torch.randn(batch, 3, 8, 8)
    folded = fold_batch_norm(freeze_lookup_layers(copy.deepcopy(net).eval()), x)
    with torch.no_grad():
        want = folded(x).numpy()
    got = run_reference(load_graph(path), [x.numpy()])["output"]
    assert check.difference(got, want) < 1e-5


def test_folding_into_lookup_layers_changes_scale_and_bias_only(net: Net, images: Tensor) -> None:
    frozen = freeze_lookup_layers(copy.deepcopy(net).eval())
    folded = fold_batch_norm(frozen, images)
    assert isinstance(folded.bn1, nn.Identity)
    assert isinstance(folded.bn2, nn.Identity)
    assert torch.equal(folded.conv1.tables, frozen.conv1.tables)
    assert torch.equal(folded.conv1.centroids, frozen.conv1.centroids)
    assert folded.conv1.scale[0] == 0.0  # gamma was 0
    x = F.relu(frozen.stem(images))
    torch.testing.assert_close(folded.conv1(x), frozen.bn1(frozen.conv1(x)), rtol=1e-5, atol=1e-5)


def test_export_keeps_the_model_trainable(tmp_path: Path, net: Net, images: Tensor) -> None:
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    export(net, tmp_path / "m.lutra", images)
    assert isinstance(net.conv1, PQConv2d)
    assert net.training
    assert net.conv1.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_one_lookup_layer_is_a_model(tmp_path: Path) -> None:
    graph = export(pq_linear(6, 3), tmp_path / "m.lutra", torch.randn(4, 6))
    assert [node.op for node in graph.nodes] == ["pq_linear"]
    assert graph.values[graph.outputs[0]].shape == (None, 3)


def test_a_layer_used_twice_is_written_once(tmp_path: Path) -> None:
    layer = pq_conv(4, 4, 3, padding=1)
    graph = export(nn.Sequential(layer, nn.ReLU(), layer), tmp_path / "m.lutra", _noise(4))
    first, _, second = graph.nodes
    assert first.tensors == second.tensors
    assert len(graph.tensors) == 4


def test_freeze_of_other_libraries_is_left_alone() -> None:
    class Backbone(nn.Sequential):
        def freeze(self) -> None:
            self.requires_grad_(False)

    model = freeze_lookup_layers(Backbone(pq_conv(4, 4, 3)))
    assert isinstance(model, Backbone)
    assert not isinstance(model[0], PQConv2d)


def test_only_rounding_excuses_outputs_that_differ(
    tmp_path: Path, net: Net, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding in a dense node may flip codes behind it; each node alone still agrees."""

    def noisy(graph: Graph, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        results = run_reference(graph, feeds)
        if len(graph.nodes) > 1:  # as if codes had flipped somewhere in the whole model
            results = {name: value + 1.0 for name, value in results.items()}
        return results

    monkeypatch.setattr(check, "runners", lambda: {"a noisy engine": noisy})
    with pytest.raises(LutraError, match="each node alone agrees; where last bits move"):
        export(net, tmp_path / "m.lutra", images, golden=False)
    assert not (tmp_path / "m.lutra").exists()
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "rounding_share", lambda *_: 10.0)
        with pytest.warns(UserWarning, match="each node alone agrees"):
            export(net, tmp_path / "m.lutra", images)

    def misshapen(graph: Graph, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: value[..., 0] for name, value in run_reference(graph, feeds).items()}

    monkeypatch.setattr(check, "runners", lambda: {"a small engine": misshapen})
    with pytest.raises(LutraError, match=r"gives output 'output' of shape \(4,\), and torch gives"):
        export(net, tmp_path / "m.lutra", images[:4], golden=False)

    def broken(graph: Graph, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: value * np.nan for name, value in run_reference(graph, feeds).items()}

    monkeypatch.setattr(check, "runners", lambda: {"an engine of NaN": broken})
    with pytest.raises(LutraError, match="gives NaN or infinity in output 'output'"):
        export(net, tmp_path / "m.lutra", images, golden=False)

    def wrong(graph: Graph, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        shift = any(node.name == "conv2" for node in graph.nodes)
        return {name: value + shift for name, value in run_reference(graph, feeds).items()}

    monkeypatch.setattr(check, "runners", lambda: {"a wrong engine": wrong})
    with pytest.raises(LutraError, match=r"'conv2' \(pq_conv2d\)"):
        export(net, tmp_path / "m.lutra", images)


def _noise(channels: int) -> Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(4))


# Factors


@pytest.mark.slow
def test_factors_make_nearly_the_same_tables(tmp_path: Path, net: Net, images: Tensor) -> None:
    stored = export(net, tmp_path / "a.lutra", images)
    graph = export(net, tmp_path / "b.lutra", images, tables="compact")
    assert (tmp_path / "b.lutra").stat().st_size < (tmp_path / "a.lutra").stat().st_size
    entry = graph.metadata["tables"]
    assert entry["form"] == "compact"
    assert entry["stored"] == {}
    assert [layer["name"] for layer in entry["layers"]] == ["conv1", "conv2", "fc"]
    for layer in entry["layers"]:
        before, after = (
            next(g.node_tensors(node)["tables"] for node in g.nodes if node.name == layer["name"])
            for g in (stored, graph)
        )
        change = np.abs(before.astype(int) - after)
        assert layer["largest_change"] == change.max() <= 1  # rounding twice
        assert layer["changed_entries"] == (change > 0).mean()
        assert layer["bytes"] < layer["table_bytes"] == before.nbytes
    loaded = load_graph(tmp_path / "b.lutra")
    assert loaded.metadata["tables"] == entry
    x = images.numpy()
    wanted = run_reference(stored, [x])["output"]
    got = run_reference(loaded, [x])["output"]
    assert entry["largest_output_difference"]["output"] == pytest.approx(
        check.difference(got, wanted), rel=0.01
    )
    assert 0.0 < entry["output_error"]["output"] < 0.01
    assert loaded.golden is not None
    np.testing.assert_array_equal(loaded.golden[1][0], got)
    assert "tables" not in stored.metadata


def test_layers_whose_tables_are_no_larger_keep_them(tmp_path: Path) -> None:
    wide = with_codebooks(PQLinear.from_float(nn.Linear(32, 4), PQ(v=16, k=16)))
    model = nn.Sequential(wide, with_codebooks(PQLinear.from_float(nn.Linear(4, 3), PQ(v=4))))
    graph = export(model, tmp_path / "m.lutra", torch.randn(4, 32), tables="compact")
    entry = graph.metadata["tables"]
    assert entry["stored"] == {"0": "V=16 is not less than K=16: its tables are no larger"}
    assert [layer["name"] for layer in entry["layers"]] == ["1"]
    assert "tables" in graph.nodes[0].tensors


@pytest.mark.slow
def test_trees_keep_their_tables(tmp_path: Path) -> None:
    """Their residual is in no weight: what is exported with factors is what is exported without."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    images = torch.randn(16, 3, 8, 8)
    trees = {"0": PQ(encoder="tree"), "3": PQ(v=4, encoder="tree")}
    mixed, _ = convert(net, {**trees, "3": PQ(v=4)}, [images], kmeans_steps=2)
    assert mixed[0].table_residual.abs().max() > 0
    stored = export(mixed, tmp_path / "a.lutra", images[:4])
    graph = export(mixed, tmp_path / "b.lutra", images[:4], tables="compact")
    entry = load_graph(tmp_path / "b.lutra").metadata["tables"]
    reason = "encoder 'tree': its tables are more than products of centroids and weights"
    assert entry["stored"] == {"0": reason}
    assert [layer["name"] for layer in entry["layers"]] == ["3"]
    roles = [set(node.tensors) for node in graph.nodes if node.op.startswith("pq_")]
    assert roles[0] == {"splits", "thresholds", "tables", "scale", "bias"}
    assert roles[1] == {"centroids", "weight", "factor", "scale", "bias"}
    for role in roles[0]:
        ours, theirs = (g.node_tensors(g.nodes[0])[role] for g in (graph, stored))
        np.testing.assert_array_equal(ours, theirs)

    alone, _ = convert(net, trees, [images], kmeans_steps=2)
    stored = export(alone, tmp_path / "a.lutra", images[:4])
    graph = export(alone, tmp_path / "b.lutra", images[:4], tables="compact")
    entry = graph.metadata["tables"]
    assert (entry["layers"], entry["stored"]) == ([], {"0": reason, "3": reason})
    assert graph.nodes == stored.nodes
    assert all((graph.tensors[name] == array).all() for name, array in stored.tensors.items())


def test_tied_layers_share_their_factors(tmp_path: Path) -> None:
    layer = pq_conv(4, 4, 3, padding=1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    graph = export(model, tmp_path / "m.lutra", _noise(4), tables="compact")
    first, _, second = graph.nodes
    assert first.tensors == second.tensors
    assert set(first.tensors) == {"centroids", "weight", "factor", "scale", "bias"}
    assert len(graph.tensors) == 5


def test_a_single_layer_has_factors(tmp_path: Path) -> None:
    graph = export(pq_linear(6, 3), tmp_path / "m.lutra", torch.randn(4, 6), tables="compact")
    assert set(graph.nodes[0].tensors) == {"centroids", "weight", "factor", "scale", "bias"}


def test_layers_that_are_all_zero_have_factors(tmp_path: Path) -> None:
    layer = pq_linear(6, 3)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0] = 1e-30
    graph = export(layer, tmp_path / "m.lutra", torch.randn(4, 6), tables="compact")
    assert not graph.node_tensors(graph.nodes[0])["tables"][:, :, 1:].any()


@pytest.mark.slow
def test_factors_need_weights(tmp_path: Path, net: Net, images: Tensor) -> None:
    frozen = freeze_lookup_layers(copy.deepcopy(net).eval())
    with pytest.raises(LutraError, match="needs the weights of the 3 lookup layers"):
        export(frozen, tmp_path / "m.lutra", images, tables="compact")
    assert not (tmp_path / "m.lutra").exists()
    half = copy.deepcopy(net)
    half.fc = half.fc.eval().freeze()
    graph = export(half, tmp_path / "m.lutra", images, tables="compact")
    assert graph.metadata["tables"]["stored"] == {"fc": "its weights are not known"}
    dense = export(nn.Linear(3, 2), tmp_path / "d.lutra", torch.randn(2, 3), tables="compact")
    assert dense.metadata["tables"]["layers"] == []
    with pytest.raises(LutraError, match="tables='small' is not one of"):
        export(net, tmp_path / "m.lutra", images, tables="small")  # type: ignore[arg-type]


def test_the_engine_must_agree_with_the_reference_on_factors(
    tmp_path: Path, net: Net, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = check.run_engine

    def wrong(graph: Graph, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        shift = any("factor" in n.tensors and n.name == "conv2" for n in graph.nodes)
        return {name: value + shift for name, value in right(graph, feeds).items()}

    monkeypatch.setattr(check, "run_engine", wrong)
    with pytest.raises(LutraError, match=r"differs from the reference .*'conv2' \(pq_conv2d\)"):
        export(net, tmp_path / "m.lutra", images, tables="compact")

    def flipped(graph: Graph, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        shift = len(graph.nodes) > 1 and any("factor" in n.tensors for n in graph.nodes)
        return {name: value + shift for name, value in right(graph, feeds).items()}

    monkeypatch.setattr(check, "run_engine", flipped)
    with pytest.raises(LutraError, match="each node alone agrees; where last bits move"):
        export(net, tmp_path / "m.lutra", images, tables="compact")
    monkeypatch.setattr(exporting, "rounding_share", lambda *_: 10.0)
    with pytest.warns(UserWarning, match="each node alone agrees"):
        export(net, tmp_path / "m.lutra", images, tables="compact")

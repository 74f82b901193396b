"""Decision trees in training: how they grow, what the layer computes, and that runs resume."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lutra.errors import LutraError
from lutra.format import load_graph
from lutra.reference import run_reference
from lutra.runtime.session import Session
from lutra.train import PQ, PQConv2d, convert, export, finetune, recipe_from_json, recipe_to_json
from lutra.train.encoder import Nearest, Tree
from lutra.train.layers import pq_tree as trees
from lutra.train.layers.pq_kmeans import kmeans
from lutra.train.operators import native, portable
from lutra.train.operators import pq as ops
from lutra.train.operators.frozen import frozen as frozen_op


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(grid: Tensor, metric: Tensor | None = None, bins: int = 64) -> trees.Samples:
    """Sub-vectors that are grid values (B, V, n)."""
    codebooks, dim, _ = grid.shape
    values = grid.transpose(1, 2).float()
    metric = torch.eye(dim).repeat(codebooks, 1, 1) if metric is None else metric
    return trees.Samples(values, grid, metric, torch.ones(codebooks, dim, dtype=torch.bool), bins)


def error(part: trees.Samples, taps: Tensor, thresholds: Tensor, centroids: Tensor) -> float:
    rows = torch.arange(len(taps))[:, None]
    codes = trees.descend(part.grid[rows, taps], thresholds)
    picked = centroids.gather(1, codes[:, :, None].expand(-1, -1, centroids.shape[2]))
    return float((part.values - picked).square().sum(2).mean())


def with_tree(case: Case, seed: int = 0, **method: Any) -> PQConv2d:
    """A layer with random trees and free tables."""
    layer = make_conv(case, seed, encoder="tree", **method)
    levels = trees.levels_of(case.k)
    with torch.no_grad():
        rows = torch.randint(
            layer.geometry.depth, (layer.codebooks, levels), generator=generator(seed)
        )
        layer.splits.copy_(rows)
        layer.thresholds.uniform_(0.0, layer.grid().qmax + 1, generator=generator(seed))
        layer.table_residual.normal_(0.0, 0.1, generator=generator(seed))
    return layer


# Growing


def test_a_tree_that_made_the_data_is_found() -> None:
    """Eight clusters, told apart by entries 4, 1 and 3 of six."""
    sides = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
    picks = torch.randint(8, (4000,), generator=generator(0))
    grid = torch.randint(20, 30, (1, 6, 4000), generator=generator(1))
    for entry, level, width in ((4, 0, 30), (1, 1, 20), (3, 2, 12)):
        noise = torch.randint(3, (4000,), generator=generator(2 + entry))
        grid[0, entry] = 10 + sides[picks, level] * width + noise
    part = samples(grid)
    taps, thresholds, centroids = trees.fit(part, 8)
    assert sorted(taps[0].tolist()) == [1, 3, 4]
    codes = trees.descend(grid[torch.arange(1)[:, None], taps], thresholds)[0]
    pairs = {(int(a), int(b)) for a, b in zip(codes, picks, strict=True)}
    assert len(pairs) == 8  # leaves and clusters, one to one
    # thresholds are not at the edge of the data but amid the gap
    first = int(taps[0, 0])
    low, high = sorted(set(grid[0, first].tolist()))[2:4]
    assert low + 1 < int(thresholds[0, 0]) < high
    means = torch.stack([part.values[0][picks == c].mean(0) for c in range(8)])
    distances = torch.cdist(centroids[0], means).min(1).values
    assert float(distances.max()) < 0.01


def correlated(codebooks: int = 3) -> Tensor:
    """Grid values (B, 8, 6000) with four directions of variance."""
    base = torch.randn(codebooks, 4, 6000, generator=generator(0))
    mixed = torch.bmm(torch.randn(codebooks, 8, 4, generator=generator(1)), base)
    return (mixed * 5 + 32).round().clamp(0, 63).long()


def test_trees_come_near_kmeans() -> None:
    part = samples(correlated())
    got = error(part, *trees.fit(part, 16))
    best, _ = kmeans(part.values, 16)
    nearest = float(torch.cdist(part.values, best).min(2).values.square().mean())
    total = float((part.values - part.values.mean(1, keepdim=True)).square().sum(2).mean())
    assert nearest < got < 0.6 * total
    assert got < 2.0 * nearest


def test_refining_repairs_a_tree() -> None:
    part = samples(correlated())
    rows = torch.arange(3)[:, None]

    def loss(taps: Tensor, thresholds: Tensor) -> float:
        codes = trees.descend(part.grid[rows, taps], thresholds)
        return error(part, taps, thresholds, trees.leaf_means(part.values, codes, 16)[0])

    taps, thresholds = trees.grow(part, part.values, 4)
    good = loss(taps, thresholds)
    thresholds = thresholds + torch.randint(-6, 7, thresholds.shape, generator=generator(2))
    last = start = loss(taps, thresholds)
    for _ in range(4):
        taps, thresholds = trees.refine(part, part.values, taps, thresholds)
        assert loss(taps, thresholds) <= last
        last = loss(taps, thresholds)
    assert last - good < 0.2 * (start - good)


def test_the_metric_is_the_error_of_the_output() -> None:
    blocks = torch.randn(2, 9, 5, generator=generator(0))  # fewer outputs than entries
    factor = trees.output_metric(blocks)
    x = torch.randn(2, 30, 9, generator=generator(1))
    want = torch.bmm(x, blocks).square().sum(2)
    torch.testing.assert_close(torch.bmm(x, factor).square().sum(2), want, rtol=1e-3, atol=1e-3)


def test_entries_beyond_the_row_are_never_asked() -> None:
    x = torch.rand(20, 7, 4, 4, generator=generator(0))
    x[:, 5:] = 0.0  # so that no entry of the last sub-vector is better than another
    dense = nn.Conv2d(7, 3, 1)
    model, _ = convert(dense, {"*": PQ(v=5, encoder="tree")}, [x])
    assert isinstance(model, PQConv2d)
    assert model.splits.dtype == torch.int32
    assert ((model.splits >= 0) & (model.splits < 7)).all()
    model(x).sum().backward()
    with torch.no_grad():
        np.testing.assert_array_equal(model.eval()(x).numpy(), reference(model, x))


def test_groups_of_codebooks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = torch.randint(64, (7, 4, 500), generator=generator(0))
    whole = trees.fit(samples(grid), 8)
    monkeypatch.setattr(trees, "_GROUP_VALUES", 16)
    for got, want in zip(trees.fit(samples(grid), 8), whole, strict=True):
        assert torch.equal(got, want)


def test_refitting_follows_the_centroids() -> None:
    """Two clusters on a line, and leaves that moved: thresholds go where the halves meet."""
    grid = torch.arange(64).repeat(40)[None, None]
    taps = grid.expand(1, 3, -1)
    leaves = torch.tensor([0.5, 8.0, 17.5, 25.0, 40.0, 49.5, 55.0, 63.3])[None, :, None]
    thresholds = torch.full((1, 7), 32)
    distances = trees.squared_distances(grid.transpose(1, 2).float(), leaves)
    for _ in range(6):
        thresholds = trees.refit(taps, thresholds, distances, 64)
    codes = trees.descend(taps, thresholds)
    assert torch.equal(codes, torch.cdist(grid[0].t().float(), leaves[0]).argmin(1)[None])


def test_rare_nodes_keep_their_thresholds() -> None:
    taps = torch.zeros((1, 3, 10), dtype=torch.int64)
    thresholds = torch.full((1, 7), 20)
    distances = torch.rand(1, 10, 8, generator=generator(0))
    assert torch.equal(trees.refit(taps, thresholds, distances, 64), thresholds)


# The layer


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_mode_is_the_specification(case: Case) -> None:
    layer, x = with_tree(case), images(case)
    layer.tree_age.fill_(1)  # no renewal before the first output
    want = reference(layer, x)
    for mode, y in outputs_of_every_mode(layer, x).items():
        np.testing.assert_array_equal(y.numpy(), want, err_msg=mode)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_equals_portable(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = with_tree(case), images(case)
    encoder, frozen = layer.encoder(), layer.freeze()
    assert isinstance(encoder, Tree)
    for block in (portable.BLOCK, 2000):
        monkeypatch.setattr(portable, "BLOCK", block)
        y, codes = ops.forward(
            x, layer.geometry, layer.grid(), encoder, frozen.tables, frozen.scale
        )
        slow, slow_codes = portable.forward(
            x, layer.geometry, layer.grid(), encoder, frozen.tables, frozen.scale,
            torch.zeros(case.outputs),
        )  # fmt: skip
        assert torch.equal(codes, slow_codes)
        assert torch.equal(y, slow)


def test_linear_layers_of_any_rank() -> None:
    layer = make_linear(10, 3, signed=True, v=4, k=8, encoder="tree")
    x = torch.randn(2, 5, 10, generator=generator(0))
    with torch.no_grad():
        y = layer.eval()(x)
    np.testing.assert_array_equal(y.numpy(), reference(layer, x))


def test_the_gradient_of_the_tables_is_exact() -> None:
    layer, x = with_tree(Case(v=9)), images(Case(v=9))
    layer.train()
    y = layer(x)
    direction = torch.randn(y.shape, generator=generator(3))
    y.backward(direction)
    codes = portable.encode(x, layer.geometry, layer.grid(), layer.encoder())
    tables = portable.table_gradient(codes, direction, layer.method.k)
    torch.testing.assert_close(layer.table_residual.grad, tables, rtol=1e-4, atol=1e-4)
    assert layer.centroids.grad is not None
    want = torch.bmm(tables, layer.weight_blocks().detach().transpose(1, 2))
    torch.testing.assert_close(layer.centroids.grad, want, rtol=1e-4, atol=1e-4)


def test_the_input_gradient_is_that_of_the_best_linear_model() -> None:
    """Regress the layer's own output on its input: far from the clipping the gradient is the
    slope."""
    x = torch.rand(24, 1, 12, 12, generator=generator(0))
    dense = nn.Conv2d(1, 4, (1, 2), bias=False)
    layer, _ = convert(dense, {"*": PQ(v=2, k=64, encoder="tree")}, [x])
    assert isinstance(layer, PQConv2d)
    y = layer.train()(x.requires_grad_())
    y[:, 0].sum().backward()
    rows = portable.unfold(x.detach(), layer.geometry, 2, 0.0)[0].t()
    out = y.detach()[:, :1].permute(0, 2, 3, 1).reshape(-1, 1)
    rows, out = rows - rows.mean(0), out - out.mean(0)
    slope = torch.linalg.lstsq(rows, out).solution[:, 0]
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, 0, 3, 5], slope.sum(), rtol=0.05, atol=0.02)


def test_thresholds_are_renewed_in_training_only() -> None:
    x = torch.randn(24, 6, 8, 8, generator=generator(0)).relu()
    layer, _ = convert(nn.Conv2d(6, 5, 3, padding=1), {"*": PQ(encoder="tree")}, [x])
    assert isinstance(layer, PQConv2d)
    start = layer.thresholds.clone()
    layer.eval()(x)
    assert torch.equal(layer.thresholds, start)
    layer.train()
    layer(x * 0.5)
    first = layer.thresholds.clone()
    assert not torch.equal(first, start)
    for step in range(1, trees.REFIT + 1):
        layer(x * 0.5)
        assert torch.equal(layer.thresholds, first) == (step < trees.REFIT)
    assert (layer.thresholds >= 0).all()
    assert (layer.thresholds <= layer.grid().qmax + 1).all()
    layer(x[:0])  # nothing to learn from


def test_the_portable_path_trains_like_the_native_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(v=9, signed=True)
    results = []
    for is_native in (True, False):
        with monkeypatch.context() as patch:
            if not is_native:
                patch.setattr(ops, "_is_native", lambda _: False)
            layer = with_tree(case)
            x = images(case).requires_grad_()
            y = layer.train()(x)
            y.square().sum().backward()
            results.append((y, x.grad, layer.table_residual.grad, layer.thresholds))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(results[0][0], results[1][0])


def test_averaged_centroids_work_too() -> None:
    layer, x = with_tree(Case(v=9), centroids="average", decay=0.0), images(Case(v=9))
    layer.train()(x)
    grid = layer.grid()
    codes = ops.forward(
        x, layer.geometry, grid, layer.encoder(), layer.freeze().tables, layer.freeze().scale
    )[1]
    sums, counts = native.cluster_sums(layer.geometry, grid, x, codes, 16, layer.v)
    want = (sums / counts.clamp_min(1)[:, :, None] - grid.zero) * grid.scale
    used = counts > 0
    torch.testing.assert_close(layer.centroids[used], want[used].float())


# Recipes, operators


def test_recipes_survive_json() -> None:
    recipe = {"a": PQ(encoder="tree", k=32), "*": PQ()}
    data = json.loads(json.dumps(recipe_to_json(recipe)))
    assert data["a"]["encoder"] == "tree"
    assert recipe_from_json(data) == recipe
    del data["*"]["encoder"]  # as older files have it
    assert recipe_from_json(data) == recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "forest"}, r"encoder='forest' is not one of \['nearest', 'tree'\]"),
        ({"encoder": "tree", "gradient": "soft"}, "choose 'projected' or 'straight-through'"),
    ],
)
def test_wrong_recipes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LutraError, match=message):
        PQ(**settings)


def test_the_operator_is_well_formed_and_refuses_foreign_tensors() -> None:
    frozen = make_linear(10, 3, v=4, k=8, encoder="tree").freeze()
    x, tensors, text = operator_arguments(frozen, torch.rand(2, 3, 10))
    torch.library.opcheck(frozen_op, (x, tensors, text))
    roles = ("centroids", *frozen.node.roles)
    foreign = replace(frozen.node, roles=roles).to_json()
    with pytest.raises(LutraError, match="no centroids"):
        frozen_op(x, [torch.zeros(3, 8, 4, dtype=torch.uint8), *tensors], foreign)
    nearest = replace(frozen.node, attrs={**frozen.node.attrs, "encoder": "nearest"})
    with pytest.raises(LutraError, match="takes centroids"):
        frozen_op(x, tensors, nearest.to_json())


# Whole models


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(72, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(F.relu(self.stem(x)))))
        y: Tensor = self.fc(F.avg_pool2d(x, 2).flatten(1))
        return y


def data() -> TensorDataset:
    classes = torch.randn(4, 2, 6, 6, generator=generator(0))
    y = torch.arange(128) % 4
    return TensorDataset(classes[y] + 0.5 * torch.randn(128, 2, 6, 6, generator=generator(1)), y)


def converted() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    recipe = {"conv": PQ(encoder="tree", k=8), "fc": PQ(v=4, encoder="tree")}
    return convert(Net(), recipe, [data().tensors[0]], rows=512)


def test_the_report_names_the_encoder() -> None:
    _, report = converted()
    assert "pq, tree" in str(report)
    assert report["conv"].encoder == "tree"
    assert report["stem"].encoder is None
    assert report.to_dict()["layers"][1]["encoder"] == "tree"
    assert report["conv"].error is not None
    assert report["conv"].error < 0.5


def test_conversion_is_deterministic() -> None:
    first, second = converted()[0].state_dict(), converted()[0].state_dict()
    assert {"conv.splits", "conv.thresholds", "conv.table_residual"} <= set(first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.slow
def test_a_stopped_run_continues_bit_equal(tmp_path: Path) -> None:
    """Across a renewal of the thresholds."""
    steps = trees.REFIT + 6

    def run(model: nn.Module, folder: Path, stop: bool) -> None:
        def evaluate(_: nn.Module) -> float:
            if stop:
                raise KeyboardInterrupt
            return 0.0

        loader = DataLoader(data(), batch_size=32, shuffle=True)
        finetune(
            model, loader, steps=steps, lr=3e-3, checkpoint_dir=folder, checkpoint_every=5,
            evaluate=evaluate, evaluate_every=11, batch_norm_batches=2,
        )  # fmt: skip

    whole, parts = converted()[0], converted()[0]
    run(whole, tmp_path / "whole", False)
    with pytest.raises(KeyboardInterrupt):
        run(parts, tmp_path / "parts", True)
    fresh = converted()[0]
    with torch.no_grad():
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            tensor.zero_()  # everything must come from the checkpoint
    run(fresh, tmp_path / "parts", False)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


@pytest.mark.slow
def test_the_loss_falls() -> None:
    model, _ = converted()
    loader = DataLoader(data(), batch_size=32, shuffle=True)
    run = finetune(model, loader, steps=60, lr=1e-2, evaluate_every=4)
    losses = [entry["loss"] for entry in run.history]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_exported_models_run_everywhere(tmp_path: Path) -> None:
    model, _ = converted()
    x = data().tensors[0][:9]
    graph = export(model, tmp_path / "m.lutra", x)
    nodes = {node.name: node for node in graph.nodes}
    assert nodes["conv"].attrs["encoder"] == "tree"
    assert set(nodes["conv"].tensors) == {"splits", "thresholds", "tables", "scale", "bias"}
    stored = load_graph(tmp_path / "m.lutra").node_tensors(nodes["conv"])
    frozen = model.get_submodule("conv").freeze()
    for role in ("splits", "thresholds", "tables"):
        assert torch.equal(torch.from_numpy(stored[role].copy()), getattr(frozen, role))
    with torch.no_grad():
        want = model.eval()(x).numpy()
    got = Session(tmp_path / "m.lutra")(x.numpy())
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    slow = run_reference(graph, [x.numpy()])[graph.outputs[0]]
    np.testing.assert_allclose(got, slow, rtol=1e-4, atol=1e-4)


def test_freezing_copies() -> None:
    layer = with_tree(Case(v=9))
    frozen = layer.freeze()
    splits = frozen.splits.clone()
    layer.splits.zero_()
    assert torch.equal(frozen.splits, splits)
    other = copy.deepcopy(make_conv(Case(v=9)))
    assert isinstance(other.encoder(), Nearest)

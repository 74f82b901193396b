"""Point clouds of the examples: surfaces, sampling, splits, the generator, one short training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import modelnet10_pointnet as script
import numpy as np
import points
import pytest
import torch
from examples_support import DATA

import lutra
from lutra.cli import main as command

MODELNET10 = DATA / "points"


def shapes(count: int = 30, seed: int = 0) -> Any:
    return points.Clouds.from_grids(*points.synthetic_grids(count, seed))


def test_surface_of_a_cube() -> None:
    grids = np.zeros((2, 7, 7, 7), np.uint8)
    grids[0, 1:6, 1:6, 1:6] = 1
    grids[1] = 1  # touches the sides of the grid
    found = points.surface(grids)
    assert [int(f.sum()) for f in found] == [5**3 - 3**3, 7**3 - 5**3]
    assert not found[0, 2:5, 2:5, 2:5].any()
    assert not (found & ~grids.astype(bool)).any()


def test_generator() -> None:
    grids, labels = points.synthetic_grids(18, 3)
    again, other = points.synthetic_grids(18, 3), points.synthetic_grids(18, 4)
    np.testing.assert_array_equal(grids, again[0])
    np.testing.assert_array_equal(labels, again[1])
    assert (grids != other[0]).any()
    assert grids.shape == (18, 24, 24, 24)
    assert sorted(set(labels.tolist())) == list(range(len(points.SHAPES)))
    assert grids.any(axis=(1, 2, 3)).all()
    for name in points.SHAPES:  # the third axis points up: something stands on the floor
        assert grids[points.SHAPES.index(name), :, :, 0].any(), name
    chair = grids[points.SHAPES.index("chair")]
    assert 0 < chair[:, :, -5].sum() < chair[:, :, 8:13].sum(axis=(0, 1)).max()


def test_points_lie_in_cells_of_the_surface() -> None:
    clouds = shapes()
    index = torch.arange(len(clouds))
    raw = []
    original = points.normalize
    points.normalize = lambda x: raw.append(x) or original(x)
    try:
        x = clouds.sample(index, 200, torch.Generator().manual_seed(0))
    finally:
        points.normalize = original
    assert x.shape == (30, 3, 200, 1)
    assert x.dtype == torch.float32
    for i in range(len(clouds)):
        own = clouds.cells[clouds.first[i] : clouds.first[i + 1]].tolist()
        hit = {tuple(cell) for cell in raw[0][i].floor().int().tolist()}
        assert hit <= {tuple(cell) for cell in own}
        assert len(hit) > min(100, len(own)) / 3


def test_normalize() -> None:
    x = points.normalize(torch.tensor([[[1.0, 2, 3], [3, 2, 3], [2, 2, 0]]]))
    cloud = x[0, :, :, 0].T
    torch.testing.assert_close(cloud.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(cloud.norm(dim=1).max(), torch.tensor(1.0))
    torch.testing.assert_close(cloud[1] - cloud[0], torch.tensor([1.0, 0, 0]))
    single = points.normalize(torch.ones(2, 1, 3))
    assert single.isfinite().all()
    for bad in (torch.ones(2, 0, 3), torch.ones(0, 4, 3), torch.ones(2, 4, 2), torch.ones(4, 3)):
        with pytest.raises(ValueError, match="P >= 1"):
            points.normalize(bad)


def test_empty_grids_are_left_out() -> None:
    grids, labels = points.synthetic_grids(6, 0)
    grids[2] = False
    clouds = points.Clouds.from_grids(grids, labels)
    assert clouds.labels.tolist() == [0, 1, 3, 4, 5]
    whole = shapes(6).subset(np.array([0, 1, 3, 4, 5]))
    assert torch.equal(clouds.cells, whole.cells)
    assert torch.equal(clouds.first, whole.first)
    with pytest.raises(ValueError, match="all 6 grids are empty"):
        points.Clouds.from_grids(np.zeros_like(grids), labels)
    with pytest.raises(ValueError, match="one label for each grid"):
        points.Clouds.from_grids(grids, labels[:3])


def test_split_keeps_equal_objects_together() -> None:
    grids, _ = points.synthetic_grids(20, 0)
    clouds = points.Clouds.from_grids(np.concatenate([grids, grids]), np.arange(40))
    used, held_out = points.split(clouds, 0.3, seed=1)
    both = sorted(used.labels.tolist() + held_out.labels.tolist())
    assert both == list(range(40))
    assert {i % 20 for i in used.labels.tolist()}.isdisjoint(
        i % 20 for i in held_out.labels.tolist()
    )
    assert len(held_out) == 12
    again = points.split(clouds, 0.3, seed=1)[1]
    assert torch.equal(again.labels, held_out.labels)
    assert points.split(clouds, 0.3, seed=2)[1].labels.tolist() != held_out.labels.tolist()


def test_clouds_to_measure_with_are_fixed() -> None:
    x, y = points.fixed(shapes(), 64, seed=5)
    torch.rand(7)  # the global generator does not matter
    again = points.fixed(shapes(), 64, seed=5)
    np.testing.assert_array_equal(x, again[0])
    np.testing.assert_array_equal(y, again[1])
    assert x.dtype == np.float32
    assert (x != points.fixed(shapes(), 64, seed=6)[0]).any()


def test_augmentation() -> None:
    clouds, index = shapes(), list(range(12))

    def batch(seed: int, **settings: Any) -> Any:
        torch.manual_seed(seed)
        x, y = points.Augmented(clouds, 50, **settings).__getitems__(index)
        assert x.shape == (12, 3, 50, 1)
        assert y.tolist() == clouds.labels[:12].tolist()
        return x

    assert torch.equal(batch(0), batch(0))
    assert not torch.equal(batch(0), batch(1))
    still = batch(0, stretch=1.0)
    ratio = batch(0, stretch=1.25) / still
    torch.testing.assert_close(ratio, ratio[:, :, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)
    assert ratio.min() >= 0.8 - 1e-3
    assert ratio.max() <= 1.25 + 1e-3
    turned = batch(0, stretch=1.0, degrees=180)
    assert not torch.equal(turned, still)
    torch.testing.assert_close(turned[:, 2], still[:, 2])
    torch.testing.assert_close(turned.norm(dim=1), still.norm(dim=1))
    mirrored = batch(0, stretch=1.0, mirror=True)
    torch.testing.assert_close(mirrored.abs(), still.abs())
    assert (mirrored[:, 2] == still[:, 2]).all()
    assert (batch(0, stretch=1.0, noise=0.1) - still).std() == pytest.approx(0.1, rel=0.1)
    one = points.Augmented(clouds, 50)[3]
    assert (one[0].shape, int(one[1])) == ((3, 50, 1), int(clouds.labels[3]))


@pytest.mark.slow
def test_pointnet_from_training_to_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.lutra"
    words = ["--synthetic", "60", "--points", "24", "--widths", "8", "16", "--hidden", "8"]
    words += ["--float-epochs", "1", "--epochs", "1"]
    words += ["--batch", "8", "--threads", "1", "--output", str(file)]
    words += ["--checkpoints", str(tmp_path / "checkpoints")]
    monkeypatch.setattr(sys, "argv", ["modelnet10_pointnet.py", *words])
    threads = torch.get_num_threads()
    try:
        script.main()
        first = json.loads(file.with_suffix(".json").read_text())
        content = file.read_bytes()
        capsys.readouterr()
        script.main()  # from the checkpoints: the same file without any training
    finally:
        torch.set_num_threads(threads)
    assert "min in this process" not in capsys.readouterr().out
    assert file.read_bytes() == content
    assert first["engine_validation"] == first["lookup_validation"]
    assert first["test_objects"] == 12
    graph = lutra.load_graph(file)
    assert [node.op for node in graph.nodes if "lookup" in node.op] == [
        "lookup_conv2d", "lookup_linear",
    ]  # fmt: skip
    assert graph.metadata["seed"] == 0
    x, y = points.fixed(points.load_synthetic(60, 0)[1], 24, 0)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    arrays = ["--inputs", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "y.npy")]
    capsys.readouterr()
    assert command(["eval", str(file), *arrays, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 100 * report["top1"] == pytest.approx(first["engine_test"])
    with pytest.raises(lutra.InputError, match="empty"):
        lutra.Session(file)(np.zeros((1, 3, 0, 1), np.float32))


@pytest.mark.slow
@pytest.mark.skipif(
    not (MODELNET10 / "modelnet10_labels.npz").exists(),
    reason="needs ModelNet10: set LUTRA_TEST_DATA to the folder that holds points/",
)
def test_modelnet10() -> None:
    train, test = points.load_modelnet10(MODELNET10)
    assert (len(train), len(test)) == (3984, 815)  # 8 grids are empty
    assert int(train.labels.max()) == len(points.CLASSES) - 1
    x, _ = points.fixed(test, 32, 0)
    assert np.isfinite(x).all()
    np.testing.assert_allclose(np.sqrt(np.square(x).sum(1)).max(1), 1, rtol=1e-5)

"""k-means over all codebooks at once, and the reservoirs that feed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train.conversion.calibrate import Reservoir, collect
from lutra.train.geometry import Geometry
from lutra.train.layers import pq_kmeans as module
from lutra.train.layers.pq_kmeans import assign, kmeans
from lutra.train.operators import portable


def clusters(codebooks: int, k: int, each: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples (B, k * each, V) around centres (B, k, V) that are far apart, in random order."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.stack(
        [torch.randperm(4 * k, generator=generator)[:k] for _ in range(codebooks)]
    )
    centres = centres[:, :, None] * 10.0 + torch.rand((codebooks, k, dim), generator=generator)
    noise = 0.1 * torch.randn((codebooks, k, each, dim), generator=generator)
    samples = (centres[:, :, None] + noise).flatten(1, 2)
    return samples[:, torch.randperm(k * each, generator=generator)], centres


def test_separated_clusters_are_found() -> None:
    samples, centres = clusters(codebooks=5, k=8, each=50, dim=3)
    centroids, counts = kmeans(samples, 8, seed=3)
    assert (counts == 50).all()
    nearest, _ = assign(centres, centroids)
    for codebook in range(5):
        assert sorted(nearest[codebook].tolist()) == list(range(8))
        torch.testing.assert_close(
            centroids[codebook][nearest[codebook]], centres[codebook], atol=0.1, rtol=0
        )


def test_the_seed_decides() -> None:
    samples = torch.randn(3, 400, 4, generator=torch.Generator().manual_seed(0))
    first, again, other = (kmeans(samples, 16, steps=4, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    kmeans(samples, 16, steps=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_error_falls_with_every_step() -> None:
    samples = torch.randn(2, 500, 4, generator=torch.Generator().manual_seed(0))
    errors = [
        assign(samples, kmeans(samples, 16, steps=steps)[0])[1].sum().item()
        for steps in (0, 1, 3, 9, 27)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_books_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = torch.randn(4, 300, 5, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(module, "_spread_start", lambda x, k, _: x[:, :k].clone())
    centroids, counts = kmeans(samples, 8)
    for codebook in range(4):
        alone, alone_counts = kmeans(samples[codebook : codebook + 1], 8)
        torch.testing.assert_close(centroids[codebook], alone[0])
        assert torch.equal(counts[codebook], alone_counts[0])


def test_memory_is_bounded_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # integers, so that sums do not depend on their order
    samples = torch.randint(0, 50, (3, 500, 4), generator=torch.Generator().manual_seed(0)).float()
    want = kmeans(samples, 8, steps=5)
    monkeypatch.setattr(portable, "BLOCK", 8 * 3 * 37)
    for got, expected in zip(kmeans(samples, 8, steps=5), want, strict=True):
        assert torch.equal(got, expected)


def test_dead_centroids_are_revived(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, _ = clusters(codebooks=3, k=8, each=20, dim=2)
    # all of them start at the same place, far from every sample
    monkeypatch.setattr(module, "_spread_start", lambda x, k, _: x.new_full((3, k, 2), -1e3))
    _, counts = kmeans(samples, 8)
    assert (counts > 0).all()


def test_the_start_draws_far_samples_and_no_duplicates() -> None:
    samples, centres = clusters(codebooks=2, k=8, each=1, dim=3)
    samples = samples.repeat(1, 40, 1)  # eight distinct points
    start = module._spread_start(samples, 8, torch.Generator().manual_seed(0))
    for codebook in range(2):
        assert len(start[codebook].unique(dim=0)) == 8
    assert centres.shape == start.shape


@pytest.mark.parametrize("distinct", [1, 3])
@pytest.mark.parametrize("samples", [1, 3, 100])
def test_fewer_distinct_samples_than_centroids(distinct: int, samples: int) -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 5.0], [-3.0, 2.0]])[:distinct]
    x = points[torch.arange(samples) % distinct].expand(2, -1, -1)
    centroids, counts = kmeans(x, 16)
    assert centroids.isfinite().all()
    used = min(distinct, samples)
    for codebook in range(2):
        assert counts[codebook].sum() == samples
        found = centroids[codebook][counts[codebook] > 0].unique(dim=0)
        torch.testing.assert_close(found, points[:used].unique(dim=0))
    assert assign(x, centroids)[1].max() < 1e-6


def test_assign_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 9, (2, 50, 3), generator=generator).float()
    centroids = torch.randint(0, 9, (2, 8, 3), generator=generator).float()
    codes, distances = assign(x, centroids)
    every = (x[:, :, None] - centroids[:, None]).square().sum(3)
    assert torch.equal(distances, every.amin(2))
    assert torch.equal(codes, every.argmin(2))


# Reservoirs


def rows_of(x: Tensor, g: Geometry) -> Tensor:
    """Every row (N * H' * W', D)."""
    (ph, pw) = g.padding
    padded = F.pad(x, (pw, pw, ph, ph))
    unfolded = F.unfold(padded, g.kernel, g.dilation, 0, g.stride)
    return unfolded.transpose(1, 2).flatten(0, 1)


GEOMETRIES = [
    Geometry(3, (3, 3), (1, 1), (1, 1)),
    Geometry(2, (3, 2), (2, 1), (0, 2), (1, 2)),
    Geometry(5),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_reservoirs_hold_the_rows_of_the_convolution(geometry: Geometry) -> None:
    x = torch.randn(4, geometry.channels, 6, 7, generator=torch.Generator().manual_seed(0))
    want = rows_of(x, geometry)
    reservoir = Reservoir(geometry, len(want), torch.Generator().manual_seed(1))
    for part in x.split(3):
        reservoir.add(part.contiguous(memory_format=torch.channels_last))
    assert torch.equal(reservoir.rows, want)  # all fit
    few = Reservoir(geometry, 20, torch.Generator().manual_seed(1))
    for part in x.split(3):
        few.add(part)
    assert few.rows.shape == (20, geometry.depth)
    assert few.seen == len(want)
    distance = (few.rows[:, None] - want).square().sum(2)
    assert (distance.amin(1) == 0).all()
    assert len(distance.argmin(1).unique()) == 20  # without replacement


def test_reservoirs_are_deterministic_and_bounded() -> None:
    x = torch.randn(50, 4, 1, 1)
    kept = []
    for seed in (1, 1, 2):
        reservoir = Reservoir(Geometry(4), 30, torch.Generator().manual_seed(seed))
        for part in x.split(7):
            reservoir.add(part)
            assert len(reservoir.rows) <= 30
        reservoir.add(x[:0])
        kept.append(reservoir.rows)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_reservoirs_are_uniform() -> None:
    """Early and late rows are kept alike, however many come in a batch."""
    total, capacity, runs = 60, 12, 600
    x = torch.arange(total, dtype=torch.float32).view(-1, 1, 1, 1)
    hits = torch.zeros(total)
    generator = torch.Generator().manual_seed(0)
    for _ in range(runs):
        reservoir = Reservoir(Geometry(1), capacity, generator)
        for part in x.split([1, 20, 5, 34]):
            reservoir.add(part)
        hits[reservoir.rows.flatten().long()] += 1
    expected = runs * capacity / total
    chi_squared = ((hits - expected).square() / (expected * (1 - capacity / total))).sum().item()
    assert 30 < chi_squared < 100  # 60 degrees of freedom: 3 to 4 standard deviations
    assert abs(hits[:30].sum().item() - runs * capacity / 2) < 150


def gather(model: nn.Module, data: Any, **limits: Any) -> dict[str, Reservoir]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    geometries = {name: Geometry.of(layer) for name, layer in layers.items()}
    limits = {"rows": 100, "memory_bytes": 1 << 20, "seed": 0, **limits}
    return collect(model, layers, geometries, data, **limits)


def test_rows_of_linear_layers_are_the_last_axis() -> None:
    """Also of inputs with four axes, which are not images then."""
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(gather(model, [x])["0"].rows, x.view(-1, 6))


def test_the_memory_limit_holds_for_all_layers_together() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 5))
    samples = gather(model, [torch.randn(500, 6)], rows=10**6, memory_bytes=16 * 400)
    rows = [samples[name].rows for name in ("0", "1")]
    assert [len(r) for r in rows] == [100, 100]
    assert sum(r.numel() for r in rows) * 4 <= 16 * 400
    with pytest.raises(LutraError, match=r"memory_bytes=1000 leaves 15 .* at least 4096 bytes"):
        gather(model, [torch.randn(500, 6)], memory_bytes=1000)
    with pytest.raises(LutraError, match="rows=0"):
        gather(model, [torch.randn(500, 6)], rows=0)
    assert len(gather(model, [torch.randn(500, 6)], rows=7)["0"].rows) == 7


def test_convolutions_need_batches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    with pytest.raises(LutraError, match=r"layer '0' has shape \(3, 8, 8\)"):
        gather(model, [torch.randn(3, 8, 8)])


def test_inputs_by_keyword_are_seen() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(input=x)
            return y

    assert len(gather(Model(), [torch.randn(9, 6)])["layer"].rows) == 9


def test_hooks_and_modes_are_restored() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 2))
    model[1].eval()

    def broken() -> Any:
        yield torch.randn(4, 6)
        raise OSError("disk")

    for data in ([torch.randn(4, 6)], broken()):
        try:
            gather(model, data)
        except OSError as error:
            assert str(error) == "disk"  # noqa: PT017
        assert [m.training for m in model.modules()] == [True, True, False, True]
        assert not any(m._forward_pre_hooks for m in model.modules())

"""Clustering by distances without products: sums of absolute differences, or the largest of them.

Samples lie on the activation grid, as the engine sees them. Centroids of "l1" are medians entry by
entry, which have the least sum of such distances. Those of "chebyshev" are means: the table of a
centroid stands for all samples that choose it, and the mean has the least squared error of the
outputs; the middle of a cluster's range, which has the least largest distance, follows outliers.

Deterministic under a seed on one kind of device; with torch.distributed the statistics of every
step are added up over the processes, each of which holds its own samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lutra.train import distributed as collective
from lutra.train.encoder import Distance
from lutra.train.layers.pq_kmeans import cluster_sums, revive
from lutra.train.operators import portable
from lutra.train.operators.portable import POWERS

_COUNTS = 1 << 24  # that a histogram of several codebooks may have


def cluster(
    x: Tensor, k: int, distance: Distance, bins: int, *, steps: int = 25, seed: int = 0
) -> Tensor:
    """Centroids of every codebook: assignment by a distance and its centres, in turn.

    A centroid that loses all its samples takes the sample that is worst served.

    Args:
        x: samples (B, n, V) on the activation grid: whole numbers 0..bins - 1 as float32, n >= 1;
            with torch.distributed, this process's part.
        k: centroids per codebook.
        distance: "l1" or "chebyshev".
        bins: values of the grid.
        steps: of assigning samples and moving centroids.
        seed: of the start.

    Returns:
        Centroids (B, K, V) in steps of the grid.
    """
    generator = torch.Generator().manual_seed(seed)
    centroids = collective.broadcast(_spread_start(x, k, distance, generator).contiguous())
    for _ in range(steps):
        codes, distances = assign(x, centroids, distance)
        sums, counts = cluster_sums(x, codes, k)
        collective.all_reduce(counts)
        if distance == "l1":
            middle = _medians(x, codes, counts, bins)
        else:
            collective.all_reduce(sums)
            middle = sums / counts.clamp_min(1.0)[:, :, None]
        moved = torch.where(counts[:, :, None] > 0, middle, centroids)
        moved = revive(moved, counts, x, distances)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def assign(x: Tensor, centroids: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """Codes (B, n) int64 of samples x (B, n, V) and distances (B, n) to centroids (B, K, V)."""
    codebooks, k, _ = centroids.shape
    codes, distances = [], []
    for part in torch.split(x, max(1, portable.block_size(x) // (codebooks * k)), dim=1):
        best, code = torch.cdist(part.contiguous(), centroids, p=POWERS[distance]).min(2)
        codes.append(code)
        distances.append(best)
    return torch.cat(codes, 1), torch.cat(distances, 1)


def _spread_start(x: Tensor, k: int, distance: Distance, generator: torch.Generator) -> Tensor:
    """As k-means++: every next centroid is a sample drawn in proportion to its squared distance."""
    codebooks, n, _ = x.shape
    rows = torch.arange(codebooks, device=x.device)
    pick = torch.randint(n, (codebooks,), generator=generator).to(x.device)
    chosen = [x[rows, pick]]
    nearest = assign(x, chosen[0][:, None], distance)[1]
    for _ in range(k - 1):
        total = nearest.square().cumsum(1)
        target = torch.rand((codebooks, 1), generator=generator).to(x.device) * total[:, -1:]
        pick = torch.searchsorted(total, target).clamp_max(n - 1).squeeze(1)
        chosen.append(x[rows, pick])
        nearest = torch.minimum(nearest, assign(x, chosen[-1][:, None], distance)[1])
    return torch.stack(chosen, 1)


def _medians(x: Tensor, codes: Tensor, counts: Tensor, bins: int) -> Tensor:
    """Lower medians (B, K, V) of samples x (B, n, V) by code (B, n), from histograms."""
    codebooks, _, dim = x.shape
    k = counts.shape[1]
    entries = torch.arange(dim, device=x.device)
    medians = []
    for first in range(0, codebooks, max(1, _COUNTS // (k * dim * bins))):
        part = slice(first, first + max(1, _COUNTS // (k * dim * bins)))
        own = torch.arange(len(codes[part]), device=x.device)[:, None] * k + codes[part]
        cell = (own[:, :, None] * dim + entries) * bins + x[part].long()
        seen = torch.bincount(cell.flatten(), minlength=len(own) * k * dim * bins)
        collective.all_reduce(seen)
        below = seen.view(-1, k, dim, bins).cumsum(3)
        half = (counts[part].long() + 1) // 2
        medians.append((below < half[:, :, None, None]).sum(3).clamp_max(bins - 1))
    return torch.cat(medians).to(x.dtype)

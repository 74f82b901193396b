"""k-means over all codebooks of a layer at once.

Deterministic under a seed on one kind of device; with torch.distributed the statistics of every
step are added up over the processes, each of which holds its own samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lutra.train import distributed as collective
from lutra.train.operators import portable


def assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of every sample and its squared distance.

    Args:
        x: samples (B, n, V). centroids: (B, K, V).

    Returns:
        codes (B, n) int64 and distances (B, n).
    """
    codebooks, k, _ = centroids.shape
    norms = centroids.square().sum(2)[:, None, :]
    codes, distances = [], []
    for part in torch.split(x, max(1, portable.block_size(x) // (codebooks * k)), dim=1):
        score = torch.baddbmm(norms, part, centroids.transpose(1, 2), beta=1.0, alpha=-2.0)
        best, code = score.min(2)
        codes.append(code)
        distances.append((best + part.square().sum(2)).clamp_min_(0.0))
    return torch.cat(codes, 1), torch.cat(distances, 1)


def _cluster_sums(x: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sums (B, K, V) and counts (B, K) of samples x (B, n, V) by code, as one-hot products."""
    codebooks, n, dim = x.shape
    sums, counts = x.new_zeros((codebooks, k, dim)), x.new_zeros((codebooks, k))
    clusters = torch.arange(k, device=x.device)[:, None]
    block = max(1, portable.block_size(x) // (codebooks * k))
    for first in range(0, n, block):
        member = (codes[:, None, first : first + block] == clusters).to(x.dtype)  # (B, K, rows)
        sums.baddbmm_(member, x[:, first : first + block])
        counts += member.sum(2)
    return sums, counts


def _spread_start(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++: every next centroid is a sample drawn in proportion to its squared distance."""
    codebooks, n, _ = x.shape
    pick = torch.randint(n, (codebooks,), generator=generator).to(x.device)
    rows = torch.arange(codebooks, device=x.device)
    chosen = [x[rows, pick]]
    distance = (x - chosen[0][:, None]).square().sum(2)
    for _ in range(k - 1):
        total = distance.cumsum(1)
        target = torch.rand((codebooks, 1), generator=generator).to(x.device) * total[:, -1:]
        pick = torch.searchsorted(total, target).clamp_max(n - 1).squeeze(1)
        chosen.append(x[rows, pick])
        distance = torch.minimum(distance, (x - chosen[-1][:, None]).square().sum(2))
    return torch.stack(chosen, 1)


def kmeans(x: Tensor, k: int, *, steps: int = 25, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Centroids of every codebook by Lloyd's algorithm.

    A centroid that loses all its samples takes the sample that is worst served. Centroids on
    which fewer distinct samples than K exist stay duplicates; the counts tell.

    Args:
        x: float32 samples (B, n, V), n >= 1; with torch.distributed, this process's part.
        k: centroids per codebook.
        steps: Lloyd steps.
        seed: of the start.

    Returns:
        centroids (B, K, V) and the number of samples of each (B, K).
    """
    codebooks = x.shape[0]
    generator = torch.Generator().manual_seed(seed)
    centroids = collective.broadcast(_spread_start(x, k, generator).contiguous())
    counts = torch.zeros((codebooks, k), device=x.device)
    for step in range(steps + 1):
        codes, distances = assign(x, centroids)
        sums, counts = _cluster_sums(x, codes, k)
        collective.all_reduce(counts)
        if step == steps:
            break
        collective.all_reduce(sums)
        moved = torch.where(
            counts[:, :, None] > 0, sums / counts.clamp_min(1.0)[:, :, None], centroids
        )
        moved = _revive(moved, counts, x, distances)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids, counts


def _revive(centroids: Tensor, counts: Tensor, x: Tensor, distances: Tensor) -> Tensor:
    """Gives the dead centroids of a codebook its worst-served samples, one each."""
    dead = (counts == 0).sum(1)
    most = int(dead.max())
    if most == 0:
        return centroids
    take = min(most, x.shape[1])
    worst_distance, worst = distances.topk(take, 1)
    samples = torch.gather(x, 1, worst[:, :, None].expand(-1, -1, x.shape[2]))
    if collective.active():
        # the worst of each process, as many everywhere, and of these the worst
        worst_distance = collective.gather(F.pad(worst_distance, (0, most - take)), 1)
        samples = collective.gather(F.pad(samples, (0, 0, 0, most - take)), 1)
        worst_distance, worst = worst_distance.topk(most, 1)
        samples = torch.gather(samples, 1, worst[:, :, None].expand(-1, -1, x.shape[2]))
    centroids = centroids.clone()
    for codebook in torch.nonzero(dead).flatten().tolist():
        empty = torch.nonzero(counts[codebook] == 0).flatten()[: worst_distance.shape[1]]
        useful = worst_distance[codebook, : len(empty)] > 0  # no sample is left unserved otherwise
        centroids[codebook, empty[useful]] = samples[codebook, : len(empty)][useful]
    return centroids

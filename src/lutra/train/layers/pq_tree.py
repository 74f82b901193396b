"""Decision trees instead of nearest centroids: how they are grown and kept up to date.

A tree looks at one entry (tap) of the sub-vector per level and has a threshold per node, as in
MADDNESS (arXiv 2106.10860); finding a code takes log2 K comparisons instead of K * V products.

All errors are measured on the grid of the activations, where a threshold is one of at most 128
integers: histograms over the grid give the error of every threshold of every node at once.

* `grow` picks taps and thresholds level by level, for all codebooks together;
* `refine` walks over the finished levels again (tree alternating optimisation, Carreira-Perpinan
  and Tavallali 2018): a node sends a sample to the side whose leaf, found by the levels below as
  they are, is nearer, as well as one threshold can;
* `refit` is the same step with the taps fixed: in training, thresholds follow the centroids.

Tables of trees are not only products of centroids and weights: `pq_refit.fit_tables` makes those of
all codebooks together, as MADDNESS does, because sub-vectors of one row depend on each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lutra.train import distributed as collective
from lutra.train.encoder import descend

REFIT = 16  # training steps from one renewal of the thresholds to the next
REFIT_RATE = 0.1  # how far they then move
_ROUNDS = 2  # times that `refine` renews every level
_LEAST = 16  # samples that a node must have seen to be moved
_RIDGE = 1e-6  # relative to the largest variance of an output metric
_GROUP_VALUES = 4096  # codebooks * max(K, V) that are grown together; bounds the memory


def levels_of(k: int) -> int:
    """L, the levels of a tree of K = 2**L leaves."""
    return k.bit_length() - 1


def output_metric(weight_blocks: Tensor) -> Tensor:
    """Factors F (B, V, V) with |(x - c) F| = the error of x -> c in the layer's output.

    Args:
        weight_blocks: (B, V, M).
    """
    gram = torch.bmm(weight_blocks, weight_blocks.transpose(1, 2)).double()
    values, vectors = torch.linalg.eigh(gram)
    floor = _RIDGE * values.amax(1, keepdim=True).clamp_min(1e-30)
    factors: Tensor = vectors * values.clamp_min(floor).sqrt()[:, None, :]
    return factors.to(weight_blocks.dtype)


def _group_sums(index: Tensor, values: Tensor | None, groups: int) -> Tensor:
    """Per group of samples the sum of `values` (B, n, W), or the count, over all processes.

    Args:
        index: int64 (B, n), the group of each sample within its codebook.

    Returns:
        (B, groups, W), or (B, groups) counts.
    """
    codebooks, n = index.shape
    flat = (index + torch.arange(codebooks, device=index.device)[:, None] * groups).flatten()
    if values is None:
        sums = torch.bincount(flat, minlength=codebooks * groups).to(torch.float64)
        return collective.all_reduce(sums).view(codebooks, groups)
    width = values.shape[2]
    sums = torch.zeros((codebooks * groups, width), dtype=values.dtype, device=index.device)
    sums.index_add_(0, flat, values.reshape(codebooks * n, width))
    return collective.all_reduce(sums).view(codebooks, groups, width)


def leaf_means(z: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Means (B, K, W) and counts (B, K) of samples z (B, n, W) by code (B, n).

    A leaf without samples has the mean of its codebook.
    """
    sums, counts = _group_sums(codes, z, k), _group_sums(codes, None, k)
    mean = sums.sum(1, keepdim=True) / counts.sum(1).clamp_min(1)[:, None, None].to(z.dtype)
    means = sums / counts.clamp_min(1)[:, :, None].to(z.dtype)
    return torch.where(counts[:, :, None] > 0, means, mean), counts


def _best_thresholds(gain: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The best thresholds of nodes, and what they gain.

    Args:
        gain: (B, nodes, bins + 1): what each threshold t (values below t go left) is worth.
        counts: (B, nodes, bins): samples with each value.

    Returns:
        Thresholds (B, nodes) int64, each in the middle of the values that split the samples alike,
        and gains (B, nodes).
    """
    best, at = gain.max(2)
    # All thresholds up to the next value that occurs give the same split; the middle one is the
    # most likely to be right about values that the samples lack.
    bins = counts.shape[2]
    positions = torch.arange(bins, device=counts.device).expand_as(counts)
    occurs = torch.where(counts > 0, positions, bins)
    following = occurs.flip(2).cummin(2).values.flip(2)
    following = F.pad(following, (0, 1), value=bins)
    reach = following.gather(2, at[:, :, None]).squeeze(2)
    middle = torch.where(reach >= bins, at, (at + reach + 1) // 2)
    return middle, best


@dataclass(frozen=True)
class Samples:
    """Sub-vectors of B codebooks from which trees are made.

    Args:
        values: (B, n, V).
        grid: int64 (B, V, n), the same on the grid of the activations.
        metric: (B, V, V), see `output_metric`.
        allowed: bool (B, V), the entries that a level may look at.
        bins: values of the grid.
    """

    values: Tensor
    grid: Tensor
    metric: Tensor
    allowed: Tensor
    bins: int


def fit(samples: Samples, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Trees of K leaves, and the mean of each leaf.

    Returns:
        taps int64 (B, L) in 0..V-1, thresholds int64 (B, K - 1), centroids (B, K, V).
    """
    found = []
    size = max(1, _GROUP_VALUES // max(k, samples.values.shape[2]))
    for first in range(0, samples.values.shape[0], size):
        codebooks = slice(first, first + size)
        part = Samples(
            samples.values[codebooks],
            samples.grid[codebooks],
            samples.metric[codebooks],
            samples.allowed[codebooks],
            samples.bins,
        )
        z = torch.bmm(part.values, part.metric)
        taps, thresholds = refine(part, z, *grow(part, z, levels_of(k)))
        codes = descend(_at(part.grid, taps), thresholds)
        found.append((taps, thresholds, leaf_means(part.values, codes, k)[0]))
    taps, thresholds, centroids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return taps, thresholds, centroids


def _at(q: Tensor, taps: Tensor) -> Tensor:
    """The entries (B, L, n) of q (B, V, n) at taps (B, L)."""
    return q[torch.arange(q.shape[0], device=q.device)[:, None], taps]


def grow(samples: Samples, z: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Trees chosen level by level: the tap and the thresholds that leave the least variance.

    Args:
        samples: What the trees look at.
        z: (B, n, W), what is to be told apart.
        levels: L.

    Returns:
        taps int64 (B, L) in 0..V-1 and thresholds int64 (B, 2**L - 1) in heap order.
    """
    q, bins = samples.grid, samples.bins
    codebooks, dim, n = q.shape
    device = q.device
    # Variances do not depend on the mean, and small sums round less.
    everything = torch.zeros((codebooks, n), dtype=torch.int64, device=device)
    z = z - leaf_means(z, everything, 1)[0]
    node = torch.zeros((codebooks, n), dtype=torch.int64, device=device)
    rows = torch.arange(codebooks, device=device)
    taps, thresholds = [], []
    for level in range(levels):
        nodes = 1 << level
        gains = torch.empty((dim, codebooks), dtype=z.dtype, device=device)
        found = torch.empty((dim, codebooks, nodes), dtype=torch.int64, device=device)
        for tap in range(dim):
            index = node * bins + q[:, tap]
            sums = _group_sums(index, z, nodes * bins).view(codebooks, nodes, bins, -1)
            counts = _group_sums(index, None, nodes * bins).view(codebooks, nodes, bins)
            gain = _variance_gain(sums, counts.to(z.dtype))
            found[tap], best = _best_thresholds(gain, counts)
            gains[tap] = best.sum(1)
        pick = gains.masked_fill(~samples.allowed.t(), -torch.inf).argmax(0)
        chosen = found[pick, rows]
        taps.append(pick)
        thresholds.append(chosen)
        node = 2 * node + (q[rows, pick] >= chosen.gather(1, node))
    return torch.stack(taps, 1), torch.cat(thresholds, 1)


def _variance_gain(sums: Tensor, counts: Tensor) -> Tensor:
    """|left sum|^2 / left count + the same of the right, by threshold: (B, nodes, bins + 1).

    Args:
        sums: (B, nodes, bins, W). counts: (B, nodes, bins).
    """
    left = F.pad(sums.cumsum(2), (0, 0, 1, 0))
    left_counts = F.pad(counts.cumsum(2), (1, 0))
    right, right_counts = left[:, :, -1:] - left, left_counts[:, :, -1:] - left_counts
    gain = left.square().sum(3) / left_counts.clamp_min(1)
    return gain + right.square().sum(3) / right_counts.clamp_min(1)


def _level_costs(
    taps: Tensor, thresholds: Tensor, distances: Tensor, level: int
) -> tuple[Tensor, Tensor]:
    """The node of each sample on a level, and what going left rather than right costs it.

    Args:
        taps: int64 (B, L, n). thresholds: int64 (B, K - 1). distances: (B, n, K) to the leaves.

    Returns:
        Nodes (B, n) counted within the level, and costs (B, n).
    """
    levels = taps.shape[1]
    node = torch.zeros(taps.shape[::2], dtype=torch.int64, device=taps.device)
    for above in range(level):
        node = 2 * node + 1 + (taps[:, above] >= thresholds.gather(1, node))
    ends = []
    for side in (1, 2):
        leaf = 2 * node + side
        for below in range(level + 1, levels):
            leaf = 2 * leaf + 1 + (taps[:, below] >= thresholds.gather(1, leaf))
        leaf = leaf - ((1 << levels) - 1)
        ends.append(distances.gather(2, leaf[:, :, None]).squeeze(2))
    return node - ((1 << level) - 1), ends[0] - ends[1]


def _threshold_gain(
    nodes: Tensor, cost: Tensor, tap: Tensor, count: int, bins: int
) -> tuple[Tensor, Tensor]:
    """What every threshold saves against sending all samples right, and the counts by value.

    Args:
        nodes: (B, n) of `count` nodes. cost: (B, n) of going left. tap: int64 (B, n).

    Returns:
        gain (B, count, bins + 1) and counts (B, count, bins).
    """
    index = nodes * bins + tap
    sums = _group_sums(index, cost[:, :, None], count * bins).view(-1, count, bins)
    counts = _group_sums(index, None, count * bins).view(-1, count, bins)
    return -F.pad(sums.cumsum(2), (1, 0)), counts


def squared_distances(z: Tensor, centroids: Tensor) -> Tensor:
    """Squared distances (B, n, K) of samples (B, n, W) to centroids (B, K, W), without |z|^2."""
    norms = centroids.square().sum(2)[:, None, :]
    return torch.baddbmm(norms, z, centroids.transpose(1, 2), beta=1.0, alpha=-2.0)


def refit(taps: Tensor, thresholds: Tensor, distances: Tensor, bins: int) -> Tensor:
    """Thresholds that send samples to nearer leaves; the taps stay as they are.

    Goes from the leaves to the root, so that the total distance never grows.

    Args:
        taps: int64 (B, L, n), the entries that the levels look at.
        thresholds: int64 (B, K - 1).
        distances: (B, n, K), of every sample to the centroid of every leaf.
        bins: values of the grid.

    Returns:
        Thresholds int64 (B, K - 1).
    """
    thresholds = thresholds.clone()
    for level in reversed(range(taps.shape[1])):
        first, count = (1 << level) - 1, 1 << level
        nodes, cost = _level_costs(taps, thresholds, distances, level)
        gain, counts = _threshold_gain(nodes, cost, taps[:, level], count, bins)
        old = thresholds[:, first : first + count]
        new, best = _best_thresholds(gain, counts)
        better = best > gain.gather(2, old[:, :, None]).squeeze(2)
        better &= counts.sum(2) >= _LEAST
        thresholds[:, first : first + count] = torch.where(better, new, old)
    return thresholds


def refine(samples: Samples, z: Tensor, taps: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Better trees than the greedy ones: taps and thresholds by `refit`'s rule, and new means.

    Args:
        samples: What the trees look at.
        z: (B, n, W). taps: (B, L). thresholds: (B, K - 1).

    Returns:
        taps (B, L) and thresholds (B, K - 1).
    """
    q, bins = samples.grid, samples.bins
    codebooks, dim, _ = q.shape
    levels = taps.shape[1]
    taps, thresholds = taps.clone(), thresholds.clone()
    rows = torch.arange(codebooks, device=q.device)
    for _ in range(_ROUNDS):
        for level in reversed(range(levels)):
            seen = _at(q, taps)
            means, _ = leaf_means(z, descend(seen, thresholds), 1 << levels)
            distances = squared_distances(z, means)
            first, count = (1 << level) - 1, 1 << level
            nodes, cost = _level_costs(seen, thresholds, distances, level)
            totals = torch.empty((dim, codebooks), dtype=z.dtype, device=q.device)
            found = torch.empty((dim, codebooks, count), dtype=torch.int64, device=q.device)
            for tap in range(dim):
                gain, counts = _threshold_gain(nodes, cost, q[:, tap], count, bins)
                found[tap], best = _best_thresholds(gain, counts)
                totals[tap] = best.sum(1)
            pick = totals.masked_fill(~samples.allowed.t(), -torch.inf).argmax(0)
            old, _ = _threshold_gain(nodes, cost, seen[:, level], count, bins)
            kept = thresholds[:, first : first + count]
            better = totals[pick, rows] > old.gather(2, kept[:, :, None]).sum((1, 2))
            taps[:, level] = torch.where(better, pick, taps[:, level])
            thresholds[:, first : first + count] = torch.where(
                better[:, None], found[pick, rows], kept
            )
    return taps, thresholds

"""What makes codes of sub-vectors: the nearest of K centroids, or a decision tree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lutra.errors import LutraError
from lutra.train.parts import Distance, Group


@dataclass(frozen=True)
class Nearest:
    """The nearest centroid. centroids: uint8 (G, K, V), on the activation grid.

    `group` says of which parts of a row the sub-vectors are, see `lutra.train.parts`.
    """

    centroids: Tensor
    group: Group = "patch"
    distance: Distance = "l2"

    @property
    def attrs(self) -> dict[str, str]:
        """The attributes of an operator with this encoder."""
        return {"encoder": "nearest", "group": self.group, "distance": self.distance}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by role, as in a file."""
        return {"centroids": self.centroids}


@dataclass(frozen=True)
class Tree:
    """A balanced decision tree per codebook, one entry of the row per level.

    Args:
        splits: int32 (B, L): the entry of the row that each level looks at.
        thresholds: uint8 (B, K - 1), K = 2**L: node 0 is the root, the children of i are 2 i + 1
            (entry below the threshold) and 2 i + 2.
        group: of which parts of a row the entries are, see `lutra.train.parts`.
    """

    splits: Tensor
    thresholds: Tensor
    group: Group = "patch"

    @property
    def attrs(self) -> dict[str, str]:
        """The attributes of an operator with this encoder."""
        return {"encoder": "tree", "group": self.group, "distance": "l2"}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by role, as in a file."""
        return {"splits": self.splits, "thresholds": self.thresholds}


Encoder = Nearest | Tree


def descend(taps: Tensor, thresholds: Tensor) -> Tensor:
    """Leaves (B, n) int64 of samples.

    Args:
        taps: int64 (B, L, n), the entries that the levels look at, on the grid.
        thresholds: (B, K - 1) in heap order.
    """
    codebooks, levels, n = taps.shape
    heap = thresholds.long()
    node = torch.zeros((codebooks, n), dtype=torch.int64, device=taps.device)
    for level in range(levels):
        right = taps[:, level] >= heap.gather(1, node)
        node = 2 * node + 1 + right
    return node - ((1 << levels) - 1)


def encoder_of(
    encoder: str,
    centroids: Tensor | None,
    splits: Tensor | None,
    thresholds: Tensor | None,
    group: Group = "patch",
    distance: Distance = "l2",
) -> Encoder:
    """The encoder of a name and the tensors that come with it.

    Raises:
        LutraError: an unknown encoder, or tensors that are not its own.
    """
    if encoder == "nearest":
        if centroids is not None and splits is None and thresholds is None:
            return Nearest(centroids, group, distance)
        raise LutraError("encoder 'nearest' takes centroids and neither splits nor thresholds")
    if encoder == "tree":
        if centroids is None and splits is not None and thresholds is not None:
            return Tree(splits, thresholds, group)
        raise LutraError("encoder 'tree' takes splits and thresholds and no centroids")
    raise LutraError(f"encoder {encoder!r} is unknown; choose 'nearest' or 'tree'")

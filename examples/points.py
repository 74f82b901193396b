"""Point clouds for the examples: ModelNet10 from voxels, and synthetic shapes for tests.

An object is a set of cells of a 24x24x24 grid, the third axis pointing up. Points are drawn from
the cells of its surface, each moved by up to half a cell, so that a cloud samples the surface and
not the grid. Everything random depends on a seed alone.
"""

from __future__ import annotations

import lzma
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GRID = 24
CLASSES = (
    "bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table",
    "toilet",
)  # fmt: skip
SHAPES = ("box", "cylinder", "table", "chair", "shelf", "lamp")


@dataclass(frozen=True)
class Clouds:
    """Surface cells of many objects.

    Attributes:
        cells: uint8 (total, 3), the objects one after the other.
        first: int64 (N + 1), where the cells of each object begin.
        labels: int64 (N).
    """

    cells: Tensor
    first: Tensor
    labels: Tensor

    @classmethod
    def from_grids(cls, grids: np.ndarray, labels: np.ndarray) -> Clouds:
        """Objects of occupancy grids (N, 24, 24, 24), without those that are empty.

        Raises:
            ValueError: grids and labels do not fit, or all grids are empty.
        """
        if grids.ndim != 4 or len(grids) != len(labels):
            raise ValueError(
                f"grids have shape {grids.shape} and labels {labels.shape}; give (N, X, Y, Z) and "
                "one label for each grid"
            )
        filled = grids.any(axis=(1, 2, 3))
        if not filled.any():
            raise ValueError(f"all {len(grids)} grids are empty; give at least one object")
        index = np.argwhere(surface(grids[filled]))
        counts = np.bincount(index[:, 0], minlength=int(filled.sum()))
        return cls(
            torch.from_numpy(index[:, 1:].astype(np.uint8)),
            torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
            torch.from_numpy(np.asarray(labels)[filled].astype(np.int64)),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> Clouds:
        """The objects with these numbers, in this order."""
        pieces = [self.cells[self.first[i] : self.first[i + 1]] for i in index]
        counts = torch.tensor([len(piece) for piece in pieces])
        first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return Clouds(torch.cat(pieces), first, self.labels[torch.from_numpy(np.asarray(index))])

    def sample(
        self, index: Tensor, points: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Clouds of these objects: float32 (N, 3, points, 1), see `normalize`."""
        first = self.first[index]
        count = self.first[index + 1] - first
        position = torch.rand((len(index), points), generator=generator)
        # rand < 1, but its product with the count may be rounded up to the count
        row = torch.minimum((position * count[:, None]).long(), count[:, None] - 1)
        cells = self.cells[first[:, None] + row].float()
        cells += torch.rand(cells.shape, generator=generator)
        return normalize(cells)


def surface(grids: np.ndarray) -> np.ndarray:
    """The filled cells that have an empty one beside them; outside of the grid all is empty."""
    filled = grids.astype(bool)
    padded = np.pad(filled, ((0, 0), (1, 1), (1, 1), (1, 1)))
    inner = np.ones_like(filled)
    size = filled.shape[1:]
    for axis in range(3):
        for shift in (0, 2):
            begin = [1, 1, 1]
            begin[axis] = shift
            window = tuple(slice(b, b + s) for b, s in zip(begin, size, strict=True))
            inner &= padded[(slice(None), *window)]
    return filled & ~inner


def normalize(points: Tensor) -> Tensor:
    """Point sets (N, P, 3) around their mean, in the unit ball, as float32 (N, 3, P, 1).

    Raises:
        ValueError: there are no points.
    """
    if points.ndim != 3 or points.shape[2] != 3 or 0 in points.shape:
        raise ValueError(f"points have shape {tuple(points.shape)}; give (N, P, 3), P >= 1")
    points = points.double()  # so that the order of summation, which differs by CPU, is not seen
    points = points - points.mean(1, keepdim=True)
    radius = points.square().sum(2, keepdim=True).amax(1, keepdim=True).sqrt()
    points = points / radius.clamp_min(1e-6)
    return points.float().transpose(1, 2).unsqueeze(3).contiguous()


def load_modelnet10(folder: Path) -> tuple[Clouds, Clouds]:
    """Training and test objects of ModelNet10; the few empty grids are left out.

    Args:
        folder: holds modelnet10_vox24_train.npy.xz and ..._test.npy.xz, 24x24x24 bits for each
            object, and modelnet10_labels.npz.
    """
    with np.load(folder / "modelnet10_labels.npz", allow_pickle=False) as labels:
        parts = []
        for part in ("train", "test"):
            with lzma.open(folder / f"modelnet10_vox24_{part}.npy.xz") as file:
                bits = np.load(file, allow_pickle=False)
            grids = np.unpackbits(bits, axis=1).reshape(-1, GRID, GRID, GRID)
            parts.append(Clouds.from_grids(grids, labels[part]))
    return parts[0], parts[1]


def split(clouds: Clouds, held_out: float, seed: int) -> tuple[Clouds, Clouds]:
    """Objects to train with, and a share held out; equal objects stay on one side."""
    groups: dict[bytes, list[int]] = {}
    for i in range(len(clouds)):
        cells = clouds.cells[clouds.first[i] : clouds.first[i + 1]]
        groups.setdefault(cells.numpy().tobytes(), []).append(i)
    order = list(groups.values())
    order = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
    taken = 0
    while taken < len(order) and sum(map(len, order[:taken])) < held_out * len(clouds):
        taken += 1
    parts = [
        np.array([i for group in half for i in group]) for half in (order[taken:], order[:taken])
    ]
    return clouds.subset(parts[0]), clouds.subset(parts[1])


def fixed(clouds: Clouds, points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The clouds to measure with: float32 (N, 3, points, 1) and labels int64 (N)."""
    generator = torch.Generator().manual_seed(seed)
    x = clouds.sample(torch.arange(len(clouds)), points, generator)
    return x.numpy(), clouds.labels.numpy()


class Augmented(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Fresh points each time, stretched along every axis, turned about the vertical one.

    Fetches whole batches at once.

    Args:
        clouds: the objects.
        points: of every cloud.
        stretch: largest factor along an axis; the smallest is its inverse.
        degrees: largest angle of rotation.
        mirror: whether to mirror the two horizontal axes, each half of the time.
        noise: standard deviation of the jitter that is added to the cell's own.
    """

    def __init__(
        self,
        clouds: Clouds,
        points: int,
        *,
        stretch: float = 1.25,
        degrees: float = 0.0,
        mirror: bool = False,
        noise: float = 0.0,
    ) -> None:
        self.clouds, self.points = clouds, points
        self.stretch, self.degrees, self.mirror = stretch, degrees, mirror
        self.noise = noise

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([i])
        return x[0], y[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(indices)
        count = len(index)
        x = self.clouds.sample(index, self.points)
        factors = torch.exp((2 * torch.rand(count, 3) - 1) * math.log(self.stretch))
        if self.mirror:
            factors[:, :2] *= torch.where(torch.rand(count, 2) < 0.5, -1.0, 1.0)
        angle = (2 * torch.rand(count) - 1) * math.radians(self.degrees)
        sine, cosine = angle.sin(), angle.cos()
        turn = torch.zeros(count, 3, 3)
        turn[:, 0, 0], turn[:, 0, 1] = cosine, -sine
        turn[:, 1, 0], turn[:, 1, 1] = sine, cosine
        turn[:, 2, 2] = 1.0
        x = (turn * factors[:, None]) @ x.squeeze(3)
        if self.noise:
            x += self.noise * torch.randn(x.shape)
        x = x.unsqueeze(3).contiguous(memory_format=torch.channels_last)  # as convolutions like it
        return x, self.clouds.labels[index]


# Synthetic shapes


def _block(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Cells whose centres are between two corners; coordinates in 0..1."""
    inside = np.ones((GRID, GRID, GRID), bool)
    for axis in range(3):
        centre = (np.arange(GRID) + 0.5) / GRID
        shape = [1, 1, 1]
        shape[axis] = GRID
        inside &= ((centre >= low[axis]) & (centre <= high[axis])).reshape(shape)
    return inside


def _column(x: float, y: float, radius: float, low: float, high: float) -> np.ndarray:
    """Cells whose centres are in a vertical cylinder."""
    centre = (np.arange(GRID) + 0.5) / GRID
    flat = (centre[:, None] - x) ** 2 + (centre[None, :] - y) ** 2 <= radius**2
    upright = (centre >= low) & (centre <= high)
    return flat[:, :, None] & upright[None, None, :]


def _legs(half: np.ndarray, thick: float, top: float) -> np.ndarray:
    cells = np.zeros((GRID, GRID, GRID), bool)
    for sx in (-1, 1):
        for sy in (-1, 1):
            corner = 0.5 + np.array([sx, sy]) * (half - thick)
            cells |= _block(np.array([*(corner - thick), 0.0]), np.array([*(corner + thick), top]))
    return cells


def _shape(name: str, rng: np.random.Generator) -> np.ndarray:
    half = rng.uniform(0.25, 0.48, 2)
    thick = rng.uniform(0.06, 0.09)
    flat_low, flat_high = 0.5 - half, 0.5 + half
    if name == "box":
        return _block(np.array([*flat_low, 0.0]), np.array([*flat_high, rng.uniform(0.4, 1.0)]))
    if name == "cylinder":
        return _column(0.5, 0.5, half[0], 0.0, rng.uniform(0.4, 1.0))
    if name == "table":
        top = rng.uniform(0.5, 0.9)
        plate = _block(np.array([*flat_low, top - thick]), np.array([*flat_high, top + thick]))
        return plate | _legs(half, thick, top)
    if name == "chair":
        seat = rng.uniform(0.35, 0.5)
        cells = _block(np.array([*flat_low, seat - thick]), np.array([*flat_high, seat + thick]))
        back = np.array([flat_low[0] + 2 * thick, flat_high[1], rng.uniform(0.85, 1.0)])
        return cells | _legs(half, thick, seat) | _block(np.array([*flat_low, seat]), back)
    if name == "shelf":
        cells = np.zeros((GRID, GRID, GRID), bool)
        for level in np.linspace(thick, 1 - thick, int(rng.integers(3, 6))):
            cells |= _block(
                np.array([*flat_low, level - thick / 2]), np.array([*flat_high, level + thick / 2])
            )
        for side in (flat_low[0], flat_high[0] - thick):
            cells |= _block(
                np.array([side, flat_low[1], 0.0]), np.array([side + thick, flat_high[1], 1.0])
            )
        return cells
    if name == "lamp":
        cells = _column(0.5, 0.5, half[0], 0.0, thick) | _column(0.5, 0.5, thick, 0.0, 1.0)
        return cells | _column(0.5, 0.5, half[1], rng.uniform(0.6, 0.75), 1.0)
    raise ValueError(f"there is no shape {name!r}; choose one of {SHAPES}")


def synthetic_grids(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Occupancy grids of made-up furniture: bool (N, 24, 24, 24) and labels 0..5 (see SHAPES)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(SHAPES)
    grids = np.stack([_shape(SHAPES[label], rng) for label in labels])
    return grids, labels.astype(np.int64)


def load_synthetic(count: int, seed: int) -> tuple[Clouds, Clouds]:
    """Training and test objects, four to one, of the generator."""
    grids, labels = synthetic_grids(count, seed)
    test = np.arange(count) // len(SHAPES) % 5 == 4
    return (
        Clouds.from_grids(grids[~test], labels[~test]),
        Clouds.from_grids(grids[test], labels[test]),
    )

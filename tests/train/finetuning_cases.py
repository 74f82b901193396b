"""A small network, random data, and comparisons, for the tests of fine-tuning."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lutra.errors import LutraError
from lutra.train import PQ, convert, finetune

EPOCH = 4  # batches
BATCH = 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(F.relu(self.stem(x)))))
        y: Tensor = self.fc(self.drop(F.avg_pool2d(x, 3).flatten(1)))
        return y


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Draws from all three generators for every sample, and may crash at one of them."""

    def __init__(self, crash_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        classes = torch.randn(4, 2, 6, 6, generator=generator)
        self.y = torch.arange(EPOCH * BATCH - 5) % 4
        self.x = classes[self.y] + 0.5 * torch.randn(len(self.y), 2, 6, 6, generator=generator)
        self.reads, self.crash_at = 0, crash_at

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        if self.reads == self.crash_at:
            raise OSError("the disk is gone")
        noise = torch.randn(1) + np.random.rand() + random.random()  # noqa: NPY002
        return self.x[index] + 0.1 * noise, self.y[index]


def loader(crash_at: int | None = None, **settings: Any) -> DataLoader[Any]:
    return DataLoader(Augmented(crash_at), batch_size=BATCH, shuffle=True, **settings)


def converted(method: PQ | None = None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    dense, x = Net(), Augmented().x
    dense.norm.momentum = None
    dense(x)  # statistics, so that conversion sees the range that training has
    dense.norm.momentum = 0.1
    recipe = {"conv": method or PQ(v=9, k=8, centroids="average"), "fc": PQ(v=4, k=8)}
    return convert(dense, recipe, [x], rows=256, kmeans_steps=3)[0]


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, got), want in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(got, want), name


def refused(message: str, model: nn.Module, data: Any, **settings: Any) -> None:
    with pytest.raises(LutraError, match=message):
        finetune(model, data, **settings)

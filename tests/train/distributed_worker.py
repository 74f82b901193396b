"""Converts and fine-tunes a small network; started by test_finetune_processes.py once per process.

    python distributed_worker.py FOLDER

With WORLD_SIZE in the environment, as torchrun sets it, the processes share the work. Each writes
what it has learned to FOLDER/rank-<i>.pt.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lutra.train import PQ, convert, finetune
from lutra.train.layers.pq_kmeans import kmeans

GLOBAL_BATCH = 32
STEPS = 5


class Net(nn.Module):
    """Without batch norm, whose statistics are those of one process."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.mixed = nn.Conv2d(8, 8, 3, padding=1)
        self.tree = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mixed(F.relu(self.conv(F.relu(self.stem(x))))))
        x = F.relu(self.tree(x))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def main(folder: Path) -> None:
    """Everything that the test compares."""
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    x = torch.randn(256, 2, 6, 6)
    y = (x.mean((1, 2, 3)) * 20).round().long().clamp(-2, 1) + 2
    dense = Net()
    recipe = {
        "conv": PQ(v=9, k=8),
        "mixed": PQ(v=3, k=8, centroids="average"),
        "tree": PQ(v=9, k=8, encoder="tree"),
        "fc": PQ(v=4, k=8, gradient="soft"),
    }
    share = x[rank::processes]
    model, report = convert(dense, recipe, share.split(16), rows=10**6, seed=3)
    result: dict[str, Any] = {"converted": {k: v.clone() for k, v in model.state_dict().items()}}
    result["errors"] = [layer.error for layer in report.replaced]
    result["used"] = [layer.used for layer in report.replaced]

    # k-means where process 0 has fewer samples than there are centroids
    line = torch.arange(40.0).view(1, 40, 1)
    mine = line if processes == 1 else (line[:, :3], line[:, 3:])[rank]
    result["line"], result["line_counts"] = kmeans(mine, 8, seed=1)

    start = folder.parent / "start.pt"  # the same in every run
    if start.exists():
        model.load_state_dict(torch.load(start, weights_only=True))
    else:
        torch.save(model.state_dict(), start)
    data = DataLoader(
        TensorDataset(x[:128], y[:128]), batch_size=GLOBAL_BATCH // processes, shuffle=True
    )
    run = finetune(
        model,
        data,
        steps=STEPS,
        lr=2e-3,
        teacher=dense,
        distillation=0.5,
        evaluate=lambda m: float((m(x).argmax(1) == y).float().mean()),
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every=2,
        seed=1,
    )
    result["trained"] = model.state_dict()
    result["history"] = run.history

    # With batch norm, and random numbers in the model: processes must agree at the end.
    torch.manual_seed(5)
    norm = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 4)
    )
    finetune(norm, data, steps=3, batch_norm_batches=2, seed=1)
    result["norm"] = norm.state_dict()
    torch.save(result, folder / f"rank-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

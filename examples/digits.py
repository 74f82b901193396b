"""The main job on a data set that comes with scikit-learn: 1,797 handwritten digits of 8x8 pixels.

Trains a small CNN, turns it into lookups, fine-tunes it, writes one file, and runs that file in a
second process in which PyTorch cannot be imported. With `--report` it then lets lutra look for a
recipe by itself, and writes a page about what was found.

    python examples/digits.py [--output digits.lutra] [--report report.html] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lutra
from lutra.train import PQ, Budget, Keep, convert, export, finetune, optimize

RECIPE = {"conv1": Keep("the first layer sees raw pixels"), "conv*": PQ(v=9, k=16)}
SAMPLES, SEARCH_MINUTES = 512, 0.25


class DigitsNet(nn.Module):
    """Four 3x3 convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.max_pool2d(x, 2)
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        return self.fc(x.mean((2, 3)))


def load(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels (a fifth, stratified)."""
    images, labels = load_digits(return_X_y=True)
    x = (images.reshape(-1, 1, 8, 8) / 16.0).astype(np.float32)
    split = train_test_split(x, labels, test_size=0.2, random_state=seed, stratify=labels)
    x_train, x_test, y_train, y_test = (torch.from_numpy(np.ascontiguousarray(a)) for a in split)
    return x_train, y_train, x_test, y_test


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Top-1 in percent."""
    model.eval()
    return 100.0 * float((model(x).argmax(1) == y).float().mean())


@torch.no_grad()
def milliseconds(model: nn.Module, x: Tensor) -> float:
    """Median time of one image, one thread."""
    model.eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for image in x[:200].split(1):
        start = time.perf_counter()
        model(image)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 1e3 * float(np.median(times))


def run_without_torch(file: Path, x: Tensor, y: Tensor) -> dict[str, float | str]:
    """Runs examples/digits_engine.py, which forbids torch, and returns what it prints."""
    script = Path(__file__).with_name("digits_engine.py")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "test.npz"
        np.savez(data, x=x.numpy(), y=y.numpy())
        done = subprocess.run(
            [sys.executable, str(script), str(file), str(data)], capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(f"the engine process failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("digits.lutra"))
    parser.add_argument("--report", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console()
    torch.manual_seed(options.seed)
    x, y, x_test, y_test = load(options.seed)
    data = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True, drop_last=True)

    console.print(f"[bold]1/5[/] training a CNN on {len(x)} digits")
    dense = DigitsNet()
    finetune(dense, data, epochs=15, lr=3e-3, seed=options.seed)
    dense_accuracy = accuracy(dense, x_test, y_test)

    console.print("[bold]2/5[/] converting its convolutions to lookups")
    model, report = convert(dense, RECIPE, x.split(128), seed=options.seed)
    console.print(str(report), highlight=False, soft_wrap=True)
    converted_accuracy = accuracy(model, x_test, y_test)

    console.print("[bold]3/5[/] fine-tuning, with the CNN as teacher")
    finetune(model, data, epochs=25, lr=2e-3, teacher=dense, distillation=0.5,
             batch_norm_batches=20, seed=options.seed)  # fmt: skip
    tuned_accuracy = accuracy(model, x_test, y_test)

    console.print(f"[bold]4/5[/] exporting to {options.output}")
    graph = export(model, options.output, x_test[:4], metadata={"seed": options.seed})

    console.print("[bold]5/5[/] running the file in a process without PyTorch\n")
    engine = run_without_torch(options.output, x_test, y_test)

    cost = graph.total_cost()
    table = Table(title=f"handwritten digits, {len(x_test)} test images, one thread")
    table.add_column("")
    table.add_column("dense (PyTorch)", justify="right")
    table.add_column("lookups (lutra)", justify="right")
    table.add_row("accuracy, converted only", "", f"{converted_accuracy:.1f} %")
    table.add_row("accuracy, PyTorch", f"{dense_accuracy:.1f} %", f"{tuned_accuracy:.1f} %")
    table.add_row("accuracy, engine", "", f"{engine['accuracy']:.1f} %")
    weights = sum(p.numel() * 4 for p in dense.parameters())
    table.add_row("bytes on disk", f"{weights:,}", f"{options.output.stat().st_size:,}")
    table.add_row("multiplications per image", f"{cost.dense_macs + cost.macs:,}",
                  f"{cost.macs + cost.encode_ops:,}")  # fmt: skip
    table.add_row("table reads per image", "0", f"{cost.lookups:,}")
    table.add_row("ms per image", f"{milliseconds(dense, x_test):.3f}",
                  f"{engine['milliseconds']:.3f}")  # fmt: skip
    console.print(table)
    console.print(f"engine: {engine['session']}, lutra {lutra.__version__}", highlight=False)

    if options.report is not None:
        console.print("\n[bold]and by itself:[/] the fastest recipe that loses at most one point")
        # Without labels: what counts is how often the file says what the CNN says.
        study = optimize(dense, x[:SAMPLES], budget=Budget(max_drop=1.0, minutes=SEARCH_MINUTES))
        console.print(str(study), highlight=False, soft_wrap=True)
        study.save_report(options.report, "handwritten digits")
        console.print(f"wrote {options.report}")


if __name__ == "__main__":
    main()

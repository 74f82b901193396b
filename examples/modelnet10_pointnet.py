"""ModelNet10 PointNet: point clouds with every inner layer a learned lookup table.

    python examples/modelnet10_pointnet.py --data DATA \
        --output zoo/pointnet_modelnet10_lookup4.lutra --checkpoints runs/pointnet

DATA is a folder with modelnet10_*.npy.xz; `--synthetic N` takes N made-up shapes instead. Three
trainings: the float network; its lookup form, with the float network as teacher; and the float
network again for as long as the lookup form, so that the comparison is fair. The run can be stopped
at any time: the same command goes on from the last checkpoint.

A tenth of the training objects is held out for validation: every choice is made on them. The test
objects are used once, at the end, through the engine. Clouds to measure with are drawn once, from
the seed.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import points as data
import torch
import torch.nn.functional as F
from tasks import Log, add_data, add_training, as_batch, finish, lookup_method, stage, steady
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lutra
from lutra.train import Int8, convert, export, finetune, recipe_to_json


class PointNet(nn.Module):
    """The same small network for every point, the largest value over the points, a classifier.

    Takes (N, 3, P, 1): the points are pixels, and what is shared by them is 1x1 convolutions
    (Qi et al. 2017, without the transformation networks).
    """

    def __init__(
        self,
        classes: int,
        widths: tuple[int, ...] = (64, 64, 64, 128, 1024),
        hidden: tuple[int, ...] = (512, 256),
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        sizes = (3, *widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 1, bias=False) for a, b in zip(sizes, widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths)
        sizes = (widths[-1], *hidden)
        self.linears = nn.ModuleList(
            nn.Linear(a, b, bias=False) for a, b in zip(sizes, hidden, strict=False)
        )
        self.linear_norms = nn.ModuleList(nn.BatchNorm1d(b) for b in hidden)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        x = F.adaptive_max_pool2d(x, 1).flatten(1)
        for linear, norm in zip(self.linears, self.linear_norms, strict=True):
            x = F.relu(norm(linear(x)))
        return self.classifier(self.dropout(x))


@torch.no_grad()
def accuracy(model: nn.Module, x: np.ndarray, y: np.ndarray) -> float:
    """Top-1 in percent."""
    model.eval()
    device = next(model.parameters()).device
    parts = [model(part.to(device)).argmax(1).cpu() for part in torch.from_numpy(x).split(64)]
    return 100.0 * float((torch.cat(parts).numpy() == y).mean())


def engine_accuracy(file: Path, x: np.ndarray, y: np.ndarray) -> float:
    """Top-1 in percent of the exported file."""
    session = lutra.Session(file)
    parts = [session(x[i : i + 64]).argmax(1) for i in range(0, len(x), 64)]
    return 100.0 * float((np.concatenate(parts) == y).mean())


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with a tenth of the weight on all classes."""
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data(parser, "folder with modelnet10_*.npy.xz")
    parser.add_argument("--synthetic", type=int, metavar="N", help="N made-up shapes, no --data")
    add_training(parser, "pointnet_modelnet10_lookup4.lutra")
    parser.add_argument("--points", type=int, default=512)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 64, 64, 128, 512])
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 128])
    parser.add_argument("--degrees", type=float, default=0.0, help="of random rotation")
    parser.add_argument("--mirror", action="store_true", help="mirror horizontal axes at random")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--float-epochs", type=float, default=30, help="of the first training")
    parser.add_argument("--float-lr", type=float, default=2e-3)
    parser.add_argument("--epochs", type=float, default=20, help="of each of the others")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--distillation", type=float, default=0.7, help="weight of the teacher")
    parser.add_argument("--stop-after", choices=("float", "lookup"), help="for trials")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    if options.synthetic:
        classes = data.SHAPES
        everything, tests = data.load_synthetic(options.synthetic, options.seed)
    elif options.data is None:
        raise SystemExit("give --data FOLDER, or --synthetic N")
    else:
        classes = data.CLASSES
        everything, tests = data.load_modelnet10(options.data)
    used, held_out = data.split(everything, 0.1, options.seed)
    x, y = data.fixed(held_out, options.points, options.seed)
    print(f"{len(used)} objects to train with, {len(held_out)} held out, {len(tests)} to test")
    loader = DataLoader(
        data.Augmented(used, options.points, degrees=options.degrees, mirror=options.mirror),
        batch_size=options.batch, shuffle=True, drop_last=True, collate_fn=as_batch,
    )  # fmt: skip
    every = max(1, len(loader))
    common = {
        "evaluate_every": 2 * every, "checkpoint_every": every, "batch_norm_batches": 50,
        "mixed_precision": options.mixed_precision, "seed": options.seed, "loss": smoothed,
        "clip_norm": options.clip_norm,
    }  # fmt: skip

    def log(name: str) -> Log:
        return Log(name, lambda model: accuracy(model, x, y), "%")

    torch.manual_seed(options.seed)
    dense = PointNet(len(classes), tuple(options.widths), tuple(options.hidden))
    dense = dense.to(memory_format=torch.channels_last)
    finetune(
        dense, loader, epochs=options.float_epochs, lr=options.float_lr, warmup=every,
        checkpoint_dir=stage(options.checkpoints, "float"), evaluate=log("float"), **common,
    )  # fmt: skip
    dense.eval()
    metrics = {"float_validation": accuracy(dense, x, y)}
    print(f"float network: {metrics['float_validation']:.2f} %", flush=True)
    if options.stop_after == "float":
        return

    method = lookup_method(options.bits, options.rank)
    recipe = {"convs.0": Int8(), "classifier": Int8(), "convs.*": method, "linears.*": method}
    calibration = [torch.from_numpy(part) for part in np.array_split(
        data.fixed(used.subset(np.arange(min(512, len(used)))), options.points, options.seed)[0], 8
    )]  # fmt: skip
    model, report = convert(dense, recipe, calibration, seed=options.seed)
    print(report, flush=True)
    print(f"converted, before fine-tuning: {accuracy(model, x, y):.2f} %", flush=True)
    run = finetune(
        model, loader, epochs=options.epochs, lr=options.lr, warmup=min(100, every),
        teacher=dense, distillation=options.distillation,
        checkpoint_dir=stage(options.checkpoints, f"lookup{options.bits}"),
        evaluate=log(f"lookup {options.bits} bits"), **common, **steady(options),
    )  # fmt: skip
    metrics["lookup_validation"] = accuracy(model, x, y)
    if options.stop_after == "lookup":
        return

    longer = copy.deepcopy(dense)
    finetune(
        longer, loader, epochs=options.epochs, lr=options.lr, warmup=min(100, every),
        checkpoint_dir=stage(options.checkpoints, "float_longer"), evaluate=log("float, longer"),
        **common,
    )  # fmt: skip
    metrics["float_longer_validation"] = accuracy(longer, x, y)

    metadata = {
        "recipe": recipe_to_json(recipe),
        "seed": options.seed,
        "training": {
            "float_epochs": options.float_epochs, "float_lr": options.float_lr,
            "epochs": options.epochs, "steps": run.steps, "batch": options.batch,
            "lr": options.lr, "distillation": options.distillation, "points": options.points,
            "mixed_precision": options.mixed_precision,
        },
        "metrics": metrics,
        "classes": list(classes),
    }  # fmt: skip
    example = torch.from_numpy(x[:1])
    export(model, options.output, example, metadata=metadata, dynamic_axes=(0, 2))
    x_test, y_test = data.fixed(tests, options.points, options.seed)
    result = {
        **metrics,
        "engine_validation": engine_accuracy(options.output, x, y),
        "float_test": accuracy(dense, x_test, y_test),
        "float_longer_test": accuracy(longer, x_test, y_test),
        "engine_test": engine_accuracy(options.output, x_test, y_test),
        "test_objects": len(tests),
        "steps": run.steps,
    }
    finish(options.output, result)


if __name__ == "__main__":
    main()

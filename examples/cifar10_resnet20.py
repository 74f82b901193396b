"""CIFAR-10 ResNet-20: every 3x3 convolution but the first becomes lookups (LUT-NN, V=9, K=16).

    python examples/cifar10_resnet20.py --data DATA --weights cifar10_resnet20.npz \
        --output zoo/resnet20_cifar10.lutra --checkpoints runs/resnet20

DATA is the official cifar-10-python.tar.gz, or a folder with cifar10_*.npy.xz. The run can be
stopped at any time: the same command goes on from the last checkpoint. Under `torchrun` it trains
on several devices. With `--encoder tree` codes come from decision trees, which is faster and less
accurate.

5,000 training images are held out for validation: every choice is made on them. (The public
checkpoint was trained on all 50,000, so validation accuracy is optimistic.) The test images are
used once, at the end, through the engine.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from cifar10 import CLASSES, MEAN, STD, Augmented, ResNet, collate, load_checkpoint, load_images
from cifar10 import normalize as to_tensor
from torch import nn
from torch.utils.data import DataLoader

import lutra
from lutra.preprocess import ImagePreprocess
from lutra.train import PQ, convert, export, finetune, recipe_to_json

BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]


@torch.no_grad()
def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 in percent."""
    model.eval()
    device = next(model.parameters()).device
    correct = 0
    for i in range(0, len(images), 250):
        x = to_tensor(images[i : i + 250]).contiguous(memory_format=torch.channels_last)
        answer = model(x.to(device)).argmax(1).cpu().numpy()
        correct += int((answer == labels[i : i + 250]).sum())
    return 100.0 * correct / len(images)


def engine_accuracy(file: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 in percent of the exported file."""
    session = lutra.Session(file)
    correct = 0
    for i in range(0, len(images), 250):
        x = to_tensor(images[i : i + 250]).contiguous().numpy()
        correct += int((session(x).argmax(1) == labels[i : i + 250]).sum())
    return 100.0 * correct / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="the dense checkpoint, .npz")
    parser.add_argument("--output", type=Path, default=Path("resnet20_cifar10.lutra"))
    parser.add_argument("--checkpoints", type=Path, help="folder; enables stop and resume")
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--v", type=int, default=9)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--encoder", default="nearest", choices=("nearest", "tree"))
    parser.add_argument("--feature-weight", type=float, default=1.0)
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use only this many training images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    x, y, x_test, y_test = load_images(options.data)
    order = np.random.default_rng(options.seed).permutation(len(x))
    held_out, used = order[:5000], order[5000:][: options.limit]
    dense = ResNet()
    load_checkpoint(dense, options.weights)
    dense = dense.eval().to(memory_format=torch.channels_last)

    recipe = {"layer*.conv*": PQ(v=options.v, k=options.k, encoder=options.encoder)}
    calibration = [to_tensor(x[i]) for i in np.array_split(used[:1024], 8)]
    model, report = convert(dense, recipe, calibration, seed=options.seed)
    print(report, flush=True)
    before = accuracy(model, x[held_out], y[held_out])
    print(f"converted, before fine-tuning: {before:.2f} % of the validation images", flush=True)

    start = time.perf_counter()
    data = DataLoader(
        Augmented(x[used], y[used]),
        batch_size=options.batch,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
    )

    def validate(current: nn.Module) -> float:
        top1 = accuracy(current, x[held_out], y[held_out])
        hours = (time.perf_counter() - start) / 3600
        print(f"validation {top1:.2f} %, {hours:.2f} h in this process", flush=True)
        return top1

    run = finetune(
        model, data, epochs=options.epochs, lr=options.lr, warmup=100,
        teacher=dense, distillation=1.0, feature_layers=BLOCKS,
        feature_weight=options.feature_weight,
        evaluate=validate, evaluate_every=max(1, len(data)), batch_norm_batches=100,
        checkpoint_dir=options.checkpoints, checkpoint_every=max(1, len(data) // 2),
        mixed_precision=options.mixed_precision, seed=options.seed,
    )  # fmt: skip

    metadata = {
        "recipe": recipe_to_json(recipe),
        "seed": options.seed,
        "training": {"epochs": options.epochs, "steps": run.steps, "batch": options.batch,
                     "lr": options.lr, "feature_weight": options.feature_weight,
                     "mixed_precision": options.mixed_precision},
        "classes": list(CLASSES),
        "preprocess": ImagePreprocess(
            layout="NCHW", range=(0.0, 1.0), mean=MEAN, std=STD
        ).to_dict(),
    }  # fmt: skip
    example = to_tensor(x[held_out[:4]]).contiguous()
    export(model, options.output, example, metadata=metadata)
    result = {
        "dense_test": accuracy(dense.cpu(), x_test, y_test),
        "engine_validation": engine_accuracy(options.output, x[held_out], y[held_out]),
        "engine_test": engine_accuracy(options.output, x_test, y_test),
        "test_images": len(x_test),
        "bytes": options.output.stat().st_size,
        "steps": run.steps,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

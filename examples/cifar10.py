"""CIFAR-10 for the examples: images, augmentation, networks, and the way from network to file."""

from __future__ import annotations

import argparse
import copy
import pickle
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from packed import undo_median
from tasks import Log, add_data, add_training, finish, lookup_method, stage, steady
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lutra
from lutra.preprocess.image import ImagePreprocess
from lutra.train import PQ, Lookup, convert, export, finetune, recipe_to_json
from lutra.train.recipe import Recipe

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the public checkpoint
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


class Block(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.added = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return F.relu(y + x)


class ResNet(nn.Module):
    """ResNet for 32x32 images (He et al. 2015, 4.2) of depth 6 n + 2: n = 3 is ResNet-20."""

    def __init__(self, n: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for number, outputs in enumerate((16, 32, 64), start=1):
            blocks = []
            for i in range(n):
                blocks.append(Block(channels, outputs, 2 if i == 0 and number > 1 else 1))
                channels = outputs
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class VGG(nn.Module):
    """VGG-small: three pairs of 3x3 convolutions, each pair twice as wide, and a classifier."""

    def __init__(self, width: int = 128, classes: int = 10) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False)
            for a, b in zip([3, *widths], widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths)
        self.classifier = nn.Linear(widths[-1] * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(x)
            if i % 2:
                x = F.max_pool2d(x, 2)
            x = F.relu(norm(x))
        return self.classifier(x.flatten(1))


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Loads arrays of an .npz by name; extra counters are left alone."""
    with np.load(path, allow_pickle=False) as arrays:
        state = {k.removeprefix("module."): torch.from_numpy(arrays[k]) for k in arrays.files}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise SystemExit(f"{path}: missing {missing}, unexpected {unexpected}")


def _from_archive(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The official cifar-10-python.tar.gz (Python pickles: open only the archive you trust)."""
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            leaf = Path(member.name).name
            if leaf.startswith("data_batch_") or leaf == "test_batch":
                file = archive.extractfile(member)
                assert file is not None
                batch = pickle.load(file, encoding="latin1")
                images = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                parts[leaf] = images, np.array(batch["labels"], np.int64)
    train = [parts[f"data_batch_{i}"] for i in range(1, 6)]
    x, y = (np.concatenate(a) for a in zip(*train, strict=True))
    x_test, y_test = parts["test_batch"]
    return np.ascontiguousarray(x), y, np.ascontiguousarray(x_test), y_test


def load_test_images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Test images uint8 (N, 32, 32, 3) and labels int64 of a folder of cifar10_*.npy.xz files."""
    with np.load(folder / "cifar10_labels.npz", allow_pickle=False) as labels:
        y = labels["test"].astype(np.int64)
    return undo_median(folder / "cifar10_test.npy.xz"), y


def load_images(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, test images and labels: uint8 (N, 32, 32, 3) and int64.

    Args:
        data: the official cifar-10-python.tar.gz, or a folder of cifar10_*.npy.xz files.
    """
    if data.is_file():
        return _from_archive(data)
    train = [undo_median(data / f"cifar10_train_{part}.npy.xz") for part in "ab"]
    with np.load(data / "cifar10_labels.npz", allow_pickle=False) as labels:
        y = labels["train"].astype(np.int64)
    return np.concatenate(train), y, *load_test_images(data)


def normalize(images: np.ndarray) -> Tensor:
    """float32 (N, 3, 32, 32) of uint8 (N, 32, 32, 3)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    return x.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


class Augmented(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Random crop with 4 pixels of padding, and random flip; fetches whole batches at once."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
        self.images, self.labels = torch.from_numpy(padded), torch.from_numpy(labels)
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        self.mean, self.step = mean * 255, 1 / (std * 255)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([i])[0]
        return x, y

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        index = torch.tensor(indices)
        count = len(index)
        top, left = torch.randint(9, (2, count))
        columns = left[:, None] + torch.arange(32)
        flip = torch.rand(count) < 0.5
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        rows = top[:, None] + torch.arange(32)
        x = self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        x = ((x.float() - self.mean) * self.step).permute(0, 3, 1, 2)  # channels last in memory
        return list(zip(x, self.labels[index], strict=True))


def collate(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stacks images channels-last, which PyTorch's CPU convolutions like best."""
    x, y = zip(*batch, strict=True)
    return torch.stack([i.permute(1, 2, 0) for i in x]).permute(0, 3, 1, 2), torch.stack(y)


# From network to file


class Data(NamedTuple):
    """Images uint8 (N, 32, 32, 3) and labels int64 to train with, to choose by, to test with."""

    x: np.ndarray
    y: np.ndarray
    x_valid: np.ndarray
    y_valid: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def loader(self, batch: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """Augmented training images."""
        return DataLoader(
            Augmented(self.x, self.y),
            batch_size=batch, shuffle=True, drop_last=True, collate_fn=collate,
        )  # fmt: skip


def load_data(options: argparse.Namespace) -> Data:
    """All images, 5,000 of the training images held out; `options` of `add_arguments`."""
    if options.data is None:
        raise SystemExit("give --data cifar-10-python.tar.gz, or a folder of cifar10_*.npy.xz")
    x, y, x_test, y_test = load_images(options.data)
    order = np.random.default_rng(options.seed).permutation(len(x))
    held_out, used = order[:5000], order[5000:][: options.limit]
    return Data(x[used], y[used], x[held_out], y[held_out], x_test, y_test)


def add_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Adds the arguments that the CIFAR-10 examples share."""
    add_data(parser, "cifar-10-python.tar.gz, or a folder with cifar10_*.npy.xz")
    add_training(parser, output)
    parser.add_argument("--method", default="pq", choices=("pq", "lookup"))
    parser.add_argument(
        "--epochs", type=float, default=40, help="of fine-tuning; default: 40; 0: none"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--v", type=int, default=9, help="PQ: values of a sub-vector")
    parser.add_argument("--k", type=int, default=16, help="PQ: centroids of a codebook")
    parser.add_argument("--encoder", default="nearest", choices=("nearest", "tree"), help="PQ")
    parser.add_argument(
        "--group", default="patch", choices=("patch", "row", "pixel"), help="PQ: what codes are of"
    )
    parser.add_argument(
        "--free-tables", action="store_true", help="PQ: train more than products in the tables"
    )
    parser.add_argument("--distillation", type=float, default=1.0, help="weight of the teacher")
    parser.add_argument("--feature-weight", type=float, default=1.0)
    parser.add_argument("--limit", type=int, help="use only this many training images")
    parser.add_argument(
        "--dense-too", action="store_true", help="train the dense network for as long as well"
    )


def method_of(options: argparse.Namespace) -> PQ | Lookup:
    """The method that the options ask for."""
    if options.method == "lookup":
        return lookup_method(options.bits, options.rank)
    return PQ(
        v=options.v, k=options.k, encoder=options.encoder, group=options.group,
        free_tables=True if options.free_tables else None,
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 in percent."""
    model.eval()
    device = next(model.parameters()).device
    correct = 0
    for i in range(0, len(images), 250):
        x = normalize(images[i : i + 250]).contiguous(memory_format=torch.channels_last)
        answer = model(x.to(device)).argmax(1).cpu().numpy()
        correct += int((answer == labels[i : i + 250]).sum())
    return 100.0 * correct / len(images)


def engine_accuracy(file: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 in percent of the exported file."""
    session = lutra.Session(file)
    correct = 0
    for i in range(0, len(images), 250):
        x = normalize(images[i : i + 250]).contiguous().numpy()
        correct += int((session(x).argmax(1) == labels[i : i + 250]).sum())
    return 100.0 * correct / len(images)


def compress(
    dense: nn.Module,
    recipe: Recipe,
    data: Data,
    options: argparse.Namespace,
    *,
    feature_layers: list[str],
    teacher: nn.Module | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Converts a trained network, fine-tunes it, writes the file and measures it.

    Args:
        dense: the network.
        recipe: of the conversion.
        data: of `load_data`.
        options: of `add_arguments`.
        feature_layers: inner layers whose outputs are distilled.
        teacher: the network to learn from; by default `dense`.
        metadata: more entries for the file.
    """
    calibration = [normalize(part) for part in np.array_split(data.x[:1024], 8)]
    model, report = convert(dense, recipe, calibration, seed=options.seed)
    print(report, flush=True)
    before = accuracy(model, data.x_valid, data.y_valid)
    print(f"converted, before fine-tuning: {before:.2f} % of the validation images", flush=True)
    loader = data.loader(options.batch)
    every = max(1, len(loader))
    clip_norm = options.clip_norm
    settings = {
        "epochs": options.epochs, "lr": options.lr, "warmup": 100, "clip_norm": clip_norm,
        "evaluate_every": every, "checkpoint_every": max(1, every // 2),
        "mixed_precision": options.mixed_precision, "seed": options.seed,
    }  # fmt: skip

    folder = options.checkpoints
    if options.method == "lookup":
        folder = stage(folder, f"lookup{options.bits}")

    def log(name: str) -> Log:
        return Log(name, lambda current: accuracy(current, data.x_valid, data.y_valid), "%")

    steps = 0
    if options.epochs:
        run = finetune(
            model, loader, teacher=teacher or dense, distillation=options.distillation,
            feature_layers=feature_layers, feature_weight=options.feature_weight,
            batch_norm_batches=100, checkpoint_dir=folder, evaluate=log(options.method),
            **settings, **steady(options),
        )  # fmt: skip
        steps = run.steps
    metrics = {
        "dense_validation": accuracy(dense, data.x_valid, data.y_valid),
        "validation": accuracy(model, data.x_valid, data.y_valid),
    }
    results: dict[str, Any] = {"dense_test": accuracy(dense.cpu(), data.x_test, data.y_test)}
    if options.dense_too:
        longer = copy.deepcopy(dense)
        finetune(
            longer, loader, checkpoint_dir=stage(options.checkpoints, "dense_too"),
            evaluate=log("dense, longer"), **settings,
        )  # fmt: skip
        metrics["dense_longer_validation"] = accuracy(longer, data.x_valid, data.y_valid)
        results["dense_longer_test"] = accuracy(longer.cpu(), data.x_test, data.y_test)
    entries = {
        "recipe": recipe_to_json(recipe),
        "seed": options.seed,
        "training": {"epochs": options.epochs, "steps": steps, "batch": options.batch,
                     "lr": options.lr, "distillation": options.distillation,
                     "feature_weight": options.feature_weight, "clip_norm": clip_norm,
                     "mixed_precision": options.mixed_precision, **steady(options)},
        "metrics": metrics,
        "classes": list(CLASSES),
        "preprocess": ImagePreprocess(
            layout="NCHW", range=(0.0, 1.0), mean=MEAN, std=STD
        ).to_dict(),
        **(metadata or {}),
    }  # fmt: skip
    example = normalize(data.x_valid[:1]).contiguous()  # stays in the file
    export(model, options.output, example, metadata=entries)
    results |= {
        **metrics,
        "engine_validation": engine_accuracy(options.output, data.x_valid, data.y_valid),
        "engine_test": engine_accuracy(options.output, data.x_test, data.y_test),
        "test_images": len(data.x_test),
        "steps": steps,
    }
    finish(options.output, results)

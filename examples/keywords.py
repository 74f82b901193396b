"""Keyword spotting: sound in, one of twelve words out, the network by table lookup.

    python examples/keywords.py --net dscnn --data DATA --weights mlperf_dscnn_kws_fp32.npz \
        --output zoo/dscnn_speech_commands.lutra --checkpoints runs/dscnn --compact
    python examples/keywords.py --net resnet --data DATA \
        --output zoo/resnet_speech_commands.lutra --checkpoints runs/resnet

DATA is a folder with speechcmd_*.npy.xz, speechcmd_*_meta.npz and, for the DS-CNN,
kws01_mfcc_int8.npz. The run can be stopped at any time: the same command goes on from the last
checkpoint.

`--net dscnn` is the public network of MLPerf Tiny: its pointwise convolutions become lookups
(product quantisation), the depthwise ones and the classifier int8; the first layer, which sees the
MFCCs, stays as it is. The dense network is the teacher; the training inputs are MFCCs made from
log-mel features of the training clips, and the true ones of those of the public test inputs whose
recordings are training clips. So only the 173 public inputs whose recordings are test clips are a
test. The accuracy on all 900, and on made-up MFCCs of all test clips, is printed beside it.

`--net resnet` is a ResNet-8 on log-mel features, trained here from scratch, then converted and
fine-tuned with itself as the teacher.

A tenth of the training speakers is held out for validation: every choice is made on them. The test
clips are used once, at the end, through the engine.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import speech as data
import torch
import torch.nn.functional as F
from tasks import Log, add_data, add_training, as_batch, finish, milliseconds, stage, steady
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lutra
from lutra.preprocess.audio import AudioPreprocess
from lutra.train import PQ, Int8, Keep, convert, export, finetune, recipe_to_json
from lutra.train.recipe import Recipe

# Networks


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-8 on log-mel features (N, 1, 49, 40)."""

    def __init__(
        self, widths: tuple[int, ...] = (32, 48, 64), classes: int = 12, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, widths[0], 5, 2, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.blocks = nn.ModuleList(
            Block(a, b, 2 if i else 1)
            for i, (a, b) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for block in self.blocks:
            x = block(x)
        return self.linear(self.dropout(x.mean((2, 3))))


class Separable(nn.Module):
    """A depthwise 3x3 and a pointwise convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pointwise(F.relu(self.depthwise(x))))


class DSCNN(nn.Module):
    """The DS-CNN of MLPerf Tiny (Zhang et al. 2017) on MFCCs over `std`, (N, 1, 49, 10).

    Its batch norms are folded into the convolutions: their statistics, which are not those of the
    clips at hand, stay. TensorFlow pads 49x10 pixels under a kernel of 10x4 and a stride of 2 by 4
    rows above and 5 below.
    """

    def __init__(self, std: float = 1.0, channels: int = 64, classes: int = 12) -> None:
        super().__init__()
        self.std = std
        self.conv1 = nn.Conv2d(1, channels, (10, 4), 2)
        self.blocks = nn.ModuleList(Separable(channels) for _ in range(4))
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(F.pad(x, (1, 1, 4, 5))))
        for block in self.blocks:
            x = block(x)
        return self.linear(x.mean((2, 3)))


def load_public(model: DSCNN, path: Path) -> None:
    """Loads the public weights: TensorFlow's names and layouts, .npz."""
    with np.load(path, allow_pickle=False) as arrays:
        weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    def load(layer: nn.Conv2d, number: int, kernel: str, order: tuple[int, ...]) -> None:
        """A convolution and the batch norm behind it."""
        norm = {
            name: weights[f"l{number + 1:02}.{name}"]
            for name in ("gamma", "beta", "moving_mean", "moving_variance")
        }
        scale = norm["gamma"] / (norm["moving_variance"] + 1e-3).sqrt()
        weight = weights[f"l{number:02}.{kernel}"].permute(order)
        layer.weight.data.copy_(weight * scale[:, None, None, None])
        assert layer.bias is not None
        bias = weights[f"l{number:02}.bias"] - norm["moving_mean"]
        layer.bias.data.copy_(bias * scale + norm["beta"])

    load(model.conv1, 0, "kernel", (3, 2, 0, 1))
    model.conv1.weight.data *= model.std
    for i, block in enumerate(model.blocks):
        load(block.depthwise, 4 * i + 2, "depthwise_kernel", (2, 3, 0, 1))
        load(block.pointwise, 4 * i + 4, "kernel", (3, 2, 0, 1))
    model.linear.weight.data.copy_(weights["l18.kernel"].t())
    model.linear.bias.data.copy_(weights["l18.bias"])


# Tasks


@dataclass(frozen=True)
class Part:
    """Inputs float32 (N, 1, frames, width) and labels int64 (N) to measure with."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Task:
    """A network and its data: a training set, parts to measure with by name, a front end."""

    dense: nn.Module
    train: Dataset[tuple[Tensor, Tensor]]
    calibration: np.ndarray
    valid: Part
    tests: dict[str, Part]
    front: AudioPreprocess
    classes: tuple[str, ...]
    recipe: Recipe
    features: list[str]
    notes: dict[str, Any]


def resnet_task(options: argparse.Namespace) -> Task:
    """The ResNet: nothing but clips of Speech Commands."""
    everything, tests = load_clips(options)
    used, valid = data.split(everything, 0.1, options.seed)
    print(f"{len(used)} clips to train with, {len(valid)} held out, {len(tests)} to test")
    torch.manual_seed(options.seed)
    return Task(
        dense=ResNet(tuple(options.widths)),
        train=data.Augmented(used),
        calibration=data.LOG_MEL.values(used.x[:1024]),
        valid=Part(data.LOG_MEL.values(valid.x), valid.y),
        tests={"test": Part(data.LOG_MEL.values(tests.x), tests.y)},
        front=data.LOG_MEL,
        classes=data.CLASSES,
        recipe={
            "conv1": Int8(),
            "linear": Int8(),
            "*.shortcut.*": Int8(),
            "*": codes_of_pixels(options),
        },
        features=[f"blocks.{i}" for i in range(len(options.widths))],
        notes={"train_clips": len(used)},
    )


def dscnn_task(options: argparse.Namespace) -> Task:
    """The public DS-CNN: true MFCCs of some clips, and made-up ones of all."""
    if options.weights is None:
        raise SystemExit("--net dscnn needs --weights mlperf_dscnn_kws_fp32.npz")
    everything, spoken = load_clips(options)
    kws = load_inputs(options)
    out = data.held_out(everything, 0.1, options.seed)
    known = kws.row >= 0
    rows = np.flatnonzero(known & ~out[kws.row])
    kept = np.flatnonzero(known & out[kws.row])
    true = torch.from_numpy(data.level_values(kws.x[rows], data.MFCC))
    log_mel = torch.from_numpy(data.level_values(everything.x, data.LOG_MEL))
    mapping = data.MfccMap(log_mel[torch.from_numpy(kws.row[rows])], true)
    used, valid = everything.subset(np.flatnonzero(~out)), everything.subset(np.flatnonzero(out))

    def made(clips: data.Clips) -> np.ndarray:
        values = torch.from_numpy(data.level_values(clips.x, data.LOG_MEL))
        return data.normalized(mapping(values), data.MFCC).numpy()

    x = data.MFCC.values(kws.x)
    tests = np.flatnonzero(kws.test)
    print(
        f"{len(rows)} public inputs and {len(used)} clips to train with, {len(kept)} and "
        f"{len(valid)} held out, {len(tests)} public inputs to test"
    )
    dense = DSCNN(data.MFCC.std)
    load_public(dense, options.weights)
    return Task(
        dense=dense,
        train=data.AugmentedMfcc(used, mapping, kws, rows),
        calibration=np.concatenate([x[rows], made(used.subset(np.arange(min(300, len(used)))))]),
        valid=Part(
            np.concatenate([x[kept], made(valid)]),
            np.concatenate([kws.y[kept], kws.numbers[valid.y]]),
        ),
        tests={
            "test": Part(x[tests], kws.y[tests]),
            "all": Part(x, kws.y),
            "made_up": Part(made(spoken), kws.numbers[spoken.y]),
        },
        front=data.MFCC,
        classes=kws.classes,
        recipe={
            "conv1": FIRST[options.first],
            "linear": Int8(),
            "blocks.*.depthwise": Int8(),
            "blocks.*.pointwise": codes_of_pixels(options),
        },
        features=[f"blocks.{i}" for i in range(4)],
        notes={"train_inputs": len(rows), "train_clips": len(used)},
    )


#: What becomes of the first layer of the DS-CNN. Its inputs are coefficients of very different
#: sizes under one grid.
FIRST = {"keep": Keep(), "int8": Int8(), "pq": PQ(v=4, k=16, act_bits=7)}

TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "resnet": resnet_task,
    "dscnn": dscnn_task,
}


def codes_of_pixels(options: argparse.Namespace) -> PQ:
    """The lookups of both networks; compact tables need 8-bit weights."""
    bits = 8 if options.compact else None
    return PQ(v=options.v, k=options.k, act_bits=options.act_bits, group="pixel", weight_bits=bits)


def load_clips(options: argparse.Namespace) -> tuple[data.Clips, data.Clips]:
    """Training and test clips."""
    return data.load_speech_commands(need_data(options))


def load_inputs(options: argparse.Namespace) -> data.Kws01:
    """The public inputs."""
    return data.load_kws01(need_data(options))


def need_data(options: argparse.Namespace) -> Path:
    """The folder of the data."""
    if options.data is None:
        raise SystemExit("give --data FOLDER, with speechcmd_*.npy.xz")
    folder: Path = options.data
    return folder


# From network to file


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Top-1 in percent."""
    model.eval()
    answers = [model(x).argmax(1) for x in torch.from_numpy(part.x).split(100)]
    return 100.0 * float((torch.cat(answers).numpy() == part.y).mean())


def engine_accuracy(file: Path, part: Part) -> float:
    """Top-1 in percent of the exported file."""
    session = lutra.Session(file)
    answers = [session(part.x[i : i + 100]).argmax(1) for i in range(0, len(part.x), 100)]
    return 100.0 * float((np.concatenate(answers) == part.y).mean())


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with a tenth of the weight on all classes."""
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def speeds(dense: nn.Module, file: Path, x: np.ndarray) -> dict[str, float]:
    """Milliseconds for one clip on one thread: torch dense, engine dense, engine with lookups."""
    one = torch.from_numpy(x[:1])
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export(dense, Path(folder) / "dense.lutra", one)
        engine = lutra.Session(Path(folder) / "dense.lutra", threads=1)
        lookups = lutra.Session(file, threads=1)
        torch.set_num_threads(1)
        try:
            runs = [lambda: dense(one), lambda: engine(x[:1]), lambda: lookups(x[:1])]
            times = milliseconds(runs)
        finally:
            torch.set_num_threads(threads)
    return dict(zip(("torch_dense_ms", "engine_dense_ms", "engine_ms"), times, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", choices=sorted(TASKS), default="dscnn", help="default: dscnn")
    add_data(parser, "folder with speechcmd_*.npy.xz and kws01_mfcc_int8.npz")
    parser.add_argument("--weights", type=Path, help="dscnn: mlperf_dscnn_kws_fp32.npz")
    add_training(parser, "keywords.lutra", tables=False)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 48, 64], help="resnet")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--float-epochs", type=float, default=60, help="resnet: dense training")
    parser.add_argument("--float-lr", type=float, default=3e-3, help="resnet")
    parser.add_argument("--epochs", type=float, default=30, help="with lookups; default: 30")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--distillation", type=float, default=0.9, help="weight of the teacher")
    parser.add_argument("--feature-weight", type=float, default=1.0)
    parser.add_argument("--v", type=int, default=2, help="values of a sub-vector; default: 2")
    parser.add_argument("--k", type=int, default=16, help="centroids of a codebook")
    parser.add_argument("--act-bits", type=int, default=7)
    parser.add_argument("--first", choices=sorted(FIRST), default="keep", help="dscnn: layer 1")
    parser.add_argument(
        "--compact", action="store_true", help="weights in the file, tables when it is loaded"
    )
    parser.add_argument("--stop-after", choices=("float", "convert"), help="for trials")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = TASKS[options.net](options)
    loader = DataLoader(
        task.train, batch_size=options.batch, shuffle=True, drop_last=True, collate_fn=as_batch
    )
    every = max(1, len(loader))
    common = {
        "evaluate_every": 2 * every, "checkpoint_every": every, "batch_norm_batches": 50,
        "mixed_precision": options.mixed_precision, "seed": options.seed,
        "clip_norm": options.clip_norm,
    }  # fmt: skip

    def log(name: str) -> Log:
        return Log(name, lambda model: accuracy(model, task.valid), "%")

    dense = task.dense.to(memory_format=torch.channels_last)
    if options.net == "resnet":
        finetune(
            dense, loader, epochs=options.float_epochs, lr=options.float_lr, warmup=100,
            checkpoint_dir=stage(options.checkpoints, "float"), evaluate=log("float"), **common,
        )  # fmt: skip
    dense.eval()
    metrics = {"dense_validation": accuracy(dense, task.valid)}
    print(f"dense network: {metrics['dense_validation']:.2f} % of the held-out clips", flush=True)
    if options.stop_after == "float":
        return

    calibration = [torch.from_numpy(part) for part in np.array_split(task.calibration, 8)]
    model, report = convert(dense, task.recipe, calibration, seed=options.seed)
    print(report, flush=True)
    print(f"converted, before fine-tuning: {accuracy(model, task.valid):.2f} %", flush=True)
    if options.stop_after == "convert":
        return
    run = finetune(
        model, loader, epochs=options.epochs, lr=options.lr, warmup=100, teacher=dense,
        distillation=options.distillation, feature_layers=task.features,
        feature_weight=options.feature_weight, loss=smoothed,
        checkpoint_dir=stage(options.checkpoints, "lookup"), evaluate=log("lookup"), **common,
        **steady(options),
    )  # fmt: skip
    metrics["validation"] = accuracy(model, task.valid)

    entries = {
        "recipe": recipe_to_json(task.recipe),
        "seed": options.seed,
        "training": {
            "epochs": options.epochs, "steps": run.steps, "batch": options.batch,
            "lr": options.lr, "distillation": options.distillation,
            "feature_weight": options.feature_weight, "clip_norm": options.clip_norm,
            "mixed_precision": options.mixed_precision, **steady(options), **task.notes,
        },
        "metrics": metrics,
        "classes": list(task.classes),
        "preprocess": task.front.to_dict(),
    }  # fmt: skip
    if options.net == "resnet":
        entries["training"] |= {
            "float_epochs": options.float_epochs, "float_lr": options.float_lr,
        }  # fmt: skip
    example = torch.from_numpy(task.valid.x[:1])  # stays in the file
    tables = "compact" if options.compact else "stored"
    export(model, options.output, example, metadata=entries, tables=tables)
    dense = dense.cpu()
    results: dict[str, Any] = {
        **metrics,
        "engine_validation": engine_accuracy(options.output, task.valid),
        "steps": run.steps,
        **speeds(dense, options.output, task.valid.x),
    }
    for name, part in task.tests.items():
        results[f"dense_{name}"] = accuracy(dense, part)
        results[f"engine_{name}"] = engine_accuracy(options.output, part)
        results[f"{name}_clips"] = len(part.y)
    finish(options.output, results)


if __name__ == "__main__":
    main()

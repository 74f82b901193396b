"""CIFAR-10 ResNet-9: trains a wide, shallow network, then turns its inner layers into lookups.

    python examples/cifar10_resnet9.py --data DATA --output zoo/resnet9_cifar10.lutra \
        --checkpoints runs/resnet9 --group pixel --v 4 --epochs 10 --mixed-precision bf16

DATA is the official cifar-10-python.tar.gz, or a folder with cifar10_*.npy.xz. The dense network is
trained first (SGD, cycles of the rate with half the rate each, cut-out, smoothed labels). The run
can be stopped at any time: the same command goes on from the last checkpoint. `--width 64` is the
usual network; the default is half of it. First convolution and classifier are int8.

`--dense zoo/resnet9_cifar10_dense.safetensors` begins with the dense network of the zoo, which
saves more than an hour on one core.

5,000 training images are held out for validation: every choice is made on them, and neither network
sees them in training. The test images are used once, at the end, through the engine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar10 import Data, accuracy, add_arguments, compress, load_data, method_of
from safetensors.torch import load_file, save_file
from tasks import Log, stage
from torch import Tensor, nn

from lutra.train import Int8, recipe_from_json


class Conv(nn.Sequential):
    """A 3x3 convolution with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()


class ResNet9(nn.Module):
    """ResNet-9 for 32x32 images (Page 2018, "How to train your ResNet"), 6 widths wide at most."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = Conv(3, width)
        self.conv1 = Conv(width, 2 * width)
        self.block1 = nn.Sequential(Conv(2 * width, 2 * width), Conv(2 * width, 2 * width))
        self.conv2 = Conv(2 * width, 4 * width)
        self.conv3 = Conv(4 * width, 8 * width)
        self.block3 = nn.Sequential(Conv(8 * width, 8 * width), Conv(8 * width, 8 * width))
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(self.stem(x)), 2)
        x = x + self.block1(x)
        x = F.max_pool2d(self.conv2(x), 2)
        x = F.max_pool2d(self.conv3(x), 2)
        x = x + self.block3(x)
        return self.linear(x.amax((2, 3)))


def cut_out(images: Tensor, side: int = 8) -> Tensor:
    """The images with a square of zeros at a random place each (DeVries and Taylor 2017)."""
    count, _, height, width = images.shape
    top = torch.randint(height - side + 1, (count, 1))
    left = torch.randint(width - side + 1, (count, 1))
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = (rows >= top) & (rows < top + side)
    inside_columns = (columns >= left) & (columns < left + side)
    hole = inside_rows[:, :, None] & inside_columns[:, None, :]
    return images.masked_fill(hole[:, None], 0.0)


def rate_at(place: float) -> float:
    """The share of the largest rate at a place (0..1) of a cycle: up for a fifth, then down."""
    return min(0.1 + 4.5 * place, 1.25 * (1 - place))


def train_dense(
    model: nn.Module, data: Data, options: argparse.Namespace, folder: Path | None
) -> None:
    """Trains `model` in place; with a folder it goes on from the last epoch that was finished."""
    loader = data.loader(options.batch)
    steps = options.dense_epochs * len(loader)  # of a cycle
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD(
        [{"params": decay, "weight_decay": options.weight_decay}, {"params": rest}],
        lr=options.dense_lr, momentum=0.9, nesterov=True,
    )  # fmt: skip
    state = None if folder is None else folder / "dense.pt"
    first = 0
    if state is not None and state.exists():
        saved = torch.load(state, weights_only=True)
        first = saved["epoch"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    log = Log("dense", lambda m: accuracy(m, data.x_valid, data.y_valid), "%")
    for epoch in range(first, options.dense_epochs * options.dense_cycles):
        torch.manual_seed(1000 * options.seed + epoch)
        model.train()
        for step, (images, labels) in enumerate(loader, start=epoch * len(loader)):
            cycle, place = divmod(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = options.dense_lr / 2**cycle * rate_at(place / steps)
            with torch.autocast("cpu", torch.bfloat16, options.mixed_precision == "bf16"):
                scores = model(cut_out(images))
            loss = F.cross_entropy(scores.float(), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        log(model)
        if state is not None:
            state.parent.mkdir(parents=True, exist_ok=True)
            now = {"epoch": epoch + 1, "model": model.state_dict(),
                   "optimizer": optimizer.state_dict()}  # fmt: skip
            torch.save(now, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
    model.eval()


def save_dense(model: nn.Module, path: Path) -> None:
    """Writes the weights of the dense network, numbers in half precision."""
    halves = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    save_file(halves, path)


def load_dense(model: nn.Module, path: Path) -> None:
    """Reads what `save_dense` wrote into `model`, in place."""
    model.load_state_dict({name: value.float() if value.is_floating_point() else value
                           for name, value in load_file(path).items()})  # fmt: skip
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, "resnet9_cifar10.lutra")
    parser.add_argument("--width", type=int, default=32, help="of the first layer; default: 32")
    parser.add_argument("--dense-epochs", type=int, default=18, help="of a cycle")
    parser.add_argument("--dense-cycles", type=int, default=2)
    parser.add_argument("--dense-lr", type=float, default=0.2)
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="of the dense training")
    parser.add_argument("--dense", type=Path, help="weights of the dense network (safetensors): "
                        "read where the file is there, else trained and written")  # fmt: skip
    parser.add_argument("--recipe", type=Path, help="a recipe in JSON, in place of one method")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_data(options)
    torch.manual_seed(options.seed)
    dense = ResNet9(options.width).to(memory_format=torch.channels_last)
    if options.dense is not None and options.dense.exists():
        load_dense(dense, options.dense)
    else:
        train_dense(dense, data, options, stage(options.checkpoints, "dense"))
        if options.dense is not None:
            save_dense(dense, options.dense)
    recipe = {"stem.conv": Int8(), "linear": Int8(), "*.conv": method_of(options)}
    if options.recipe is not None:
        recipe = recipe_from_json(json.loads(options.recipe.read_text()))
    compress(
        dense, recipe, data, options,
        feature_layers=["conv1", "block1", "conv2", "conv3", "block3"],
        metadata={"dense_training": {"epochs": options.dense_epochs,
                                     "cycles": options.dense_cycles, "lr": options.dense_lr,
                                     "weight_decay": options.weight_decay,
                                     "width": options.width}},
    )  # fmt: skip


if __name__ == "__main__":
    main()

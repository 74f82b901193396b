"""CIFAR-10 ResNet-20: every 3x3 convolution but the first becomes lookups.

    python examples/cifar10_resnet20.py --data DATA --weights cifar10_resnet20.npz \
        --output zoo/resnet20_cifar10.lutra --checkpoints runs/resnet20

DATA is the official cifar-10-python.tar.gz, or a folder with cifar10_*.npy.xz. The run can be
stopped at any time: the same command goes on from the last checkpoint. Under `torchrun` it trains
on several devices.

`--method pq` is product quantisation (LUT-NN, V=9, K=16); with `--encoder tree` its codes come from
decision trees, which is faster and less accurate. `--method lookup --bits 4|3|2` is a learned table
of activations and weights for each layer (Deep Lookup Network), with the first convolution and the
classifier in int8. `--recipe FILE` takes a method for each layer, as `lutra optimize` finds them.
`--teacher FILE` is a deeper ResNet whose answers are learned from, in place of the dense network.

5,000 training images are held out for validation: every choice is made on them. (The public
checkpoint was trained on all 50,000, so validation accuracy is optimistic.) The test images are
used once, at the end, through the engine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from cifar10 import ResNet, add_arguments, compress, load_checkpoint, load_data, method_of
from torch import nn

from lutra.train import Int8, recipe_from_json
from lutra.train.recipe import Recipe

BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]


def load_resnet(path: Path) -> nn.Module:
    """The ResNet of a checkpoint, as deep as that is."""
    with np.load(path, allow_pickle=False) as arrays:
        blocks = [
            name for name in arrays.files if name.endswith("conv2.weight") and "layer1." in name
        ]
    model = ResNet(len(blocks))
    load_checkpoint(model, path)
    return model.eval().to(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, "resnet20_cifar10.lutra")
    parser.add_argument("--weights", type=Path, required=True, help="the dense checkpoint, .npz")
    parser.add_argument("--teacher", type=Path, help="the checkpoint of a deeper one, .npz")
    parser.add_argument(
        "--recipe",
        type=Path,
        help="a recipe in JSON, as `lutra optimize` finds one; in place of one method",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_data(options)
    dense = load_resnet(options.weights)
    teacher = None if options.teacher is None else load_resnet(options.teacher)
    recipe: Recipe = {"layer*.conv*": method_of(options)}
    if options.method == "lookup":
        recipe = {"conv1": Int8(), "linear": Int8(), **recipe}
    if options.recipe is not None:
        recipe = recipe_from_json(json.loads(options.recipe.read_text()))
    blocks = BLOCKS if teacher is None else []  # a deeper network has other values inside
    compress(dense, recipe, data, options, feature_layers=blocks, teacher=teacher)


if __name__ == "__main__":
    main()

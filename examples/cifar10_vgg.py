"""CIFAR-10 VGG-small: trains the dense network, then turns its inner layers into lookups.

    python examples/cifar10_vgg.py --data DATA --width 64 --method lookup --bits 4 \
        --output vgg_cifar10_lookup4.lutra --checkpoints runs/vgg

DATA is the official cifar-10-python.tar.gz, or a folder with cifar10_*.npy.xz. The run can be
stopped at any time: the same command goes on from the last checkpoint. Methods as in
cifar10_resnet20.py; first convolution and classifier are int8.

5,000 training images are held out for validation: every choice is made on them. The test images are
used once, at the end, through the engine.
"""

from __future__ import annotations

import argparse

import torch
from cifar10 import VGG, accuracy, add_arguments, compress, load_data, method_of
from tasks import Log, stage

from lutra.train import Int8, finetune


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, "vgg_cifar10.lutra")
    parser.add_argument("--width", type=int, default=128, help="of the first pair; default: 128")
    parser.add_argument("--dense-epochs", type=float, default=30)
    parser.add_argument("--dense-lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="of the dense training")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_data(options)
    torch.manual_seed(options.seed)
    dense = VGG(options.width).to(memory_format=torch.channels_last)
    loader = data.loader(options.batch)
    every = max(1, len(loader))
    finetune(
        dense, loader, epochs=options.dense_epochs, lr=options.dense_lr, warmup=every,
        weight_decay=options.weight_decay, batch_norm_batches=100,
        evaluate=Log("dense", lambda m: accuracy(m, data.x_valid, data.y_valid), "%"),
        evaluate_every=every, checkpoint_dir=stage(options.checkpoints, "dense"),
        checkpoint_every=max(1, every // 2), mixed_precision=options.mixed_precision,
        seed=options.seed,
    )  # fmt: skip
    recipe = {"convs.0": Int8(), "classifier": Int8(), "convs.*": method_of(options)}
    compress(
        dense.eval(), recipe, data, options,
        feature_layers=[f"norms.{i}" for i in range(1, len(dense.norms))],
        metadata={"dense_training": {"epochs": options.dense_epochs, "lr": options.dense_lr,
                                     "weight_decay": options.weight_decay,
                                     "width": options.width}},
    )  # fmt: skip


if __name__ == "__main__":
    main()

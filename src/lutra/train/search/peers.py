"""ONNX Runtime on the samples of a study, in float32 and in static int8, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from lutra.node import Array
from lutra.train.search.quality import Outputs
from lutra.train.search.samples import Part, Split

_SECONDS: Final = 2.0
_LEAST: Final = 9
_MOST: Final = 301
_CALIBRATED: Final = 64
_POOL: Final = 8


def onnx_runtime(
    path: str | os.PathLike[str], threads: int
) -> Callable[[Split, Callable[[Outputs], tuple[float, float]]], list[dict[str, Any]]]:
    """What `optimize` takes as `peers`: ONNX Runtime with the file that the model came from.

    Args:
        path: the ONNX file.
        threads: of its sessions.

    Returns:
        A function that measures; it finds nothing where onnxruntime is not installed, and a peer
        that cannot run the file has the reason in place of numbers.
    """

    def measure(
        data: Split, judge: Callable[[Outputs], tuple[float, float]]
    ) -> list[dict[str, Any]]:
        if importlib.util.find_spec("onnxruntime") is None:
            return []
        found = [_measured("ONNX Runtime", "float32", str(path), data, judge, threads)]
        with tempfile.TemporaryDirectory(prefix="lutra-") as folder:
            quantised = Path(folder) / "int8.onnx"
            try:
                _quantise(str(path), quantised, data)
            except Exception:  # the quantiser takes many files not, and says so in many ways
                return [entry for entry in found if entry is not None]
            text = "static int8 (QDQ, a scale for each channel), calibrated on the same samples"
            found.append(_measured("ONNX Runtime int8", text, str(quantised), data, judge, threads))
        return [entry for entry in found if entry is not None]

    return measure


def _measured(
    name: str,
    text: str,
    path: str,
    data: Split,
    judge: Callable[[Outputs], tuple[float, float]],
    threads: int,
) -> dict[str, Any] | None:
    """Quality and milliseconds of a file; None where it cannot run."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = session.get_inputs()
        outputs = [session.run(None, feeds) for feeds in _batches(data.judged, inputs)]
        pool = [_named(inputs, sample) for sample in data.judged.samples(_POOL)]
        times: list[float] = []
        begin = time.perf_counter()
        for turn in range(-2, _MOST):
            start = time.perf_counter()
            session.run(None, pool[turn % len(pool)])
            if turn >= 0:
                times.append(1e3 * (time.perf_counter() - start))
            if turn >= _LEAST and time.perf_counter() - begin > _SECONDS:
                break
        quality, drop = judge(outputs)
    except Exception:  # a batch that the file fixes, operators that this version lacks, ...
        return None
    plural = "" if threads == 1 else "s"
    return {
        "name": name, "quality": quality, "drop": drop, "ms": float(np.median(times)),
        "text": f"{text}; {runtime.__version__}, {threads} thread{plural}, median of {len(times)}",
    }  # fmt: skip


def _quantise(path: str, output: Path, data: Split) -> None:
    """Writes a file with int8 weights and activations."""
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    runtime: Any = importlib.import_module("onnxruntime")
    inputs = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()
    samples = iter([_named(inputs, sample) for sample in data.calibration.samples(_CALIBRATED)])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Array] | None:
            return next(samples, None)

    quantization.quantize_static(path, str(output), Reader(), per_channel=True)


def _batches(part: Part, inputs: list[Any]) -> Iterator[dict[str, Array]]:
    for batch in part.batches:
        yield _named(inputs, tuple(tensor.numpy() for tensor in batch))


def _named(inputs: list[Any], arrays: tuple[Array, ...]) -> dict[str, Array]:
    """Arrays by name, in the types of the file."""
    kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
    return {
        value.name: array.astype(kinds.get(value.type, np.float32))
        for value, array in zip(inputs, arrays, strict=True)
    }

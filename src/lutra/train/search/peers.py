"""Other runtimes on the samples of a study, in float32 and static int8, where they are installed.

ONNX Runtime and OpenVINO get the ONNX file that the model came from. Their int8 is calibrated on
the samples that calibrate the study: by the quantiser of ONNX Runtime, whose file (QDQ) OpenVINO
runs too, and by NNCF for OpenVINO where it is installed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lutra.node import Array
from lutra.train.search.quality import Outputs
from lutra.train.search.samples import Part, Split

_SECONDS: Final = 2.0
_TURNS: Final = 40
_BLOCK: Final = 8  # runs of a runtime in a turn
_CALIBRATED: Final = 64
_POOL: Final = 8
#: Types of inputs as ONNX Runtime and OpenVINO call them; all others get float32.
_TYPES: Final = {
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
    "i64": np.int64, "i32": np.int32, "boolean": np.bool_,
}  # fmt: skip
_QDQ: Final = (
    "static int8 (QDQ, a scale for each channel) by the quantiser of ONNX Runtime, calibrated on "
    "the same samples"
)
_NNCF: Final = "static int8 (mixed preset) by NNCF, calibrated on the same samples"
#: A scale for each channel needs operator set 13.
_OPSET: Final = 17

#: From the outputs of a runtime to quality and drop.
Judge = Callable[[Outputs], tuple[float, float]]
#: What `optimize` takes as `peers`.
Peers = Callable[[Split, Judge], list[dict[str, Any]]]
_Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class _Opened:
    """A file that a runtime has loaded.

    Attributes:
        run: the outputs for inputs by name.
        inputs: their names and types, in the order of the file.
        version: of the runtime.
    """

    run: Callable[[_Feeds], Sequence[Array]]
    inputs: Sequence[tuple[str, Any]]
    version: str

    def feeds(self, arrays: Sequence[Array]) -> dict[str, Array]:
        """Arrays by name, in the types of the file."""
        return {
            name: np.ascontiguousarray(array.astype(kind))
            for (name, kind), array in zip(self.inputs, arrays, strict=True)
        }


def runtimes(path: str | os.PathLike[str], threads: int) -> Peers:
    """What `optimize` takes as `peers`: other runtimes with the file that the model came from.

    Args:
        path: the ONNX file.
        threads: of the runtimes.

    Returns:
        A function that measures all runtimes that are installed. Each result is a mapping with
        `name`, `quality`, `drop`, `ms` and a `text` on how it was measured. A runtime that cannot
        run the file is left out.
    """

    def measure(data: Split, judge: Judge) -> list[dict[str, Any]]:
        has = {name: _is_installed(name) for name in ("onnxruntime", "openvino", "nncf")}
        found: list[_Judged] = []
        with tempfile.TemporaryDirectory(prefix="lutra-") as folder:
            int8: Any = Path(folder) / "int8.onnx"
            if not has["onnxruntime"] or not _quantise(str(path), int8, data):
                int8 = None
            if has["onnxruntime"]:
                load = _onnx_runtime(threads)
                found += _pair("ONNX Runtime", load, path, int8, _QDQ, data, judge)
            if has["openvino"]:
                load, own = _openvino(threads), None
                if has["nncf"]:
                    own = _by_nncf(str(path), data)
                source, how = (int8, _QDQ) if own is None else (own, _NNCF)
                found += _pair("OpenVINO", load, path, source, how, data, judge)
            times = _times(found, data.judged.samples(_POOL))
        end = f"{threads} thread{'' if threads == 1 else 's'}, measured in turns"
        return [
            {
                "name": each.name, "quality": each.quality, "drop": each.drop,
                "ms": float(np.median(own)),
                "text": f"{each.text}; {each.opened.version}, {end}, median of {len(own)}",
            }
            for each, own in zip(found, times, strict=True)
        ]  # fmt: skip

    return measure


@dataclass
class _Judged:
    """A runtime whose outputs are judged, and that is not timed yet.

    Attributes:
        name: of the runtime.
        opened: the file that it runs.
        quality: of its outputs.
        drop: against the dense model.
        text: how the file was made.
    """

    name: str
    opened: _Opened
    quality: float
    drop: float
    text: str


def _pair(
    name: str,
    load: Callable[[Any], _Opened],
    path: str | os.PathLike[str],
    int8: Any,
    how: str,
    data: Split,
    judge: Judge,
) -> list[_Judged]:
    """A runtime in float32 and in int8, as far as it can run both.

    Args:
        name: of the runtime.
        load: loads a path, or a model of the runtime.
        path: of the float file.
        int8: the int8 file or model; None where there is none.
        how: it was made.
        data: the samples.
        judge: from outputs to quality and drop.
    """
    plain = _judged(name, "float32", load, path, data, judge)
    rounded = None
    if int8 is not None:
        rounded = _judged(f"{name} int8", how, load, int8, data, judge)
    if plain is not None and rounded is None:
        why = "no quantiser made a file" if int8 is None else "it does not run the quantised file"
        plain.text += f", its int8 is not measured: {why}"
    return [entry for entry in (plain, rounded) if entry is not None]


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _judged(
    name: str,
    text: str,
    load: Callable[[Any], _Opened],
    source: Any,
    data: Split,
    judge: Judge,
) -> _Judged | None:
    """A runtime with the quality of its outputs; None where it cannot run the samples.

    Args:
        name: of the runtime.
        text: how the file was made.
        load: loads what `source` is.
        source: a path, or a model of the runtime.
        data: the samples.
        judge: from outputs to quality and drop.
    """
    try:
        opened = load(source)
        outputs = [
            [np.array(output) for output in opened.run(feeds)]
            for feeds in _batches(data.judged, opened)
        ]
        for sample in data.judged.samples(_POOL):  # some files have one batch
            opened.run(opened.feeds(sample))
        quality, drop = judge(outputs)
    except Exception:  # a batch that the file fixes, operators that this version lacks, ...
        return None
    return _Judged(name, opened, float(quality), float(drop), text)


def _times(judged: Sequence[_Judged], samples: Sequence[tuple[Array, ...]]) -> list[list[float]]:
    """Milliseconds of single samples, of all runtimes in turns: the clock of a machine moves."""
    pools = [[each.opened.feeds(sample) for sample in samples] for each in judged]
    times: list[list[float]] = [[] for _ in judged]
    begin = time.perf_counter()
    for turn in range(_TURNS):
        for each, pool, own in zip(judged, pools, times, strict=True):
            # Of a block the first run wakes threads and fetches weights, and does not count.
            for run in range(-1, _BLOCK):
                start = time.perf_counter()
                each.opened.run(pool[(turn * _BLOCK + run) % len(pool)])
                if run >= 0:
                    own.append(1e3 * (time.perf_counter() - start))
        if turn and time.perf_counter() - begin > _SECONDS * len(judged):
            break
    return times


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back the bars and warnings that quantisers write."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _batches(part: Part, opened: _Opened) -> Iterator[dict[str, Array]]:
    for batch in part.batches:
        yield opened.feeds([tensor.numpy() for tensor in batch])


# ---- ONNX Runtime -------------------------------------------------------------------------------


def _onnx_runtime(threads: int) -> Callable[[Any], _Opened]:
    runtime: Any = importlib.import_module("onnxruntime")

    def load(path: Any) -> _Opened:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = [(each.name, _TYPES.get(each.type, np.float32)) for each in session.get_inputs()]
        return _Opened(lambda feeds: session.run(None, feeds), inputs, runtime.__version__)

    return load


def _quantise(path: str, output: Path, data: Split) -> bool:
    """Writes a file with int8 weights and activations; whether it could.

    The quantiser gets what its guide asks for, a newer operator set with norms in the convolutions,
    and the file as it is where that makes none that runs.
    """
    try:
        opened = _onnx_runtime(1)(path)
    except Exception:  # it cannot run the file
        return False
    samples = [opened.feeds(each) for each in data.calibration.samples(_CALIBRATED)]
    for prepare in (_newer, lambda path, folder: path):
        try:
            with _quiet():
                _write_int8(prepare(path, output.parent), output, samples)
            _onnx_runtime(1)(output).run(samples[0])
            return True
        except Exception:  # it takes many files not, and says so in many ways
            output.unlink(missing_ok=True)
    return False


def _newer(path: str, folder: Path) -> str:
    """The file in a newer operator set, with constants and norms folded."""
    onnx: Any = importlib.import_module("onnx")
    shapes: Any = importlib.import_module("onnxruntime.quantization.shape_inference")
    converter: Any = importlib.import_module("onnx.version_converter")
    model = onnx.load(path)
    own = max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    newer = model if own >= _OPSET else converter.convert_version(model, _OPSET)
    onnx.save(newer, folder / "newer.onnx")
    ready = str(folder / "ready.onnx")
    shapes.quant_pre_process(str(folder / "newer.onnx"), ready, skip_symbolic_shape=True)
    return ready


def _write_int8(path: str, output: Path, samples: Sequence[_Feeds]) -> None:
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    left = iter(samples)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> _Feeds | None:
            return next(left, None)

    quantization.quantize_static(path, str(output), Reader(), per_channel=True)


# ---- OpenVINO -----------------------------------------------------------------------------------


def _openvino(threads: int) -> Callable[[Any], _Opened]:
    runtime: Any = importlib.import_module("openvino")
    core = runtime.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # and not bfloat16, where the CPU has it
        "ENABLE_CPU_PINNING": False,  # the core may be busy: the system knows a better one
    }

    def load(source: Any) -> _Opened:
        model = str(source) if isinstance(source, str | os.PathLike) else source
        compiled = core.compile_model(model, "CPU", settings)
        request = compiled.create_infer_request()
        ports = list(compiled.outputs)

        def run(feeds: _Feeds) -> Sequence[Array]:
            made = request.infer(feeds, share_inputs=True, share_outputs=True)
            return [made[port] for port in ports]

        return _Opened(run, _inputs(compiled.inputs), runtime.__version__.partition("-")[0])

    return load


def _inputs(ports: Any) -> list[tuple[str, Any]]:
    """Names and types of the inputs of a model of OpenVINO."""
    return [
        (port.get_any_name(), _TYPES.get(port.get_element_type().get_type_name(), np.float32))
        for port in ports
    ]


def _by_nncf(path: str, data: Split) -> Any:
    """A model of OpenVINO in int8; None where NNCF takes the file not."""
    try:
        runtime: Any = importlib.import_module("openvino")
        nncf: Any = importlib.import_module("nncf")
        model = runtime.Core().read_model(path)
        named = _Opened(lambda feeds: [], _inputs(model.inputs), "")
        samples = [named.feeds(each) for each in data.calibration.samples(_CALIBRATED)]
        with _quiet():
            return nncf.quantize(
                model, nncf.Dataset(samples), preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(samples),
            )  # fmt: skip
    except Exception:  # operators that it does not know, packages of other versions, ...
        return None

"""The runtimes beside lutra: their models, made by their own tools, and how they are called.

Every runtime gets a model of one fixed input shape, arrays in and a float32 array out,
and is called in the fastest ordinary way that its Python interface has. Nothing is imported before
it is needed, so that `benchmarks.memory` can count one runtime alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import saturates
from benchmarks.networks import Network
from benchmarks.networks_text import Sentences

Array = NDArray[Any]
Feeds: TypeAlias = Mapping[str, Array]
Run: TypeAlias = Callable[[Feeds], Array]

#: The file that each peer reads; the last word of a name is its precision.
PEERS: Final = {
    "onnxruntime fp32": "fp32.onnx",
    "onnxruntime int8": "int8.onnx",
    "openvino fp32": "fp32.onnx",
    "openvino bf16": "fp32.onnx",
    "openvino int8": "int8.onnx",
    "torch fp32": "dense.pt",
}
#: What is another file for sentence encoders: the fastest form that we know of for each.
_ENCODER_FILES: Final = {
    "onnxruntime fp32": "fused.onnx",
    "onnxruntime int8": "fused_int8.onnx",
}
#: Variables that keep oneDNN (OpenVINO, PyTorch) and the rest of PyTorch at an instruction set;
#: "avx512" is that of VNNI, without bf16 and without the matrix units (AMX) of newer CPUs.
CAPS: Final = {
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}
#: Who cannot be kept at an instruction set, and why.
NOT_CAPPED: Final = {
    "onnxruntime fp32": "ONNX Runtime has no way to be kept at an instruction set",
    "onnxruntime int8": "ONNX Runtime has no way to be kept at an instruction set",
    "openvino bf16": "bf16 is beyond the instruction sets that others are kept at",
}
_BATCHES: Final = 4  # random batches that the activation ranges are taken from


@dataclass(frozen=True)
class Opened:
    """A model that is ready to run.

    Attributes:
        run: From an input to the output.
        kernels: What OpenVINO runs for the layers with weights, by the name it gives; else empty.
        session: The session of lutra.
    """

    run: Run
    kernels: tuple[str, ...] = ()
    session: Any = None


def peer_files(network: Network | Sentences) -> dict[str, str]:
    """The file that each peer reads."""
    return PEERS | (_ENCODER_FILES if isinstance(network, Sentences) else {})


def write_models(network: Network | Sentences, batch: int, folder: Path) -> dict[str, str]:
    """Writes the files of all peers.

    Args:
        network: The network.
        batch: Samples in an input; the models take nothing else.
        folder: Where the files go.

    Returns:
        Why a file could not be made, by its name.
    """
    failed = {}
    writers: dict[str, Callable[[Any, int, Path], None]]
    writers = {"dense.pt": _write_dense, "fp32.onnx": _export, "int8.onnx": _int8}
    if isinstance(network, Sentences):
        writers |= {"fused.onnx": _fused, "fused_int8.onnx": _dynamic_int8}
    for name, write in writers.items():
        try:
            with _quiet():
                write(network, batch, folder)
        except Exception as error:  # whatever a tool raises becomes a line in the record
            failed[name] = reason(error)
    return failed


def load_runtime(name: str) -> None:
    """Imports what a contestant needs, plug-ins included."""
    runtime = name.split()[0]
    if runtime == "onnxruntime":
        import onnxruntime  # noqa: F401
    elif runtime == "openvino":
        import openvino

        openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")
    elif runtime == "torch":
        import benchmarks.dense
        import benchmarks.dense_encoder  # noqa: F401
    else:
        import lutra  # noqa: F401


def open_model(name: str, path: Path, threads: int, isa: str) -> Opened:
    """Loads the model of a contestant.

    Args:
        name: One of `PEERS`, or a name that begins with "lutra".
        path: Its file.
        threads: Threads, the caller's included.
        isa: Instruction set of lutra.
    """
    runtime, precision = name.split()[0], name.split()[-1]
    if runtime == "onnxruntime":
        return _open_onnxruntime(path, threads)
    if runtime == "openvino":
        return _open_openvino(path, threads, precision)
    if runtime == "torch":
        return _open_torch(path, threads)
    import lutra

    session = lutra.Session(path, threads=threads, isa=isa)
    return Opened(lambda feeds: session.run(None, feeds)[0], session=session)


def reason(error: Exception) -> str:
    """An error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


def random_input(network: Network | Sentences, batch: int, seed: int) -> dict[str, Array]:
    """The inputs of one run by name: normal values, or token ids without padding."""
    rng = np.random.default_rng(seed)
    if isinstance(network, Sentences):
        shape = (batch, network.tokens)
        ids = rng.integers(0, network.encoder.vocabulary, shape, np.int64)
        return {"ids": ids, "mask": np.ones(shape, np.int64)}
    return {"x": rng.standard_normal((batch, *network.shape), np.float32)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps exporters from advertising their successors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _write_dense(network: Network | Sentences, batch: int, folder: Path) -> None:
    import torch

    torch.save(_module(network), folder / "dense.pt")


def _module(network: Network | Sentences) -> Any:
    """The PyTorch module."""
    if isinstance(network, Sentences):
        from benchmarks.dense_encoder import DenseEncoder

        return DenseEncoder(network.encoder).eval()
    from benchmarks.dense import Dense

    return Dense(network).eval()


def _export(network: Network | Sentences, batch: int, folder: Path) -> None:
    path = folder / "fp32.onnx"
    if isinstance(network, Sentences):
        from benchmarks.encoder_onnx import write_plain

        write_plain(network, batch, path)
        return
    import torch

    example = torch.from_numpy(random_input(network, batch, 0)["x"])
    torch.onnx.export(
        _module(network),
        (example,),
        str(path),
        input_names=["x"],
        output_names=["y"],
        dynamo=False,
    )


def _fused(network: Sentences, batch: int, folder: Path) -> None:
    from benchmarks.encoder_onnx import write_fused

    write_fused(network, batch, folder / "fused.onnx")


def _dynamic_int8(network: Sentences, batch: int, folder: Path) -> None:
    """ONNX Runtime's dynamic quantisation, as its guide has it for transformers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(folder / "fused.onnx"),
        str(folder / "fused_int8.onnx"),
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=saturates(),
        op_types_to_quantize=["MatMul", "Attention"],
        extra_options={"DefaultTensorType": 1},  # float32, of values behind its own operators
    )


def _int8(network: Network | Sentences, batch: int, folder: Path) -> None:
    """ONNX Runtime's static quantisation, as its guide has it for x86: uint8 with int8 weights.

    Where such products saturate (`saturates`), weights have 7 bits.
    Of encoders the linear layers, whose patterns its own optimisation would hide from OpenVINO:
    attention, sums and embeddings in int8 as well made OpenVINO slower by a third.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seeds = iter(range(_BATCHES))

        def get_next(self) -> dict[str, Array] | None:
            seed = next(self.seeds, None)
            return None if seed is None else random_input(network, batch, 1000 + seed)

    prepared = folder / "prepared.onnx"
    encodes = isinstance(network, Sentences)
    quant_pre_process(
        str(folder / "fp32.onnx"),
        str(prepared),
        skip_symbolic_shape=True,
        skip_optimization=encodes,
    )
    quantize_static(
        str(prepared),
        str(folder / "int8.onnx"),
        Batches(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=saturates(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"] if encodes else None,
        extra_options={"MatMulConstBOnly": True} if encodes else None,
    )


def _open_onnxruntime(path: Path, threads: int) -> Opened:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )  # IOBinding was no faster
    return Opened(lambda feeds: session.run(None, feeds)[0])


def _open_openvino(path: Path, threads: int, precision: str) -> Opened:
    import openvino

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("OpenVINO has no bf16 on this CPU")
    compiled = core.compile_model(
        str(path),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()

    names = [port.get_any_name() for port in compiled.inputs]

    def run(feeds: Feeds) -> Array:  # shares the memory of inputs and output
        for index, name in enumerate(names):
            request.set_input_tensor(index, openvino.Tensor(feeds[name], shared_memory=True))
        request.infer()
        result: Array = request.get_output_tensor().data
        return result

    weighted = ("Convolution", "FullyConnected", "MatMul")
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    named = [(_text(info["layerType"]), _text(info["primitiveType"])) for info in infos]
    return Opened(run, tuple(kernel for kind, kernel in named if kind in weighted))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value.astype(str))


def _open_torch(path: Path, threads: int) -> Opened:
    """Eager, in channels last, the faster layout of its convolutions."""
    import torch

    torch.set_num_threads(threads)
    module = torch.load(path, weights_only=False).to(memory_format=torch.channels_last)

    def run(feeds: Feeds) -> Array:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
            for name, tensor in tensors.items():
                if tensor.ndim == 4:
                    tensors[name] = tensor.contiguous(memory_format=torch.channels_last)
            result: Array = module(**tensors).numpy()
            return result

    return Opened(run)

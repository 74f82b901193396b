"""llama.cpp beside lutra, through the libraries of llama-cpp-python: matrix products and models.

A product is one ``ggml_mul_mat`` node, as llama.cpp makes it for a linear layer: weights lie in the
buffer that llama.cpp would choose for them, which repacks the formats that it has faster kernels
for, and the product is computed by ``ggml_backend_graph_compute``. A model is decoded by
``llama_decode``. Both run on what the libraries were built for; ``LLAMA_CPP_LIB_PATH`` names a
folder with others, such as a build without AVX-512.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.peers import Array

#: Formats of weights, and the bits of a code. TQ1_0 and TQ2_0 hold ternary weights.
FORMATS: Final = {"TQ1_0": 1.58, "TQ2_0": 1.58, "Q2_K": 2, "Q4_0": 4}
_DRAWN: Final = 64  # rows of random weights; more of them repeat
_POINTERS: Final = (
    "ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_get_data",
    "ggml_backend_alloc_ctx_tensors_from_buft", "ggml_backend_alloc_ctx_tensors",
    "ggml_backend_reg_get_proc_address", "ggml_backend_reg_dev_get",
)  # fmt: skip


#: A callback that drops what llama.cpp says.
_SILENT: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda *_: None
)


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def folder() -> Path:
    """Where the libraries are.

    Raises:
        ModuleNotFoundError: llama-cpp-python is not installed.
    """
    given = os.environ.get("LLAMA_CPP_LIB_PATH")
    if given:
        return Path(given)
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("llama-cpp-python is not installed")
    return Path(found.origin).parent / "lib"


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    base = ctypes.CDLL(str(folder() / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder() / "libggml-cpu.so"))
    base.ggml_log_set(_SILENT, None)
    base.ggml_init.argtypes = [_InitParams]
    base.ggml_row_size.restype = ctypes.c_size_t
    base.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    base.ggml_new_tensor_2d.argtypes = [ctypes.c_void_p, ctypes.c_int, *[ctypes.c_int64] * 2]
    base.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p
    ]  # fmt: skip
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_backend_tensor_set.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2]
    base.ggml_backend_supports_op.restype = ctypes.c_bool
    for name in _POINTERS:
        getattr(base, name).restype = ctypes.c_void_p
    for name in ("ggml_backend_cpu_init", "ggml_backend_cpu_reg"):
        getattr(cpu, name).restype = ctypes.c_void_p
    return base, cpu


def features() -> str | None:
    """The instruction sets that the libraries were built for; None without llama-cpp-python."""
    try:
        _, cpu = _libraries()
    except ModuleNotFoundError:
        return None
    names = ("avx2", "avx_vnni", "avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_int8")
    return " ".join(name for name in names if getattr(cpu, f"ggml_cpu_has_{name}")())


def open_product(
    format_: str, outputs: int, depth: int, threads: int, weights: Array | None = None
) -> Callable[[Array], Array]:
    """A product of rows (n, depth) with weights (outputs, depth) of a format.

    Args:
        format_: One of ``FORMATS``.
        outputs: Rows of the matrix of weights.
        depth: Its columns.
        threads: That compute.
        weights: float32; random ones without it.

    Raises:
        ModuleNotFoundError: llama-cpp-python or gguf is not installed.
        ValueError: The format does not take this depth.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[format_]
    block, _ = GGML_QUANT_SIZES[kind]
    if depth % block:
        raise ValueError(f"{format_} takes inputs in blocks of {block}, not {depth}")
    base, cpu = _libraries()
    if weights is None:
        rng = np.random.default_rng(0)
        drawn = rng.normal(size=(min(_DRAWN, outputs), depth)).astype(np.float32)
    else:
        drawn = np.ascontiguousarray(weights, np.float32)
    size = base.ggml_row_size(kind, depth)
    packed = np.empty((len(drawn), size), np.uint8)
    base.ggml_quantize_chunk(
        kind, drawn.ctypes.data, packed.ctypes.data, 0, len(drawn), depth, None
    )
    packed = np.ascontiguousarray(np.resize(packed, (outputs, size)))

    stack = ExitStack()

    def kept(free: str, pointer: int) -> ctypes.c_void_p:
        made = ctypes.c_void_p(pointer)
        stack.callback(getattr(base, free), made)
        return made

    def context() -> ctypes.c_void_p:
        return kept("ggml_free", base.ggml_init(_InitParams(2**20, None, True)))

    backend = kept("ggml_backend_free", cpu.ggml_backend_cpu_init())
    cpu.ggml_backend_cpu_set_n_threads(backend, threads)
    for buffer_type in [*_extra_buffers(base, cpu), None]:
        held = context()
        matrix = ctypes.c_void_p(base.ggml_new_tensor_2d(held, kind, depth, outputs))
        if buffer_type is None:
            kept("ggml_backend_buffer_free", base.ggml_backend_alloc_ctx_tensors(held, backend))
            break
        buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(held, buffer_type)
        kept("ggml_backend_buffer_free", buffer)
        float32 = GGMLQuantizationType.F32
        tried = context()
        row = ctypes.c_void_p(base.ggml_new_tensor_2d(tried, float32, depth, 1))
        product = ctypes.c_void_p(base.ggml_mul_mat(tried, matrix, row))
        if base.ggml_backend_supports_op(backend, product):
            break
    base.ggml_backend_tensor_set(matrix, packed.ctypes.data, 0, packed.nbytes)
    graphs: dict[int, tuple[Any, Array, Array]] = {}

    def graph_of(rows: int) -> tuple[Any, Array, Array]:
        if rows not in graphs:
            held = context()
            x = ctypes.c_void_p(base.ggml_new_tensor_2d(held, 0, depth, rows))
            y = ctypes.c_void_p(base.ggml_mul_mat(held, matrix, x))
            kept("ggml_backend_buffer_free", base.ggml_backend_alloc_ctx_tensors(held, backend))
            graph = ctypes.c_void_p(base.ggml_new_graph(held))
            base.ggml_build_forward_expand(graph, y)
            graphs[rows] = graph, _array(base, x, (rows, depth)), _array(base, y, (rows, outputs))
        return graphs[rows]

    def run(x: Array) -> Array:
        graph, given, made = graph_of(len(x))
        given[...] = x
        if base.ggml_backend_graph_compute(backend, graph):
            raise RuntimeError("ggml_backend_graph_compute failed")
        return made.copy()

    weakref.finalize(run, stack.close)
    return run


def _array(base: ctypes.CDLL, tensor: ctypes.c_void_p, shape: tuple[int, int]) -> Array:
    """The float32 values of a tensor, where they are."""
    count = shape[0] * shape[1]
    memory = (ctypes.c_float * count).from_address(base.ggml_get_data(tensor))
    return np.frombuffer(memory, np.float32).reshape(shape)


def _extra_buffers(base: ctypes.CDLL, cpu: ctypes.CDLL) -> list[ctypes.c_void_p]:
    """The buffers of the CPU that repack weights, in the order in which llama.cpp tries them."""
    registry = ctypes.c_void_p(cpu.ggml_backend_cpu_reg())
    device = ctypes.c_void_p(base.ggml_backend_reg_dev_get(registry, 0))
    found = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not found:
        return []
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(found)(device)
    made = []
    while listed and listed[len(made)]:
        made.append(ctypes.c_void_p(listed[len(made)]))
    return made


class Decoder:
    """A GGUF file in llama.cpp.

    Args:
        path: The file.
        length: The most tokens of a text.
        threads: That compute.

    Raises:
        ModuleNotFoundError: llama-cpp-python is not installed.
        ValueError: llama.cpp does not load the file.
    """

    def __init__(self, path: Path, length: int, threads: int) -> None:
        import llama_cpp

        self._llama = llama_cpp
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        model = llama_cpp.llama_load_model_from_file(str(path).encode(), options)
        if not model:
            raise ValueError(f"llama.cpp does not load {path.name}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = length, length, 512
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_new_context_with_model(model, settings)
        if not self._context:
            llama_cpp.llama_free_model(model)
            raise ValueError(f"llama.cpp makes no context of {length} tokens for {path.name}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._free = weakref.finalize(self, _free, llama_cpp, self._context, model)

    def clear(self) -> None:
        """Forgets all tokens."""
        memory = self._llama.llama_get_memory(self._context)
        self._llama.llama_memory_clear(memory, True)

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens behind those that it has; the scores (V,) behind the last one."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        batch = self._llama.llama_batch_get_one(tokens, len(ids))
        if self._llama.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        scores = self._llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(scores, (self._vocabulary,)).copy()


def _free(llama_cpp: Any, context: Any, model: Any) -> None:
    llama_cpp.llama_free(context)
    llama_cpp.llama_free_model(model)

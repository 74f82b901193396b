"""Runtimes with low-bit matrices beside lutra: one node of ONNX Runtime or of llama.cpp each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from benchmarks import llama_peer
from benchmarks.peers import Array

#: Weights that share a scale in MatMulNBits: the largest group that all of its kernels have.
BLOCK: Final = 128
#: The bits of a code of each peer; ONNX Runtime's node of 2 bits is asked for lookups too.
PEERS: Final = {
    "onnxruntime 2 bits": 2,
    "onnxruntime 2 bits, lookups": 2,
    "onnxruntime 4 bits": 4,
    "onnxruntime float32": 32,
    **{f"llama.cpp {name}": bits for name, bits in llama_peer.FORMATS.items()},
}

Run = Callable[[Array], Array]


def open_peer(name: str, outputs: int, depth: int, threads: int, seed: int = 0) -> Run:
    """A peer that multiplies rows (n, depth) with random weights (outputs, depth).

    Args:
        name: One of ``PEERS``.
        outputs: Rows of the matrix of weights.
        depth: Its columns.
        threads: Of the session.
        seed: Of the weights.
    """
    runtime, _, format_ = name.partition(" ")
    if runtime == "llama.cpp":
        return llama_peer.open_product(format_, outputs, depth, threads)
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    bits = PEERS[name]
    tensors: dict[str, Array]
    attributes: dict[str, Any]
    if bits == 32:
        op, domain, attributes = "MatMul", "", {}
        tensors = {"weight": rng.normal(size=(depth, outputs)).astype(np.float32)}
    else:
        blocks = -(-depth // BLOCK)
        op, domain = "MatMulNBits", "com.microsoft"
        # accuracy_level 4: activations may become int8, as lutra's do.
        attributes = {
            "K": depth, "N": outputs, "bits": bits, "block_size": BLOCK, "accuracy_level": 4
        }  # fmt: skip
        tensors = {
            "weight": rng.integers(0, 256, (outputs, blocks, BLOCK * bits // 8), dtype=np.uint8),
            "scales": rng.uniform(0.01, 0.02, (outputs * blocks,)).astype(np.float32),
        }
    node = helper.make_node(op, ["x", *tensors], ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, outputs])],
        [numpy_helper.from_array(array, role) for role, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if name.endswith("lookups"):
        options.add_session_config_entry("mlas.use_lut_gemm", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x})[0]

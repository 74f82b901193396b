"""Single layers in lutra, ONNX Runtime, OpenVINO and PyTorch, in float and in int8.

    python -m benchmarks.layers [--json FILE] [--threads N] [--isa avx2] [--case TEXT] ...

A layer stands in a small network, so that nobody's conversion of the float32 input and output
decides: three equal convolutions, or a linear layer and the layer back, with ReLU between. lutra
runs it with product quantisation (codes of patches, of kernel rows and of pixels), with response
tables of 4 bits (16x15) and of 2 bits (4x3), and multiplied in int8.
"""

from __future__ import annotations

from typing import Final

from benchmarks.command import run_command
from benchmarks.lookups import GROUPED, Method, Multiplied, Response, encoders
from benchmarks.measure import Case
from benchmarks.networks import convolutions, linears

#: Channels and size of the image: those of ResNets on ImageNet and on CIFAR.
_CONVOLUTIONS: Final = (
    (64, 56), (128, 28), (256, 14), (512, 7),
    (64, 32), (128, 16), (256, 8), (512, 4),
)  # fmt: skip
#: The shape that is measured with other sizes of tables too.
_SWEEP: Final = (256, 14)
_TABLES: Final = (Response(16, 15), Response(4, 3), Multiplied())
_METHODS: Final[tuple[Method, ...]] = (*encoders(), *GROUPED, *_TABLES)
_SWEPT: Final[tuple[Method, ...]] = (
    *(pq for k in (8, 32, 64) for pq in encoders(k=k)),
    *(Response(*size) for size in ((8, 7), (32, 33), (64, 33))),
)

CASES: Final = (
    *(
        Case(convolutions(*shape), 1, _METHODS + (_SWEPT if shape == _SWEEP else ()))
        for shape in _CONVOLUTIONS
    ),
    Case(linears(1, 4096, 4096), 1, (*encoders(v=8), *_TABLES)),
    Case(linears(128, 384, 1536), 128, (*encoders(v=16), *_TABLES)),
    Case(linears(512, 768, 768), 512, (*encoders(v=16), *encoders(v=32), *_TABLES)),
)

if __name__ == "__main__":
    run_command("benchmarks.layers", __doc__.splitlines()[0], CASES)

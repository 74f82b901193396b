"""Single layers in lutra, ONNX Runtime, OpenVINO and PyTorch, in float and in int8.

    python -m benchmarks.layers [--json FILE] [--threads N] [--isa avx2] [--case TEXT] ...

A layer stands in a small network, so that nobody's conversion of the float32 input and output
decides: three equal convolutions, or a linear layer and the layer back, with ReLU between.
"""

from __future__ import annotations

from typing import Final

from benchmarks.command import run_command
from benchmarks.lookups import Lookup
from benchmarks.measure import Case
from benchmarks.networks import convolutions, linears

#: Channels and size of the image: those of ResNets on ImageNet and on CIFAR.
_CONVOLUTIONS: Final = (
    (64, 56), (128, 28), (256, 14), (512, 7),
    (64, 32), (128, 16), (256, 8), (512, 4),
)  # fmt: skip
#: The shape that is measured with other sizes of tables too.
_SWEEP: Final = (256, 14)

CASES: Final = (
    *(
        Case(convolutions(*shape), 1, tuple(Lookup(k=k) for k in ks))
        for shape in _CONVOLUTIONS
        for ks in ((16, 8, 32, 64) if shape == _SWEEP else (16,),)
    ),
    Case(linears(1, 4096, 4096), 1, (Lookup(v=8),)),
    Case(linears(128, 384, 1536), 128, (Lookup(v=16),)),
    Case(linears(512, 768, 768), 512, (Lookup(v=16), Lookup(v=32))),
)

if __name__ == "__main__":
    run_command("benchmarks.layers", __doc__.splitlines()[0], CASES)

"""Whole networks in lutra, ONNX Runtime, OpenVINO and PyTorch, in float and in int8.

    python -m benchmarks.models [--json FILE] [--threads N] [--isa avx2] [--case TEXT] ...

The first convolution and the classifier are dense, all other convolutions are lookups: V = 9, 1x1
shortcuts V = 4, K = 16.
"""

from __future__ import annotations

from typing import Final

from benchmarks.command import run_command
from benchmarks.measure import Case
from benchmarks.networks import resnet18, resnet20, vgg11

CASES: Final = tuple(
    Case(network, batch)
    for network in (resnet20(), resnet18(32), vgg11(), resnet18(224))
    for batch in (1, 8)
)

if __name__ == "__main__":
    run_command("benchmarks.models", __doc__.splitlines()[0], CASES)

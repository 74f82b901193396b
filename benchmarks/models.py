"""Whole networks in lutra, ONNX Runtime, OpenVINO and PyTorch, in float and in int8.

    python -m benchmarks.models [--json FILE] [--threads N] [--isa avx2] [--case TEXT] ...

The first convolution, depthwise ones and the last layer are dense. All others are lookups: product
quantisation with V = 9, 1x1 convolutions V = 4, K = 16, or with codes of kernel rows (V = 3) or of
pixels (V = 4, 8, 16), and response tables of 4 bits (16x15) and 2 bits (4x3).
"""

from __future__ import annotations

from typing import Final

from benchmarks.command import run_command
from benchmarks.lookups import GROUPED, Multiplied, Response, encoders
from benchmarks.measure import Case
from benchmarks.networks import (
    Conv,
    Network,
    dscnn,
    efficientnet_lite0,
    keyword_resnet,
    mobilenet_v2,
    pointnet,
    resnet9,
    resnet18,
    resnet20,
    vdsr,
    vgg11,
)

_NETWORKS: Final = (
    *(
        (network, (1, 8))
        for network in (resnet20(), resnet9(), resnet18(32), vgg11(), resnet18(224))
    ),
    (vdsr(128), (1,)),
    (pointnet(512), (1, 8)),
    (dscnn(), (1,)),
    (keyword_resnet(), (1,)),
    (mobilenet_v2(96), (1,)),
    (efficientnet_lite0(224), (1,)),
)


def _has_windows(network: Network) -> bool:
    """Whether some lookups read more than a pixel."""
    return any(
        isinstance(layer, Conv) and layer.lookup and layer.kernels != (1, 1)
        for layer in network.layers
    )


_TABLES: Final = (Response(16, 15), Response(4, 3), Multiplied())
CASES: Final = tuple(
    Case(network, batch, (*encoders(), *(GROUPED if _has_windows(network) else ()), *_TABLES))
    for network, batches in _NETWORKS
    for batch in batches
)

if __name__ == "__main__":
    run_command("benchmarks.models", __doc__.splitlines()[0], CASES)

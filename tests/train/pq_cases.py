"""Lookup layers of many shapes, and the ways to run them, for the tests of the training side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lutra.graph import Node
from lutra.reference import run_node
from lutra.train import PQ, PQConv2d, PQLinear


@dataclass(frozen=True)
class Case:
    """A convolution, its method and its input size."""

    v: int
    k: int = 16
    channels: int = 4
    outputs: int = 5
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    signed: bool = False
    act_bits: int = 7
    size: tuple[int, int] = (7, 6)
    bias: bool = True


CASES = [
    Case(v=1, k=8, channels=2),
    Case(v=3),
    Case(v=4, signed=True),  # 36 = 9 * 4
    Case(v=5, signed=True, k=32),  # the last sub-vector has one entry
    Case(v=9),
    Case(v=9, signed=True, stride=(2, 1), padding=(0, 2), bias=False),
    Case(v=9, k=64, dilation=(2, 1), padding=(2, 1), size=(8, 9), act_bits=6, signed=True),
    Case(v=9, channels=1, kernel=(5, 3), padding=(2, 0), outputs=1, k=8),
    Case(v=18, k=32, channels=3),  # 27 = 18 + 9
    Case(v=18, signed=True, stride=(3, 3), padding=(1, 1)),
    Case(v=4, kernel=(1, 1), padding=(0, 0), channels=7, signed=True),
    Case(v=16, kernel=(1, 1), padding=(0, 0), stride=(2, 2), channels=16, act_bits=4),
    Case(v=40, k=8, signed=True),  # longer than a row
    Case(v=64, channels=9, k=64),
]


def make_conv(case: Case, seed: int = 0, **method: Any) -> PQConv2d:
    """A layer whose centroids are random points of the grid's range."""
    torch.manual_seed(seed)
    dense = nn.Conv2d(
        case.channels,
        case.outputs,
        case.kernel,
        case.stride,
        case.padding,
        case.dilation,
        bias=case.bias,
    )
    method = {"centroids": "gradient", **method}
    return spread(
        PQConv2d.from_float(dense, PQ(v=case.v, k=case.k, act_bits=case.act_bits, **method)),
        case.signed,
    )


def make_linear(features: int, outputs: int, *, signed: bool = False, **method: Any) -> PQLinear:
    torch.manual_seed(1)
    method = {"centroids": "gradient", **method}
    return spread(PQLinear.from_float(nn.Linear(features, outputs), PQ(**method)), signed)


def spread(layer: Any, signed: bool) -> Any:
    layer.set_activation_range(-2.0 if signed else 0.0, 2.0)
    with torch.no_grad():
        layer.centroids.uniform_(-2.0 if signed else 0.0, 2.0)
    return layer


def images(case: Case, batch: int = 3, seed: int = 3) -> Tensor:
    """Inputs that go beyond the grid on both sides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(batch, case.channels, *case.size)
    return x.uniform_(-2.5, 2.5, generator=generator)


def reference(layer: Any, x: Tensor) -> np.ndarray[Any, Any]:
    """What the executable specification makes of the layer's integer tensors."""
    frozen = layer.freeze()
    tensors = frozen.arrays()
    roles = {role: role for role in tensors}
    node = Node(frozen.node.op, "layer", ("x",), "y", frozen.node.attrs, roles)
    return run_node(node, [x.contiguous().numpy()], tensors)


def operator_arguments(frozen: Any, x: Tensor) -> tuple[Any, ...]:
    """The arguments of `lutra::frozen`."""
    return x, list(frozen.tensors.values()), frozen.node.to_json()


def outputs_of_every_mode(layer: Any, x: Tensor) -> dict[str, Tensor]:
    layer.train()
    outputs = {"training": layer(x).detach()}
    layer.eval()
    outputs["eval with gradients"] = layer(x).detach()
    with torch.no_grad():
        outputs["eval"] = layer(x)
        outputs["frozen"] = layer.freeze()(x)
    with torch.inference_mode():
        outputs["inference"] = layer(x).clone()
    return outputs

"""The ordinary PyTorch module of a network: what a user has before lutra or any other runtime."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import (
    Add,
    Border,
    Conv,
    GlobalAverage,
    GlobalMax,
    Layer,
    Linear,
    MaxPool,
    Network,
    Relu,
)


class Dense(nn.Module):
    """Random weights that keep the size of the activations (He et al. 2015)."""

    def __init__(self, network: Network, seed: int = 0) -> None:
        super().__init__()
        self.network = network
        generator = torch.Generator().manual_seed(seed)
        self.weighted = nn.ModuleList()
        for layer in network.layers:
            module: nn.Conv2d | nn.Linear
            if isinstance(layer, Conv):
                module = nn.Conv2d(
                    layer.inputs,
                    layer.outputs,
                    layer.kernels,
                    layer.stride,
                    layer.padding,
                    groups=layer.groups,
                )
            elif isinstance(layer, Linear):
                module = nn.Linear(layer.inputs, layer.outputs)
            else:
                continue
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            assert module.bias is not None
            nn.init.normal_(module.bias, std=0.1, generator=generator)
            self.weighted.append(module)
        self.last_use = {x: i for i, layer in enumerate(network.layers) for x in _reads(layer)}

    def forward(self, x: Tensor) -> Tensor:
        """(N, *shape) to the output of the last layer."""
        weighted = iter(self.weighted)
        values = {"x": x}
        for i, layer in enumerate(self.network.layers):
            if isinstance(layer, Conv | Linear):
                y: Tensor = next(weighted)(values[layer.x])
            else:
                y = _apply(layer, values)
            for name in _reads(layer):
                if self.last_use[name] == i:
                    del values[name]
            values[layer.name] = y
        return y


def _reads(layer: Layer) -> tuple[str, ...]:
    return (layer.x, layer.other) if isinstance(layer, Add) else (layer.x,)


def _apply(layer: Layer, values: dict[str, Tensor]) -> Tensor:
    """A layer without weights."""
    x = values[layer.x]
    if isinstance(layer, Relu):
        return F.relu(x, inplace=True)  # nobody else reads what it reads
    if isinstance(layer, Add):
        return x + values[layer.other]
    if isinstance(layer, MaxPool):
        return F.max_pool2d(x, layer.kernel, layer.stride, layer.padding)
    if isinstance(layer, GlobalAverage):
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
    if isinstance(layer, GlobalMax):
        return F.adaptive_max_pool2d(x, 1).flatten(1)
    assert not isinstance(layer, Conv | Linear)
    if isinstance(layer, Border):
        return F.pad(x, (*layer.columns, *layer.rows))
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, layer.added, layer.added))

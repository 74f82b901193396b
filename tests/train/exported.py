"""Small models, their export, and the comparison of the exported graph with torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lutra.train.exporting.parity as check
from lutra.format import load_graph
from lutra.graph import Graph
from lutra.train.exporting.export import export

IMAGE = (3, 9, 8)


class Fn(nn.Module):
    """A model from a function of itself and its inputs, with child modules given by name."""

    def __init__(self, function: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            if isinstance(child, Tensor) and not isinstance(child, nn.Parameter):
                self.register_buffer(name, child)
            else:
                setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def randomise(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and signs as after training, so that folding is not trivial."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.3, 2.0, generator=generator)
            if module.weight is not None:
                with torch.no_grad():
                    module.weight.normal_(generator=generator)
                    module.bias.normal_(generator=generator)
    return model


def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    result = copy.deepcopy(model).eval()(*(x.clone() for x in inputs))
    values = result.values() if isinstance(result, dict) else result
    return [v.detach().numpy() for v in ([values] if isinstance(values, Tensor) else values)]


def check_model(
    tmp_path: Path, model: nn.Module, *shapes: tuple[int, ...], example_batch: int = 2
) -> Graph:
    """Export, load, and compare with torch at batch 1, 2 and 5; return the loaded graph."""
    randomise(model)
    generator = torch.Generator().manual_seed(3)

    def draw(batch: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)

    path = tmp_path / "model.lutra"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
        export(model, path, draw(example_batch))
    graph = load_graph(path)
    for batch in (1, 2, 5):
        inputs = draw(batch)
        feeds = {v.name: x.numpy() for v, x in zip(graph.inputs, inputs, strict=True)}
        wanted = outputs_of(model, inputs)
        assert len(wanted) == len(graph.outputs)
        for run in check.runners().values():
            got = run(graph, feeds)
            for name, want in zip(graph.outputs, wanted, strict=True):
                assert got[name].shape == want.shape
                assert check.difference(got[name], want) < 1e-5
    return graph


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


class PreActBlock(nn.Module):
    """Pre-activation block with an option-A shortcut: strided slice, then zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.extra = outputs - inputs
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x), inplace=True))
        y = self.conv2(F.relu(self.bn2(y)))
        short = x[:, :, :: self.stride, :: self.stride]
        return y + F.pad(short, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


class PreActNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(4, 4, 1), PreActBlock(4, 4, 1))
        self.layer2 = nn.Sequential(PreActBlock(4, 8, 2))
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(F.avg_pool2d(x, x.shape[2:]).view(x.size(0), -1))


def conv(*args: Any, **kwargs: Any) -> nn.Sequential:
    layer = nn.Conv2d(*args, **kwargs)
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU(inplace=True))

"""What a network of `test_architectures` is, and the inputs of such networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """A network with random weights.

    Attributes:
        make: Makes it.
        inputs: Makes its inputs: of a batch, a seed, and how much longer or larger than usual.
        axes: The axes that may have any size in the file; only the batch where it is empty.
        refused: What the refusal says; None where it works.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], tuple[Tensor, ...]]
    axes: tuple[int, ...] = ()
    refused: str | None = None


def spread(model: nn.Module) -> None:
    """Make every part of the network count: initial weights of zero and of 1e-6 hide faults."""
    generator = torch.Generator().manual_seed(11)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                fan = max(1, value[0].numel())
                value.normal_(0, min(0.5, fan**-0.5), generator=generator)
            else:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))


def tokens(batch: int, seed: int, more: int) -> tuple[Tensor, ...]:
    """Ids and a mask of sentences of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    length = 7 + more
    ids = torch.randint(3, 60, (batch, length), generator=generator)
    lengths = torch.randint(3, length + 1, (batch,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    return ids * mask + (1 - mask), mask


def ids_alone(batch: int, seed: int, more: int) -> tuple[Tensor, ...]:
    return tokens(batch, seed, more)[:1]


def pixels(*shape: int, step: int = 0) -> Callable[[int, int, int], tuple[Tensor, ...]]:
    def draw(batch: int, seed: int, more: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        larger = step * (more > 0)
        sizes = (shape[0], *(size + larger for size in shape[1:]))
        return (torch.randn(batch, *sizes, generator=generator),)

    return draw


def signal(length: int) -> Callable[[int, int, int], tuple[Tensor, ...]]:
    def draw(batch: int, seed: int, more: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(batch, length + 40 * more, generator=generator),)

    return draw

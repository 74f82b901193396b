"""Running statistics of batch norms: the same in all processes, and not behind the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lutra.train import distributed as collective
from lutra.train.batches import BatchReader
from lutra.train.finetuning.accelerate import unwrapped


def _batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of all batch norms that keep them."""
    kept = [(layer.running_mean, layer.running_var) for layer in _batch_norms(model)]
    return [value for pair in kept for value in pair if value is not None]


def freeze_batch_norm(model: nn.Module) -> None:
    """Lets batch norms use their running statistics, and not renew them, until the next `train`."""
    for layer in _batch_norms(model):
        layer.eval()


@torch.no_grad()
def average_batch_norm(model: nn.Module) -> None:
    """Makes running statistics, which every process gathers alone, the same everywhere.

    Their averages move linearly, so that it does not matter how often this is done.
    """
    if not collective.active():
        return
    processes = torch.distributed.get_world_size()
    for layer in _batch_norms(model):
        for statistic in (layer.running_mean, layer.running_var):
            if statistic is not None:
                collective.all_reduce(statistic).div_(processes)


@torch.no_grad()
def renew_batch_norm(
    model: nn.Module, data: Iterable[Any], batches: int, reader: BatchReader, device: torch.device
) -> None:
    """Replaces running statistics by the plain average over some training batches.

    Only the normalisation layers are in training mode, so nothing else moves.
    """
    layers = _batch_norms(model)
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    with unwrapped(model):
        for i, batch in enumerate(data):
            if i == batches:
                break
            inputs = reader.training(batch, device, own_loss=True)
            model(*inputs.args, **inputs.kwargs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum

"""Which parameters learn how fast: asked from the layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lutra.errors import LutraError
from lutra.train.finetuning.settings import Schedule
from lutra.train.layers.base import QuantizedLayer


def quantized_layers(model: nn.Module) -> list[QuantizedLayer]:
    """The layers that have a say in their training."""
    return [module for module in model.modules() if isinstance(module, QuantizedLayer)]


def codebook_parameters(layers: Iterable[QuantizedLayer]) -> list[nn.Parameter]:
    """The codebooks of some layers that an optimiser moves."""
    return [parameter for layer in layers for parameter in layer.codebook_parameters()]


def weight_parameters(model: nn.Module, layers: Iterable[QuantizedLayer]) -> list[nn.Parameter]:
    """The parameters that a dense model has too: all but codebooks, tables and what scales them."""
    own = {
        parameter
        for layer in layers
        for name, parameter in layer.named_parameters()
        if name not in ("weight", "bias")
    }
    return [parameter for parameter in model.parameters() if parameter not in own]


def parameter_groups(model: nn.Module, schedule: Schedule) -> list[dict[str, Any]]:
    """Groups for an optimiser: ordinary parameters, temperatures, tables, and codebooks if they
    have a learning rate of their own; those that are empty are left out.

    Raises:
        LutraError: no parameter requires a gradient.
    """
    layers = quantized_layers(model)
    hot = {parameter for layer in layers for parameter in layer.temperature_parameters()}
    spared = {parameter for layer in layers for parameter in layer.table_parameters()}
    slow = set(codebook_parameters(layers)) if schedule.codebook_lr is not None else set()
    temperatures: list[nn.Parameter] = []
    codebooks: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter in hot:
                group = temperatures
            elif parameter in spared:
                group = tables
            else:
                group = codebooks if parameter in slow else others
            group.append(parameter)
    decay = schedule.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": schedule.lr, "weight_decay": decay},
        {"params": temperatures, "lr": schedule.temperature_lr, "weight_decay": decay},
        {"params": tables, "lr": schedule.rate_of_tables, "weight_decay": 0.0},
        {"params": codebooks, "lr": schedule.codebook_lr, "weight_decay": decay},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise LutraError("finetune: no parameter of the model requires a gradient")
    return groups

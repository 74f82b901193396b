"""Where NaN and infinity come from: looked for when a run must stop, and only then."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lutra.train.batches import TrainingBatch, named_tensors
from lutra.train.finetuning.accelerate import unwrapped
from lutra.train.layers.finite import FiniteCheck, NotFiniteError, describe, is_finite
from lutra.train.modes import evaluating

if TYPE_CHECKING:
    from accelerate import Accelerator


def bad_input(inputs: TrainingBatch) -> str | None:
    """Names the first tensor among the arguments of a model that is not finite.

    A mask that is added to attention scores, of 0 and -infinity only, is let through.
    """
    for name, x in named_tensors(inputs.args, inputs.kwargs):
        if not is_finite(x) and not bool(((x == 0) | (x == -torch.inf)).all()):
            return f"{name} has {describe(x)}"
    return None


@torch.no_grad()
def reached_layer(model: nn.Module, inputs: TrainingBatch) -> str | None:
    """The first quantised layer that NaN or infinity reaches; runs the model in eval mode, so that
    nothing in it moves."""
    try:
        with evaluating(model), unwrapped(model), FiniteCheck(model):
            model(*inputs.args, **inputs.kwargs)
    except NotFiniteError as error:
        return error.layer
    return None


@torch.no_grad()
def broken_layer(
    model: nn.Module, inputs: TrainingBatch, accelerator: Accelerator
) -> tuple[str, str] | None:
    """The first layer that makes NaN or infinity of finite inputs, and what its output has.

    A copy of the model runs, in training mode, as it ran in the step.
    """
    found: list[tuple[str, str]] = []
    with unwrapped(model):
        trial = copy.deepcopy(model).train()
    for name, module in trial.named_modules():
        if next(module.children(), None) is not None:
            continue

        def look(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if not found and _all_finite(args) and not _all_finite([output]):
                wrong = [x for _, x in named_tensors([output], {}) if not is_finite(x)]
                found.append((name, describe(wrong[0])))

        module.register_forward_hook(look)
    with accelerator.autocast():
        trial(*inputs.args, **inputs.kwargs)
    return found[0] if found else None


def _all_finite(values: Sequence[Any]) -> bool:
    return all(is_finite(x) for _, x in named_tensors(values, {}))

"""Modules that cannot be exported, found before a trace: tracing some of them takes a minute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from lutra.train.exporting.lowering.core import LOWERINGS
from lutra.train.exporting.lowering.emitter import UnsupportedOp, unsupported_model
from lutra.train.exporting.lowering.hints import hint_for

#: The operators of a module; one of them must have a lowering. The first stands in errors.
NEEDS: Final[Mapping[type[nn.Module], tuple[str, ...]]] = {
    nn.RNN: ("aten.rnn_tanh.input", "aten.rnn_relu.input"),
}
#: What a layer with projections is told.
PROJECTS: Final = (
    "it projects its hidden values, which works for sequences of fixed length; leave proj_size "
    "out, or take the axis of the sequence out of dynamic_axes"
)


def check_modules(model: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Refuses a model that calls modules without a lowering.

    Args:
        model: The model, in eval mode.
        example: Its arguments; one sample is run if there is such a module.

    Raises:
        UnsupportedModelError: Such modules, all of them listed.
    """
    every = {module: _lacking(module) for module in model.modules()}
    lacking = {module: needed for module, needed in every.items() if needed is not None}
    if not lacking:
        return
    called: dict[nn.Module, None] = {}

    def note(module: nn.Module, _: Any) -> None:
        called[module] = None

    handles = [module.register_forward_pre_hook(note) for module in lacking]
    try:
        with torch.no_grad():
            model(*(tensor[:1].clone() for tensor in example))
    except Exception:  # a model that fails is for `capture` to refuse, with the whole example
        return
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in model.named_modules()}
    found = [UnsupportedOp(lacking[m][0], names[m], lacking[m][1]) for m in called]
    if found:
        raise unsupported_model(found)


def _lacking(module: nn.Module) -> tuple[str, str] | None:
    """The operator of a module that has no lowering, and what to do; None for other modules."""
    needed = NEEDS.get(type(module))
    if needed is None or LOWERINGS.keys() & set(needed):
        return None
    return needed[0], hint_for(needed[0])

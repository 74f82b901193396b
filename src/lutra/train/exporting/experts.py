"""Mixtures of experts of `transformers`, traced so that every expert sees every token.

Its own forms sort the batch by expert, or go through the experts that were chosen, which depends on
values. An expert that was not chosen counts with a weight of 0 here: the result is the same, and
the work that of all experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_MODULE = "transformers.integrations.moe"


@contextmanager
def every_expert() -> Iterator[None]:
    """Takes `all_experts` for the experts of `transformers`, where it is imported."""
    interface = getattr(sys.modules.get(_MODULE), "ExpertsInterface", None)
    if interface is None:
        yield
        return
    chosen = interface.get_interface

    def get_interface(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return all_experts

    interface.get_interface = get_interface
    try:
        yield
    finally:
        interface.get_interface = chosen


def all_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The weighted sum of experts, each of them computed for all tokens.

    Args:
        module: Holds the weights of all experts in tensors of three axes, in the form that
            `transformers` gives to such modules.
        hidden_states: (S, features).
        top_k_index: (S, k) experts of each token; a number that is none of them counts for nothing.
        top_k_weights: (S, k).
    """
    experts: Any = module
    total = None
    for expert in range(experts.num_experts):
        share = (top_k_weights * (top_k_index == expert)).sum(-1, keepdim=True)
        name = "gate_up_proj" if experts.has_gate else "up_proj"
        x = _linear(experts, name, expert, hidden_states)
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        x = _linear(experts, "down_proj", expert, x)
        x = experts.post_expert_norm(x) if experts.has_post_expert_norm else x
        total = x * share if total is None else total + x * share
    assert total is not None
    return total


def _linear(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return F.linear(x, weight.t() if experts.is_transposed else weight, bias)

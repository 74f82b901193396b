"""How modules of networks are seen as the dense layers that families replace.

A family makes layers for `nn.Conv2d`, `nn.Linear` and `nn.Embedding`. Other modules compute the
same with another layout of input or weight, and a `Form` says which: a family needs no code for
them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

#: Hooks that compute a weight before each call.
WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


@dataclass(frozen=True)
class Form:
    """A kind of module, seen as a dense layer.

    Attributes:
        name: how reports call it.
        dense: the dense layer.
        line: whether inputs and outputs are (N, C, L), images of one row.
        transposed: whether the weight is (D, M).
    """

    name: str
    dense: type[nn.Module]
    line: bool = False
    transposed: bool = False

    def enter(self, x: Tensor) -> Tensor:
        """The input of the dense layer."""
        return x.unsqueeze(2) if self.line else x

    def leave(self, y: Tensor) -> Tensor:
        """The output of the module, given the output of the dense layer."""
        return y.squeeze(2) if self.line else y

    def kernel(self, weight: Tensor) -> Tensor:
        """The weight with the outputs on its first axis."""
        return weight.t().contiguous() if self.transposed else weight


CONV2D = Form("conv2d", nn.Conv2d)
CONV1D = Form("conv1d", nn.Conv2d, line=True)
LINEAR = Form("linear", nn.Linear)
TRANSPOSED_LINEAR = Form("linear", nn.Linear, transposed=True)
EMBEDDING = Form("embedding", nn.Embedding)


def _forms() -> Iterator[tuple[type[nn.Module], Form]]:
    yield nn.Conv2d, CONV2D
    yield nn.Conv1d, CONV1D
    yield nn.Linear, LINEAR
    yield nn.Embedding, EMBEDDING
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None:  # without it there are no such modules
        yield transformers.Conv1D, TRANSPOSED_LINEAR


def runs_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of a kind and computes with its forward, and no other."""
    own = type(module)
    return (
        isinstance(module, kind)
        and own.forward is kind.forward
        and own.__call__ is nn.Module.__call__
        and getattr(own, "_conv_forward", None) is getattr(kind, "_conv_forward", None)
        and not {"forward", "_conv_forward"} & module.__dict__.keys()
    )


def form_of(module: nn.Module) -> Form | None:
    """The form of a module; None where nothing can replace it."""
    for kind, form in _forms():
        if runs_forward_of(module, kind):
            renorms = isinstance(module, nn.Embedding) and module.max_norm is not None
            return None if renorms else form
    return None


def why_kept(module: nn.Module) -> str:
    """Why nothing can replace a module that has no form."""
    name = type(module).__name__
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its max_norm changes the weight while it runs"
    for kind, _ in _forms():
        if isinstance(module, kind):
            return f"{name} has a forward of its own, other than that of {kind.__name__}"
    return f"{name} has no lookup form"


def is_parametrized(module: nn.Module) -> bool:
    """Whether a weight of a module is computed before each call: weight norm, spectral norm,
    pruning, or another parametrization."""
    return parametrize.is_parametrized(module) or any(
        isinstance(hook, WEIGHT_HOOKS) for hook in module._forward_pre_hooks.values()
    )

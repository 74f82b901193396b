"""Whether a converted model calls its new layers wherever the dense model calls the old ones.

Code that multiplies by the weight of a layer, or keeps the dense layer in a place that is no
submodule, would go on with the dense network. Both models run one batch, the new layers with their
float weights, so that both take the same way; the calls are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lutra.errors import LutraError
from lutra.train.batches import BatchReader
from lutra.train.layers.attention import plain_attention
from lutra.train.layers.base import QuantizedLayer
from lutra.train.modes import evaluating


@torch.no_grad()
def check_calls(
    dense: nn.Module,
    converted: nn.Module,
    layers: Mapping[str, tuple[nn.Module, nn.Module]],
    batch: Any,
) -> None:
    """Compares the calls of layers in two models, in eval mode.

    Args:
        dense: the model before.
        converted: the model after.
        layers: the layer of the dense model and the new one, by path.
        batch: of calibration data.

    Raises:
        LutraError: names the layers that the converted model does not call as often.
    """
    device = next((p.device for p in dense.parameters()), torch.device("cpu"))
    args, kwargs = BatchReader(dense, "calibration data").inputs(batch, device)
    before: Counter[str] = Counter()
    old = {name: layer for name, (layer, _) in layers.items()}
    with plain_attention(), _counting(old, before), evaluating(dense):
        dense(*args, **kwargs)
    after: Counter[str] = Counter()
    new = {name: made for name, (_, made) in layers.items()}
    reads = _Reads(_own_weights(converted, new))
    with _counting(new, after, reads.inside), evaluating(converted):
        try:
            with reads:
                converted(*args, **kwargs)
        except Exception as error:
            raise LutraError(
                "convert: the converted model fails on a batch of the calibration data, which the "
                f"dense one takes ({type(error).__name__}: {error}); keep the layers that the "
                "failing code reads"
            ) from error
    missed = [n for n in before if not after[n] or (after[n] < before[n] and reads.seen[n])]
    if missed:
        names = ", ".join(f"'{name}'" for name in missed[:8])
        raise LutraError(
            f"convert: the model goes past the new layers {names}{', ...' * (len(missed) > 8)}, as "
            "its code reads their weights without calling them, or holds them in another way than "
            "as submodules; keep these layers, or change that code"
        )


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which weights operators get outside of the calls of their layers.

    Args:
        weights: the name of each weight's layer, by id.
    """

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = weights
        self.inside: Counter[str] = Counter()  # calls that run
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for value in torch.utils._pytree.arg_tree_leaves(*args):
            name = self._weights.get(id(value)) if isinstance(value, Tensor) else None
            if name is not None and not self.inside[name]:
                self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def _own_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[int, str]:
    """The weights that no other module of a model holds, by id."""
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    weights = {
        id(layer._parameters["weight"]): name
        for name, layer in layers.items()
        if layer._parameters.get("weight") is not None
    }
    return {key: name for key, name in weights.items() if holders[key] == 1}


@contextmanager
def _counting(
    layers: Mapping[str, nn.Module], calls: Counter[str], inside: Counter[str] | None = None
) -> Iterator[None]:
    """Counts the calls of layers; those that are quantised compute with their float weights. No
    hooks, which would keep encoders off the fast path.

    Args:
        inside: how many calls of each layer run.
    """

    def counted(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            if inside is None:
                return forward(*args, **kwargs)
            inside[name] += 1
            try:
                return forward(*args, **kwargs)
            finally:
                inside[name] -= 1

        return run

    for name, layer in layers.items():
        forward: Any = layer.forward
        if isinstance(layer, QuantizedLayer):
            forward = layer.dense_forward
        layer.__dict__["forward"] = counted(name, forward)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.__dict__["forward"]

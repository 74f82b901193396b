"""NaN and infinity on their way into layers that would round them to numbers.

A quantised layer makes codes of its input, and a code is always a number: what comes out of NaN is
finite and wrong. So the inputs of these layers are looked at. A sum shows nearly all there is to
see, at a few percent of the cost of rounding; only where it is not finite all values are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train.layers.base import QuantizedLayer


class NotFiniteError(LutraError):
    """NaN or infinity reached a quantised layer; `layer` is its path."""

    def __init__(self, message: str, layer: str) -> None:
        super().__init__(message)
        self.layer = layer


def _sum(x: Tensor) -> Tensor:
    return x.detach().sum(dtype=torch.float32)


def is_finite(x: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity; fast where it is."""
    if not x.is_floating_point() or x.is_meta:
        return True
    # The sum of large numbers may overflow.
    return math.isfinite(float(_sum(x))) or bool(torch.isfinite(x).all())


def describe(x: Tensor) -> str:
    """What a tensor has that is not finite, for errors: "NaN in 24 of 384 values"."""
    nan, infinite = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    kinds = [kind for kind, count in (("NaN", nan), ("infinity", infinite)) if count]
    return f"{' and '.join(kinds)} in {nan + infinite} of {x.numel()} values"


class FiniteCheck:
    """Looks at the inputs of a model's quantised layers while it is installed.

    Args:
        model: the model, whose quantised layers get a hook each.
        wait: whether to collect what is seen for `verify`, instead of raising in the layer. It
            saves a GPU from waiting for every layer.
    """

    def __init__(self, model: nn.Module, *, wait: bool = False) -> None:
        self._wait = wait
        self._seen: list[tuple[str, Tensor, Tensor]] = []
        self._names: dict[nn.Module, str] = {
            module: name
            for name, module in model.named_modules()
            if isinstance(module, QuantizedLayer)
        }
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._install()

    def _install(self) -> None:
        for layer in self._names:
            self._handles.append(layer.register_forward_pre_hook(self._look, with_kwargs=True))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the hooks away for a while."""
        self.remove()
        try:
            yield
        finally:
            self._install()

    def _look(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for x in (*args, *kwargs.values()):
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_meta:
                continue
            if self._wait:
                self._seen.append((self._names[layer], x.detach(), _sum(x)))
            elif not is_finite(x):
                self._refuse(self._names[layer], x)

    def _refuse(self, name: str, x: Tensor) -> None:
        where = f"layer '{name}'" if name else "the model"
        raise NotFiniteError(
            f"the input of {where} has {describe(x)}, which its codes would turn into numbers; "
            "check the data, and the layers before it",
            name,
        )

    def verify(self) -> None:
        """Judges what was collected since the last call; nothing if `wait` is not set.

        Raises:
            NotFiniteError: names the first layer whose input was not finite.
        """
        seen, self._seen = self._seen, []
        if not seen or bool(torch.stack([total for *_, total in seen]).isfinite().all()):
            return
        for name, x, _ in seen:
            if not is_finite(x):
                self._refuse(name, x)

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def __enter__(self) -> FiniteCheck:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def check_finite(model: nn.Module) -> FiniteCheck:
    """Lets the quantised layers of a model refuse NaN and infinity, in a training loop of your own.

    Without it they turn NaN into a number, and training goes on with a finite loss. `finetune`
    checks by itself. The check costs one sum over the input of each layer; on a GPU it also waits
    for the layer.

    Args:
        model: a converted model. Layers that are put into it later are not checked.

    Returns:
        An object that takes the checks away: by `remove()`, or at the end of a block
        `with check_finite(model):`.

    Raises:
        LutraError: not now, but in a forward pass: names the layer and counts what is not finite.
    """
    return FiniteCheck(model)

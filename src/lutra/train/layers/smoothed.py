"""Linear layers that may divide the features of their input by factors before they round them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lutra.train.layers.base import FrozenLayer, RowLayer


class SmoothedLinear(RowLayer):
    """A linear layer whose state has `smoothing` (D) once `smooth` was called."""

    def smooth(self, factors: Tensor) -> None:
        """Divides the features of the input by factors (D), and multiplies the weights by them."""
        self.smoothing = factors.detach().to(self.weight.device, torch.float32).clone()

    def _run(self, x: Tensor) -> Tensor:
        if self.smoothing is not None:
            x = x.float() * (1.0 / self.smoothing).view(1, -1, 1, 1)
        return super()._run(x)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        factors = state.get(prefix + "smoothing")
        self.smoothing = None if factors is None else torch.empty_like(factors)
        super()._load_from_state_dict(state, prefix, *rest)


class FrozenSmoothed(FrozenLayer):
    """A frozen layer that multiplies the features of its input by the inverse of the factors."""

    factor: Tensor | None

    def divide_by(self, smoothing: Tensor | None) -> None:
        """Lets features be divided by these numbers first; by none for None."""
        factor = None if smoothing is None else 1.0 / smoothing
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """As of the layer that was frozen."""
        return super().forward(x if self.factor is None else x * self.factor)

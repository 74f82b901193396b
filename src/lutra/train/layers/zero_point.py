"""Layers whose activation grid has its zero at any integer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lutra.train.layers.base import QuantizedLayer

_LEAST_RANGE = 1e-6


class ZeroPointLayer(QuantizedLayer):
    """A layer with `zero_point` in its state, the integer of the grid that stands for zero."""

    zero_point: Tensor
    spare = 0  # integers of the grid that must be above zero

    def _hold_grid(self, device: torch.device) -> None:
        super()._hold_grid(device)
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32, device=device))

    def _zero(self) -> int:
        return int(self.zero_point)

    def _grid_source(self) -> tuple[Tensor, ...]:
        return (*super()._grid_source(), self.zero_point)

    @torch.no_grad()
    def set_activation_range(self, low: float, high: float) -> None:
        """Sets the grid to cover low..high and zero; both ends count."""
        low, high = min(low, 0.0), max(high, 0.0)
        qmax = (1 << self.method.act_bits) - 1
        step = max(high - low, _LEAST_RANGE) / qmax
        zero = min(max(round(-low / step), 1 if low < 0.0 else 0), qmax - self.spare)
        if 0 < zero < qmax:  # rounding has moved the ends: the step that reaches both
            step = max(-low / zero, high / (qmax - zero), _LEAST_RANGE / qmax)
        self.zero_point.fill_(zero)
        self.signed.fill_(zero > 0)
        self._set_step(step)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        key = prefix + "zero_point"
        if key not in state and prefix + "signed" in state:  # states without it were symmetric
            middle = 1 << (self.method.act_bits - 1)
            signed = bool(state[prefix + "signed"])
            state[key] = torch.tensor(middle if signed else 0, dtype=torch.int32)
        super()._load_from_state_dict(state, prefix, *rest)

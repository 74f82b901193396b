"""What the outputs of a layer should be: values of the dense network at the same rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lutra.train import distributed

_DEAD = 1e-6  # of the largest gain: nothing of such an output arrives


@dataclass
class Goal:
    """What y (n, M), the outputs of a layer, should be.

    They count as `gain * y + offset`, cut off at `low` and `high`: the value behind a batch norm,
    an addition and a ReLU.

    Args:
        want: the same value in the dense network (n, M), before it is cut off.
        gain: (M). None is 1.
        offset: (n, M) or (M): what is added, in the network that is calibrated. None is 0.
        low, high: where the values are cut off.
    """

    want: Tensor
    gain: Tensor | None = None
    offset: Tensor | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def is_cut(self) -> bool:
        """Whether some errors count for nothing."""
        return self.low > -math.inf or self.high < math.inf

    def of(self, y: Tensor) -> Tensor:
        """The value that y becomes, before it is cut off."""
        if self.gain is not None:
            y = y * self.gain
        return y if self.offset is None else y + self.offset

    def targets(self, y: Tensor) -> Tensor:
        """Outputs (n, M) without an error, near y.

        Where the dense value is cut off, what is cut off as well has no error. Steps of least
        squares towards these targets, each from the y of the last one, lessen the error behind
        the cut, or a bound of it where y is cut off and should not be.
        """
        want = self.want
        if self.is_cut:
            value = self.of(y)
            want = torch.where(want <= self.low, value.clamp(max=self.low), want)
            want = torch.where(want >= self.high, value.clamp(min=self.high), want)
        if self.offset is not None:
            want = want - self.offset
        if self.gain is None:
            return want
        dead = self.gain.abs() <= _DEAD * self.gain.abs().max()
        return torch.where(dead, y, want / torch.where(dead, 1.0, self.gain))

    def weights(self, outputs: int) -> Tensor:
        """What an error of each output counts (M)."""
        if self.gain is None:
            return torch.ones(outputs, device=self.want.device)
        return self.gain.square()

    def error(self, y: Tensor) -> float:
        """Mean squared error of y relative to the variance of the dense value."""
        want = self.want.clamp(self.low, self.high)
        variance = want.var(correction=0).clamp_min(1e-12)
        found = self.of(y).clamp(self.low, self.high)
        return distributed.mean(float((found - want).square().mean() / variance))

    def at(self, rows: slice) -> Goal:
        """That of some of the rows."""
        offset = self.offset
        if offset is not None and offset.dim() == 2:
            offset = offset[rows]
        return Goal(self.want[rows], self.gain, offset, self.low, self.high)

    def of_outputs(self, outputs: slice) -> Goal:
        """That of some of the outputs."""
        gain = None if self.gain is None else self.gain[outputs]
        offset = None if self.offset is None else self.offset[..., outputs]
        return Goal(self.want[:, outputs], gain, offset, self.low, self.high)

    def to(self, device: torch.device) -> Goal:
        """The same on another device."""
        gain = None if self.gain is None else self.gain.to(device)
        offset = None if self.offset is None else self.offset.to(device)
        return Goal(self.want.to(device), gain, offset, self.low, self.high)

"""The exponential average of the parameters of a run, and of the statistics of batch norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lutra.train.finetuning.batch_norm import running_statistics


class Average:
    """Follows the parameters of a model that are trained: average += (1 - decay) * (new - average).

    The running means and variances of batch norms are averaged in the same way: those of the
    parameters that move do not fit the average. Early in a run the decay is smaller,
    (1 + steps) / (10 + steps), so that the average does not remember the start for long.

    Args:
        model: its parameters must stay the same tensors.
        decay: 0..1, of long runs; None keeps no average, and nothing below does anything.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self._decay, self._steps = decay, 0
        found: list[Tensor] = []
        if decay is not None:
            found += [p for p in model.parameters() if p.requires_grad]
            found += running_statistics(model)
        self._parameters = found
        self._average = [p.detach().clone() for p in found]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the parameters as they are."""
        if self._decay is None:
            return
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        # Of the current values: `.data` of a parameter may be replaced, the parameter may not.
        torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1.0 - decay)

    @torch.no_grad()
    def settle(self) -> None:
        """Gives the model the average for good."""
        for parameter, average in zip(self._parameters, self._average, strict=True):
            parameter.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average for a while, then its own parameters again, bit for bit."""
        own = [p.detach().clone() for p in self._parameters]
        self.settle()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, own, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"steps": self._steps, "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with the average of a checkpoint.

        Raises:
            ValueError: it is of another model.
        """
        saved = state["average"]
        shapes = [tuple(value.shape) for value in saved]
        if shapes != [tuple(value.shape) for value in self._average]:
            raise ValueError("the average of the parameters has other shapes")
        self._steps = int(state["steps"])
        for average, value in zip(self._average, saved, strict=True):
            average.copy_(value)

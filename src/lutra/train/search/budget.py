"""What a search may cost: quality, time, and the machine that it is for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from lutra.errors import LutraError
from lutra.formatting import did_you_mean
from lutra.runtime.cpu import MAX_THREADS, choose_isa

Target = Literal["latency", "size"]

#: Points that are given up where nothing is said of them.
DEFAULT_DROP: Final = 1.0
_MOST_MINUTES: Final = 60.0 * 24 * 365


@dataclass(frozen=True)
class Budget:
    """What a search may give up, and how long it may take.

    Args:
        max_drop: the largest loss of quality against the dense model, in the unit of the measure:
            points of accuracy, agreement and cosine similarity (all times 100), dB of images. None
            is 1 there. With an `evaluate` of your own it is in the unit of what that returns, and
            must be given.
        target: what becomes as small as possible: "latency", the time of one sample, or "size",
            the bytes of the file.
        minutes: of the search. The dense model and int8 everywhere are measured in any case.
        threads: of the engine.
        isa: kernels of the engine; None takes LUTRA_ISA or the best that runs here.
        finetune_minutes: of fine-tuning behind the search; 0 leaves it out.
        trials: the most recipes that one call tries beside the dense model and int8; None tries
            as many as fit into the minutes.
        seed: of everything random.

    Raises:
        LutraError: a value is out of range.

    Examples:
        >>> from lutra.train import Budget
        >>> Budget(max_drop=0.5, minutes=15).target
        'latency'
    """

    max_drop: float | None = None
    target: Target = "latency"
    minutes: float = 10.0
    threads: int = 1
    isa: str | None = None
    finetune_minutes: float = 0.0
    trials: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target not in get_args(Target):
            known = list(get_args(Target))
            raise LutraError(
                f"Budget: target={self.target!r} is unknown; "
                f"{did_you_mean(str(self.target), known)}choose one of {known}"
            )
        self._number("max_drop", 0.0, math.inf, "points that may be lost, 0 or more", True)
        self._number("minutes", 0.0, _MOST_MINUTES, "a time, 0 or more")
        self._number("finetune_minutes", 0.0, _MOST_MINUTES, "a time, 0 or more")
        if type(self.threads) is not int or not 1 <= self.threads <= MAX_THREADS:
            raise LutraError(
                f"Budget: threads={self.threads!r} is not an integer in 1..{MAX_THREADS}"
            )
        for name, least in (("trials", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name == "trials":
                continue
            if type(value) is not int or value < least:
                raise LutraError(f"Budget: {name}={value!r} is not an integer of {least} or more")
        choose_isa(self.isa)  # which says what is wrong with it

    def _number(self, name: str, least: float, most: float, what: str, none: bool = False) -> None:
        value = getattr(self, name)
        if value is None and none:
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least <= value < most:
            raise LutraError(f"Budget: {name}={value!r} is no number of {what}")

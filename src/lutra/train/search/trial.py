"""A recipe that was measured as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lutra.errors import LutraError
from lutra.train.search.budget import Target

#: What the first two trials are called.
DENSE = "dense"
INT8_EVERYWHERE = "int8 everywhere"
#: What the labels of rough trials end with.
ROUGH = ", rough"


@dataclass(frozen=True)
class Trial:
    """One recipe and what came of it.

    Attributes:
        label: why it was tried, in a few words.
        choice: the key of what each layer became, by its path.
        quality: of the file in the engine, on the samples that judge.
        drop: how much worse that is than the dense model.
        loss: squared error of the outputs relative to their variance.
        ms: milliseconds of one sample: those of the dense file times the median ratio of the times
            of both, which were measured in turns.
        ratio: that ratio.
        bytes: of the file.
        errors: of each layer in its place, as the report of the conversion has them.
        layer_ms: milliseconds of the steps of each layer in its network, where it has its own.
        seconds: that the trial took.
        finetuned: whether the model was fine-tuned.
        rough: whether a part of the calibration samples made it, as where all of them take long.
        failed: why there are no numbers; empty where there are.
    """

    label: str
    choice: Mapping[str, str]
    quality: float = 0.0
    drop: float = 0.0
    loss: float = 0.0
    ms: float = 0.0
    ratio: float = 0.0
    bytes: int = 0
    errors: Mapping[str, float] = field(default_factory=dict)
    layer_ms: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    finetuned: bool = False
    rough: bool = False
    failed: str = ""

    def cost(self, target: Target) -> float:
        """What should be small: milliseconds or bytes."""
        return self.ms if target == "latency" else float(self.bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entry: Any) -> Trial:
        """The inverse of `to_dict`.

        Raises:
            LutraError: it is no trial.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(entry, Mapping) or set(entry) != names:
            raise LutraError(
                "optimize: the storage holds something that is no trial of this version of lutra; "
                "give another file"
            )
        return cls(**entry)


def good(trials: Iterable[Trial]) -> list[Trial]:
    """The trials that have numbers."""
    return [trial for trial in trials if not trial.failed]


def front(trials: Iterable[Trial], target: Target) -> list[Trial]:
    """The trials that no other is both cheaper and better than, the cheapest first."""
    found: list[Trial] = []
    for trial in sorted(good(trials), key=lambda t: (t.cost(target), t.drop, t.loss)):
        if not found or trial.drop < found[-1].drop:
            found.append(trial)
    return found


def best(trials: Iterable[Trial], target: Target, max_drop: float) -> Trial | None:
    """The cheapest trial within the budget; None where there is none."""
    within = [trial for trial in good(trials) if trial.drop <= max_drop + 1e-9]
    return min(within, key=lambda t: (t.cost(target), t.drop, t.loss), default=None)

"""How much work goes into a trial, so that a search fits into its minutes on any model.

One conversion to int8 with few samples is timed before anything else. What more samples take
follows from it, and decides how many calibrate the recipes that may be chosen, and how many the
trials.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Effort:
    """What a conversion may look at.

    Attributes:
        samples: that calibrate.
        rows: of a layer that grids and codebooks are learned from.
    """

    samples: int
    rows: int


#: From the least on; the last one has all samples that a search calibrates with.
EFFORTS: Final = (
    Effort(12, 128),
    Effort(32, 256),
    Effort(64, 512),
    Effort(256, 1024),
    Effort(1024, 4096),
)
#: The share of the minutes that int8 everywhere may take, which is converted as the choice is.
_FINE: Final = 0.12
#: So many conversions of trials must fit into the minutes.
_TRIALS: Final = 60
#: What more samples do not make longer, as a share of the conversion that was timed.
_FIXED: Final = 0.7


@dataclass(frozen=True)
class Efforts:
    """What was decided.

    Attributes:
        fine: of int8 everywhere, and of recipes that may be chosen.
        coarse: of trials; where it is less than `fine` they are called rough.
    """

    fine: Effort
    coarse: Effort

    @property
    def rough(self) -> bool:
        """Whether trials are rough."""
        return self.coarse != self.fine

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Any) -> Efforts:
        """The inverse of `to_dict`."""
        return cls(Effort(**entry["fine"]), Effort(**entry["coarse"]))


def whole() -> Efforts:
    """All samples for everything."""
    return Efforts(EFFORTS[-1], EFFORTS[-1])


def plan(timed: float, samples: int, seconds: float) -> Efforts:
    """What fits into a time.

    Args:
        timed: seconds of a conversion to int8 everywhere with the least effort.
        samples: that there are to calibrate.
        seconds: of the whole search.
    """
    least = min(EFFORTS[0].samples, samples)

    def takes(effort: Effort) -> float:
        times = min(effort.samples, samples) / least
        return timed * (_FIXED + (1.0 - _FIXED) * times)

    def largest(limit: float) -> Effort:
        fits = [effort for effort in EFFORTS if takes(effort) <= limit]
        return fits[-1] if fits else EFFORTS[0]

    fine = largest(_FINE * seconds)
    coarse = min(fine, largest(seconds / _TRIALS), key=lambda effort: effort.samples)
    if min(coarse.samples, samples) == min(fine.samples, samples):
        coarse = fine  # the same samples
    return Efforts(fine, coarse)

"""What flows into a function: the range and density of captured inputs."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from lutra.errors import InputError
from lutra.functions.scalar import Doubles

_BINS: Final = 2048
_REACH: Final = 12.0  # sinh(12) = 81,377; what lies beyond counts at the ends


class Histogram:
    """Counts of values in bins that are narrow around zero and wide far from it.

    The edges are sinh of evenly spaced numbers: 0.012 apart near zero, 1.2 % of x far from it, to
    81,377. Infinite values and NaN are not counted.

    Attributes:
        counts: float64 (2048,).
        low: The smallest value seen; +inf if there was none.
        high: The largest; -inf if there was none.
    """

    edges: Final = np.sinh(np.linspace(-_REACH, _REACH, _BINS + 1))

    def __init__(self) -> None:
        self.counts: Doubles = np.zeros(_BINS)
        self.low, self.high = np.inf, -np.inf

    @classmethod
    def of(cls, values: Any) -> Histogram:
        """The histogram of these values."""
        histogram = cls()
        histogram.add(values)
        return histogram

    def add(self, values: Any) -> None:
        """Counts values of any shape."""
        x = np.asarray(values, np.float64).reshape(-1)
        x = x[np.isfinite(x)]
        if not len(x):
            return
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        bins = ((np.arcsinh(x) + _REACH) * (_BINS / (2 * _REACH))).astype(np.int64)
        self.counts += np.bincount(bins.clip(0, _BINS - 1), minlength=_BINS)

    @property
    def empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.counts.any()

    def density(self, x: Doubles) -> Doubles:
        """Estimated density at x, smoothed over a few bins; its integral is 1.

        Raises:
            InputError: Nothing was counted.
        """
        if self.empty:
            raise InputError("functions: the histogram is empty; give it finite inputs")
        kernel = np.hanning(11)[1:-1]
        smooth = np.convolve(self.counts, kernel / kernel.sum(), mode="same")
        heights = smooth / np.diff(self.edges) / smooth.sum()
        centres = np.arcsinh(x)
        middles = np.linspace(-_REACH, _REACH, _BINS, endpoint=False) + _REACH / _BINS
        result: Doubles = np.interp(centres, middles, heights)
        return result

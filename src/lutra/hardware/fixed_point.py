"""The way from a sum to the next layer's integer in fixed point, where that gives the same integer.

In the engine a sum ``n`` of output ``m`` becomes, in float32::

    q(n) = clamp(round_half_even(clamp(float32(n) * scale[m] + bias[m]) / act_scale) + act_zero)

In a circuit it becomes ``clamp((n * mul[m] + add[m]) >> shift, low, high)``. Both only rise with
``n`` (or only fall), so they are equal for every sum if they change at the same sums. ``q`` has at
most 127 changes; each gives a lower and an upper bound of ``add`` for a given ``mul``, so that
``fixed_point`` finds constants that are right for every sum, or finds out that there are none. Half
steps that ``round_half_even`` sends to both sides are the case that has none; then the sums are the
output.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np

from lutra.hardware.design import HardwareError
from lutra.hardware.words import pack
from lutra.node import Array
from lutra.reference.pq import quantise

__all__ = ["Constants", "EpilogueDesign", "Steps", "epilogue_words", "fixed_point"]

_NUDGES: Final = 64  # multipliers that are tried on either side of the exact one


@dataclass(frozen=True)
class Steps:
    """What happens to sums in float32.

    Attributes:
        scale: float32 (M,)
        bias: float32 (M,)
        low: Lower end of a clamp between them and the grid: 0 for ReLU; -infinity without one.
        high: Its upper end.
        act_scale: Step of the next layer's grid.
        act_zero: Its zero point.
        act_bits: Its bits.
    """

    scale: Array
    bias: Array
    act_scale: float
    act_zero: int
    act_bits: int
    low: float = -np.inf
    high: float = np.inf

    def of(self, sums: Array) -> Array:
        """The integers of sums (..., M), as the reference computes them."""
        y = sums.astype(np.float32) * self.scale + self.bias
        y = np.clip(y, np.float32(self.low), np.float32(self.high))
        return quantise(y, self.act_scale, self.act_zero, self.act_bits).astype(np.int64)


@dataclass(frozen=True)
class Constants:
    """Fixed point that gives the same integers.

    Attributes:
        mul: int64 (M,)
        add: int64 (M,)
        shift: Bits behind the point.
        low: Least integer.
        high: Largest integer.
    """

    mul: Array
    add: Array
    shift: int
    low: int
    high: int

    def of(self, sums: Array) -> Array:
        """The integers of sums (..., M)."""
        found: Array = np.clip((sums * self.mul + self.add) >> self.shift, self.low, self.high)
        return found


@dataclass(frozen=True)
class EpilogueDesign:
    """What an epilogue is built for.

    Attributes:
        tile: Outputs of a word of sums.
        sum_bits: Bits of a sum.
        act_bits: Bits of what comes out.
        mul_bits: Bits of a multiplier.
        shift: Bits behind the point.
    """

    tile: int = 16
    sum_bits: int = 24
    act_bits: int = 7
    mul_bits: int = 20
    shift: int = 20

    @property
    def add_bits(self) -> int:
        """Bits of what is added, which are those of a product and one more."""
        return self.sum_bits + self.mul_bits + 1

    def to_json(self) -> str:
        """The parameters as JSON, in a fixed order."""
        return json.dumps(asdict(self), sort_keys=True)


def fixed_point(steps: Steps, limit: int, shift: int = 20) -> Constants | None:
    """Finds constants that give the same integer for every sum.

    Args:
        steps: What happens to a sum.
        limit: No sum is larger, or smaller than ``-limit``.
        shift: Bits behind the point.

    Returns:
        The constants, or None where an output has none.
    """
    outputs = len(steps.scale)
    ends = np.stack([np.full(outputs, -limit), np.full(outputs, limit)])
    first, last = steps.of(ends)
    low, high = int(min(first.min(), last.min())), int(max(first.max(), last.max()))
    # Falling outputs become rising ones of the sum's negative.
    falls = last < first
    sign = np.where(falls, -1, 1)
    least, most = np.where(falls, last, first), np.where(falls, first, last)
    thresholds = _thresholds(steps, limit, sign, low, high)
    mul, add = np.zeros(outputs, np.int64), np.zeros(outputs, np.int64)
    slope = np.abs(steps.scale.astype(np.float64)) / steps.act_scale * 2.0**shift
    for m in range(outputs):
        ends_of = (low, int(least[m]), int(most[m]), high)
        found = _line(thresholds[:, m], ends_of, limit, slope[m], shift)
        if found is None:
            return None
        mul[m], add[m] = found[0] * sign[m], found[1]
    return Constants(mul, add, shift, low, high)


def _thresholds(steps: Steps, limit: int, sign: Array, low: int, high: int) -> Array:
    """The least sum (times its sign) whose integer is at least ``low + 1 + i``: (high - low, M);
    ``limit + 1`` where there is none."""
    wanted = np.arange(low + 1, high + 1)[:, None]
    below = np.full((len(wanted), len(sign)), -limit - 1)
    reached = np.full_like(below, limit + 1)
    while (reached - below > 1).any():  # bisection: an integer rises with the sum
        middle = (below + reached) // 2
        enough = steps.of(middle * sign) >= wanted
        stop = reached - below <= 1
        reached = np.where(enough & ~stop, middle, reached)
        below = np.where(enough | stop, below, middle)
    return reached


def _line(
    thresholds: Array, ends: tuple[int, int, int, int], limit: int, slope: float, shift: int
) -> tuple[int, int] | None:
    """A multiplier and an addend for one rising output; its least and largest integers stand
    between those of all outputs."""
    low, least, most, high = ends
    levels = np.arange(least + 1, most + 1)
    at = thresholds[levels - low - 1].astype(np.int64)
    goals = levels.astype(np.int64) << shift
    middle = round(slope)
    for distance in range(_NUDGES + 1):
        for mul in sorted({max(0, middle - distance), middle + distance}):
            enough = [goals - mul * at]  # add >= these
            less = [goals - mul * (at - 1)]  # add < these
            if least > low:  # the clamp does not hold this output at its least integer
                enough.append(np.array([(least << shift) + mul * limit]))
            if most < high:
                less.append(np.array([(most + 1 << shift) - mul * limit]))
            floor = max((int(e.max()) for e in enough if e.size), default=None)
            ceiling = min((int(e.min()) for e in less if e.size), default=None)
            if floor is None:
                floor = ceiling - 1 if ceiling is not None else low << shift
            if ceiling is None or floor < ceiling:
                return mul, floor
    return None


def epilogue_words(
    sums: Array, constants: Constants, design: EpilogueDesign, rows: int
) -> tuple[dict[str, list[int]], list[int]]:
    """The words of constants for each tile of a pass, and the integers that must come out.

    Args:
        sums: int64 (R, M) of one pass.
        constants: From ``fixed_point``.
        design: What the epilogue is built for.
        rows: R.

    Raises:
        HardwareError: If a constant does not fit the design.
    """
    outputs = sums.shape[1]
    tiles = -(-outputs // design.tile)
    width = tiles * design.tile
    mul, add = np.zeros(width, np.int64), np.zeros(width, np.int64)
    mul[:outputs], add[:outputs] = constants.mul, constants.add
    for name, values, bits in (("mul", mul, design.mul_bits), ("add", add, design.add_bits)):
        if int(np.abs(values).max()) >= 2 ** (bits - 1):
            raise HardwareError(f"{name} does not fit {bits} bits; use a smaller shift")
    words = []
    for t in range(tiles):
        part = slice(t * design.tile, (t + 1) * design.tile)
        word, place = pack(mul[part], design.mul_bits), design.tile * design.mul_bits
        word |= pack(add[part], design.add_bits) << place
        place += design.tile * design.add_bits
        word |= constants.low << place | constants.high << place + design.act_bits
        words.append(word | rows << place + 2 * design.act_bits)
    padded = np.zeros((rows, width), np.int64)
    padded[:, :outputs] = sums
    found = np.clip((padded * mul + add) >> constants.shift, constants.low, constants.high)
    tiled = [a.reshape(rows, tiles, design.tile).transpose(1, 0, 2) for a in (padded, found)]
    given, out = (a.reshape(-1, design.tile) for a in tiled)
    return {
        "constants": words, "x": [pack(row, design.sum_bits) for row in given]
    }, [pack(row, design.act_bits) for row in out]  # fmt: skip

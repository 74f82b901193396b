"""Piecewise-linear tables of a function, and NN-LUT's network that is one (arXiv 2112.02191)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lutra.errors import InputError
from lutra.functions.scalar import Doubles, Scalar
from lutra.ops.limits import FUNCTION_ENTRIES
from lutra.reference.functions import pieces

Floats: TypeAlias = NDArray[np.float32]


def check_entries(entries: object) -> int:
    """The number of entries of a table.

    Raises:
        InputError: It is not 8, 16 or 32.
    """
    if type(entries) is not int or entries not in FUNCTION_ENTRIES:
        raise InputError(
            f"functions: a table of {entries!r} entries; choose one of {list(FUNCTION_ENTRIES)}"
        )
    return entries


@dataclass(frozen=True, eq=False)
class Errors:
    """How far a table is from its function, in float64.

    Attributes:
        largest: The largest absolute error.
        at: The x of it.
        mean: The mean absolute error.
        points: How many x were looked at.
    """

    largest: float
    at: float
    mean: float
    points: int


@dataclass(frozen=True, eq=False)
class Piecewise:
    """A function as E straight lines: y = slope[i] * x + intercept[i].

    i is the number of breakpoints <= x. Where the slope is 0 the result is the intercept, also for
    an infinite x. The product is not rounded before the sum (a fused multiply-add), which is what
    the kernels do.

    Attributes:
        breakpoint: float32 (E - 1,), strictly ascending.
        slope: float32 (E,).
        intercept: float32 (E,).
        name: Of the function.

    Raises:
        InputError: Shapes that do not fit, a number of entries other than 8, 16 or 32, values that
            are not finite, or breakpoints that do not ascend.
    """

    breakpoint: Floats
    slope: Floats
    intercept: Floats
    name: str = "function"

    def __post_init__(self) -> None:
        for role in ("breakpoint", "slope", "intercept"):
            array = np.ascontiguousarray(getattr(self, role), np.float32)
            if array.ndim != 1 or not np.isfinite(array).all():
                raise InputError(
                    f"functions: the {role} of {self.name} has shape {array.shape}; give one axis "
                    "of finite numbers"
                )
            array = array.copy()
            array.setflags(write=False)
            object.__setattr__(self, role, array)
        entries = check_entries(len(self.slope))
        if len(self.intercept) != entries or len(self.breakpoint) != entries - 1:
            raise InputError(
                f"functions: {self.name} has {entries} slopes, {len(self.intercept)} intercepts "
                f"and {len(self.breakpoint)} breakpoints; give E, E and E - 1"
            )
        if (np.diff(self.breakpoint) <= 0).any():
            raise InputError(
                f"functions: the breakpoints of {self.name} do not ascend: {self.breakpoint}"
            )

    @property
    def entries(self) -> int:
        """E."""
        return len(self.slope)

    @property
    def tensors(self) -> dict[str, Floats]:
        """The three arrays by role, as a graph's ``piecewise`` node has them."""
        return {
            "breakpoint": self.breakpoint,
            "slope": self.slope,
            "intercept": self.intercept,
        }

    def index(self, x: Any) -> NDArray[np.intp]:
        """The entry of each x: the number of breakpoints <= x; 0 for NaN."""
        x = np.asarray(x, np.float32)
        entry: NDArray[np.intp] = np.searchsorted(self.breakpoint, x, side="right")
        return np.where(np.isnan(x), 0, entry)

    def __call__(self, x: Any) -> Floats:
        """The table's values, float32, of anything array-like."""
        x = np.asarray(x, np.float32)
        result: Floats = pieces(self.index(x), x, self.slope, self.intercept)
        return result

    def derivative(self, x: Any) -> Floats:
        """The slope of each x's entry."""
        result: Floats = self.slope[self.index(x)]
        return result

    def errors(self, fn: Scalar, x: Any) -> Errors:
        """Compares with the function at x, float32 values; see also `probes`."""
        x = np.asarray(x, np.float32).reshape(-1)
        error = np.abs(self(x).astype(np.float64) - fn(x))
        at = int(error.argmax())
        return Errors(float(error[at]), float(x[at]), float(error.mean()), len(x))

    def probes(self) -> Floats:
        """x values that find the largest error over all floats.

        2^17 evenly around the breakpoints, floats of every exponent, the breakpoints and
        their neighbours.
        """
        low, high = float(self.breakpoint[0]), float(self.breakpoint[-1])
        margin = 0.25 * (high - low) + 1.0
        inner = np.linspace(low - margin, high + margin, 1 << 17).astype(np.float32)
        bits = (np.arange(0, 255, dtype=np.uint32)[:, None] << 23) | np.linspace(
            0, (1 << 23) - 1, 64
        ).astype(np.uint32)
        powers = bits.reshape(-1).view(np.float32)
        edges = self.breakpoint
        beside = (np.nextafter(edges, np.float32(side)) for side in (-np.inf, np.inf))
        return np.concatenate([inner, powers, -powers, edges, *beside])


def from_relu_net(m: Any, n: Any, b: Any, *, name: str = "relu_net") -> Piecewise:
    """The table that computes what a network of one hidden layer computes.

    The network is NN(x) = sum over j of m[j] * relu(n[j] * x + b[j]), NN-LUT's. Between the points
    -b[j] / n[j] it is a line, so H neurons make at most H + 1 entries: the same function, but for
    the rounding of the entries to float32.

    Args:
        m: Weights of the second layer (H,).
        n: Weights of the first layer (H,); a neuron with n[j] = 0 is a constant.
        b: Biases of the first layer (H,).
        name: Of the table.

    Returns:
        A table of the smallest allowed number of entries; the last line is repeated to fill it.

    Raises:
        InputError: Arrays of other shapes, or neurons for more than 32 entries.
    """
    m, n, b = (np.asarray(array, np.float64).reshape(-1) for array in (m, n, b))
    if not len(m) == len(n) == len(b):
        raise InputError(
            f"functions: a network of {len(m)} m, {len(n)} n and {len(b)} b; give one of each for "
            "every neuron"
        )
    constant = float((m * np.maximum(b, 0.0))[n == 0].sum())
    m, n, b = m[n != 0], n[n != 0], b[n != 0]
    # + 0.0 makes -0.0 the same number.
    exact = -b / n + 0.0
    kinks = exact.astype(np.float32)
    edges = np.unique(kinks)
    if len(edges) + 1 > FUNCTION_ENTRIES[-1]:
        raise InputError(
            f"functions: a network of {len(edges)} different breakpoints makes {len(edges) + 1} "
            f"entries; a table has at most {FUNCTION_ENTRIES[-1]}"
        )
    # Right of how many edges each segment lies; a neuron is on there where n > 0.
    segment = np.arange(len(edges) + 1)[:, None]
    passed = np.searchsorted(edges, kinks)[None, :] < segment
    active = np.where(n > 0, passed, ~passed)
    slope = (active * (m * n)).sum(1)
    intercept = (active * (m * b)).sum(1) + constant
    return padded(edges, slope, intercept, name)


def padded(
    edges: Any, slope: Any, intercept: Any, name: str, entries: int | None = None
) -> Piecewise:
    """A table of lines, the last repeated until the number of entries is an allowed one."""
    edges = np.asarray(edges, np.float32)
    slope, intercept = np.asarray(slope, np.float32), np.asarray(intercept, np.float32)
    count = next(e for e in FUNCTION_ENTRIES if e >= len(slope)) if entries is None else entries
    more = []
    edge = edges[-1] if len(edges) else np.float32(0)
    for _ in range(count - len(slope)):
        edge = np.nextafter(edge, np.float32(np.inf))
        more.append(edge)
    return Piecewise(
        np.concatenate([edges, np.asarray(more, np.float32)]),
        np.concatenate([slope, np.repeat(slope[-1:], len(more))]),
        np.concatenate([intercept, np.repeat(intercept[-1:], len(more))]),
        name,
    )


def to_relu_net(table: Piecewise) -> tuple[Doubles, Doubles, Doubles]:
    """The network m, n, b that computes what a continuous table computes; see `from_relu_net`.

    One neuron for each breakpoint, where the slope changes, and up to two more: such a network has
    no linear term, so the outer slopes need a neuron each, and a constant one of its own.

    Raises:
        InputError: The table jumps at a breakpoint by more than 1e-5 of its size there; a network
            cannot.
    """
    edge = table.breakpoint.astype(np.float64)
    slope, intercept = table.slope.astype(np.float64), table.intercept.astype(np.float64)
    left = slope[:-1] * edge + intercept[:-1]
    right = slope[1:] * edge + intercept[1:]
    jump = np.abs(left - right)
    bound = 1e-5 * np.maximum(1.0, np.abs(slope[1:] * edge) + np.abs(intercept[1:]))
    if (jump > bound).any():
        at = int(np.argmax(jump - bound))
        raise InputError(
            f"functions: {table.name} jumps by {jump[at]:.3g} at its breakpoint {edge[at]:.6g}, "
            "and a network cannot; fit with continuous=True"
        )
    kinks = np.diff(slope)
    # At the first breakpoint a neuron for each side: slope[1] to the right, slope[0] to the left.
    m = np.concatenate([[-slope[0], slope[1]], kinks[1:], [right[0]]])
    n = np.concatenate([[-1.0, 1.0], np.ones(len(kinks) - 1), [0.0]])
    b = np.concatenate([[edge[0], -edge[0]], -edge[1:], [1.0]])
    used = m != 0.0
    return m[used], n[used], b[used]

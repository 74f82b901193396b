"""NN-LUT's way to a table: train a network of one hidden layer, then read it off.

Source: NN-LUT, arXiv 2112.02191 (DAC 2022): inputs uniform in the range of the function, L1 loss,
Adam. `lutra.functions.fit` finds better tables in less time; this is here to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lutra.errors import InputError
from lutra.functions import Histogram, Piecewise, Scalar, from_relu_net, scalar
from lutra.functions.piecewise import check_entries, padded
from lutra.functions.scalar import Doubles

#: The ranges that NN-LUT trains on (its Table 1), and those of functions that it does not have.
RANGES = {
    "gelu": (-5.0, 5.0),
    "gelu_tanh": (-5.0, 5.0),
    "silu": (-8.0, 8.0),
    "sigmoid": (-8.0, 8.0),
    "tanh": (-4.0, 4.0),
    "erf": (-3.0, 3.0),
    "exp": (-256.0, 0.0),
    "reciprocal": (1.0, 1024.0),
    "rsqrt": (0.1, 1024.0),
    "sqrt": (0.0, 1024.0),
}
_SAMPLES = 100_000
_BATCH = 1024


def fit_relu_net(
    fn: str | Callable[[Doubles], Any] | Scalar,
    low: float | None = None,
    high: float | None = None,
    entries: int = 16,
    *,
    histogram: Histogram | None = None,
    asymptotes: bool = True,
    steps: int = 3000,
    rate: float = 1e-2,
    seed: int = 0,
) -> Piecewise:
    """Trains NN(x) = sum of m * relu(n * x + b) on a function and converts it into a table.

    Args:
        fn: As for `lutra.functions.fit`.
        low: Start of the range. None: the smallest input of the histogram, NN-LUT's, or where the
            function leaves its asymptote.
        high: End of the range, the same way.
        entries: 8, 16 or 32.
        histogram: Inputs that were seen; samples are drawn from it and not uniformly (NN-LUT's
            calibration).
        asymptotes: Whether the two outer entries are the lines that the function tends to, or its
            values at the ends where it tends to none; entries - 3 neurons are trained then. False
            is the network of the paper, entries - 1 neurons, whose outer lines go on for ever.
        steps: Of Adam.
        rate: Learning rate; it falls to 0 along a cosine.
        seed: Of initial weights and samples.

    Returns:
        The table.

    Raises:
        InputError: As from `lutra.functions.fit`.
    """
    function = scalar(fn)
    check_entries(entries)
    if histogram is not None and not histogram.empty:
        low = histogram.low if low is None else low
        high = histogram.high if high is None else high
    ends = RANGES.get(function.name, function.reach)
    low, high = ends[0] if low is None else low, ends[1] if high is None else high
    low, high = max(low, function.domain[0]), min(high, function.domain[1])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(
            f"functions: {function.name} needs a range to train on, and {low}..{high} is none; "
            "give low and high"
        )
    rng = np.random.default_rng(seed)
    x = _samples(low, high, histogram, rng)
    f = function(x)
    if not np.isfinite(f).all():
        raise InputError(
            f"functions: {function.name} is not finite in {low:.6g}..{high:.6g}; give low and high"
        )
    neurons = entries - 3 if asymptotes else entries - 1
    m, n, b = _train(x, f, low, high, neurons, steps, rate, rng)
    table = from_relu_net(m, n, b, name=function.name)
    return _with_ends(table, function, low, high, entries) if asymptotes else table


def _samples(
    low: float, high: float, histogram: Histogram | None, rng: np.random.Generator
) -> Doubles:
    if histogram is None or histogram.empty:
        return rng.uniform(low, high, _SAMPLES)
    counts = histogram.counts / histogram.counts.sum()
    bins = rng.choice(len(counts), _SAMPLES, p=counts)
    inside = rng.uniform(histogram.edges[bins], histogram.edges[bins + 1])
    result: Doubles = inside.clip(low, high)
    return result


def _train(
    x: Doubles,
    f: Doubles,
    low: float,
    high: float,
    neurons: int,
    steps: int,
    rate: float,
    rng: np.random.Generator,
) -> tuple[Doubles, Doubles, Doubles]:
    """Weights of the network. It sees the range as -1..1, and the values in units of their size."""
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    unit = max(float(np.abs(f).max()), 1e-30)
    inputs = torch.from_numpy((x - middle) / half).float()
    wanted = torch.from_numpy(f / unit).float()
    # Breakpoints spread over the range, directions at random.
    direction = rng.choice([-1.0, 1.0], neurons)
    n = torch.tensor(direction * rng.uniform(0.5, 1.5, neurons), dtype=torch.float32)
    edges = torch.from_numpy(np.linspace(-1, 1, neurons + 2)[1:-1]).float()
    b = (-n * edges).requires_grad_()
    with torch.no_grad():
        # The best second layer for these neurons. From random ones, as in the paper, a few
        # neurons of a small network die at once.
        hidden = torch.relu(inputs[:4096, None] * n + b).double()
        m = torch.linalg.lstsq(hidden, wanted[:4096, None].double()).solution[:, 0].float()
    weights = [m.requires_grad_(), n.requires_grad_(), b]
    adam = torch.optim.Adam(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        pick = torch.from_numpy(rng.integers(0, len(x), _BATCH))
        with torch.enable_grad():
            made = torch.relu(inputs[pick, None] * weights[1] + weights[2]) @ weights[0]
            loss = (made - wanted[pick]).abs().mean()
            adam.zero_grad()
            loss.backward()
        adam.step()
        schedule.step()
    m64, n64, b64 = (w.detach().double().numpy() for w in weights)
    return m64 * unit, n64 / half, b64 - n64 * middle / half


def _with_ends(table: Piecewise, fn: Scalar, low: float, high: float, entries: int) -> Piecewise:
    """The lines of a table between low and high, and the function's own beyond them."""
    ends = (fn.left, low), (fn.right, high)
    left, right = (
        (0.0, float(fn(np.float64(end)))) if line is None else line for line, end in ends
    )
    inside = (table.breakpoint > np.float32(low)) & (table.breakpoint < np.float32(high))
    # Lines that are repeated fill the table of the network up; they are not needed here.
    inside &= (np.diff(table.slope) != 0) | (np.diff(table.intercept) != 0)
    first = int(table.index(np.float32(low)))
    kept = [first, *(np.flatnonzero(inside) + 1).tolist()]
    return padded(
        [low, *table.breakpoint[inside], high],
        [left[0], *table.slope[kept], right[0]],
        [left[1], *table.intercept[kept], right[1]],
        table.name,
        entries,
    )

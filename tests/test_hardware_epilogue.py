"""Fixed point behind the sums gives the integers of float32, for every sum."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from lutra.hardware.fixed_point import EpilogueDesign, Steps, epilogue_words, fixed_point


def steps(seed: int, outputs: int = 40) -> Steps:
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.0005, 0.02, outputs).astype(np.float32)
    scale[::5] *= -1
    return Steps(
        scale, rng.normal(size=outputs).astype(np.float32),
        act_scale=float(np.float32(rng.uniform(0.02, 0.08))), act_zero=(0, 64, 5)[seed % 3],
        act_bits=(6, 7)[seed % 2], low=0.0 if seed % 3 != 1 else -np.inf,
        high=6.0 if seed == 5 else np.inf,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_every_sum(seed: int) -> None:
    limit = 16 * 128
    given = steps(seed)
    constants = fixed_point(given, limit)
    assert constants is not None
    every = np.arange(-limit, limit + 1)[:, None].repeat(40, axis=1)
    assert np.array_equal(constants.of(every), given.of(every))


def test_half_steps_on_both_sides_have_no_line() -> None:
    """With a slope of exactly one half, ties to even bend the line."""
    one = np.ones(1, np.float32)
    halves = Steps(one * np.float32(0.5), one * 0, 1.0, 0, 7)
    assert fixed_point(halves, 200) is None
    assert fixed_point(Steps(one, one * 0, 1.0, 0, 7), 200) is not None


def test_constant_outputs() -> None:
    one = np.ones(2, np.float32)
    given = Steps(one * np.float32(1e-9), one * np.float32([3.0, -1.0]), 0.5, 0, 7, low=0.0)
    constants = fixed_point(given, 1000)
    assert constants is not None
    every = np.arange(-1000, 1001)[:, None].repeat(2, axis=1)
    assert np.array_equal(constants.of(every), given.of(every))


def coin(seed: int) -> Iterator[bool]:
    numbers = random.Random(seed)
    while True:
        yield numbers.random() < 0.6


def test_circuit() -> None:
    pytest.importorskip("amaranth")
    from lutra.hardware.epilogue import Epilogue
    from lutra.hardware.simulate import always, simulate_streams

    given = steps(1, outputs=5)
    constants = fixed_point(given, 2000)
    assert constants is not None
    sums = np.random.default_rng(0).integers(-2000, 2001, (6, 5))
    sums[0], sums[1] = -2000, 2000
    design = EpilogueDesign(tile=2, sum_bits=13)
    words, expected = epilogue_words(sums, constants, design, rows=6)
    mask = 2**design.act_bits - 1
    assert [word & mask for word in expected[:6]] == given.of(sums)[:, 0].tolist()
    for pattern in (lambda name: always(), lambda name: coin(len(name))):
        run = simulate_streams(Epilogue(design), words, len(expected), pattern=pattern)
        assert run.sums == expected

"""Plans built by hand, for tests of the engine's steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from graphs import Array

from lutra import _engine, runnable_isas
from lutra.node import AttrValue

F = np.float32
ISAS = runnable_isas()
#: Batches and lengths.
SEQUENCES = [(1, 1), (1, 512), (2, 7), (5, 33), (3, 64)]
Steps = Callable[[_engine.Plan, list[int]], "int | Sequence[int]"]


def plan(isa: str, threads: int, dtypes: Sequence[str], steps: Steps) -> _engine.Plan:
    """A plan with an input of each dtype and the outputs that ``steps`` names."""
    made = _engine.Plan(isa, threads)
    outputs = steps(made, [made.input(dtype) for dtype in dtypes])
    made.finish([outputs] if isinstance(outputs, int) else list(outputs))
    return made


def run(steps: Steps, *inputs: Array, threads: Sequence[int] = (1, 3)) -> Array:
    """The first output, whose bits all instruction sets and numbers of threads must agree on."""
    dtypes = [str(x.dtype) for x in inputs]
    arrays = [np.ascontiguousarray(x) for x in inputs]
    results = [plan(isa, count, dtypes, steps).run(arrays) for isa in ISAS for count in threads]
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))
    return results[0][0]


def steps_of(made: _engine.Plan, arrays: list[Array]) -> list[str]:
    """What the steps are called."""
    return [label for label, _, _ in made.profile(arrays, 1)[0]]


def close(got: Array, want: Array) -> None:
    """Equal to float32 rounding of sums, relative to the largest value."""
    assert got.dtype == F
    assert got.shape == want.shape
    top = np.abs(want).max() if want.size else 0.0
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(float(top), 1e-3))


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


def add(
    p: _engine.Plan,
    op: str,
    *inputs: int,
    tensors: Mapping[str, Array] | None = None,
    shapes: Sequence[tuple[int, ...]] | None = None,
    output: tuple[int, ...] = (-1,),
    residual: int = -1,
    clamp: tuple[float, float] | None = None,
    planes: Sequence[int] = (),
    **attrs: AttrValue,
) -> int:
    """The step of an operator; shapes that its builder need not know are left out."""
    return p.add(
        op,
        inputs,
        attrs,
        tensors or {},
        input_shapes=shapes or [(-1,)] * len(inputs),
        output_shape=output,
        residual=residual,
        clamp=clamp,
        planes=planes,
    )


def function(p: _engine.Plan, x: int, name: str) -> int:
    """The step of a function by the engine's name for it."""
    if name in ("gelu", "gelu_tanh"):
        return add(p, "gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")
    return add(p, name, x)


def function_tables(**tables: tuple[Array, Array]) -> dict[str, Array]:
    """The tensors of tables of functions: slopes and intercepts by the function's name."""
    parts = ("slope", "intercept")
    return {
        f"{name}_{part}": array
        for name, table in tables.items()
        for part, array in zip(parts, table, strict=True)
    }


def piecewise(p: _engine.Plan, x: int, breakpoint: Array, slope: Array, intercept: Array) -> int:
    tensors = {"breakpoint": breakpoint, "slope": slope, "intercept": intercept}
    return add(p, "piecewise", x, tensors=tensors)


def int8(p: _engine.Plan, x: int, tensors: dict[str, Array], grid: float = 0.05) -> int:
    """A linear layer in int8."""
    return add(p, "int8_linear", x, tensors=tensors, act_scale=grid, act_zero=64, act_bits=7)

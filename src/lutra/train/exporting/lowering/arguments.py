"""What several lowerings need to read and check their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lutra.formatting import shape_text
from lutra.train.exporting.lowering.core import (
    Deferred,
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    is_dynamic,
)
from lutra.train.exporting.lowering.deferred import computed

Number = int | float


def pair(value: Any) -> tuple[int, int]:
    """Return the two numbers of a size that torch takes as one number, a list of one or of two."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    first, last = (values * 2)[:2]
    return int(first), int(last)


def need_rank(x: Ref, rank: int) -> None:
    if x.rank != rank:
        raise UnsupportedUse(f"its input has shape {text(x)}; give it {rank} axes, the batch first")


def single(value: Any) -> int:
    """Return the number of a size that torch takes as a number or as a list of one."""
    return int(value[0] if isinstance(value, Sequence) else value)


def need_activation(x: Any) -> None:
    if not isinstance(x, (Ref, View)):
        raise UnsupportedUse("its input is a constant and its weight an activation; swap them")


def activation(ctx: Lowering, x: Any) -> Ref | View:
    """Return an argument that is an activation, or becomes one by being computed from integers."""
    x = computed(ctx, x) if isinstance(x, Deferred) else x
    if not isinstance(x, (Ref, View)):
        raise UnsupportedUse("it works on what is the same for every input; make that a buffer")
    return x


def need_constant(tensor: Any, what: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise UnsupportedUse(f"{what} is computed from activations; it must be a constant")
    return tensor


def text(x: Ref) -> str:
    return shape_text([size if isinstance(size, int) else None for size in x.shape])


def same_sizes(a: Ref, b: Ref) -> bool:
    """Whether two activations have one shape; sizes known at run time only are checked then."""
    return a.rank == b.rank and all(
        x == y or (is_dynamic(x) and is_dynamic(y)) for x, y in zip(a.shape, b.shape, strict=True)
    )

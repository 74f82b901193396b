"""What several lowerings need to read and check their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lutra.train.lowering.core import Ref, UnsupportedUse

Number = int | float
PRODUCT = "a product of two activations has no lutra op; keep this part in torch"


def pair(value: Any) -> tuple[int, int]:
    """Return the two numbers of a size that torch takes as one number, a list of one or of two."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    first, last = (values * 2)[:2]
    return int(first), int(last)


def need_rank(x: Ref, rank: int) -> None:
    if x.rank != rank:
        raise UnsupportedUse(f"its input has shape {text(x)}; give it {rank} axes, the batch first")


def need_activation(x: Any) -> None:
    if not isinstance(x, Ref):
        raise UnsupportedUse("its input is a constant and its weight an activation; swap them")


def need_constant(tensor: Any, what: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise UnsupportedUse(f"{what} is computed from activations; it must be a constant")
    return tensor


def text(x: Ref) -> str:
    return "(" + ", ".join("N" if size is None else str(size) for size in x.shape) + ")"

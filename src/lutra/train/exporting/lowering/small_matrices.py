"""Inverses and determinants of small matrices, written in products and sums of their entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

_aten = torch.ops.aten
_LARGEST: Final = 4  # rows of a matrix whose cofactors are written out


def _entries(a: Tensor) -> list[list[Tensor]]:
    return [[a[..., i, j] for j in range(a.shape[-1])] for i in range(a.shape[-2])]


def _determinant(rows: list[list[Tensor]]) -> Tensor:
    """By cofactors of the first row."""
    if len(rows) == 1:
        return rows[0][0]
    total: Tensor | None = None
    for j, entry in enumerate(rows[0]):
        part = entry * _determinant(_without(rows, 0, j))
        part = -part if j % 2 else part
        total = part if total is None else total + part
    assert total is not None
    return total


def _without(rows: list[list[Tensor]], i: int, j: int) -> list[list[Tensor]]:
    return [row[:j] + row[j + 1 :] for k, row in enumerate(rows) if k != i]


def _is_small(a: Tensor) -> bool:
    return 0 < int(a.shape[-1]) <= _LARGEST


def _det(self: Tensor) -> Any:
    return _determinant(_entries(self)) if _is_small(self) else NotImplemented


def _logdet(self: Tensor) -> Any:
    return _det(self).log() if _is_small(self) else NotImplemented


def _slogdet(A: Tensor) -> Any:
    if not _is_small(A):
        return NotImplemented
    found = _det(A)
    return found.sign(), found.abs().log()


def _inverse(A: Tensor) -> Any:
    """Cofactors over the determinant."""
    if not _is_small(A):
        return NotImplemented
    rows, size = _entries(A), int(A.shape[-1])
    if size == 1:
        return A.reciprocal()
    cofactors = [
        [_determinant(_without(rows, i, j)) * (-1.0) ** (i + j) for i in range(size)]
        for j in range(size)
    ]
    determinant = sum((rows[0][j] * cofactors[j][0] for j in range(1, size)),
                      rows[0][0] * cofactors[0][0])  # fmt: skip
    adjugate = torch.stack([torch.stack(row, -1) for row in cofactors], -2)
    return adjugate / determinant[..., None, None]


def _inverse_of_self(self: Tensor) -> Any:
    return _inverse(self)


def _solve(A: Tensor, B: Tensor, left: bool = True) -> Any:
    if not _is_small(A):
        return NotImplemented
    inverse = _inverse(A)
    if not left:
        return B @ inverse
    return (inverse @ B[..., None])[..., 0] if B.dim() == A.dim() - 1 else inverse @ B


#: What is written for each operator; NotImplemented leaves it as it is.
WRITTEN: Final[dict[Any, Callable[..., Any]]] = {
    _aten.det.default: _det,
    _aten.linalg_det.default: _det,
    _aten.logdet.default: _logdet,
    _aten.linalg_slogdet.default: _slogdet,
    _aten.inverse.default: _inverse_of_self,
    _aten.linalg_inv.default: _inverse,
    _aten.linalg_solve.default: _solve,
}

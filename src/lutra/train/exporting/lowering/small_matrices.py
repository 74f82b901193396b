"""Inverses, determinants and factors of small matrices, written in products and sums.

Up to four rows by cofactors; above by elimination, a few operators for each row. The row with the
largest entry is eliminated next, so that no matrix is worse off than in any other library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

_aten = torch.ops.aten
_BY_COFACTORS: Final = 4  # rows of a matrix whose cofactors are written out
LARGEST: Final = 32  # rows of a matrix that are eliminated one by one


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


def _rows(a: Tensor) -> int | None:
    """The rows of a matrix; None where it is too large, or of a size known at run time only."""
    size = a.shape[-1]
    return size if isinstance(size, int) and 0 < size <= LARGEST else None


def _eliminated(a: Tensor, size: int, *, singular: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss and Jordan's elimination of the first columns of a (..., size, columns).

    Args:
        a: The matrix.
        size: Its rows.
        singular: Whether to go on behind a pivot of zero; else everything is infinite or NaN.

    Returns:
        What is left of a; which row stands for which column, (..., size, size) of 1 and 0; and the
        determinant of the first columns.
    """
    numbers = torch.arange(size, device=a.device)
    unused = torch.ones_like(a[..., 0])
    chosen: list[Tensor] = []
    determinant: Tensor | None = None
    for k in range(size):
        column = a[..., k]
        # rows that were chosen before are below every other
        best = ((column.abs() + 1.0) * unused).argmax(-1)
        one = (numbers == best.unsqueeze(-1)).to(a.dtype)
        pivot = (column * one).sum(-1, keepdim=True)
        # a row that moves in front of others turns the sign for each of them
        above = (unused * (numbers < best.unsqueeze(-1)).to(a.dtype)).sum(-1, keepdim=True)
        factor = pivot * (1.0 - 2.0 * above.remainder(2.0))
        determinant = factor if determinant is None else determinant * factor
        if singular:
            pivot = torch.where(pivot == 0.0, torch.ones_like(pivot), pivot)
        row = (a * one.unsqueeze(-1)).sum(-2, keepdim=True) / pivot.unsqueeze(-1)
        rest = a - column.unsqueeze(-1) * row
        a = torch.where(one.unsqueeze(-1) > 0.0, row, rest)
        unused = unused - one
        chosen.append(one)
    assert determinant is not None
    return a, torch.stack(chosen, -2), determinant.squeeze(-1)


def _det(self: Tensor) -> Any:
    size = _rows(self)
    if size is None:
        return NotImplemented
    if size <= _BY_COFACTORS:
        return _determinant(_entries(self))
    return _eliminated(self, size, singular=True)[2]


def _logdet(self: Tensor) -> Any:
    made = _det(self)
    return made if made is NotImplemented else made.log()


def _slogdet(A: Tensor) -> Any:
    made = _det(A)
    return made if made is NotImplemented else (made.sign(), made.abs().log())


def _inverse(A: Tensor) -> Any:
    """Cofactors over the determinant, or elimination."""
    size = _rows(A)
    if size is None:
        return NotImplemented
    if size > _BY_COFACTORS:
        unit = torch.eye(size, dtype=A.dtype, device=A.device).expand_as(A)
        left, order, _ = _eliminated(torch.cat([A, unit], -1), size, singular=False)
        return order @ left[..., size:]
    rows = _entries(A)
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
    inverse = _inverse(A)
    if inverse is NotImplemented:
        return NotImplemented
    if not left:
        return B @ inverse
    return (inverse @ B[..., None])[..., 0] if B.dim() == A.dim() - 1 else inverse @ B


def _cholesky(self: Tensor, upper: bool = False) -> Any:
    """A column after the other."""
    size = _rows(self)
    if size is None:
        return NotImplemented
    numbers = torch.arange(size, device=self.device)
    columns: list[Tensor] = []
    for k in range(size):
        column = self[..., k]
        for before in columns:
            column = column - before * before[..., k : k + 1]
        below = (numbers >= k).to(self.dtype)
        columns.append(column * below / column[..., k : k + 1].sqrt())
    made = torch.stack(columns, -1)
    return made.mT if upper else made


def _triangular(
    self: Tensor, B: Tensor, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    """A row of the result after the other."""
    size = _rows(self)
    if size is None:
        return NotImplemented
    if not left:
        made = _triangular(self.mT, B.mT, not upper, True, unitriangular)
        return made.mT
    done: dict[int, Tensor] = {}
    for k in range(size)[:: -1 if upper else 1]:
        row = B[..., k : k + 1, :]
        for j, other in done.items():
            row = row - self[..., k : k + 1, j : j + 1] * other
        done[k] = row if unitriangular else row / self[..., k : k + 1, k : k + 1]
    return torch.cat([done[k] for k in range(size)], -2)


def _cholesky_solve(self: Tensor, input2: Tensor, upper: bool = False) -> Any:
    """By the factor of a matrix, L with L L^T or U with U^T U."""
    factor = input2.mT if upper else input2
    made = _triangular(factor, self, False)
    return made if made is NotImplemented else _triangular(factor.mT, made, True)


#: What is written for each operator; NotImplemented leaves it as it is.
WRITTEN: Final[dict[Any, Callable[..., Any]]] = {
    _aten.det.default: _det,
    _aten.linalg_det.default: _det,
    _aten.logdet.default: _logdet,
    _aten.linalg_slogdet.default: _slogdet,
    _aten.inverse.default: _inverse_of_self,
    _aten.linalg_inv.default: _inverse,
    _aten.linalg_solve.default: _solve,
    _aten.cholesky.default: _cholesky,
    _aten.linalg_cholesky.default: _cholesky,
    _aten.linalg_solve_triangular.default: _triangular,
    _aten.cholesky_solve.default: _cholesky_solve,
}
